"""The quickstart's `report.html`: one file with all results, images included."""

from __future__ import annotations

import base64
from html import escape
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from qformer.evaluation.zero_shot import SIZE, UNSEEN
from qformer.figures import page as sheet
from qformer.figures.page import picture, table
from qformer.scenes.scenes import Scenes, draw

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from qformer.data.held_out import HeldOut
    from qformer.evaluation.retrieval import Scores
    from qformer.scenes.text import Scene
    from qformer.stages.quickstart.exam import ExamResults

QUERIES, BEST, SHOWN = 6, 5, 12
STYLE = """
.side { display: flex; flex-wrap: wrap; gap: 0 24px; } figure { margin: 8px 0; } figcaption { color: var(--soft); }
.wide img.curves { max-width: none; height: 260px; }
.query { border-top: 1px solid var(--line); padding: 12px 0; } .row { display: flex; gap: 8px; align-items: center; }
.row span { width: 84px; flex: none; color: var(--soft); font-size: 13px; }
.row img { width: 96px; min-width: 0; flex: 0 1 96px; }
img.found { outline: 3px solid var(--right); outline-offset: 1px; }
.row + .row { margin-top: 8px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)); gap: 16px; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: 12px; font-size: 14px; }
.card img { width: 100%; max-width: 200px; display: block; margin: 0 auto 8px; } .card p { margin: 4px 0; }
code { background: var(--raised); padding: 1px 4px; border-radius: 4px; }
pre code { display: block; padding: 10px; overflow-x: auto; }
"""


def write(
    folder: Path, results: dict[str, Any], held: HeldOut, scores: Scores, candidates: int, seen: ExamResults
) -> None:
    """Write `report.html` into `folder`.

    Args:
        results: the contents of `results.json`.
        held: the scenes for retrieval, one caption each.
        scores: the retrieval scores of these images and captions.
        candidates: the number of candidates that ITM re-ranked.
    """
    parts = [
        "<h1>BLIP-2, from an untrained bridge</h1>",
        f"<p class=soft>Both stages on drawn scenes in {results['seconds']:.0f} s and "
        f"{results['peak_memory_gb']:.1f} GB. No image below was used in training; those of new "
        "combinations show shapes in a color, or in an order, that no training image shows.</p>",
        _tables(results, len(held)),
        "<h2>Training</h2>",
        _curves(folder / "stage1" / "curves.png", "stage one"),
        "<div class=side>",
        *[_curves(folder / name / "curves.png", f"stage two, {name.upper()}") for name in seen.replies],
        "</div>",
        "<h2>Retrieval: captions to images</h2>",
        f"<p>The {BEST} best of {len(held)} images, by ITC, then with {candidates} candidates re-ranked by ITM. The "
        "right one is outlined.</p>",
        *[_query(number, held, scores) for number in _telling(scores)],
        "<h2>Captions of one object</h2>",
        f"<div class=cards>{''.join(_captioned(seen, number) for number in range(SHOWN // 2))}</div>",
        "<h2>Questions, which stage two never saw</h2>",
        f"<div class=cards>{''.join(_answered(seen, number) for number in range(SHOWN))}</div>",
        "<h2>Prompts</h2>",
        _prompts(seen),
    ]
    page = sheet.page("qformer quickstart", parts, STYLE)
    (folder / "report.html").write_text(page, encoding="utf-8")


def _tables(results: dict[str, Any], scenes: int) -> str:
    names = {"step0": "untrained", "itc": "ITC", "reranked": "re-ranked by ITM"}
    retrieval = [
        [names[name], *(_percent(values[f"{way}_r{n}"]) for way in ("i2t", "t2i") for n in (1, 5, 10))]
        for name, values in results["retrieval"].items()
    ]
    captions = results["captions"]
    answers = [
        [
            name.upper(),
            *(_percent(values[key]) for key in ("accuracy", "blind", "majority", "new_combinations")),
            *(_percent(captions[key][name]) for key in ("by_model", "new_combinations")),
        ]
        for name, values in results["vqa"].items()
    ]
    kinds = list(next(iter(results["vqa"].values()))["by_kind"])
    by_kind = [[n.upper(), *(_percent(v["by_kind"][k]) for k in kinds)] for n, v in results["vqa"].items()]
    return (
        "<h2>Results, in %</h2>"
        + table(
            [
                f"{scenes} scenes, new combinations",
                *(f"{way} R@{n}" for way in ("image to text", "text to image") for n in (1, 5, 10)),
            ],
            retrieval,
        )
        + table(
            [
                "zero-shot",
                *("right answers", "blind", "most common answer", "new combinations"),
                *("captions with color and shape", "new combinations"),
            ],
            answers,
        )
        + table(["by kind", *kinds], by_kind)
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _curves(path: Path, name: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    picture = f"<img class=curves alt='losses of {name}' src='data:image/png;base64,{data}'>"
    return f"<figure class=wide><figcaption>{name}</figcaption>{picture}</figure>"


def _telling(scores: Scores) -> list[int]:
    """Choose the queries to show: half where re-ranking changed the first place, half in order."""
    before, after = scores.itc.argmax(dim=0), scores.text_to_image.argmax(dim=0)
    changed = (before != after).nonzero().flatten().tolist()[: QUERIES // 2]
    others = [number for number in range(scores.itc.shape[1]) if number not in changed]
    return changed + others[: QUERIES - len(changed)]


def _query(number: int, held: HeldOut, scores: Scores) -> str:
    """Write one caption with its five best images before and after re-ranking."""
    text = held.captions[number][0]
    rows = []
    for label, column in (("ITC", scores.itc[:, number]), ("re-ranked", scores.text_to_image[:, number])):
        best = column.topk(BEST).indices.tolist()
        pictures = "".join(_picture(_held_pixels(held, image), "found" if image == number else "") for image in best)
        rows.append(f"<div class=row><span>{label}</span>{pictures}</div>")
    return f"<div class=query><p>{escape(text)}</p>{''.join(rows)}</div>"


def _held_pixels(held: HeldOut, image: int) -> Tensor:
    for group in held.groups:
        if image < len(group):
            return group[image : image + 1].pixels[0]
        image -= len(group)
    raise IndexError(image)


def _picture(pixels: Tensor, kind: str = "") -> str:
    """Encode uint8[3, h, w] as an HTML image."""
    return picture(Image.fromarray(pixels.permute(1, 2, 0).numpy()), kind, "scene", "PNG")


def _captioned(seen: ExamResults, number: int) -> str:
    by_model = {name: by_split[UNSEEN] for name, by_split in seen.captioned.items()}
    first = next(iter(by_model.values()))[number]
    pixels = _drawn(first.scene)
    captions = "".join(
        f"<p><b>{name.upper()}</b> <span class={'right' if captioned[number].named else 'wrong'}>"
        f"{escape(captioned[number].caption)}</span></p>"
        for name, captioned in by_model.items()
    )
    return f"<div class=card>{_picture(pixels)}{captions}</div>"


def _drawn(scene: Scene) -> Tensor:
    return torch.from_numpy(draw(scene, SIZE, SIZE)).permute(2, 0, 1)


def _answered(seen: ExamResults, number: int) -> str:
    replies_by = {name: replies[UNSEEN] for name, replies in seen.replies.items()}
    answered = next(iter(replies_by.values()))
    shown = answered[number]
    source = Scenes(UNSEEN, size=SIZE, count=len(answered), questions=True)
    lines = [f"<p>{escape(shown.question)}</p>"]
    for name, replies in replies_by.items():
        reply, blind = replies[number], seen.blind[name][number]
        lines.append(
            f"<p><b>{name.upper()}</b> <span class={'right' if reply.right else 'wrong'}>{escape(reply.text)}</span> "
            f"<span class=soft>blind: {escape(blind.text)}</span></p>"
        )
    lines.append(f"<p class=soft>right: {escape(shown.answer)}</p>")
    return f"<div class=card>{_picture(_drawn(source.scene(number)))}{''.join(lines)}</div>"


def _prompts(seen: ExamResults) -> str:
    lines = [
        f"{name.upper()}, caption: {caption or '(nothing)'}\n{name.upper()}, question: {question}"
        for name, (caption, question) in seen.prompts.items()
    ]
    return (
        "<p>The text after the image, which the model continues:</p>"
        f"<pre><code>{escape(chr(10).join(lines))}</code></pre>"
    )
