"""Entries of a gallery: where their pictures are, which a search may find, and what every store of them does."""

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
    """Where a content stands.

    Attributes:
        source: number of the source in `gallery.json`. name: a path, or what the source calls a record in a tar.
        number: of the record in its source. size, modified: bytes and nanoseconds of a file; of a record -1, and
            the time of its tar if that is a file here, else -1.
    """

    source: int
    name: str
    number: int
    size: int = -1
    modified: int = -1


def modified(place: Place) -> int:
    """Seconds since 1970, below zero before; 0 of a record, whose time is not known."""
    return place.modified // 10**9 if place.size >= 0 else 0


@dataclass
class Entry:
    """One image of a gallery.

    Attributes:
        id: hash of its bytes. places: where these bytes stand, at least one.
        bytes, width, height: size of the file, and of the picture in pixels. modified: seconds since 1970, 0 unknown.
        embeds: float16[V, P], its ITC rows; captions: true captions; caption_embeds: float16[captions, P].
        features: packed tokens of each tile (`qformer.files.packing`), if they were stored.
        seq: counts entries in the order in which they came; the store gives it.
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
    """What an update needs to know of an entry."""

    id: str
    seq: int
    places: list[Place]
    captions: list[str]


class Condition(NamedTuple):
    """A column compared with a value."""

    column: str
    operator: str
    value: str | int


class Store(Protocol):
    """Where entries are kept. Searches see the last commit; a kill in the middle of one leaves the one before.

    Attributes:
        notes: what should be told of it beside an answer. Whatever is wrong otherwise is a `UsageError`.
    """

    notes: list[str]

    def __len__(self) -> int: ...
    def known(self) -> Iterator[EntrySummary]: ...
    def commit(self, new: Sequence[Entry], changed: Sequence[Entry], gone: Sequence[str]) -> None:
        """Add entries, replace entries, remove ids: all of it or nothing."""

    def get(self, ids: Sequence[str], features: bool = False) -> dict[str, Entry]:
        """Entries by id, those that exist; `features` only where asked for."""

    def nearest(
        self, query: Tensor, k: int, where: Sequence[Condition] = (), exact: bool = False
    ) -> list[tuple[str, float]]:
        """Ids and MaxSim of the k best: the mean over the rows of `query`, float[R, P], of the best row of an entry."""

    def nearest_captions(self, query: Tensor, k: int, where: Sequence[Condition] = ()) -> list[tuple[str, int, float]]:
        """Id, number of the caption and cosine of the k captions that are best for any row of `query`, float[R, P]."""

    def refresh(self, probes: Tensor) -> dict[str, Any] | None:
        """Tidy up, and index anew where that is due; what it measured with `probes`, float[n, P], if it did."""


def conditions(texts: Iterable[str]) -> list[Condition]:
    """`width>1000`, `path~holiday`, `modified>=2024-05-01`, ...: columns compared with values.

    Raises:
        UsageError: no such column or operator, or a value that is no number where one is needed.
    """
    return [_condition(text) for text in texts]


def _condition(text: str) -> Condition:
    if not isinstance(text, str) or not is_utf8(text):
        raise UsageError(f"{text!a} is no condition: it is no text in UTF-8; write one such as width>1000")
    found = re.match(r"\s*(\w+)\s*(!=|>=|<=|=|>|<|~)\s*(.*?)\s*$", text, re.DOTALL)
    if found is None or found[1] not in COLUMNS:
        raise UsageError(
            f"'{text}' is no condition; write a column ({', '.join(COLUMNS)}), one of {' '.join(OPERATORS)} "
            "(~ is 'contains'), and a value, such as width>1000"
        )
    column, operator, value = found.groups()
    if COLUMNS[column] is str:
        if operator not in ("=", "!=", "~"):
            raise UsageError(f"'{text}' compares a text by size; use =, != or ~ (contains) with {column}")
        return Condition(column, operator, normalize("NFC", value))
    try:
        if operator == "~":
            raise ValueError
        number = timegm(date.fromisoformat(value).timetuple()) if "-" in value[1:] else int(value)
        if abs(number) >= 2**63:
            raise ValueError
    except ValueError as error:
        raise UsageError(
            f"'{text}' needs a whole number behind {column} and one of = != < <= > >= "
            "(a date such as 2024-05-01 for modified)"
        ) from error
    return Condition(column, operator, number)


def is_utf8(text: str) -> bool:
    """Whether a text holds no half of a surrogate pair, as which Python hands on bytes that are no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def maxsim(query: Tensor, rows: Tensor) -> Tensor:
    """Mean over the rows of `query`, float[R, P], of the best of an entry's rows, float[V, P]: a scalar.

    A text has one row, and this is ITC's maximum over the queries; of an image it is the mean of that over its rows.
    """
    return (query @ rows.T).amax(dim=1).mean()
