"""Tables of MMVP, of people and of graders: CSV files, some of whose rows nobody has filled in."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from qformer.metrics.choice_reply import find_options
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

HEAD = ("question", "options", "correct answer")
PLACES = ("index", "lndex")  # heads of the number of a row; the second is that of the published file
NUMBERS = (*PLACES, "question_id", "number", "id")  # and of the number of a question in tables of others
LONGEST = 10  # digits of a number of a row
LETTER = re.compile(r"\(?\s*([ab])\s*\)?(?=\W|$)", re.IGNORECASE)


@dataclass(frozen=True)
class AskedRow:
    """A row of `Questions.csv` as it is written.

    Attributes:
        number: of the row and its photo, from 1.
        question, options, answer, pattern: cells without the space around them; empty ones are not filled in.
    """

    number: int
    question: str
    options: str
    answer: str
    pattern: str

    @property
    def is_blank(self) -> bool:
        """True if nobody has written a question; a pattern may have come from a model."""
        return not (self.question or self.options or self.answer)

    def letter(self, table: Path) -> str:
        """The right option, `a` or `b`. Raises UsageError: something is missing, or there are not two options."""
        if not self.question or not find_options(self.options):
            raise broken_row(table, self.number, "expected a question, and options as '(a) Open (b) Closed'")
        letter = LETTER.match(self.answer)
        if letter is None:
            raise broken_row(table, self.number, f"its answer is '{self.answer}', not (a) or (b)")
        return letter[1].lower()


def read_asked(table: Path) -> list[AskedRow]:
    """Rows of a table of questions, numbered from 1; those without a single cell at its end do not count.

    Raises:
        UsageError: the table cannot be read, columns are missing, or its Index has gaps.
    """
    rows = list(read_rows(table, keep_empty=True))
    while rows and not _is_filled(rows[-1]):
        rows.pop()
    head = [name.strip().lower() for name in rows.pop(0)] if rows else []
    if not set(HEAD) <= set(head):
        raise UsageError(f"'{table}' has the columns {head}; expected Question, Options and Correct Answer")
    _check_index(table, head, rows)
    found = []
    for number, row in enumerate(rows, start=1):
        try:
            question, options, answer = (row[head.index(name)].strip() for name in HEAD)
        except IndexError:
            raise broken_row(table, number, f"it has {len(row)} columns, not {len(head)}") from None
        pattern = row[head.index("pattern")].strip() if "pattern" in head[: len(row)] else ""
        found.append(AskedRow(number, question, options, answer, pattern))
    return found


def _check_index(table: Path, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Refuse a table from which rows were taken, since photos are counted by rows."""
    place = _find(head, PLACES)
    if place is None:
        return
    cells = [row[place].strip() if place < len(row) else "" for row in rows]
    if not all(map(is_number, cells)):
        return
    for number, (before, own) in enumerate(pairwise(map(int, cells)), start=2):
        if own != before + 1:
            fault = f"its Index is {own} behind {before}; photos are counted by rows, so leave empty rows in"
            raise broken_row(table, number, fault)


def is_number(cell: str) -> bool:
    """Tell if a cell holds a whole number that counts rows; Python refuses to read one of thousands of digits."""
    return cell.strip().isdecimal() and len(cell.strip()) < LONGEST


def read_column(table: Path, names: Sequence[str]) -> dict[int, str]:
    """Cells of the first column that there is, by the number under one of `NUMBERS`, or without one by the row.

    A table of two columns whose first holds numbers needs no head, and no name above them. Where rows are counted,
    empty ones count; a blank line is one in a table of one column, and none in others, as in `read_asked`.

    Raises:
        UsageError: the table cannot be read, there is no such column, a number is none or there twice with different
            cells, or the first column holds numbers that do not count the rows and have none of the names.
    """
    rows = list(_all_rows(table))
    while rows and not _is_filled(rows[0]):
        rows.pop(0)
    rows = [row for row in rows if row or len(rows[0]) == 1]
    below = [row for row in rows[1:] if _is_filled(row)]
    if rows and all(len(row) == 2 and is_number(row[0]) for row in below) and len(rows[0]) == 2:
        has_head = not is_number(rows[0][0])
        rows = [["index", rows[0][1] if has_head else names[0]], *rows[has_head:]]
    head = [name.strip().lower() for name in rows.pop(0)] if rows else []
    name = next((name for name in names if name in head), None)
    if name is None:
        raise UsageError(f"'{table}' has the columns {head}; expected Index and {names[0].capitalize()}")
    numbered = _find(head, NUMBERS)
    if numbered is None and head[0] != name:
        _check_counted(table, head[0], rows)
    cells: dict[int, str] = {}
    for place, row in enumerate(rows, start=1):
        if not _is_filled(row):
            continue
        number = str(place) if numbered is None else _cell(row, numbered)
        if not is_number(number):
            raise UsageError(f"row {place} of '{table}' has the Index '{number[:80]}'; give the number of a question")
        cell = _cell(row, head.index(name))
        if cells.get(int(number)) and cell and cells[int(number)] != cell:
            told = (
                f"row {place} of '{table}' has the Index {number} again, with '{cell}' and not '{cells[int(number)]}'"
            )
            raise UsageError(f"{told}; give each number once")
        cells[int(number)] = cell or cells.get(int(number), "")
    return cells


def _find(head: Sequence[str], names: Sequence[str]) -> int | None:
    """Place of the first of these names in a head, whose words may stand apart."""
    plain = [name.replace(" ", "_") for name in head]
    return next((plain.index(name) for name in names if name in plain), None)


def _check_counted(table: Path, name: str, rows: Sequence[Sequence[str]]) -> None:
    """Refuse numbers of questions under a name that says nothing: rows would be counted in their place."""
    told = {place: row[0].strip() for place, row in enumerate(rows, start=1) if row and row[0].strip()}
    if told and all(map(is_number, told.values())) and any(int(cell) != place for place, cell in told.items()):
        raise UsageError(
            f"'{table}' has numbers under '{name}' that do not count its rows; call that column Index if they are the "
            "numbers of questions, or add an Index"
        )


def _cell(row: Sequence[str], place: int) -> str:
    return row[place].strip() if place < len(row) else ""


def _is_filled(row: Sequence[str]) -> bool:
    return any(map(str.strip, row))


def read_rows(table: Path, keep_empty: bool = False) -> Iterator[list[str]]:
    """Rows of a CSV file with or without a byte order mark; blank lines do not count, as in pandas.

    Args:
        keep_empty: also yield rows whose cells are all empty.
    """
    return (row for row in _all_rows(table) if _is_filled(row) or (keep_empty and len(row) > 1))


def _all_rows(table: Path) -> Iterator[list[str]]:
    """All rows, with an empty one for a blank line."""
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            yield from csv.reader(file, strict=True)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"'{table}' cannot be read ({error}); give the table as CSV in UTF-8") from error


def broken_row(table: Path, number: int, fault: str) -> UsageError:
    """The error about a row of a table."""
    return UsageError(f"row {number} of '{table}' is broken: {fault}")
