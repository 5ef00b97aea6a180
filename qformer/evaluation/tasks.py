"""The benchmarks of what a language model says: how each is asked, and what its answers are worth.

caption     captions against reference captions (COCO, NoCaps)                  `score_captions`
vqa         open answers, each against what ten people said (VQAv2, OK-VQA)     `vqa.accuracy`
gqa         open answers that must be the one accepted (GQA)                    exact match
choice      the likeliest of given answers (A-OKVQA)                            accuracy
statement   is a sentence true of the image: the likelier of yes and no         accuracy
"""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from qformer.data.columns import ANSWERS, columns_of, right_choice, written
from qformer.data.questions import DIFFICULT
from qformer.data.texts import clean_question
from qformer.evaluation.benchmarks import (
    VIZWIZ,
    AskOptions,
    Benchmark,
    Item,
    Measured,
    Record,
    all_said,
    by_column,
    likeliest,
    mean_scores,
    new_item,
    question_id,
)
from qformer.evaluation.caption import require_scorers, score_captions
from qformer.evaluation.choice import choice_losses
from qformer.evaluation.vqa import PEOPLE, Rule, accuracy, is_vqav2, normalise_answer
from qformer.identity import plain_id
from qformer.llm.prompts import vqa_preset, vqa_prompt
from qformer.metrics.lemmas import lemmatize
from qformer.types import BadSample

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from qformer.connectors.base import Prefix
    from qformer.model.vision_language import VisionLanguageModel
    from qformer.types import Sample, Tiles

YES_NO = ("yes", "no")
TRUE = {"true": 0, "yes": 0, "1": 0, "entailment": 0, "false": 1, "no": 1, "0": 1, "contradiction": 1}
IMAGE_IDS = ("image_id", "img_id", "cocoid")
SECRET = ("-1", "-1.0")  # labels of test splits on the hub
COCO = re.compile(r"(?:COCO_\w+_)?(\d{12})")


class Caption(Benchmark):
    """Captions against reference captions, those of all records of an image."""

    merges = True
    truth = "captions"

    def item(self, sample: Sample, place: int) -> Item:
        """The captions of an image, which may be none."""
        item = new_item(sample, place, _image_number(sample))
        item.accepted = [caption for caption in sample.captions if caption.strip()]
        return item

    def predict(
        self, model: VisionLanguageModel, tiles: Tiles, items: Sequence[Sequence[Item]], ask: AskOptions
    ) -> list[Record]:
        """A caption as `said` of each image."""
        return [{"said": said} for said in model.generate(tiles, ask.prompt, **ask.decoding)]

    def score(self, items: Sequence[Item], records: Sequence[Record], by: str | None, lemmas: bool) -> Measured:
        """Scores as usual, not as shares; those of a group by its own references alone."""

        def part(rows: list[int]) -> dict[str, float]:
            said = [records[row]["said"] for row in rows]
            return score_captions(said, [items[row].accepted for row in rows], java=False).total

        scores = score_captions([record["said"] for record in records], [item.accepted for item in items])
        return Measured(scores.total, scores.each["CIDEr"], by_column(items, by, part), scores.missing)

    def submit(self, items: Sequence[Item], records: Mapping[str, Record]) -> list[Record] | Record:
        """COCO's form."""
        said = all_said(items, records)
        return [{"image_id": item.number, "caption": text} for item, text in zip(items, said, strict=True)]

    def check(self, ask: AskOptions) -> None:
        """Raises UsageError: the scorers are not installed."""
        require_scorers()


class OpenQuestion(Benchmark):
    """Questions that the model answers in its own words."""

    lemmatizes = True

    def item(self, sample: Sample, place: int) -> Item:
        """A question with its accepted answers. Raises BadSample: see `asked`; `no answer` that can be read."""
        item = asked(sample, place)
        item.accepted = [" ".join(answer.split()) for answer in sample.answers]
        unread = next((name for name in ANSWERS if _says(item.facts.get(name))), None)
        if unread is not None and not sample.answers:
            raise BadSample("no answer", f"{sample.key}: no text in '{unread}', {str(item.facts[unread])[:100]}")
        return item

    def predict(
        self, model: VisionLanguageModel, tiles: Tiles, items: Sequence[Sequence[Item]], ask: AskOptions
    ) -> list[Record]:
        """An answer as `said` to each question."""
        if ask.prompt is None:
            questions = [[item.question for item in group] for group in items]
            answers = model.answer(tiles, questions, preset=ask.preset, **ask.decoding)
            return [{"said": answer} for group in answers for answer in group]
        options = {**vqa_preset(ask.preset, model.llm.wording).generate, **ask.decoding}
        seen, prompts = _prompted(model, tiles, items, ask)
        ids = model.llm.generate(*seen, prompts, **seen.placing | options)
        return [{"said": text} for text in model.llm.decode(ids)]

    def submit(self, items: Sequence[Item], records: Mapping[str, Record]) -> list[Record] | Record:
        """VQAv2's form, A-OKVQA's or VizWiz's, as the questions are."""
        return _submission(items, all_said(items, records), "direct_answer")


class Vqa(OpenQuestion):
    """Open questions, each answered by several people, ten for VQAv2."""

    def item(self, sample: Sample, place: int) -> Item:
        """Without answers where A-OKVQA's own evaluation leaves the question out, but its server asks for it."""
        item = super().item(sample, place)
        if item.facts.get(DIFFICULT) is True:
            item.accepted = []
        return item

    def score(self, items: Sequence[Item], records: Sequence[Record], by: str | None, lemmas: bool) -> Measured:
        """Means of VQA accuracy: by both rules, that of the data first, where ten people answered a question."""
        pairs = list(zip(items, _texts(records, lemmas), strict=True))
        names: dict[Rule, str] = {"normalised": "all normalised", "vqav2": "VQAv2's script"}
        order: list[Rule] = ["normalised", "vqav2"]
        if is_vqav2([item.facts for item in items]):
            order.reverse()
        if all(len(item.accepted) < PEOPLE for item in items):  # then the rules are the same
            order = order[:1]
        columns = ["accuracy", *(names[rule] for rule in order[1:])]
        shares = ([accuracy(text, item.accepted, rule) for item, text in pairs] for rule in order)
        return mean_scores(items, dict(zip(columns, shares, strict=True)), by)


class Gqa(OpenQuestion):
    """Open questions with one accepted answer."""

    def score(self, items: Sequence[Item], records: Sequence[Record], by: str | None, lemmas: bool) -> Measured:
        """Shares of answers that are the accepted one: normalised, and letter by letter."""
        pairs = list(zip(items, _texts(records, lemmas), strict=True))
        normalised = [float(normalise_answer(text) == item.accepted[0]) for item, text in pairs]
        exact = [float(text.strip() == item.accepted[0]) for item, text in pairs]
        return mean_scores(items, {"accuracy": normalised, "exact": exact}, by)

    def submit(self, items: Sequence[Item], records: Mapping[str, Record]) -> list[Record] | Record:
        """GQA's form."""
        said = all_said(items, records)
        return [{"questionId": str(item.number), "prediction": text} for item, text in zip(items, said, strict=True)]


class GivenAnswers(Benchmark):
    """Answers that are compared by their likelihood after the prompt; nothing is generated."""

    writes = False

    def predict(
        self, model: VisionLanguageModel, tiles: Tiles, items: Sequence[Sequence[Item]], ask: AskOptions
    ) -> list[Record]:
        """The `losses` of the choices of each item, and the number of their `tokens`."""
        choices = [item.choices for group in items for item in group]
        seen, prompts = _prompted(model, tiles, items, ask)
        losses = choice_losses(model, seen, prompts, choices)
        return [{"losses": sums, "tokens": counts} for sums, counts in losses]


class MultipleChoice(GivenAnswers):
    """The likeliest of the answers that a question brings along."""

    def item(self, sample: Sample, place: int) -> Item:
        """A question with choices; `label` or `answer` is the number of the right one, its letter, or the choice.

        Raises:
            BadSample: see `asked`; `no choices`; `no answer`, the right one is none of the choices.
        """
        item = asked(sample, place)
        choices = item.facts.get("choices")
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(one, str) for one in choices):
            raise BadSample("no choices", f"{sample.key}; {columns_of(item.facts)}")
        item.choices = [choice.strip() for choice in choices]
        label = item.facts.get("label", item.facts.get("answer", next(iter(sample.answers), None)))
        if label is None or written(label) in SECRET:
            return item
        item.right = right_choice(item.choices, label)
        if item.right is None:
            raise BadSample("no answer", f"{sample.key}: {label!r} is none of the choices")
        return item

    def score(self, items: Sequence[Item], records: Sequence[Record], by: str | None, lemmas: bool) -> Measured:
        """Shares of right choices: by the sum of the token losses, and by their mean."""
        means = [[s / n for s, n in zip(r["losses"], r["tokens"], strict=True)] for r in records]
        of_mean = [float(likeliest(each) == item.right) for item, each in zip(items, means, strict=True)]
        return mean_scores(items, {"accuracy": _right(items, records), "by mean loss": of_mean}, by)

    def submit(self, items: Sequence[Item], records: Mapping[str, Record]) -> list[Record] | Record:
        """A-OKVQA's form, or that of other questions."""
        return _submission(items, all_said(items, records), "multiple_choice")


class Statement(GivenAnswers):
    """Sentences that are true of their image or not."""

    def item(self, sample: Sample, place: int) -> Item:
        """Make an item that asks if the sentence is true; the right answer is yes or no.

        Raises:
            BadSample: `no statement`; `no answer`, the label is neither true nor false.
        """
        item, facts = new_item(sample, place, question_id(sample)), sample.facts
        sentence = next((facts[key] for key in ("statement", "sentence") if isinstance(facts.get(key), str)), "")
        item.question = statement_question(sentence)
        if not item.question:
            raise BadSample("no statement", f"{sample.key}; {columns_of(facts)}")
        item.choices = list(YES_NO)
        label = facts.get("label", next(iter(sample.answers), None))
        item.right = None if label is None else TRUE.get((written(label) or str(label)).strip().lower())
        if label is not None and item.right is None:
            raise BadSample("no answer", f"{sample.key}: {label!r} is neither true nor false")
        return item

    def score(self, items: Sequence[Item], records: Sequence[Record], by: str | None, lemmas: bool) -> Measured:
        """Shares of right answers and, to show a model that always says the same, of yes."""
        yes = [float(not likeliest(record["losses"])) for record in records]
        return mean_scores(items, {"accuracy": _right(items, records), "said yes": yes}, by)

    def submit(self, items: Sequence[Item], records: Mapping[str, Record]) -> list[Record] | Record:
        """As of open questions."""
        return _submission(items, all_said(items, records), "direct_answer")


def asked(sample: Sample, place: int) -> Item:
    """A question about an image, cleaned.

    Raises:
        BadSample: `no question`.
    """
    item = new_item(sample, place, question_id(sample))
    item.question = clean_question(sample.question or "")
    if not item.question:
        raise BadSample("no question", f"{sample.key}; {columns_of(sample.facts)}")
    return item


def statement_question(sentence: str) -> str:
    """`There is a red cube.` -> `is it true that there is a red cube?`; empty where there is no word."""
    bare = clean_question(sentence).strip().rstrip("?, ")
    return f"is it true that {bare}?" if any(map(str.isalnum, bare)) else ""


def _image_number(sample: Sample) -> str | int | None:
    """Id of an image in a submission; COCO's files are named by their numbers."""
    facts = {key: known for key, value in sample.facts.items() if (known := plain_id(value)) is not None}
    named = next((facts[key] for key in IMAGE_IDS if key in facts), None)
    if isinstance(named, int) or str(named).isdecimal():
        return named
    file = str(sample.image) if isinstance(sample.image, PurePath) else sample.key
    coco = COCO.fullmatch(PurePath(file).stem)
    return int(coco[1]) if coco else facts.get("id") if named is None else named


def _says(value: Any) -> bool:
    """Return True if a cell for answers holds any, even in a form that is not read."""
    if isinstance(value, list | dict):
        return any(map(_says, value.values() if isinstance(value, dict) else value))
    known = value.strip() if isinstance(value, str) else written(value)
    return isinstance(value, bool) or known not in ("", *SECRET)


def _prompted(
    model: VisionLanguageModel, tiles: Tiles, items: Sequence[Sequence[Item]], ask: AskOptions
) -> tuple[Prefix, list[str]]:
    """The visual prefix of each of n questions, and the prompts."""
    questions = [[item.question for item in group] for group in items]
    seen = model.prefix(tiles, questions)
    kind = model.llm.wording
    prompts = [
        vqa_prompt(question, ask.preset, kind) if ask.prompt is None else ask.prompt.replace("{}", question)
        for group in questions
        for question in group
    ]
    return seen, prompts


def _texts(records: Sequence[Record], lemmas: bool) -> list[str]:
    said = [record["said"] for record in records]
    return lemmatize(said) if lemmas else said


def _right(items: Sequence[Item], records: Sequence[Record]) -> list[float]:
    """1 for each item whose likeliest choice is the right one."""
    return [float(likeliest(record["losses"]) == item.right) for item, record in zip(items, records, strict=True)]


def _submission(items: Sequence[Item], said: Sequence[str], key: str) -> list[Record] | Record:
    """The form of the server whose questions these are; A-OKVQA's has the answers under a `key`."""
    if all(DIFFICULT in item.facts for item in items):  # A-OKVQA
        return {str(item.number): {key: text} for item, text in zip(items, said, strict=True)}
    if all(str(item.number).startswith(VIZWIZ) for item in items):
        return [{"image": item.number, "answer": text} for item, text in zip(items, said, strict=True)]
    return [{"question_id": item.number, "answer": text} for item, text in zip(items, said, strict=True)]
