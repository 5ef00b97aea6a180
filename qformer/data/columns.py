"""Columns of a record, by usual or given names: image, video, captions, question, answers, choices.

Annotation files differ in the names of columns and in how they store a text: plainly, in a list, in an object
(`{"answer": "red", "answer_confidence": "yes"}`), or as a printed list in a cell of a table. All sources of records
read them with this module.
"""

from __future__ import annotations

import ast
import base64
import binascii
import dataclasses
import os
import re
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qformer.data.encodings import decode_text
from qformer.formats import VideoFile
from qformer.identity import of_path, plain_id
from qformer.types import LeftOut

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

IMAGES = ("image", "image_path", "file_name", "images")
CAPTIONS = ("captions", "caption")  # and `text`, if there is no question
ANSWERS = ("answers", "answer")  # and `label`, if it is a text or the number of a choice
CHOICES = ("choices", "options")
QUESTION_IDS = ("question_id", "questionId", "qid", "index")
WITHIN = ("answer", "caption", "raw", "text")  # keys of a text, or a list of texts, in an object
CONVERSATION = "conversations"
PLACES = re.compile(r"(?:\s*<(?:image|video)>)+\s*")  # of pictures in a text; here they come first
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
FIELD = re.compile(r"\{(\w+)(?::0?(\d{1,2})d?)?\}")  # in a pattern such as {split}/{image_id:012}.jpg
LISTED = re.compile(r"""\[\s*['"].*['"]\s*,?\s*\]""", re.DOTALL)
PLACE = re.compile(r"-?\d+(?:\.0)?|\(?[A-Z][).]?", re.ASCII)  # number or letter of a choice
GLUED = re.compile(r"""['"]\s+['"]""")  # numpy prints lists without commas; Python would join the texts
BASE64 = re.compile(r"[A-Za-z0-9+/]{54,}={0,2}")  # no image is shorter
STARTS = ("/9j/", "iVBORw0K", "R0lGOD", "UklGR", "Qk", "SUkq", "TU0A", "AAAA")  # of supported images, in base64


@dataclass(frozen=True, kw_only=True)
class ColumnOptions:
    """Options shared by all sources of records: names of columns, where None means the usual name.

    Attributes:
        image: the picture, or a list of several that are shown together, or a pattern of columns, such as
            `{split}/{image_id:012}.jpg`.
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
    """Columns of a record, and the reading of pictures and texts from them.

    Attributes:
        video: the video file, of records without a picture; an option of sources whose records may have one.
    """

    video: str | None = None

    @staticmethod
    def of(source: ColumnOptions) -> Columns:
        """Take the column names from the options of a source."""
        return Columns(**{field.name: getattr(source, field.name, None) for field in dataclasses.fields(Columns)})

    def needed(self) -> list[str]:
        """List the columns that the user named and that must exist."""
        shown: list[str | None] = []
        for column in (self.image, self.video):
            patterns = FIELD.findall(column or "")
            shown += [name for name, _ in patterns] if patterns else [column]
        choices = self.choices if isinstance(self.choices, list) else [self.choices]
        named = [*shown, self.caption, self.question, self.answers, *choices, self.statement, self.id]
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
        video = self.video or _find_first(("video",), names)
        image = self.image or _find_first(IMAGES, names)
        if image is None and video is None and "image_id" in names:
            image = "{image_id}.jpg"
        return Columns(
            image=image,
            video=video,
            caption=caption,
            question=question,
            answers=self.answers or _find_first(ANSWERS, names),
            choices=self.choices or _find_first(CHOICES, names) or _find_letters(names),
            statement=self.statement,
            id=self.id,
        )

    def picture(self, record: dict[str, Any], folder: Path) -> Any:
        """Get what a record shows: an encoded image (bytes or base64), a file, or a list of several of these.

        A record without a picture has a `VideoFile`, if it has a video. None if there is nothing, or one of several
        cannot be a picture.
        """
        for column, kind in ((self.image or "", Path), (self.video or "", VideoFile)):
            value = _fill_pattern(column, record) if FIELD.search(column) else record.get(column)
            parts = [_picture_in(one, folder, kind) for one in (value if isinstance(value, list) else [value])]
            if any(part is not None for part in parts):
                return None if None in parts else parts if len(parts) > 1 else parts[0]
        return None

    def texts(self, record: dict[str, Any]) -> dict[str, Any]:
        """Read `captions`, `question`, `answers` and `facts` of a `Sample` from a record; other types are ignored.

        With choices, an answer that is a number or a letter is replaced by the choice that it means.
        """
        choices = self._read_choices(record)
        value = record.get(self.answers or "label")
        answers = strings(value, numbers=True)
        if choices and not isinstance(value, list | dict):
            right = right_choice(choices, value)
            if right is not None:
                answers = [choices[right]]
            elif PLACE.fullmatch(written(value).strip()):
                answers = []  # number of a choice that does not exist, such as -1 for a hidden answer
        elif self.answers is None and not isinstance(value, str):
            answers = []  # number of a class without a name
        facts = {name: without_halves(value) for name, value in record.items() if not _holds_picture(value)}
        number = next((facts[name] for name in QUESTION_IDS if facts.get(name) is not None), None)
        if self.question is not None and number is not None:
            facts["question_id"] = number
        if choices:
            facts["choices"] = choices
        if self.answers is not None and self.answers not in ANSWERS and not isinstance(value, list | dict):
            facts["label"] = value
        if not answers and isinstance(value, list | dict):
            facts.setdefault("answers", value)  # so that a message can report answers that could not be read
        if self.statement is not None:
            facts["statement"] = record.get(self.statement)
        question = next(iter(strings(record.get(self.question or ""))), None)
        if question is not None and (isinstance(record.get(self.image or ""), list) or record.get(self.video or "")):
            question = PLACES.sub(" ", question).strip()
        return {
            "captions": strings(record.get(self.caption or "")),
            "question": question,
            "answers": answers,
            "facts": facts,
        }

    def _read_choices(self, record: dict[str, Any]) -> list[str]:
        """Read the choices; with one column for each, the last may be empty, but a gap makes all of them invalid."""
        if not isinstance(self.choices, list):
            held = record.get(self.choices or "")
            if isinstance(held, dict) and (letters := _find_letters(held)):  # in tables, the last ones are None
                return Columns(choices=letters)._read_choices(held)
            texts = strings(held, numbers=True)
            whole = all(map(str.strip, texts)) and (not isinstance(held, list) or len(texts) == len(held))
            return texts if whole else []  # without a choice, the numbers of the others would be wrong
        cells = [written(record.get(name)).strip() for name in self.choices]
        while cells and cells[-1] in ("", "nan"):  # "nan" is from pandas, in MMBench's files
            cells.pop()
        return cells if all(cells) else []


def read_record(record: dict[str, Any], named: Columns, folder: Path) -> tuple[Any, dict[str, Any]]:
    """Read what a record shows and its texts (see `Columns`); its columns may differ from those of other records.

    Args:
        named: columns named by the user.
        folder: folder that paths of images are relative to.
    """
    record = unfold(record)
    columns = named.among([name for name, value in record.items() if _is_filled(name, value)])
    return columns.picture(record, folder), columns.texts(record)


def unfold(record: dict[str, Any]) -> dict[str, Any]:
    """Turn `conversations`, as in LLaVA's training files, into a `question` and its `answers`: the first of them."""
    turns = record.get(CONVERSATION)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return record
    said = [(turn.get("from"), turn.get("value")) for turn in turns]
    places = [place for place, (who, value) in enumerate(said) if who == "human" and isinstance(value, str)]
    rest = {name: value for name, value in record.items() if name != CONVERSATION}
    if not places:
        return rest
    if len(places) > 1:
        told = "of each of the `conversations`, the first question and its answer are read"
        warnings.warn(told, LeftOut, stacklevel=1)
    answers = [value for who, value in said[places[0] + 1 : places[0] + 2] if who == "gpt"]
    return {"question": PLACES.sub(" ", said[places[0]][1]).strip(), "answers": answers} | rest


def _picture_in(value: Any, folder: Path, kind: type[Path]) -> bytes | Path | None:
    """Get an encoded image, or the file, from one cell; from a cell for videos the file alone."""
    if isinstance(value, dict):
        value = (value.get("bytes") if kind is Path else None) or value.get("path")
    if isinstance(value, str):
        return (kind is Path and _decode_base64(value)) or (kind(folder / value) if value.strip() else None)
    return value if isinstance(value, bytes) and value and kind is Path else None


def _fill_pattern(pattern: str, record: dict[str, Any]) -> str | None:
    """Fill the pattern of a file's name with a record's values; None if a value is not a text or a number."""
    values = {name: written(record.get(name)) for name, _ in FIELD.findall(pattern)}
    if not all(values.values()):
        return None
    return FIELD.sub(lambda found: values[found[1]].zfill(int(found[2] or 0)), pattern)


def _is_filled(name: str, value: Any) -> bool:
    """Check if a cell is filled; if not, another column with the same meaning is used."""
    return bool(strings(value)) if name in CAPTIONS else value is not None and value != []


def id_of(record: dict[str, Any], column: str | None, space: Any) -> str | None:
    """Get the id in a column of a record, qualified by the data set; 42 and "42" are equal. None if there is no id."""
    known = None if column is None else plain_id(record.get(column))
    return None if known is None else f"{_name_space(str(space))}/{known}"


@lru_cache(maxsize=256)
def _name_space(space: str) -> str:
    """Normalize the path of a data set, which a mixture may spell in two ways; keep any other name."""
    return of_path(space) if os.path.exists(space) else space


def right_choice(choices: list[str], answer: Any) -> int | None:
    """Find the number of the choice that an answer gives by its text, its number from 0 or its letter, else None.

    A list with one element stands for that element.
    """
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    number = answer if isinstance(answer, int) and not isinstance(answer, bool) else -1
    if isinstance(answer, str):
        word = answer.strip()
        letter = word.strip("(). ").upper()
        if word in choices:
            number = choices.index(word)
        elif re.fullmatch(r"[0-9]{1,3}(?:\.0)?", word):  # "2.0" is from tables with gaps
            number = int(word.partition(".")[0])
        elif len(letter) == 1:
            number = LETTERS.find(letter)
    return number if 0 <= number < len(choices) else None


def strings(value: Any, numbers: bool = False) -> list[str]:
    """Extract the texts from a value: a text, a list, or an object with a text or a list of texts.

    A printed list of texts, as in tables, is parsed, and bytes are decoded. Half of a surrogate pair, which tokenizers
    refuse, becomes "?".

    Args:
        numbers: convert numbers to texts, and keep empty texts unless all are empty, since each of ten people's
            answers counts a tenth.
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
    return [without_halves(text) for text in texts if isinstance(text, str)]


def without_halves(value: Any) -> Any:
    """A text with "?" in place of halves of surrogate pairs, which no file in UTF-8 can hold; else the value itself."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def written(value: Any) -> str:
    """Convert a number to text (3.0 to "3"), keep a text, and return an empty text for anything else."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    known = isinstance(value, str | int | float) and not isinstance(value, bool) and value == value  # NaN is not
    return str(value) if known else ""


def columns_of(record: Any) -> str:
    """Describe the columns of a record, for a message about a missing one."""
    names = ", ".join(map(str, record)) if isinstance(record, dict) else ""
    return f"its columns are {names[:300]}" if names else "it has no columns"


def _find_first(wanted: Iterable[str], names: Collection[str]) -> str | None:
    return next((name for name in wanted if name in names), None)


def _find_letters(names: Collection[str]) -> list[str] | None:
    """Find columns that are named A, B and so on without a gap, else None."""
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
    """Decode an image in base64, also after `data:image/png;base64,`; None if the text may be a path."""
    bare = text.partition(";base64,")[2] if text.startswith("data:") else text
    bare = bare.strip().replace("\r", "").replace("\n", "")
    if not bare.startswith(STARTS) or not BASE64.fullmatch(bare):
        return None
    try:
        return base64.b64decode(bare, validate=True)
    except binascii.Error:
        return None


def _holds_picture(value: Any) -> bool:
    """Check if a cell holds an image, which is not kept in `facts`."""
    if isinstance(value, list):
        return any(map(_holds_picture, value))
    if isinstance(value, dict):
        value = value.get("bytes")
    return isinstance(value, bytes) or (isinstance(value, str) and _decode_base64(value) is not None)
