"""`qformer eval --bench mmvp`: both photos of a pair must be answered, read in three ways and asked in three.

A reply is read by `parse_choice`; the likelier option by its loss is a second answer, without any reading; and where a
grader has judged the replies, as GPT-4 did for the original, its verdicts are a third.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from qformer.evaluation.benchmarks import ALL, AskOptions, Benchmark, Item, Measured, Record, likeliest, new_item
from qformer.evaluation.choice import choice_losses
from qformer.evaluation.mmvp import graded, pairs_right, parse_choice
from qformer.llm.prompts import wording
from qformer.metrics.proportions import share_interval
from qformer.mmvp import folder
from qformer.mmvp.folder import CORRECTIONS, PUBLISHED, WAYS
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from qformer.data.base import Source
    from qformer.evaluation.benchmarks import ImageItems
    from qformer.model.vision_language import VisionLanguageModel
    from qformer.types import Sample, Tiles

PARSER, LIKELIER, GRADER, PEOPLE = "parser", "likelier", "grader", "people"
THE_MODEL = "the model, the same pairs"
NO_GRADES = "a grader must judge the replies; --submission writes them, and --data grades=FILE has a verdict a line"


class Mmvp(Benchmark):
    """Questions with two options about pairs of photos."""

    source = "mmvp"
    beside: ClassVar[tuple[str, ...]] = ("patterns", "human", "grades")
    columns: ClassVar[tuple[str, ...] | None] = ("asked", "pattern")  # in which both questions of a pair are alike

    def __init__(self) -> None:
        self.person: dict[int, str | None] = {}
        self.verdicts: dict[int, bool] = {}
        self.is_published = False
        self.unfinished = ""

    def items(self, source: Source, limit: int | None = None) -> tuple[list[ImageItems], list[Record]]:
        """As of any benchmark; a person's answers and a grader's verdicts are kept.

        Raises:
            UsageError: the source is another one, or a file of answers cannot be used.
        """
        if not isinstance(source, folder.Mmvp):
            raise UsageError("mmvp reads a folder in MMVP's layout; give --data path=FOLDER and no name")
        self.person = source.person()
        self.is_published = source.is_published
        finished = len(source.questions) // 2
        self.unfinished = folder.tell_unfinished(source.unfinished, finished) if source.unfinished else ""
        listed, skipped = super().items(source, limit)
        asked = sum(item.facts["asked"] == PUBLISHED for one in listed for item in one.items)
        self.verdicts = {number: graded(reply) for number, reply in source.verdicts(asked).items()}
        return listed, skipped

    def item(self, sample: Sample, place: int) -> Item:
        """A question in one way of asking; the right option is what is accepted."""
        row, way = sample.facts["row"], sample.facts["asked"]
        item = new_item(sample, place, row)
        item.id = str(row) if way == PUBLISHED else f"{row} {way}"
        item.question, item.accepted = sample.question or "", sample.answers
        return item

    def predict(
        self, model: VisionLanguageModel, tiles: Tiles, items: Sequence[Sequence[Item]], ask: AskOptions
    ) -> list[Record]:
        """Let the model answer: what is `said`, with room for a sentence, and the `losses` of both options."""
        seen = model.prefix(tiles, [[item.question for item in group] for group in items])
        words = wording("dialogue", ask.preset, model.llm.wording)
        flat = [item for group in items for item in group]
        prompts = [(ask.prompt or words.template).replace("{}", item.question) for item in flat]
        ids = model.llm.generate(*seen, prompts, **seen.placing | words.generate | dict(ask.decoding))
        losses = choice_losses(model, seen, prompts, [item.facts["options"] for item in flat])
        said = model.llm.decode(ids)
        return [{"said": text, "losses": sums} for text, (sums, _) in zip(said, losses, strict=True)]

    def score(self, items: Sequence[Item], records: Sequence[Record], by: str | None, lemmas: bool) -> Measured:
        """Shares of pairs of which both are right, with 95 % intervals; pairs that lack an answer are left out.

        `parser` and `likelier` are the two readings, `grader` a third where there are verdicts. `single` is the share
        of single questions that the parser finds right, `unread` of replies in which it finds no choice. `people` is
        the share of those pairs that a person has answered.
        """
        rows = [_Answer.of(item, record) for item, record in zip(items, records, strict=True)]
        measured = Measured({}, [float(row.said == row.answer) for row in rows])
        measured.notes += [self.unfinished] if self.unfinished else []
        ways = {way: _pairs([row for row in rows if row.way == way]) for way in WAYS}
        asked, said = ways[PUBLISHED], [row for row in rows if row.way == PUBLISHED]
        if not asked:
            measured.missing["pair accuracy"] = "no pair has both of its photos answered"
            return measured
        measured.total = self._measure(measured, ALL, asked)
        del measured.total["count"]
        measured.total["single"] = sum(row.said == row.answer for row in said) / len(said)
        measured.total["unread"] = sum(row.said is None for row in said) / len(said)
        if not self.verdicts:
            measured.missing[GRADER] = NO_GRADES
        parts = {"asked": ways, "pattern": _by_pattern(asked)}
        if self.is_published:
            parts["answers"] = {"published": asked, "corrected": [row.corrected() for row in asked]}
        for column, values in parts.items():
            found = {name: self._measure(measured, f"{column}: {name}", own) for name, own in values.items() if own}
            measured.groups |= {column: found} if found else {}
        self._measure_people(measured, asked)
        return measured

    def _measure_people(self, measured: Measured, asked: Sequence[_Answer]) -> None:
        """The row of people, and where they have not answered all pairs that of the model on the same ones."""
        if not self.person:
            return
        told = self._told(asked)
        if not told:
            measured.missing[PEOPLE] = "they have answered both questions of no pair that the model has answered"
            return
        label = f"answered by: {PEOPLE}"
        found = self._measure(measured, label, told)
        rows = {PEOPLE: {"count": found["count"], PEOPLE: found.pop(PEOPLE)}}
        ends = measured.intervals.pop(label)
        measured.intervals[label] = {PEOPLE: ends.pop(PEOPLE)}
        if len(told) < len(asked):
            rows[THE_MODEL] = found
            measured.intervals[f"answered by: {THE_MODEL}"] = ends
            part = f"{len(told) // 2} of {len(asked) // 2}"
            measured.notes.append(f"people answered {part} pairs; their shares are of these, by pattern too")
        measured.groups["answered by"] = rows

    def _told(self, rows: Sequence[_Answer]) -> list[_Answer]:
        """Pairs of which a person has answered both questions."""
        return _pairs([row for row in rows if row.number in self.person])

    def _measure(self, measured: Measured, label: str, rows: Sequence[_Answer]) -> dict[str, float]:
        """Shares of pairs by each reading; their intervals are kept under the label."""
        right = {
            PARSER: [row.said == row.answer for row in rows],
            LIKELIER: [row.likelier == row.answer for row in rows],
        }
        if rows[0].way == PUBLISHED:  # as people and graders are asked
            if self.verdicts and not label.startswith("answers"):
                right[GRADER] = [self.verdicts[row.number] for row in rows]
            if told := self._told(rows):
                right[PEOPLE] = [self.person[row.number] == row.answer for row in told]
        shares = {}
        for kind, each in right.items():
            both = pairs_right(each)
            shares[kind] = sum(both) / len(both)
            measured.intervals.setdefault(label, {})[kind] = share_interval(sum(both), len(both))
        return {"count": len(rows), **shares}

    def submit(self, items: Sequence[Item], records: Mapping[str, Record]) -> list[Record] | Record:
        """The answers as `gpt_grader.py` takes them, of the questions as they are published."""
        return [
            {
                "question_id": item.number,
                "prompt": item.question,
                "answer": f"({item.facts['answer']})",
                "response": records.get(item.id, {}).get("said", ""),
            }
            for item in items
            if item.facts["asked"] == PUBLISHED
        ]

    def submission(self, items: Sequence[Item], records: Mapping[str, Record]) -> str:
        """JSON lines."""
        return "".join(json.dumps(row) + "\n" for row in self.submit(items, records))


@dataclass(frozen=True)
class _Answer:
    """An answered question: what is right, what was said, and which option is likelier, each `a`, `b` or None."""

    number: int
    way: str
    pattern: str | None
    answer: str
    said: str | None
    likelier: str | None

    @staticmethod
    def of(item: Item, record: Record) -> _Answer:
        facts = item.facts
        said = parse_choice(record["said"], facts["options"])
        likelier = "ab"[likeliest(record["losses"])]
        return _Answer(facts["row"], facts["asked"], facts.get("pattern"), facts["answer"], said, likelier)

    def corrected(self) -> _Answer:
        return replace(self, answer=CORRECTIONS.get(self.number, self.answer))


def _pairs(rows: Sequence[_Answer]) -> list[_Answer]:
    """Both answers of each pair that has both, one behind the other."""
    known = {row.number: row for row in rows}
    firsts = [number for number in sorted(known) if number % 2 and number + 1 in known]
    return [known[number + place] for number in firsts for place in (0, 1)]


def _by_pattern(rows: Sequence[_Answer]) -> dict[str, list[_Answer]]:
    found: dict[str, list[_Answer]] = defaultdict(list)
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        pattern = second.pattern if first.pattern is None else first.pattern  # a table may name it once
        if pattern is not None:
            found[pattern] += [first, second]
    return found
