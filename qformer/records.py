"""JSON lines that a run appends to: what a kill cut off is passed over, and a shorter list replaces a longer whole."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


def read_records(file: Path) -> list[dict[str, Any]]:
    """The lines of a file; one that was cut off while it was written is passed over."""
    records = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def replace_records(file: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write the file anew; a kill in the middle leaves it as it was."""
    partial = file.with_suffix(".partial")
    partial.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    os.replace(partial, file)


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON for standard output, in letters that it takes: a name that is no UTF-8 is escaped, and so survives."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent)
    return text
