"""The contract of a benchmark of `qformer eval`, the records that it works on, and the table of all of them.

A benchmark is a small class: what it asks about a sample (`item`), what a model says to that (`predict`), what this is
worth (`score`), and the file that a server takes (`submit`). Adding one is a file and a line of `BENCHMARKS`; somebody
else's is typed as `--bench module:Class`. Those that come with the project are in `qformer.evaluation.tasks`.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from qformer import lookup
from qformer.data.base import indices
from qformer.data.held_out import ImageRecord
from qformer.files.logs import printable
from qformer.identity import plain_id, stamp
from qformer.types import BadSample, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from qformer.data.base import Source
    from qformer.metrics.shares import Score
    from qformer.types import Sample, Tiles

BENCHMARKS: dict[str, Any] = {
    "retrieval": "qformer.evaluation.retrieval:Retrieval",
    "caption": "qformer.evaluation.tasks:Caption",
    "vqa": "qformer.evaluation.tasks:Vqa",
    "gqa": "qformer.evaluation.tasks:Gqa",
    "choice": "qformer.evaluation.tasks:MultipleChoice",
    "statement": "qformer.evaluation.tasks:Statement",
    "naturalbench": "qformer.suites.eyes:NaturalBench",
    "cvbench": "qformer.suites.eyes:CvBench",
    "blindtest": "qformer.suites.eyes:BlindTest",
    "hallusionbench": "qformer.suites.eyes:HallusionBench",
    "docvqa": "qformer.suites.documents:DocVqa",
    "chartqa": "qformer.suites.documents:ChartQa",
    "ocrbench": "qformer.suites.documents:OcrBench",
    "mmvp": "qformer.suites.mmvp_questions:Mmvp",
    "mmvp-vlm": "qformer.suites.mmvp_statements:MmvpVlm",
}
#: Columns by which results are told apart where the data have them.
COLUMNS = ("domain", "question_type", "answer_type", "structural", "semantic", "task", "type", "kind")
#: Where records say what a submission calls them, the likeliest first.
QUESTION_IDS = ("question_id", "questionId", "qid", "id")
ALL = "all"  # label of the first row of the table
VIZWIZ = "VizWiz_"  # in front of names of images, which are all that its questions are known by
Record = dict[str, Any]


@dataclass
class Item:
    """One thing to say about an image.

    Attributes:
        id: of the record in the file of predictions; its own where it has one. number: of the submission file.
        question: as the model reads it; empty for captions.
        accepted: reference captions, or accepted answers; none where they are not published.
        choices, right: answers to choose from, and the number of the right one (None where it is not published).
        facts: what the record says besides.
        image: name and `qformer.identity.stamp` of its image, for `digest`.
        has_id: whether `number` is of the data, not the place in them.
    """

    id: str
    number: Any
    question: str = ""
    accepted: list[str] = field(default_factory=list)
    choices: list[str] = field(default_factory=list)
    right: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    image: str = ""
    has_id: bool = True

    @property
    def digest(self) -> str:
        """Digest of everything that a prediction depends on, so that it is never reused for another question."""
        asked = json.dumps([self.image, self.question, self.choices])
        return hashlib.sha256(asked.encode()).hexdigest()[:12]

    @property
    def known(self) -> bool:
        """True if an answer to it can be scored."""
        return bool(self.accepted) or self.right is not None


@dataclass
class ImageItems:
    """An image with what is asked about it."""

    image: ImageRecord
    items: list[Item] = field(default_factory=list)


@dataclass(frozen=True)
class AskOptions:
    """Options of asking a model.

    Attributes:
        preset: prompt and decoding of answers, one of `qformer.llm.prompts.PRESETS`.
        prompt: for captions, the text that they go on from; else the whole prompt, `{}` in place of the question.
        decoding: fields of `GenerateConfig` that differ from the task's; choices are compared, not written.
    """

    preset: str = "paper"
    prompt: str | None = None
    decoding: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Measured:
    """Scores of the answers.

    Attributes:
        total: of all, by name of the score; shares in [0, 1] but for captions, where they are as usual.
        each: of every item the score that counts most.
        groups: by column, then by its value: `count`, and scores as in `total`.
        missing: scores that could not be computed, with the reason.
        intervals: by row of the table, `all` or `column: value`, the 95 % interval of each score that has one.
        notes: sentences below the table, such as a count that is published in place of a share.
    """

    total: dict[str, float]
    each: list[float]
    groups: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    intervals: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Benchmark(ABC):
    """Contract of a benchmark, `qformer eval --bench NAME`.

    Attributes:
        stage: whose model it needs.
        merges: whether records of one image are one item, whose `accepted` are those of all of them.
        writes: whether the model writes texts, so that beams mean something. False where it compares given ones.
        lemmatizes: whether answers may be compared by their lemmas.
        truth: what is lacking where nothing can be scored.
        source: data source that is meant where none is named.
        beside: options of `--data` on which no prediction depends.
        judged: whether a language model may judge the answers, `--server`.
        columns: those by which results can be told apart, `--by`; None for any.
    """

    stage: ClassVar[Literal["stage1", "stage2"]] = "stage2"
    merges: ClassVar[bool] = False
    writes: ClassVar[bool] = True
    lemmatizes: ClassVar[bool] = False
    truth: ClassVar[str] = "answers"
    source: ClassVar[str] = "jsonl"
    beside: ClassVar[tuple[str, ...]] = ()
    judged: ClassVar[bool] = False
    columns: ClassVar[tuple[str, ...] | None] = None

    @abstractmethod
    def item(self, sample: Sample, place: int) -> Item:
        """Make the item of a sample, the record at this place of the data; `new_item` makes an empty one.

        Raises:
            BadSample: it cannot be asked about. The record is skipped and counted.
        """

    @abstractmethod
    def predict(self, model: Any, tiles: Tiles, items: Sequence[Sequence[Item]], ask: AskOptions) -> list[Record]:
        """Predict each item, image by image, without gradients.

        Args:
            model: of `stage`: an `ImageTextModel` or a `VisionLanguageModel`. tiles: of B images.
            items: those of each image, which is to be encoded once.

        Returns:
            For each item plain data, since they are kept as JSON: `said`, or the `losses` of its choices with their
            `tokens`, and what else `score` reads.

        Raises:
            TooLong: an image with its question does not fit the positions of the language model.
        """

    @abstractmethod
    def score(self, items: Sequence[Item], records: Sequence[Record], by: str | None, lemmas: bool) -> Measured:
        """Score the records, each of an item that can be scored (`Item.known`).

        Args:
            by: a further column by which results are told apart. lemmas: compare lemmas of the answers.
        """

    def judge(
        self, items: Sequence[Item], records: Sequence[Record], ask: Callable[[list[str]], list[str]], name: str
    ) -> None:
        """Have answers judged before they are scored, where `judged`; `score` of the same records uses the verdicts.

        Args:
            ask: replies of a language model to as many prompts. name: of that model, for notes.
        """
        raise UsageError("a judge is for benchmarks whose authors have one, such as hallusionbench")

    def submit(self, items: Sequence[Item], records: Mapping[str, Record]) -> list[Record] | Record:
        """All items in the form that the benchmark's server takes, with an empty answer where there is no record."""
        said = all_said(items, records)
        return [{"question_id": item.number, "answer": text} for item, text in zip(items, said, strict=True)]

    def submission(self, items: Sequence[Item], records: Mapping[str, Record]) -> str:
        """Text of the file that the server takes, JSON of `submit`."""
        return json.dumps(self.submit(items, records))

    def check(self, ask: AskOptions) -> None:
        """Look before hours of work for what would stop them.

        Raises:
            UsageError: an option cannot be used, or a package is missing.
        """
        if ask.prompt is not None and "{}" not in ask.prompt:
            raise UsageError(f"--prompt is '{ask.prompt}'; write {{}} where the question belongs")

    def items(self, source: Source, limit: int | None = None) -> tuple[list[ImageItems], list[Record]]:
        """The first `limit` images with all that is asked about them, and the records that cannot be used.

        Records of one image stand together.

        Raises:
            UsageError: no record can be used.
        """
        listed: dict[Any, ImageItems] = {}
        skipped: list[Record] = []
        taken: set[str] = set()
        for place, index in enumerate(indices(source)):
            try:
                sample = source[index]
                item = self.item(sample, place)
            except BadSample as bad:
                skipped.append({"index": str(index), "kind": bad.kind, "detail": bad.detail})
                continue
            if sample.image_id not in listed:
                if len(listed) == limit:
                    if getattr(source, "apart", False):  # a drawn one, which need not be walked to its end
                        break
                    continue
                listed[sample.image_id] = ImageItems(ImageRecord(index, sample.key, []))
            asked = listed[sample.image_id]
            if self.merges and asked.items:
                asked.items[0].accepted += item.accepted
                continue
            while item.id in taken:  # two records of one id: both are asked, under two names
                item.id += "'"
            taken.add(item.id)
            asked.items.append(item)
        if not listed:
            raise UsageError(f"none of the {len(skipped)} records could be used ({skipped[:3]}); check --data")
        return list(listed.values()), skipped


def choose(name: str) -> Benchmark:
    """The benchmark of that name, or somebody's own as `module:Class`: the name is typed, never read from a file.

    Raises:
        UsageError: there is none, or it is something else.
    """
    found = lookup.find(BENCHMARKS, name, "benchmark", own=True)
    if not (isinstance(found, type) and issubclass(found, Benchmark)):
        raise UsageError(f"'{name}' is no benchmark; give a class made from qformer.evaluation.benchmarks.Benchmark")
    try:
        made: Benchmark = found()
    except TypeError as error:  # something of the contract is missing, or must be given
        raise UsageError(f"the benchmark '{name}' cannot be made ({error}); give its class what is missing") from error
    return made


def new_item(sample: Sample, place: int, number: str | int | None = None) -> Item:
    """An item about a sample that asks nothing yet; without a number of its own it has its place in the data."""
    name = PurePath(sample.image).name if isinstance(sample.image, PurePath) else ""
    shown = place if number is None else number
    image = f"{name} {stamp(sample.image)}"
    return Item(str(shown), shown, facts=sample.facts, image=image, has_id=number is not None)


def question_id(sample: Sample) -> str | int | None:
    """Id of a question in a submission; VizWiz uses the name of its image."""
    facts = {key: known for key, value in sample.facts.items() if (known := plain_id(value)) is not None}
    name = PurePath(sample.image).name if isinstance(sample.image, PurePath) else ""
    return next((facts[key] for key in QUESTION_IDS if key in facts), name if name.startswith(VIZWIZ) else None)


@torch.no_grad()
def predict(
    bench: Benchmark, model: Any, tiles: Tiles, items: Sequence[Sequence[Item]], ask: AskOptions
) -> list[Record]:
    """The records of `Benchmark.predict`, each with the `id` of its item, and the item's digest as `of`."""
    flat = [item for group in items for item in group]
    said = bench.predict(model, tiles, items, ask)
    return [{"id": item.id, "of": item.digest, **record} for item, record in zip(flat, said, strict=True)]


def said_of(item: Item, record: Record) -> str:
    """The answer: what was generated, or the likeliest choice."""
    return item.choices[likeliest(record["losses"])] if item.choices else record["said"]


def all_said(items: Sequence[Item], records: Mapping[str, Record]) -> list[str]:
    """The answer to each item, empty to those without a record."""
    return [said_of(item, records[item.id]) if item.id in records else "" for item in items]


def likeliest(losses: Sequence[float]) -> int:
    """The number of the choice that costs least."""
    return min(range(len(losses)), key=losses.__getitem__)


def mean_scores(items: Sequence[Item], shares: Mapping[str, list[float]], by: str | None) -> Measured:
    """The means of what each item earned in [0, 1], by name of the score; the first score counts most."""

    def means(rows: Sequence[int]) -> dict[str, float]:
        return {name: sum(each[row] for row in rows) / len(rows) for name, each in shares.items()}

    return Measured(means(range(len(items))), next(iter(shares.values())), by_column(items, by, means))


def measure_scores(
    items: Sequence[Item], scores: Mapping[str, Score], each: list[float], by: str | None, columns: Sequence[str]
) -> Measured:
    """Means of scores with their intervals, of all items and by value of each of `columns` and `by`.

    Args:
        scores: by name; their units count rows of `items`.
        each: of every item the score that counts most.
    """
    measured = Measured({}, each)

    def means(rows: Sequence[int], label: str) -> dict[str, float]:
        own = frozenset(rows)
        parts = {name: score.within(own) for name, score in scores.items()}
        found = {name: mean for name, part in parts.items() if (mean := part.mean) is not None}
        measured.intervals[label] = {name: ends for name in found if (ends := parts[name].interval()) is not None}
        return found

    measured.total = means(range(len(items)), ALL)
    for column, values in rows_by_column(items, by, columns).items():
        measured.groups[column] = {
            value: {"count": len(own)} | means(own, f"{column}: {value}") for value, own in values.items()
        }
    for name in [name for name in scores if name not in measured.total]:
        lacking = ", ".join(map(str, scores[name].lacking))
        measured.missing[name] = f"the data have nothing of {lacking}" if lacking else "nothing of it is complete"
    return measured


def by_column(
    items: Sequence[Item], by: str | None, score: Callable[[list[int]], dict[str, float]]
) -> dict[str, dict[str, dict[str, float]]]:
    """Groups as in `Measured`: for each of `COLUMNS`, and `by`, the score of the rows that have each of its values."""
    return {
        column: {value: {"count": len(own)} | score(own) for value, own in values.items()}
        for column, values in rows_by_column(items, by).items()
    }


def rows_by_column(
    items: Sequence[Item], by: str | None, columns: Sequence[str] = COLUMNS
) -> dict[str, dict[str, list[int]]]:
    """Rows of the items that have each value of each of `columns`, and of `by`; without columns of one value."""
    groups: dict[str, dict[str, list[int]]] = {}
    for column in [*columns, *([by] if by and by not in columns else [])]:
        rows: dict[str, list[int]] = defaultdict(list)
        for row, item in enumerate(items):
            if isinstance(item.facts.get(column), str | int | float | bool):
                rows[printable(str(item.facts[column]))].append(row)
        if rows and (len(rows) > 1 or column == by):
            groups[column] = dict(sorted(rows.items()))
    return groups
