"""Benchmarks of reading in their published layouts and scores.

docvqa     documents and infographics     rrc.cvc.uab.es/?ch=17, arXiv:2007.00398, arXiv:2104.12756     ANLS
chartqa    charts                         vis-nlp/ChartQA, arXiv:2203.10244                             relaxed accuracy
ocrbench   words, forms and formulas      Yuliang-Liu/MultimodalOCR, arXiv:2305.07895                   answers of 1,000

Questions are asked as they are; lmms-eval and VLMEvalKit add that a word or phrase is enough, which here the wording of
the preset says.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from qformer.data.columns import written
from qformer.evaluation.benchmarks import COLUMNS, Item, Measured, Record, all_said, measure_scores
from qformer.identity import plain_id
from qformer.metrics.documents import anls, ocr_right, relaxed_accuracy
from qformer.suites.published import Published, asked_as, first_fact, of_each, tell_print
from qformer.types import BadSample

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from qformer.types import Sample

RECOGNITION = "Text Recognition"
FORMULA = "Handwritten Mathematical Expression Recognition"
FORMULAS = "HME100k"  # the data set of formulas
#: By type of OCRBench's questions: the part of the score that it belongs to.
PARTS = dict.fromkeys(
    (
        "Regular Text Recognition",
        "Irregular Text Recognition",
        "Artistic Text Recognition",
        "Handwriting Recognition",
        "Digit String Recognition",
        "Non-Semantic Text Recognition",
    ),
    RECOGNITION,
) | {name: name for name in ("Scene Text-centric VQA", "Doc-oriented VQA", "Key Information Extraction", FORMULA)}
HUMAN, AUGMENTED = "human", "augmented"


class DocVqa(Published):
    """DocVQA and InfographicVQA: `val_v1.0_withQT.json`, `infographicsVQA_val_v1.0.json`, or the tables of the hub."""

    def item(self, sample: Sample, place: int) -> Item:
        """A question with its accepted answers, none in the test splits. Raises BadSample: `no question`."""
        return asked_as(sample, place, sample.question)

    def score(self, items: Sequence[Item], records: Sequence[Record], by: str | None, lemmas: bool) -> Measured:
        """The mean of the similarities to the nearest accepted answer, also by size of print where it is known."""
        earned = [anls(record["said"], item.accepted) for item, record in zip(items, records, strict=True)]
        return measure_scores(
            items, {"ANLS": of_each(items, earned)}, earned, by, (*COLUMNS, *tell_print(items, records))
        )

    def submit(self, items: Sequence[Item], records: Mapping[str, Record]) -> list[Record] | Record:
        """The form of rrc.cvc.uab.es."""
        said = all_said(items, records)
        return [{"questionId": item.number, "answer": text} for item, text in zip(items, said, strict=True)]


class ChartQa(Published):
    """ChartQA: `test_human.json` and `test_augmented.json`, or the tables of the hub."""

    new_tokens = 16

    def item(self, sample: Sample, place: int) -> Item:
        """A question with its answer, and the `set` it is of. Raises BadSample: `no question`."""
        item = asked_as(sample, place, sample.question)
        told = first_fact(sample, ("type", "human_or_machine", "split"))
        told = {"0": HUMAN, "1": AUGMENTED, "machine": AUGMENTED}.get(
            written(told), told
        )  # as HuggingFaceM4/ChartQA has it
        name = (str(told) if told is not None else sample.key.rpartition("/")[2]).lower()
        kind = next((kind for kind in (HUMAN, AUGMENTED) if kind in name), None)
        item.facts |= {} if kind is None else {"set": kind}
        return item

    def score(self, items: Sequence[Item], records: Sequence[Record], by: str | None, lemmas: bool) -> Measured:
        """The share of answers within 5 %, of all and of both sets, which have 1,250 questions each."""
        earned = [relaxed_accuracy(record["said"], item.accepted) for item, record in zip(items, records, strict=True)]
        columns = ("set", "question_type", *tell_print(items, records))
        return measure_scores(items, {"relaxed accuracy": of_each(items, earned)}, earned, by, columns)


class OcrBench(Published):
    """OCRBench: `OCRBench.json` with its pictures, or the tables of the hub and of VLMEvalKit."""

    new_tokens = 128

    def item(self, sample: Sample, place: int) -> Item:
        """A question with its accepted texts. Raises BadSample: `no question`; `unknown type`."""
        data, number = first_fact(sample, ("dataset_name", "dataset")), plain_id(sample.facts.get("id"))
        item = asked_as(sample, place, sample.question, None if None in (data, number) else f"{data} {number}")
        kind = first_fact(sample, ("type", "question_type", "category"))
        if not isinstance(kind, str) or kind not in PARTS:
            raise BadSample("unknown type", f"{sample.key}: type is {kind!r}; expected one of OCRBench's ten")
        item.facts |= {"part": PARTS[kind], "type": kind, "formula": data == FORMULAS or (not data and kind == FORMULA)}
        return item

    def score(self, items: Sequence[Item], records: Sequence[Record], by: str | None, lemmas: bool) -> Measured:
        """Shares of answers that contain an accepted text; how many they are of 1,000 is the published score."""
        earned = [
            ocr_right(record["said"], item.accepted, item.facts["formula"])
            for item, record in zip(items, records, strict=True)
        ]
        measured = measure_scores(items, {"accuracy": of_each(items, earned)}, earned, by, ("part", "type"))
        asked = Counter(item.facts["part"] for item in items)
        right = Counter(item.facts["part"] for item, value in zip(items, earned, strict=True) if value)
        told = ", ".join(f"{part} {right[part]} of {count}" for part, count in asked.items())
        measured.notes = [f"OCRBench: {right.total()} of {len(items):,} ({told}); the published score is of all 1,000"]
        return measured
