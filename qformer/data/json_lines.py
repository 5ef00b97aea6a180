"""Files of JSON records: an object per line, or one list or object of them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qformer import lookup
from qformer.data.columns import ColumnOptions, Columns, columns_of, id_of, read_record
from qformer.data.documents import BLANK, NOT_JSON, read_document
from qformer.data.encodings import refuse_utf16
from qformer.data.fetching import expand_local
from qformer.types import BadSample, Sample, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

LOOK = 100  # records to search for named columns


@dataclass(frozen=True)
class JsonLines(ColumnOptions):
    """One JSON object per line, or one JSON list or object of records; `ColumnOptions` names their fields.

    Attributes:
        path: one file or several: a list, or a pattern such as `captions-*.jsonl` or `{00..11}.jsonl`.
        images: folder that `image` and `video` are relative to; the file's own folder by default.
        video: column with a video file, for records without a picture; `video` by default.
        where: keep the records whose fields equal these, such as {split: train}; all by default.
    """

    path: str | list[str]
    images: str | None = None
    video: str | None = None
    where: dict[str, Any] | None = None
    _files: list[str] = field(init=False, repr=False, compare=False)
    # int64[n, 4]: file, line number, start and length in bytes; for a file with one list: file, number in it, 0, 0
    _lines: Any = field(init=False, repr=False, compare=False)
    _documents: dict[int, list[Any]] = field(init=False, repr=False, compare=False)
    _named: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        named = isinstance(self.path, str) and Path(self.path).is_file()  # even if its name looks like a pattern
        files = [str(self.path)] if named else expand_local(self.path)
        if missing := [file for file in files if not Path(file).is_file()]:
            if address := lookup.address(missing[0]):
                raise UsageError(f"'{address}'{lookup.NOT_FETCHED} and give the file as data.path")
            raise UsageError(
                f"no file at '{missing[0]}'; data.path of a jsonl source must name files with one JSON object per line"
            )
        _refuse_utf16(files)
        if self.images is not None and not Path(self.images).is_dir():
            raise UsageError(f"no folder at '{self.images}'; data.images must be the folder that holds the images")
        kept: list[tuple[int, int, int, int]] = []
        documents = {}
        for number, file in enumerate(files):
            listed = read_document(Path(file), named=self.image is not None)
            if listed is None:
                kept += [(number, *line) for line in self._find_lines(Path(file))]
            else:
                documents[number] = listed
                kept += [(number, row, 0, 0) for row, record in enumerate(listed, 1) if self._matches(record)]
        if not kept:
            raise UsageError(
                f"'{self.path}' has no record{f' with {self.where}' if self.where else ''}; "
                "check the file and data.where"
            )
        object.__setattr__(self, "_files", files)
        object.__setattr__(self, "_lines", np.array(kept, dtype=np.int64))
        object.__setattr__(self, "_documents", documents)
        object.__setattr__(self, "_named", Columns.of(self))
        self._check_columns()

    def _check_columns(self) -> None:
        """Refuse a column name that none of the first records has."""
        needed = self._named.needed()
        known: dict[str, None] = {}
        for index in range(min(len(self), LOOK) if needed else 0):
            try:
                known |= dict.fromkeys(self._record(index))
            except BadSample:
                continue
        if missing := [name for name in needed if known and name not in known]:
            raise UsageError(f"'{self.path}' has no column '{missing[0]}': {lookup.nearest(missing[0], known)}")

    def _find_lines(self, path: Path) -> Iterator[tuple[int, int, int]]:
        """Yield number, start and length of each line with a record."""
        start = 0
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip(BLANK) and self._keeps_line(line):
                    yield number, start, len(line)
                start += len(line)

    def _keeps_line(self, line: bytes) -> bool:
        if not self.where:
            return True
        try:
            record = json.loads(line.decode("utf-8-sig", errors="replace"))
        except NOT_JSON:
            return True  # kept, so that it is counted as bad when it is read
        return self._matches(record)

    def _matches(self, record: Any) -> bool:
        return not self.where or (
            isinstance(record, dict) and all(record.get(key) == value for key, value in self.where.items())
        )

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Sample:
        which, number, _, _ = self._lines[index].tolist()
        path = Path(self._files[which])
        key = f"{path}:{number}"
        record = self._record(index)
        image, texts = read_record(record, self._named, Path(self.images or path.parent))
        if image is None:
            raise BadSample("no image", f"{key} has no '{self.image or 'image'}' path; {columns_of(record)}")
        return Sample(image=image, key=key, image_id=id_of(record, self.id, self.path), **texts)

    def _record(self, index: int) -> dict[str, Any]:
        """Read the object on a line or in a list.

        Raises:
            BadSample: the record cannot be read or is not an object.
        """
        which, number, start, length = self._lines[index].tolist()
        path = Path(self._files[which])
        if which in self._documents:
            record = self._documents[which][number - 1]
        else:
            try:
                with path.open("rb") as file:
                    line = os.pread(file.fileno(), length, start)
            except OSError as error:
                raise BadSample("unreadable", f"{path}:{number}: {error.strerror}") from error
            try:
                record = json.loads(line.decode("utf-8-sig", errors="replace"))
            except NOT_JSON as error:
                raise BadSample("not json", f"{path}:{number}: {error}") from error
        if not isinstance(record, dict):
            raise BadSample("no image", f"{path}:{number} is not an object")
        return record


def _refuse_utf16(files: list[str]) -> None:
    """Refuse files whose lines cannot be separated. Raises UsageError: there is one."""
    for file in files:
        with Path(file).open("rb") as lines:
            refuse_utf16(file, lines.read(1000))
