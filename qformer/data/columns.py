"""What the columns of a record mean, by their usual names or by those that are given: picture, texts, choices.

Annotation files differ in names and in how they hold a text: as it stands, in a list, in an object (`{"answer": "red",
"answer_confidence": "yes"}`), as a list written into a cell of a table. All sources of records read them by this file.
"""

from __future__ import annotations

import ast
import base64
import binascii
import dataclasses
import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qformer.data.encodings import decode_text
from qformer.identity import of_path, plain_id

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

IMAGES = ("image", "image_path", "file_name")
CAPTIONS = ("captions", "caption")  # and `text`, where nothing is asked
ANSWERS = ("answers", "answer")  # and `label`, where it is a text or the number of a choice
CHOICES = ("choices", "options")
QUESTION_IDS = ("question_id", "questionId", "qid", "index")
WITHIN = ("answer", "caption", "raw", "text")  # of an object that holds a text, or a list of them
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
FIELD = re.compile(r"\{(\w+)(?::0?(\d{1,2})d?)?\}")  # of a pattern such as {split}/{image_id:012}.jpg
LISTED = re.compile(r"""\[\s*['"].*['"]\s*,?\s*\]""", re.DOTALL)
PLACE = re.compile(r"-?\d+(?:\.0)?|\(?[A-Z][).]?", re.ASCII)  # what names a choice by number or letter
GLUED = re.compile(r"""['"]\s+['"]""")  # numpy prints lists without commas, which Python reads as one text
BASE64 = re.compile(r"[A-Za-z0-9+/]{54,}={0,2}")  # no picture is shorter
STARTS = ("/9j/", "iVBORw0K", "R0lGOD", "UklGR", "Qk", "SUkq", "TU0A", "AAAA")  # of pictures that are read, in base64


@dataclass(frozen=True, kw_only=True)
class ColumnOptions:
    """Options shared by all sources of records: names of columns, where None means the usual name.

    Attributes:
        image: the picture, or a pattern of columns, such as `{split}/{image_id:012}.jpg`.
        caption: one text or several.
        question: a text.
        answers: one text or several, a number, or the right choice.
        choices: one column with all choices, or a list with one column for each choice.
        statement: a sentence that is true or false.
        id: equal values mark the same image; without it, images are the same if their files or bytes are.
    """

    image: str | None = None
    caption: str | None = None
    question: str | None = None
    answers: str | None = None
    choices: str | list[str] | None = None
    statement: str | None = None
    id: str | None = None


@dataclass(frozen=True, kw_only=True)
class Columns(ColumnOptions):
    """Columns of a record, and the reading of pictures and texts from them."""

    @staticmethod
    def of(source: ColumnOptions) -> Columns:
        """Take the column names from the options of a source."""
        return Columns(**{field.name: getattr(source, field.name) for field in dataclasses.fields(ColumnOptions)})

    def needed(self) -> list[str]:
        """List the columns that the user named and that must exist."""
        patterns = FIELD.findall(self.image or "")
        image = [name for name, _ in patterns] if patterns else [self.image]
        choices = self.choices if isinstance(self.choices, list) else [self.choices]
        named = [*image, self.caption, self.question, self.answers, *choices, self.statement, self.id]
        return [name for name in named if name is not None]

    def among(self, names: Collection[str]) -> Columns:
        """Find the columns of a record with these column names; `text` is a question if there is a `question_id`."""
        caption = self.caption or _find_first(CAPTIONS, names)
        question = self.question
        if question is None and self.caption is None:
            question = _find_first(("question",), names)
            if question is None and caption is None and "text" in names and "question_id" in names:
                question = "text"
        if caption is None and question is None:
            caption = _find_first(("text",), names)
        image = self.image or _find_first(IMAGES, names) or ("{image_id}.jpg" if "image_id" in names else None)
        return Columns(
            image=image,
            caption=caption,
            question=question,
            answers=self.answers or _find_first(ANSWERS, names),
            choices=self.choices or _find_first(CHOICES, names) or _find_letters(names),
            statement=self.statement,
            id=self.id,
        )

    def picture(self, record: dict[str, Any], folder: Path) -> bytes | Path | None:
        """The encoded picture of a record, or its file; None where it has none, or several.

        Pictures may be written in base64.
        """
        if FIELD.search(self.image or ""):
            value: Any = self._fill_pattern(record)
        else:
            value = record.get(self.image or "")
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str):
            return _decode_base64(value) or (folder / value if value.strip() else None)
        return value if isinstance(value, bytes) and value else None

    def _fill_pattern(self, record: dict[str, Any]) -> str | None:
        """The pattern of the picture's name with a record's values; None where one is no text and no number."""
        values = {name: written(record.get(name)) for name, _ in FIELD.findall(self.image or "")}
        if not all(values.values()):
            return None
        return FIELD.sub(lambda found: values[found[1]].zfill(int(found[2] or 0)), self.image or "")

    def texts(self, record: dict[str, Any]) -> dict[str, Any]:
        """`captions`, `question`, `answers` and `facts` of a `Sample`. What is no text is left out.

        Where there are choices, an answer that is a number or a letter becomes the choice that it means.
        """
        choices = self._read_choices(record)
        said = record.get(self.answers or "label")
        answers = strings(said, numbers=True)
        if choices and not isinstance(said, list | dict):
            right = right_choice(choices, said)
            if right is not None:
                answers = [choices[right]]
            elif PLACE.fullmatch(written(said).strip()):
                answers = []  # of a choice that is not there, such as -1, which stands for a secret
        elif self.answers is None and not isinstance(said, str):
            answers = []  # the number of a class that nothing names
        facts = {name: value for name, value in record.items() if not _holds_picture(value)}
        number = next((facts[name] for name in QUESTION_IDS if facts.get(name) is not None), None)
        if self.question is not None and number is not None:
            facts["question_id"] = number
        if choices:
            facts["choices"] = choices
        if self.answers is not None and self.answers not in ANSWERS and not isinstance(said, list | dict):
            facts["label"] = said
        if not answers and isinstance(said, list | dict):
            facts.setdefault("answers", said)  # by whatever name, so that it can be told that nothing of it is read
        if self.statement is not None:
            facts["statement"] = record.get(self.statement)
        question = next(iter(strings(record.get(self.question or ""))), None)
        return {
            "captions": strings(record.get(self.caption or "")),
            "question": question,
            "answers": answers,
            "facts": facts,
        }

    def _read_choices(self, record: dict[str, Any]) -> list[str]:
        """Where each has its own column, the last ones may be empty; without the one before none of them counts."""
        if not isinstance(self.choices, list):
            held = record.get(self.choices or "")
            if isinstance(held, dict) and (letters := _find_letters(held)):  # in tables the last ones are None
                return Columns(choices=letters)._read_choices(held)
            texts = strings(held, numbers=True)
            whole = all(map(str.strip, texts)) and (not isinstance(held, list) or len(texts) == len(held))
            return texts if whole else []  # else they would move up
        cells = [written(record.get(name)).strip() for name in self.choices]
        while cells and cells[-1] in ("", "nan"):  # the latter of pandas, in MMBench's files
            cells.pop()
        return cells if all(cells) else []


def read_record(record: dict[str, Any], named: Columns, folder: Path) -> tuple[bytes | Path | None, dict[str, Any]]:
    """The picture of a record whose columns are its own, and its texts (see `Columns.texts`).

    Args:
        named: the columns that the user names. folder: that paths of pictures are relative to.
    """
    columns = named.among([name for name, value in record.items() if _is_filled(name, value)])
    return columns.picture(record, folder), columns.texts(record)


def _is_filled(name: str, value: Any) -> bool:
    """Whether a cell is filled, so that another column of the same meaning is not looked at."""
    return bool(strings(value)) if name in CAPTIONS else value is not None and value != []


def id_of(record: dict[str, Any], column: str | None, space: Any) -> str | None:
    """The id that a record has in a column, 42 like "42", among those of this data; None where it has none."""
    known = None if column is None else plain_id(record.get(column))
    return None if known is None else f"{_name_space(str(space))}/{known}"


@lru_cache(maxsize=256)
def _name_space(space: str) -> str:
    """Of data in a file or folder its path, however that is spelled: a mixture may name it twice."""
    return of_path(space) if os.path.exists(space) else space


def right_choice(choices: list[str], said: Any) -> int | None:
    """The number of the choice that is meant: by itself, by its number from 0, by its letter; None where by nothing.

    A list of one stands for that one.
    """
    if isinstance(said, list) and len(said) == 1:
        said = said[0]
    if isinstance(said, float) and said.is_integer():
        said = int(said)
    number = said if isinstance(said, int) and not isinstance(said, bool) else -1
    if isinstance(said, str):
        word = said.strip()
        letter = word.strip("(). ").upper()
        if word in choices:
            number = choices.index(word)
        elif re.fullmatch(r"[0-9]{1,3}(?:\.0)?", word):  # the latter of tables with gaps
            number = int(word.partition(".")[0])
        elif len(letter) == 1:
            number = LETTERS.find(letter)
    return number if 0 <= number < len(choices) else None


def strings(value: Any, numbers: bool = False) -> list[str]:
    """The texts in a list of anything, or the one text. Half a surrogate pair, which no tokeniser takes, becomes ?.

    An object stands for the text in it, or for the list of texts; a text that is a list of texts, as tables have it,
    for these; bytes, as some tables have it, for the text that they encode.

    Args:
        numbers: whether numbers are texts as well; what is empty is left out only where all is, since of ten people's
            answers each counts a tenth.
    """
    if isinstance(value, str) and LISTED.fullmatch(value.strip()) and not GLUED.search(value):
        value = _parse_list(value.strip())
    if isinstance(value, dict):
        value = _find_text(value)
    texts = [
        _find_text(one) if isinstance(one, dict) else one for one in (value if isinstance(value, list) else [value])
    ]
    texts = [decode_text(one) if isinstance(one, bytes) else one for one in texts]
    if numbers:
        texts = [one if isinstance(one, str) else written(one) or None for one in texts]
        texts = texts if any(one and one.strip() for one in texts) else []
    return [text.encode("utf-8", "replace").decode() for text in texts if isinstance(text, str)]


def written(value: Any) -> str:
    """A text as it stands, a number in digits (3.0 as 3), anything else as nothing."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    known = isinstance(value, str | int | float) and not isinstance(value, bool) and value == value  # NaN is not
    return str(value) if known else ""


def columns_of(record: Any) -> str:
    """What to say of a record in which something is missing: the columns that are there."""
    names = ", ".join(map(str, record)) if isinstance(record, dict) else ""
    return f"its columns are {names[:300]}" if names else "it has no columns"


def _find_first(wanted: Iterable[str], names: Collection[str]) -> str | None:
    return next((name for name in wanted if name in names), None)


def _find_letters(names: Collection[str]) -> list[str] | None:
    """A, B and so on, without a gap, where names are these."""
    found = [letter for letter in LETTERS if letter in names]
    return found if len(found) > 1 and "".join(found) == LETTERS[: len(found)] else None


def _find_text(held: dict[str, Any]) -> Any:
    return next((held[key] for key in WITHIN if held.get(key) is not None), None)


def _parse_list(text: str) -> Any:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text
    return value if isinstance(value, list) and all(isinstance(one, str) for one in value) else text


def _decode_base64(text: str) -> bytes | None:
    """What a text is in base64, also behind `data:image/png;base64,`; None for one that can be a path."""
    bare = text.partition(";base64,")[2] if text.startswith("data:") else text
    bare = bare.strip().replace("\r", "").replace("\n", "")
    if not bare.startswith(STARTS) or not BASE64.fullmatch(bare):
        return None
    try:
        return base64.b64decode(bare, validate=True)
    except binascii.Error:
        return None


def _holds_picture(value: Any) -> bool:
    """Whether a cell holds a picture, which is not kept with what is known of it."""
    if isinstance(value, list):
        return any(map(_holds_picture, value))
    if isinstance(value, dict):
        value = value.get("bytes")
    return isinstance(value, bytes) or (isinstance(value, str) and _decode_base64(value) is not None)
