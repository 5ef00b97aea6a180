"""`qformer eval`: benchmarks of a checkpoint, printed as a table and written as JSON."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import yaml
from rich.table import Table

from qformer import load
from qformer.data import sources
from qformer.data.loader import held_out
from qformer.evaluation import retrieval
from qformer.model.image_text import ImageTextModel
from qformer.types import UsageError
from stages.loop import console

if TYPE_CHECKING:
    from pathlib import Path

BENCHMARKS = ("retrieval",)


def evaluate_retrieval(
    path: str,
    bench: str,
    data: list[str],
    k: int,
    limit: int | None,
    batch: int,
    output: Path | None,
    device: str | None,
) -> None:
    """Image-text retrieval in both directions, by ITC and re-ranked by ITM.

    Raises:
        UsageError: another benchmark, data that cannot be used, or a checkpoint that is not of stage one.
    """
    if bench not in BENCHMARKS:
        raise UsageError(f"unknown benchmark '{bench}'; known are {', '.join(BENCHMARKS)}")
    options = pairs(data)
    source = sources.build(str(options.pop("name", "jsonl")), **options)
    model = load(path, device)
    if not isinstance(model, ImageTextModel):
        raise UsageError(f"'{path}' is a checkpoint of stage two; retrieval needs one of stage one")
    held = held_out(source, model.frontend.strategy, limit, batch)
    start = time.perf_counter()
    measured = retrieval.measure(model, held.groups, held.captions, k, show=True)
    texts = sum(len(captions) for captions in held.captions)
    title = f"{len(held)} images, {texts} texts, k = {k}, {time.perf_counter() - start:.0f} s"
    table = Table("%", *(f"{way} R@{n}" for way in ("i2t", "t2i") for n in retrieval.CUTOFFS), title=title)
    for name, values in measured.items():
        table.add_row(
            name, *(f"{100 * values[f'{way}_r{n}']:.1f}" for way in ("i2t", "t2i") for n in retrieval.CUTOFFS)
        )
    console.print(table)
    if held.skipped:
        console.print(f"skipped {len(held.skipped)} samples: {held.skipped[:5]}")
    if output is not None:
        result = {"checkpoint": path, "images": len(held), "texts": texts, "k": k, "skipped": held.skipped, **measured}
        output.write_text(json.dumps(result, indent=1), encoding="utf-8")


def pairs(words: list[str]) -> dict[str, Any]:
    """Options of a data source, written as `key=value`; values are YAML.

    Raises:
        UsageError: something else.
    """
    return dict(map(_pair, words))


def _pair(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    try:
        read = yaml.safe_load(value)
    except yaml.YAMLError:
        equals = ""
    if not equals:
        raise UsageError(f"'{text}' is not an option of the data source; write key=value, such as path=captions.jsonl")
    return key, read
