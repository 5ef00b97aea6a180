"""`qformer tiles`: how each resolution strategy cuts a picture, as a table, as JSON and as a drawing."""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from PIL import Image

from qformer import lookup, resolution
from qformer.data.arguments import pairs
from qformer.figures import tiles as drawing
from qformer.images import read_image
from qformer.resolution.measures import useful
from qformer.types import BadSample, Plan, UsageError

if TYPE_CHECKING:
    from pathlib import Path

HEAD = ("strategy", "grid", "tiles", "size of a tile", "tokens", "markers", "useful", "GFLOP")


def show(path: Path, strategy: str | None, words: list[str], output: Path | None, as_json: bool) -> None:
    """Print what a strategy makes of a picture, and draw it.

    Args:
        strategy: its name, or your own `module:Class`; None: all of the table.
        words: options of the strategy, `key=value`; of all strategies, for those that have them.
        output: file for the drawing, a PNG, with the strategies side by side.

    Raises:
        UsageError: no picture there, an unknown strategy or option, or a picture that every strategy asked for refuses.
    """
    try:
        pixels = read_image(path)
    except BadSample as bad:
        raise UsageError(f"'{path}' cannot be read as an image ({bad}); give a JPEG, PNG or WebP file") from bad
    if output is not None and output.suffix.lower() != ".png":
        raise UsageError(f"'{output}' does not end in .png; the drawing is a PNG")
    picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    given = pairs(words, "a strategy", "max_tiles=6")
    names = list(resolution.STRATEGIES) if strategy is None else [strategy]
    cards, records, refused = [], [], []
    for name, options in _options(names, given).items():
        try:
            plan = resolution.build(name, **options).plan(*picture.size)
            card = None if output is None else drawing.slices(picture, name, **options)[0]
        except BadSample as bad:  # this picture, not the options
            refused.append(UsageError(f"{name}: {bad}"))
            continue
        cards.append(card)
        records.append(record(name, plan))
    if not records:
        raise refused[0]
    for reason in refused:
        print(f"qformer: {reason}", file=sys.stderr)
    if output is not None:
        drawing.side_by_side([card for card in cards if card is not None]).save(output)
    print(json.dumps(records) if as_json else table(records))


def _options(names: list[str], given: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Options of each strategy: those given that it has.

    Raises:
        UsageError: one that none of them has.
    """
    if len(names) == 1:
        return {names[0]: given}
    known = {
        name: {field.name for field in fields(lookup.find(resolution.STRATEGIES, name)) if field.init} for name in names
    }
    every = set().union(*known.values())
    for key in given:
        if key not in every:
            raise UsageError(f"resolution.{key} is not an option of any strategy: {lookup.nearest(key, every)}")
    return {name: {key: value for key, value in given.items() if key in known[name]} for name in names}


def record(name: str, plan: Plan) -> dict[str, Any]:
    """Numbers of a plan, as `--json` prints them.

    `sizes` are (width, height) of each tile in reading order, and `useful` is a share in 0..1. `gflops`
    is the cost of BLIP-2's ViT-g/14 on these tiles: one encoder for all strategies.
    """
    return {
        "strategy": name,
        "image": list(plan.image),
        "grid": list(plan.grid),
        "tiles": len(plan.tiles),
        "sizes": [list(tile.size) for tile in plan.tiles],
        "tokens": plan.tokens,
        "markers": plan.markers,
        "useful": round(useful(plan), 4),
        "gflops": round(drawing.gflops(plan), 1),
    }


def table(records: list[dict[str, Any]]) -> str:
    """The same as lines of text."""
    rows = [HEAD]
    for one in records:
        sizes = " and ".join(f"{w} x {h}" for w, h in dict.fromkeys(map(tuple, one["sizes"])))
        rows.append(
            (
                one["strategy"],
                f"{one['grid'][0]} x {one['grid'][1]}",
                f"{one['tiles']}",
                sizes,
                f"{one['tokens']:,}",
                f"{one['markers']}",
                f"{one['useful']:.0%}",
                f"{one['gflops']:,.0f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)
