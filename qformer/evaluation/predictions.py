"""Predictions of a model, saved as JSON lines during an evaluation, so that an interrupted one can continue.

The first line of a file identifies the checkpoint, the data and the settings of the others. Each of several processes
appends to its own file; at the end the first one merges all of them. A line that was cut off by a kill is dropped.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Self

from qformer.files.records import read_records, replace_records
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

MADE_BY = "made_by"


class Predictions:
    """Records by their `id`, in a file or, without one, only in memory.

    Attributes:
        known: the records so far, by id.
    """

    def __init__(self, path: Path | None, made_by: dict[str, Any], rank: int = 0) -> None:
        """Read the predictions that exist.

        Args:
            made_by: everything that the predictions depend on.
            rank: number of the process, which selects the file it appends to.

        Raises:
            UsageError: the file is not one of predictions, or they belong to another checkpoint, data or settings.
        """
        self.path = path
        self.made_by = json.loads(json.dumps(made_by))
        self.known: dict[str, dict[str, Any]] = {}
        self._own = None if path is None else _part(path, rank)
        self._file: Any = None
        for file in [] if path is None else [path, *_parts(path)]:
            if file.exists():
                self._read(file)

    def _read(self, file: Path) -> None:
        records = read_records(file)
        if not records:  # an empty file, or one whose first line was cut off
            return
        head = records[0].get(MADE_BY) if isinstance(records[0], dict) else None
        if not isinstance(head, dict):
            raise UsageError(f"'{file}' is not a file of predictions; give --predictions another name")
        changed = [key for key in {**head, **self.made_by} if head.get(key) != self.made_by.get(key)]
        if changed:
            changes = ", ".join(f"{key} was {head.get(key)!r}, is {self.made_by.get(key)!r}" for key in changed)
            raise UsageError(
                f"the predictions in '{file}' belong to another run ({changes}); remove the file, or give "
                "--predictions another name"
            )
        for record in records[1:]:
            if isinstance(record, dict) and isinstance(record.get("id"), str) and _is_sound(record):
                self.known[record["id"]] = record

    def __enter__(self) -> Self:
        if self._own is not None:
            _drop_half_line(self._own)
            self._file = self._own.open("a", encoding="utf-8")
            if not self._file.tell():
                self._file.write(json.dumps({MADE_BY: self.made_by}) + "\n")
                self._file.flush()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def keep(self, of: Mapping[str, str]) -> int:
        """Drop the predictions whose input has changed under the same id; returns their number.

        Args:
            of: digest of each input, by id.
        """
        changed = [id_ for id_, record in self.known.items() if record.get("of") != of.get(id_, record.get("of"))]
        for id_ in changed:
            del self.known[id_]
        return len(changed)

    def add(self, records: Iterable[dict[str, Any]]) -> None:
        """Add records, and flush them to the file."""
        for record in records:
            self.known[record["id"]] = record
            if self._file is not None:
                self._file.write(json.dumps(record) + "\n")
        if self._file is not None:
            self._file.flush()

    def finish(self, order: Sequence[str]) -> None:
        """Write all records to one file in this order; records with other ids come last."""
        if self.path is None:
            return
        wanted = set(order)
        ordered = [self.known[id_] for id_ in order if id_ in self.known]
        others = [record for id_, record in self.known.items() if id_ not in wanted]
        replace_records(self.path, [{MADE_BY: self.made_by}, *ordered, *others])
        for part in _parts(self.path):
            part.unlink(missing_ok=True)


def _is_sound(record: dict[str, Any]) -> bool:
    """Tell if what was said is a text that a page in UTF-8 can show, and losses are numbers; others are asked again."""
    said, losses = record.get("said", ""), record.get("losses", [0.0])
    texts = isinstance(said, str) and said == said.encode("utf-8", "replace").decode()
    numbers = isinstance(losses, list) and all(isinstance(loss, int | float) for loss in losses)
    return texts and numbers and bool(losses) and len(record.keys() - {"id", "of"}) > 0


def _part(path: Path, rank: int) -> Path:
    return path.with_name(f"{path.name}.{rank}") if rank else path


def _parts(path: Path) -> list[Path]:
    """List the files of the other processes, which can be from an earlier run with more of them."""
    found = path.parent.glob(f"{path.name}.*") if path.parent.is_dir() else []
    return sorted(file for file in found if file.name.removeprefix(f"{path.name}.").isdecimal())


def _drop_half_line(file: Path) -> None:
    if not file.exists():
        return
    with file.open("r+b") as opened:
        opened.truncate(opened.read().rfind(b"\n") + 1)
