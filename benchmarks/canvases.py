"""A sheet of canvases, pairs and clips with their texts, to look at: `python benchmarks/canvases.py -o sheet.png`."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from qformer.canvases.canvas import Canvas
from qformer.canvases.clips import Clips, clip_description
from qformer.canvases.drawing import draw_canvas
from qformer.canvases.pairs import Twins
from qformer.canvases.source import Canvases

WIDTH, GAP, LINE, LETTER = 1240, 12, 15, 6.4  # pixels; the last is the mean width of a letter
COLOURS = 96  # of the file

Cell = tuple[list[Canvas], str]  # what stands side by side, and the text below it


def cells(count: int, seed: int) -> list[Cell]:
    """Choose `count` canvases, half as many pairs, and a quarter as many clips, each with its question."""
    source = Canvases("val", sides=(120, 260), seed=seed, questions=True)
    found: list[Cell] = []
    for index in range(count):
        sample = source[index]
        found.append(([source.canvas(index)], f"{sample.question} {sample.answers[0]}"))
    twins = Twins("val", sides=(120, 160), seed=seed)
    for number in range(count // 2):
        pair = twins.pair(number)
        answers = " / ".join(pair.options[right] for right in pair.right)
        found.append((list(pair.canvases), f"{pair.question} {answers}"))
    clips = Clips("val", sides=(120, 150), seed=seed)
    for index in range(count // 4):
        clip = clips.clip(index)
        found.append((list(clip.frames), clip_description(clip)))
    return found


def draw(found: list[Cell]) -> Image.Image:
    """Lay cells out in lines of `WIDTH` pixels."""
    sheet = Image.new("RGB", (WIDTH, 20_000), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    x, y, tallest = GAP, GAP, 0
    for shown, text in found:
        width = max(sum(canvas.width + 3 for canvas in shown), 150)
        lines = textwrap.wrap(text, int(width / LETTER))
        height = max(canvas.height for canvas in shown) + LINE * len(lines) + 4
        if x + width > WIDTH:
            x, y, tallest = GAP, y + tallest + GAP, 0
        place = x
        for canvas in shown:
            sheet.paste(Image.fromarray(draw_canvas(canvas)), (place, y))
            place += canvas.width + 3
        pen.text((x, y + height - LINE * len(lines)), "\n".join(lines), fill="black", font=font)
        x, tallest = x + width + GAP, max(tallest, height)
    return sheet.crop((0, 0, WIDTH, y + tallest + GAP))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--count", type=int, default=12, help="canvases; half as many pairs, a quarter as many clips")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sheet = draw(cells(options.count, options.seed))
    sheet.quantize(COLOURS, dither=Image.Dither.NONE).save(options.output, optimize=True)
    print(f"{options.output}: {sheet.width} x {sheet.height}, {options.output.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
