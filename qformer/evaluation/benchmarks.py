"""What `qformer eval` measures of a language model: how each benchmark is asked, and what its answers are worth.

caption     captions against reference captions (COCO, NoCaps)                  `score_captions`
vqa         open answers, each against what ten people said (VQAv2, OK-VQA)     `vqa.accuracy`
gqa         open answers that must be the one accepted (GQA)                    exact match
choice      the likeliest of given answers (A-OKVQA)                            accuracy
statement   is a sentence true of the image: the likelier of yes and no         accuracy
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import PurePath
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from qformer.data.columns import ANSWERS, columns_of, right_choice, written
from qformer.data.questions import DIFFICULT
from qformer.data.texts import clean_question
from qformer.evaluation.caption import score_captions
from qformer.evaluation.choice import choice_losses
from qformer.evaluation.lemmas import lemmatize
from qformer.evaluation.vqa import PEOPLE, Rule, accuracy, is_vqav2, normalise_answer
from qformer.identity import plain_id, stamp
from qformer.llm.prompts import vqa_preset, vqa_prompt
from qformer.types import BadSample

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from qformer.model.vision_language import VisionLanguageModel
    from qformer.types import Sample, Tiles

BENCHMARKS = ("caption", "vqa", "gqa", "choice", "statement")
#: Columns by which results are told apart where the data have them.
COLUMNS = ("domain", "question_type", "answer_type", "structural", "semantic", "task", "type")
YES_NO = ("yes", "no")
TRUE = {"true": 0, "yes": 0, "1": 0, "entailment": 0, "false": 1, "no": 1, "0": 1, "contradiction": 1}
#: Where records say what a submission calls them, the likeliest first.
QUESTION_IDS = ("question_id", "questionId", "qid", "id")
IMAGE_IDS = ("image_id", "img_id", "cocoid")
SECRET = ("-1", "-1.0")  # labels of test splits on the hub
VIZWIZ = "VizWiz_"  # in front of names of images, which are all that its questions are known by
COCO = re.compile(r"(?:COCO_\w+_)?(\d{12})")
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
        """Of all that what is said depends on, so that it is not taken for an answer to something else."""
        asked = json.dumps([self.image, self.question, self.choices])
        return hashlib.sha256(asked.encode()).hexdigest()[:12]

    @property
    def known(self) -> bool:
        """Whether an answer to it can be scored."""
        return bool(self.accepted) or self.right is not None


@dataclass
class Measured:
    """What the answers are worth.

    Attributes:
        total: of all, by name of the score; shares in [0, 1] but for captions, where they are as usual.
        each: of every item the score that counts most.
        groups: by column, then by its value: `count`, and scores as in `total`.
        missing: scores that could not be computed, with the reason.
    """

    total: dict[str, float]
    each: list[float]
    groups: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def item_of(bench: str, sample: Sample, place: int) -> Item:
    """What a benchmark asks about a sample, the record at this place of the data.

    Raises:
        BadSample: kinds `no question`, `no choices`, `no statement`, `no answer` (one that is none of the choices).
    """
    facts = sample.facts
    own = _number(bench, sample)
    number = place if own is None else own
    name = PurePath(sample.image).name if isinstance(sample.image, PurePath) else ""
    item = Item(str(number), number, facts=facts, image=f"{name} {stamp(sample.image)}", has_id=own is not None)
    if bench == "caption":
        item.accepted = [caption for caption in sample.captions if caption.strip()]
    elif bench == "statement":
        sentence = next((facts[key] for key in ("statement", "sentence") if isinstance(facts.get(key), str)), "")
        item.question = statement_question(sentence)
        if not item.question:
            raise BadSample("no statement", f"{sample.key}; {columns_of(facts)}")
        item.choices = list(YES_NO)
        label = facts.get("label", next(iter(sample.answers), None))
        item.right = None if label is None else TRUE.get((written(label) or str(label)).strip().lower())
        if label is not None and item.right is None:
            raise BadSample("no answer", f"{sample.key}: {label!r} is neither true nor false")
    else:
        item.question = clean_question(sample.question or "")
        if not item.question:
            raise BadSample("no question", f"{sample.key}; {columns_of(facts)}")
        item.accepted = [" ".join(answer.split()) for answer in sample.answers]
        unread = next((name for name in ANSWERS if _says(facts.get(name))), None)
        if unread is not None and not sample.answers and bench != "choice":
            raise BadSample("no answer", f"{sample.key}: no text in '{unread}', {str(facts[unread])[:100]}")
        if bench == "vqa" and facts.get(DIFFICULT) is True:
            item.accepted = []  # left out of the score by A-OKVQA's own evaluation, but asked for by its server
        if bench == "choice":
            _choose(item, sample)
    return item


def _number(bench: str, sample: Sample) -> str | int | None:
    """What a submission calls the question or, of captions, the image; COCO's files are named by their numbers."""
    facts = {key: known for key, value in sample.facts.items() if (known := plain_id(value)) is not None}
    if bench != "caption":
        name = PurePath(sample.image).name if isinstance(sample.image, PurePath) else ""
        return next((facts[key] for key in QUESTION_IDS if key in facts), name if name.startswith(VIZWIZ) else None)
    named = next((facts[key] for key in IMAGE_IDS if key in facts), None)
    if isinstance(named, int) or str(named).isdecimal():
        return named
    file = str(sample.image) if isinstance(sample.image, PurePath) else sample.key
    coco = COCO.fullmatch(PurePath(file).stem)
    return int(coco[1]) if coco else facts.get("id") if named is None else named


def statement_question(sentence: str) -> str:
    """`There is a red cube.` -> `is it true that there is a red cube?`; empty where there is no word."""
    bare = clean_question(sentence).strip().rstrip("?, ")
    return f"is it true that {bare}?" if any(map(str.isalnum, bare)) else ""


def _says(value: Any) -> bool:
    """Whether a cell for answers has any in it, be they in a form that is not read."""
    if isinstance(value, list | dict):
        return any(map(_says, value.values() if isinstance(value, dict) else value))
    known = value.strip() if isinstance(value, str) else written(value)
    return isinstance(value, bool) or known not in ("", *SECRET)


def _choose(item: Item, sample: Sample) -> None:
    """Choices and the right one: `label` or `answer` is its number, its letter, or the choice itself."""
    choices = item.facts.get("choices")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(one, str) for one in choices):
        raise BadSample("no choices", f"{sample.key}; {columns_of(item.facts)}")
    item.choices = [choice.strip() for choice in choices]
    said = item.facts.get("label", item.facts.get("answer", next(iter(sample.answers), None)))
    item.accepted = []
    if said is None or written(said) in SECRET:
        return
    item.right = right_choice(item.choices, said)
    if item.right is None:
        raise BadSample("no answer", f"{sample.key}: {said!r} is none of the choices")


@torch.no_grad()
def predict(
    bench: str,
    model: VisionLanguageModel,
    tiles: Tiles,
    items: Sequence[Sequence[Item]],
    preset: str,
    prompt: str | None,
    decoding: Mapping[str, Any] = MappingProxyType({}),
) -> list[Record]:
    """What the model says of each item, image by image; each image is encoded once.

    Args:
        prompt: for captions, the text that they go on from; else the whole prompt, `{}` in place of the question.
        decoding: fields of `GenerateConfig` that differ from the task's; choices are compared, not written.

    Returns:
        Records with `id`, the item's digest as `of`, and `said`, or `losses` and `tokens` of each choice.

    Raises:
        TooLong: an image with its question does not fit the positions of the language model.
    """
    flat = [item for group in items for item in group]
    said = _predict(bench, model, tiles, items, preset, prompt, decoding)
    return [{"id": item.id, "of": item.digest, **record} for item, record in zip(flat, said, strict=True)]


def _predict(
    bench: str,
    model: VisionLanguageModel,
    tiles: Tiles,
    items: Sequence[Sequence[Item]],
    preset: str,
    prompt: str | None,
    decoding: Mapping[str, Any],
) -> list[Record]:
    flat = [item for group in items for item in group]
    if bench == "caption":
        return [{"said": said} for said in model.generate(tiles, prompt, **decoding)]
    if prompt is None and bench in ("vqa", "gqa"):
        asked = [[item.question for item in group] for group in items]
        answers = model.answer(tiles, asked, preset=preset, **decoding)
        return [{"said": answer} for group in answers for answer in group]
    prefix, mask = model.prefix(tiles, [[item.question for item in group] for group in items])
    family = model.llm.family
    prompts = [
        vqa_prompt(item.question, preset, family) if prompt is None else prompt.replace("{}", item.question)
        for item in flat
    ]
    if bench in ("vqa", "gqa"):
        options = {**vqa_preset(preset, family).generate, **decoding}
        return [{"said": text} for text in model.llm.decode(model.llm.generate(prefix, mask, prompts, **options))]
    losses = choice_losses(model, prefix, mask, prompts, [item.choices for item in flat])
    return [{"losses": sums, "tokens": counts} for sums, counts in losses]


def said_of(item: Item, record: Record) -> str:
    """The answer: what was generated, or the likeliest choice."""
    return item.choices[_likeliest(record["losses"])] if item.choices else record["said"]


def _likeliest(losses: Sequence[float]) -> int:
    return min(range(len(losses)), key=losses.__getitem__)


def measure(bench: str, items: Sequence[Item], records: Sequence[Record], by: str | None, lemmas: bool) -> Measured:
    """What the records are worth: each of an item that can be scored.

    Args:
        by: a further column by which results are told apart. lemmas: compare lemmas of the answers (see `lemmatize`).
    """
    if bench == "caption":
        scores = score_captions([record["said"] for record in records], [item.accepted for item in items])
        measured = Measured(scores.total, scores.each["CIDEr"], missing=scores.missing)
    else:
        shares = _shares(bench, items, records, lemmas)
        main = next(iter(shares))
        measured = Measured({name: sum(each) / len(each) for name, each in shares.items()}, shares[main])
    for column in [*COLUMNS, *([by] if by and by not in COLUMNS else [])]:
        rows: dict[str, list[int]] = defaultdict(list)
        for row, item in enumerate(items):
            if isinstance(item.facts.get(column), str | int | float | bool):
                rows[str(item.facts[column])].append(row)
        if rows and (len(rows) > 1 or column == by):
            measured.groups[column] = {}
            for value, own in sorted(rows.items()):
                if bench == "caption":
                    part = score_captions(
                        [records[row]["said"] for row in own], [items[row].accepted for row in own], java=False
                    ).total
                else:
                    part = {name: sum(each[row] for row in own) / len(own) for name, each in shares.items()}
                measured.groups[column][value] = {"count": len(own)} | part
    return measured


def _shares(bench: str, items: Sequence[Item], records: Sequence[Record], lemmas: bool) -> dict[str, list[float]]:
    """By name of the score, what each answer earns in [0, 1]; the first is the one that counts most."""
    if bench in ("choice", "statement"):
        of_sum = [float(_likeliest(r["losses"]) == item.right) for item, r in zip(items, records, strict=True)]
        if bench == "statement":
            return {"accuracy": of_sum, "said yes": [float(not _likeliest(r["losses"])) for r in records]}
        means = [[s / n for s, n in zip(r["losses"], r["tokens"], strict=True)] for r in records]
        of_mean = [float(_likeliest(each) == item.right) for item, each in zip(items, means, strict=True)]
        return {"accuracy": of_sum, "by mean loss": of_mean}
    said = [record["said"] for record in records]
    said = lemmatize(said) if lemmas else said
    pairs = list(zip(items, said, strict=True))
    if bench == "gqa":
        exact = [float(text.strip() == item.accepted[0]) for item, text in pairs]
        return {"accuracy": [float(normalise_answer(text) == item.accepted[0]) for item, text in pairs], "exact": exact}
    return _people(pairs)


def _people(pairs: Sequence[tuple[Item, str]]) -> dict[str, list[float]]:
    """By both rules, that of the data first; one where no question was answered by ten people, as they are the same."""
    names: dict[Rule, str] = {"normalised": "all normalised", "vqav2": "VQAv2's script"}
    order: list[Rule] = ["normalised", "vqav2"]
    if is_vqav2([item.facts for item, _ in pairs]):
        order.reverse()
    if all(len(item.accepted) < PEOPLE for item, _ in pairs):
        order = order[:1]
    columns = ["accuracy", *(names[rule] for rule in order[1:])]
    shares = ([accuracy(text, item.accepted, rule) for item, text in pairs] for rule in order)
    return dict(zip(columns, shares, strict=True))


def submission(bench: str, items: Sequence[Item], records: dict[str, Record]) -> list[Record] | Record:
    """All items in the form that the benchmark's server takes; nothing is said of those that could not be predicted."""
    said = [said_of(item, records[item.id]) if item.id in records else "" for item in items]
    if bench == "caption":
        return [{"image_id": item.number, "caption": text} for item, text in zip(items, said, strict=True)]
    if bench == "gqa":
        return [{"questionId": str(item.number), "prediction": text} for item, text in zip(items, said, strict=True)]
    if all(DIFFICULT in item.facts for item in items):  # A-OKVQA
        key = "multiple_choice" if bench == "choice" else "direct_answer"
        return {str(item.number): {key: text} for item, text in zip(items, said, strict=True)}
    if all(str(item.number).startswith(VIZWIZ) for item in items):
        return [{"image": item.number, "answer": text} for item, text in zip(items, said, strict=True)]
    return [{"question_id": item.number, "answer": text} for item, text in zip(items, said, strict=True)]
