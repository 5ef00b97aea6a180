"""Entries of a gallery, the places of their pictures, search conditions, and the protocol of stores."""

from __future__ import annotations

import re
from calendar import timegm
from dataclasses import dataclass, field
from datetime import date
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from unicodedata import normalize

import numpy as np

from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor


COLUMNS = {"id": str, "path": str, "caption": str, "bytes": int, "width": int, "height": int, "modified": int}


OPERATORS = ("!=", ">=", "<=", "=", ">", "<", "~")


class Place(NamedTuple):
    """A file or record that holds a content.

    Attributes:
        source: number of the source in `gallery.json`.
        name: path of a file, or the source's name of a record.
        number: index of a record in its source.
        size: bytes of a file; -1 for a record.
        modified: nanoseconds since 1970, of a file or of the tar of a record; -1 if there is no such file here.
    """

    source: int
    name: str
    number: int
    size: int = -1
    modified: int = -1


def modified(place: Place) -> int:
    """Seconds since 1970, negative before; 0 for a record, whose time is unknown."""
    return place.modified // 10**9 if place.size >= 0 else 0


@dataclass
class Entry:
    """One image of a gallery.

    Attributes:
        id: hash of its bytes. places: files and records with these bytes, at least one.
        bytes, width, height: size of the file, and of the picture in pixels. modified: seconds since 1970, 0 unknown.
        embeds: float16[V, P], its ITC rows; captions: true captions; caption_embeds: float16[captions, P].
        features: packed tokens of each tile (`qformer.files.packing`), if they were stored.
        seq: position in the order of indexing; an update assigns it.
    """

    id: str
    places: list[Place]
    bytes: int
    width: int
    height: int
    embeds: np.ndarray
    captions: list[str] = field(default_factory=list)
    caption_embeds: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float16))
    features: list[np.ndarray] | None = None
    seq: int = -1

    @property
    def path(self) -> str:
        return self.places[0].name

    @property
    def modified(self) -> int:
        return modified(self.places[0])


class EntrySummary(NamedTuple):
    """Parts of an entry that an update needs."""

    id: str
    seq: int
    places: list[Place]
    captions: list[str]


class Condition(NamedTuple):
    """A comparison of a column with a value."""

    column: str
    operator: str
    value: str | int


class Store(Protocol):
    """A database of entries. Searches see the last commit; a kill during a commit leaves the previous one.

    Attributes:
        notes: remarks to print with results. Every other problem is raised as a `UsageError`.
    """

    notes: list[str]

    def __len__(self) -> int: ...
    def known(self) -> Iterator[EntrySummary]: ...
    def commit(self, new: Sequence[Entry], changed: Sequence[Entry], gone: Sequence[str]) -> None:
        """Add entries, replace entries and remove ids: all of it or nothing."""

    def get(self, ids: Sequence[str], features: bool = False) -> dict[str, Entry]:
        """Entries by id, skipping ids that do not exist; with their `features` if requested."""

    def nearest(
        self, query: Tensor, k: int, where: Sequence[Condition] = (), exact: bool = False
    ) -> list[tuple[str, float]]:
        """Ids and MaxSim of the k best entries: over the rows of `query`, float[R, P], the mean of the best cosine."""

    def nearest_captions(self, query: Tensor, k: int, where: Sequence[Condition] = ()) -> list[tuple[str, int, float]]:
        """Entry id, caption number and cosine of the k captions closest to any row of `query`, float[R, P]."""

    def refresh(self, probes: Tensor) -> dict[str, Any] | None:
        """Clean up, and rebuild the index when due; returns what it measured with `probes`, float[n, P], if it did."""


def conditions(texts: Iterable[str]) -> list[Condition]:
    """Parse conditions such as `width>1000`, `path~holiday` or `modified>=2024-05-01`.

    Raises:
        UsageError: unknown column or operator, or a value that is not a number where one is needed.
    """
    return [_condition(text) for text in texts]


def _condition(text: str) -> Condition:
    if not isinstance(text, str) or not is_utf8(text):
        raise UsageError(f"{text!a} is not a condition in UTF-8 text; write one such as width>1000")
    found = re.match(r"\s*(\w+)\s*(!=|>=|<=|=|>|<|~)\s*(.*?)\s*$", text, re.DOTALL)
    if found is None or found[1] not in COLUMNS:
        raise UsageError(
            f"'{text}' is not a condition; write a column ({', '.join(COLUMNS)}), one of {' '.join(OPERATORS)} "
            "(~ is 'contains'), and a value, such as width>1000"
        )
    column, operator, value = found.groups()
    if COLUMNS[column] is str:
        if operator not in ("=", "!=", "~"):
            raise UsageError(f"'{text}' orders a text column; use =, != or ~ (contains) with {column}")
        return Condition(column, operator, normalize("NFC", value))
    try:
        if operator == "~":
            raise ValueError
        number = timegm(date.fromisoformat(value).timetuple()) if "-" in value[1:] else int(value)
        if abs(number) >= 2**63:
            raise ValueError
    except ValueError as error:
        raise UsageError(
            f"'{text}' needs one of = != < <= > >= and a whole number after {column} "
            "(or a date such as 2024-05-01 for modified)"
        ) from error
    return Condition(column, operator, number)


def is_utf8(text: str) -> bool:
    """Check that a text has no lone surrogate, which is how Python represents bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def maxsim(query: Tensor, rows: Tensor) -> Tensor:
    """Mean over the rows of `query`, float[R, P], of the best cosine with an entry's rows, float[V, P]: a scalar.

    A text has one row, for which this is ITC's maximum over the queries; an image averages that over its rows.
    """
    return (query @ rows.T).amax(dim=1).mean()
