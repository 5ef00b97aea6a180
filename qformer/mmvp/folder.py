"""MMVP and MMVP-VLM (Tong et al. 2024, arXiv:2401.06209) in their published folders.

MMVP asks the same of two photos that CLIP takes for one; MMVP-VLM has the same photos with a statement each. Layouts
and prompts are those of tsb0601/MMVP: `evaluate_mllm.py` and `evaluate_vlm.py`.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from qformer.canvases import pairs
from qformer.formats import SUFFIXES
from qformer.metrics.choice_reply import parse_choice, split_options
from qformer.metrics.choice_words import OTHER
from qformer.mmvp.table import AskedRow, broken_row, is_number, read_asked, read_column, read_rows
from qformer.types import LeftOut, Sample, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

TABLE = "Questions.csv"
IMAGES = ("MMVP Images", "MMVP_Images")
VLM_IMAGES = ("MLLM_VLM Images", "MMVP_VLM_Images", "MMVP_VLM Images", "MLLM_VLM_Images")
#: Patterns in the order of MMVP-VLM's file, in the words of `evaluate_vlm.py`.
PATTERNS = tuple(pairs.PATTERNS.values())
#: Types of MMVP-VLM's table, and their patterns.
KINDS = {
    "orientation": "Orientation and Direction",
    "presence": "Presence of Specific Features",
    "state": "State and Condition",
    "quantity": "Quantity and Count",
    "spatial": "Positional and Relational Context",
    "color": "Color and Appearance",
    "structural character": "Structural Characteristics",
    "text": "Texts",
    "camera perspective": "Viewpoint and Perspective",
}
#: Rows, from 1, whose published answer is wrong (tsb0601/MMVP#30, EvolvingLMMs-Lab/lmms-eval#1018), and the right one.
CORRECTIONS = {100: "a", 280: "a"}
SHOWN = 3  # missing images that a message names


@dataclass(frozen=True)
class Question:
    """A question about a photo, with two options.

    Attributes:
        number: of the row and the photo, from 1; 2n - 1 and 2n are a pair.
        question, options: as published, `Is the door open?` and `(a) Open (b) Closed`.
        answer: `a` or `b`.
        image: the photo.
        pattern: one of `PATTERNS` where the file has such a column, as that of `qformer.canvases.pairs.write_pairs`.
    """

    number: int
    question: str
    options: str
    answer: str
    image: Path
    pattern: str | None = None

    @property
    def prompt(self) -> str:
        """Question and options as the original asks them."""
        return f"{self.question} {self.options}"

    @property
    def choices(self) -> tuple[str, str]:
        """Texts of the options, `("Open", "Closed")`."""
        return split_options(self.options)

    def swapped(self) -> Question:
        """The same question with its options in the other order."""
        first, second = self.choices
        return replace(self, options=f"(a) {second} (b) {first}", answer=OTHER[self.answer])


PUBLISHED, SWAPPED, REWORDED = "as published", "options swapped", "reworded"
#: Questions of the rows in `CORRECTIONS`, by which MMVP itself is told from other folders of its layout.
CORRECTED_ROWS = {100: "tusks", 280: "standing or sitting"}
#: Ways of asking: the question whose options count, and its prompt.
WAYS: dict[str, Callable[[Question], tuple[Question, str]]] = {
    PUBLISHED: lambda asked: (asked, asked.prompt),
    SWAPPED: lambda asked: (asked.swapped(), asked.swapped().prompt),
    REWORDED: lambda asked: (asked, f"Choose the option that fits the picture: {asked.options}. {asked.question}"),
}


@dataclass(frozen=True)
class Statement:
    """A statement that is true of its photo, and not of the other one of the pair.

    Attributes:
        number: of the photo, from 1; it is the first of its pair where odd.
        kind: of the pattern, as the file calls it.
        text: the statement.
        image: the photo.
    """

    number: int
    kind: str
    text: str
    image: Path

    @property
    def prompt(self) -> str:
        """Text that is compared with the photos."""
        return f"a photo of {self.text}"


def read_mmvp(folder: str | Path, corrected: bool = False) -> list[Question]:
    """Read MMVP's folder: `Questions.csv`, and `MMVP Images/N.jpg` for row N.

    Columns are `Question`, `Options` and `Correct Answer` in any order and case; others, as `Index`, may be there.
    Pairs of which neither row is filled in are left out with a warning, `LeftOut`, as on a sheet that is half done.

    Args:
        corrected: take the right answers of rows 100 and 280. Later versions of lmms-eval turn 99 and 279, too.

    Raises:
        UsageError: a file or an image is missing, the table is broken, or one row of a pair is not filled in.
    """
    questions, unfinished = read_finished(folder, corrected)
    if unfinished:
        warnings.warn(tell_unfinished(unfinished, len(questions) // 2), LeftOut, stacklevel=2)
    return questions


def read_finished(folder: str | Path, corrected: bool = False) -> tuple[list[Question], int]:
    """The questions of `read_mmvp`, and how many pairs are left out, unwarned. Raises UsageError: see there."""
    folder = Path(folder)
    table = _table(folder)
    images = _images(_subfolder(folder, IMAGES))
    rows = read_asked(table)
    blank = {row.number for row in rows if row.is_blank}
    _check_pairs(table, rows, blank)
    asked = [row for row in rows if row.number not in blank]
    questions = []
    missing = []
    for row in asked:
        right = CORRECTIONS.get(row.number) if corrected else None
        image = images.get(str(row.number))
        missing += [f"{row.number}.jpg"] if image is None else []
        told = (row.question, row.options, right or row.letter(table), image or folder, row.pattern or None)
        questions.append(Question(row.number, *told))
    if rows and not asked:
        raise UsageError(f"'{table}' has {len(rows)} rows, and none is filled in; write the questions of a pair first")
    _check(table, questions, missing)
    if len(rows) % 2 and asked[-1] is rows[-1]:
        raise broken_row(table, len(rows), "it is the last one, and its pair has no other; give two rows for each pair")
    return questions, len(blank) // 2


def tell_unfinished(pairs: int, finished: int) -> str:
    """A sentence about the pairs of a table that nobody has filled in."""
    return f"{pairs} of {pairs + finished} pairs are not filled in yet and are left out"


def _check_pairs(table: Path, rows: Sequence[AskedRow], blank: set[int]) -> None:
    """Refuse a pair of which one row is filled in and the other is not."""
    for first, second in zip(rows[::2], rows[1::2], strict=False):
        if (first.number in blank) != (second.number in blank):
            empty, other = (first, second) if first.number in blank else (second, first)
            raise broken_row(
                table, empty.number, f"it is empty, and row {other.number} of its pair is not; fill both in, or neither"
            )


def read_mmvp_vlm(folder: str | Path) -> list[Statement]:
    """Read MMVP-VLM's folder: `Questions.csv` with id, type and statement, and an image N.jpg in a folder of its type.

    The images are in `MLLM_VLM Images` (the script) or `MMVP_VLM_Images` (the page); types and folders are compared
    without case, and `_` counts as a space. Two rows are a pair.

    Raises:
        UsageError: a file or an image is missing, or the table is broken.
    """
    folder = Path(folder)
    table = _table(folder)
    inside = _subfolder(folder, VLM_IMAGES)
    images = {_plain(place.name): _images(place) for place in sorted(inside.iterdir()) if place.is_dir()}
    rows = read_rows(table)
    next(rows, None)
    statements = []
    missing = []
    for number, row in enumerate(rows, start=1):
        if len(row) < 3 or not is_number(row[0]) or not row[2].strip():
            raise broken_row(table, number, "expected a number, a type and a statement")
        id_, kind, text = int(row[0]), row[1].strip(), row[2].strip()
        image = images.get(_plain(kind), {}).get(str(id_))
        missing += [f"{kind}/{id_}.jpg"] if image is None else []
        statements.append(Statement(id_, kind, text, image or folder))
    _check(table, statements, missing)
    for first, second in zip(statements[::2], statements[1::2], strict=False):
        low, high = sorted((first.number, second.number))
        if first.kind != second.kind or low % 2 == 0 or high != low + 1:
            told = f"'{table}' has no pair in {first.number} and {second.number}"
            raise UsageError(f"{told}; give two rows of one type, an odd number and the next")
    if len(statements) % 2:
        raise UsageError(f"'{table}' has {len(statements)} statements; expected pairs, two rows each")
    return statements


@dataclass(frozen=True)
class Mmvp:
    """Source of the questions of a folder in MMVP's layout, each in the three `WAYS`.

    Attributes:
        path: the folder, see `read_mmvp`.
        patterns: CSV with the columns Index (of the row) and Pattern; or the folder of MMVP-VLM, whose patterns are
            taken for equal files. MMVP itself does not say which question is of which pattern.
        human: CSV with a person's Answer of each Index; or the question file with `Correct Answer` filled in.
        grades: text with a grader's reply to each row that is asked, one a line, as `gpt_grader.py` gets them.
        unfinished: how many pairs are left out since nobody has filled them in.
    """

    path: str
    patterns: str | None = None
    human: str | None = None
    grades: str | None = None
    questions: list[Question] = field(init=False, repr=False, compare=False)
    pattern_of: dict[int, str] = field(init=False, repr=False, compare=False)
    unfinished: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        questions, unfinished = read_finished(self.path)
        patterns = {one.number: one.pattern for one in questions if one.pattern is not None}
        if self.patterns is not None:
            patterns = read_patterns(Path(self.patterns), questions)
        object.__setattr__(self, "questions", questions)
        object.__setattr__(self, "pattern_of", patterns)
        object.__setattr__(self, "unfinished", unfinished)

    def __len__(self) -> int:
        return len(WAYS) * len(self.questions)

    def __getitem__(self, index: int) -> Sample:
        row, way = index // len(WAYS), list(WAYS)[index % len(WAYS)]
        question, prompt = WAYS[way](self.questions[row])
        facts = {"row": question.number, "asked": way, "options": list(question.choices), "answer": question.answer}
        if question.number in self.pattern_of:
            facts["pattern"] = self.pattern_of[question.number]
        right = question.choices["ab".index(question.answer)]
        key = f"{question.image} ({way})"
        return Sample(question.image, key, question=prompt, answers=[right], facts=facts)

    @property
    def is_published(self) -> bool:
        """True if these are MMVP's own questions, two of whose answers are known to be wrong."""
        asked = {one.number: one.question.lower() for one in self.questions}
        return all(words in asked.get(number, "") for number, words in CORRECTED_ROWS.items())

    def person(self) -> dict[int, str | None]:
        """Read what a person answered, by number; None where nothing can be read."""
        return {} if self.human is None else read_answers(Path(self.human), self.questions)

    def verdicts(self, asked: int | None = None) -> dict[int, str]:
        """A grader's reply to each row that is asked, by its number; empty lines at the end may be there.

        Args:
            asked: how many rows are, if only the first ones; replies to all of them are taken, too.

        Raises:
            UsageError: there are more or fewer than such rows.
        """
        if self.grades is None:
            return {}
        try:
            text = Path(self.grades).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"'{self.grades}' cannot be read ({error}); give a text with a verdict a line") from error
        lines = text.removesuffix("\n").split("\n") if text else []
        every = len(self.questions)
        counts = sorted({every, every if asked is None else asked})
        told = next((count for count in counts if len(lines) >= count and not "".join(lines[count:]).strip()), None)
        if told is None:
            each = " or ".join(map(str, counts))
            raise UsageError(f"'{self.grades}' has {len(lines)} lines; give a verdict for each of {each}")
        return {one.number: line for one, line in zip(self.questions, lines[:told], strict=False)}


def name_kinds(statements: Sequence[Statement]) -> dict[str, str]:
    """The pattern of each kind: by its name; in a file of nine, kinds of other names are the rest of them in its order.

    Other kinds keep their names.
    """
    kinds = list(dict.fromkeys(one.kind for one in statements))
    known = KINDS | {_plain(name): name for name in PATTERNS}
    names = {kind: known[_plain(kind)] for kind in kinds if _plain(kind) in known}
    others = [kind for kind in kinds if kind not in names]
    rest = [name for name in PATTERNS if name not in names.values()]
    fits = len(kinds) == len(PATTERNS) and len(rest) == len(others)
    return names | dict(zip(others, rest if fits else others, strict=True))


def read_patterns(path: Path, questions: Sequence[Question]) -> dict[int, str]:
    """Patterns by the number of the question, from a table, or from MMVP-VLM's folder by equal image files.

    Raises:
        UsageError: it cannot be read, or tells the pattern of none.
    """
    if path.is_dir():
        statements = read_mmvp_vlm(path)
        names = name_kinds(statements)
        kinds = {_digest(one.image): names[one.kind] for one in statements}
        found = {one.number: kinds.get(_digest(one.image), "") for one in questions}
    else:
        found = read_column(path, ("pattern",))
    known = {one.number: found[one.number] for one in questions if found.get(one.number)}
    if not known:
        raise UsageError(f"'{path}' tells the pattern of no question; give Index and Pattern, or MMVP-VLM's folder")
    return known


def read_answers(path: Path, questions: Sequence[Question]) -> dict[int, str | None]:
    """A person's answers by the number of the question; rows that were left empty are missing.

    Raises:
        UsageError: it cannot be read, or has no answer.
    """
    cells = read_column(path, ("answer", "correct answer"))
    told = {one.number: parse_choice(cells[one.number], one.options) for one in questions if cells.get(one.number)}
    if not told:
        raise UsageError(f"'{path}' answers no question; fill in (a) or (b) under Answer")
    return told


def _digest(image: Path) -> str:
    return sha256(image.read_bytes()).hexdigest()


def _table(folder: Path) -> Path:
    if not folder.is_dir():
        raise UsageError(f"no folder at '{folder}'; give the one that holds {TABLE} and the images")
    found = [file for file in sorted(folder.iterdir()) if file.name.lower() == TABLE.lower()]
    if not found:
        raise UsageError(f"'{folder}' has no {TABLE}; give the folder of the benchmark as it is published")
    return found[0]


def _subfolder(folder: Path, names: Sequence[str]) -> Path:
    known = {place.name.lower(): place for place in sorted(folder.iterdir()) if place.is_dir()}
    found = next((known[name.lower()] for name in names if name.lower() in known), None)
    if found is None:
        raise UsageError(f"'{folder}' has no folder '{names[0]}'; put the images there")
    return found


def _images(folder: Path) -> dict[str, Path]:
    """Files of images by their numbers; the ending may be in capitals."""
    files = [file for file in sorted(folder.iterdir()) if file.suffix.lower() in SUFFIXES]
    return {file.stem: file for file in files}


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").lower().split())


def _check(table: Path, read: Sequence[Question | Statement], missing: Sequence[str]) -> None:
    if not read:
        raise UsageError(f"'{table}' has no rows; give the table as it is published")
    if missing:
        some = ", ".join(missing[:SHOWN])
        raise UsageError(f"{len(missing)} of {len(read)} images of '{table}' are missing ({some}); put them there")
