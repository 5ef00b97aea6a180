"""Work of `qformer compare`: a comparison, or the table and the page of one that has ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qformer.files.records import replace_text, to_json, writing
from qformer.progress import console
from qformer.stages.compare import report
from qformer.stages.compare.comparison import Settings, compare
from qformer.stages.compare.table import Table, make_table, read
from qformer.types import UsageError


def run(as_json: bool, **options: Any) -> None:
    """Compare, print the table, and write the page; options are fields of `Settings`. Raises like `compare`."""
    settings = Settings(**options)
    if settings.tokens is not None and settings.mode != "tokens":
        raise UsageError("--tokens is for --mode tokens; add that, or leave it out")
    if not settings.words:
        raise UsageError("no systems to compare; give configurations, such as configs/system_llava15.yaml")
    console.quiet = as_json
    try:
        found = compare(settings)
    finally:
        console.quiet = False
    _show(settings.folder, make_table(found), as_json)


def renew(folder: Path, reference: str | None, as_json: bool, words: list[str]) -> None:
    """Print the table of a comparison again, and write its page, perhaps with another reference.

    Raises:
        UsageError: there is none, the reference has no numbers, or systems are given, too.
    """
    if words:
        raise UsageError(f"--report renews what '{folder}' holds and takes no systems; leave '{words[0]}' out")
    _show(folder, make_table(read(folder), reference), as_json)


def _show(folder: Path, table: Table, as_json: bool) -> None:
    file = folder / report.PAGE
    with writing(folder):
        replace_text(file, report.page(table), shared=True)
    if as_json:
        print(to_json(table.as_data()))
        return
    report.show(table)
    console.print(f"open {file}", soft_wrap=True)


def read_seeds(text: str) -> tuple[int, ...]:
    """Seeds as they were written: `0,1,2`. Raises UsageError: something else, or one twice."""
    try:
        seeds = tuple(int(one) for one in text.split(","))
    except ValueError:
        seeds = ()
    if not seeds or min(seeds) < 0 or max(seeds) >= 1 << 32 or len(set(seeds)) < len(seeds):
        raise UsageError(f"--seeds is '{text}'; give different whole numbers from 0, such as 0,1,2")
    return seeds
