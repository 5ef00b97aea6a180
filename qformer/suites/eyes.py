"""Benchmarks of seeing in their published layouts, prompts and scores.

naturalbench     two pictures, two questions, each asked of both     Baiqi-Li/NaturalBench, arXiv:2410.14669
cvbench          counting, relations, depth and distance             nyu-visionx/CV-Bench, arXiv:2406.16860
blindtest        lines, circles, letters, grids, paths               anguyen8/vision-llms-are-blind, arXiv:2407.06581
hallusionbench   yes or no about figures and their altered twins     tianyi-lab/HallusionBench, arXiv:2310.14566
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from qformer.data.columns import written
from qformer.evaluation.benchmarks import Item, Measured, Record, measure_scores
from qformer.identity import plain_id
from qformer.metrics import replies
from qformer.metrics.shares import Score, Unit, all_right
from qformer.suites.judging import CORRECT, UNCLEAR, judge_answers
from qformer.suites.published import Published, asked_as, first_fact, of_each
from qformer.types import BadSample

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from qformer.data.base import Source
    from qformer.evaluation.benchmarks import ImageItems
    from qformer.types import Sample

    Key = tuple[tuple[str, ...], str, str]  # set, figure or question, its number

#: By type of NaturalBench's questions: the end of the prompt, and the two answers.
FORMS = {
    "yes_no": ("Please answer Yes or No.", ("yes", "no")),
    "multiple_choice": ("Please output the letter corresponding to the correct option.", ("a", "b")),
}
TYPES = ("Question_Type", "Question Type", "type")  # the first release has a space
LETTER = "Answer with the option's letter from the given choices directly."
SOURCES_2D = {"ADE20K": 0.5, "COCO": 0.5}
SOURCES = {"ADE20K": 0.25, "COCO": 0.25, "Omni3D": 0.5}
GRID = ("Counting Grid", replies.read_grid)
#: By name of a task in the data, and of its folder in the authors' repository: its column in the paper's table 1, and
#: how a reply is read.
TASKS: dict[str, tuple[str, Callable[[str], str | None]]] = {
    "line plot intersections": ("Line Plot Intersections", replies.read_count),
    "lineintersection": ("Line Plot Intersections", replies.read_count),
    "touching circles": ("Touching Circles", replies.read_yes_no),
    "touchingcircle": ("Touching Circles", replies.read_yes_no),
    "circled letter": ("Circled Letter", replies.read_letter),
    "circledword": ("Circled Letter", replies.read_letter),
    "olympic counting - circles": ("Olympic Counting - Circles", replies.read_count),
    "countingcircles": ("Olympic Counting - Circles", replies.read_count),
    "olympic counting - pentagons": ("Olympic Counting - Pentagons", replies.read_count),
    "nested squares": ("Nested Squares", replies.read_count),
    "nestedsquares": ("Nested Squares", replies.read_count),
    "counting grid - blank grids": GRID,
    "counting grid - word grids": GRID,
    "countingrowsandcolumns": GRID,
    "subway connections": ("Subway Connections", replies.read_count),
    "subwaymap": ("Subway Connections", replies.read_count),
}
COLUMNS = ("task", "source")
PLACES = ("category", "subcategory", "set_id", "figure_id", "question_id")  # of a question of HallusionBench
LONGEST = 10  # digits of an Index
YES_NO = {"1": "yes", "yes": "yes", "0": "no", "no": "no"}


class NaturalBench(Published):
    """Groups of two pictures and two questions whose answers differ, so that no one answer is right for both.

    The rules are those of `naturalbench_vqa.py`: the end of the prompt by `Question_Type`, the answer that a reply says
    first, and four scores. `name=naturalbench` (the default) reads the authors' rows. Rows of one question, as
    lmms-eval and VLMEvalKit have them, are read by `name=datasets`: their `Index` counts questions, four to a group.
    """

    source = "naturalbench"
    new_tokens = 16

    def item(self, sample: Sample, place: int) -> Item:
        """A question with the end of its prompt.

        Raises:
            BadSample: `no question`; `unknown type`, of no type or group; `no answer`, it is neither of the two.
        """
        kind, index = first_fact(sample, TYPES), plain_id(first_fact(sample, ("Index", "index")))
        if not isinstance(kind, str) or kind not in FORMS:
            raise BadSample("unknown type", f"{sample.key}: Question_Type is {kind!r}; expected {', '.join(FORMS)}")
        facts = sample.facts
        if None not in (drawn := [plain_id(facts.get(name)) for name in ("group", "question_number", "image_number")]):
            group, question, image = drawn
        elif str(index).isdecimal() and len(str(index)) < LONGEST:
            group, question, image = int(str(index)) // 4, int(str(index)) % 4 // 2, int(str(index)) % 2
        else:
            raise BadSample("unknown type", f"{sample.key}: Index is {index!r}, and groups are told by it")
        item = asked_as(sample, place, sample.question, f"{group} question {question} image {image}")
        end, answers = FORMS[kind]
        item.question = f"{item.question} {end}"
        item.facts |= {"Question_Type": kind, "group": group, "question_number": question, "image_number": image}
        truth = item.accepted[0] if item.accepted else first_fact(sample, ("Answer", "answer"))
        if truth is not None:
            right = replies.first_word(str(truth), answers)
            if right is None:
                raise BadSample("no answer", f"{sample.key}: {truth!r} is none of {', '.join(answers)}")
            item.accepted = [right]
        return item

    def score(self, items: Sequence[Item], records: Sequence[Record], by: str | None, lemmas: bool) -> Measured:
        """Shares of right answers, and of questions, pictures and groups whose answers are all right.

        A group that lacks an answer counts only as far as it is there.
        """
        right = [
            float(replies.first_word(record["said"], FORMS[item.facts["Question_Type"]][1]) == item.accepted[0])
            for item, record in zip(items, records, strict=True)
        ]
        groups = [item.facts["group"] for item in items]
        questions = [(item.facts["group"], item.facts["question_number"]) for item in items]
        images = [(item.facts["group"], item.facts["image_number"]) for item in items]
        scores = {
            "Acc": Score([Unit((row,), value, groups[row]) for row, value in enumerate(right)]),
            "Q-Acc": Score(all_right(right, questions, lambda key: key[0], size=2)),
            "I-Acc": Score(all_right(right, images, lambda key: key[0], size=2)),
            "G-Acc": Score(all_right(right, groups, lambda key: key, size=4)),
        }
        measured = measure_scores(items, scores, right, by, ("Question_Type", "Source"))
        counts = Counter(groups).values()
        partial = {"lack an answer": sum(n < 4 for n in counts), "have one twice": sum(n > 4 for n in counts)}
        told = [f"{n} of {len(counts)} groups {what} and are not in G-Acc" for what, n in partial.items() if n]
        measured.notes += told
        return measured


class CvBench(Published):
    """Multiple choice about photos of ADE20K, COCO and Omni3D: `test_2d.parquet` and `test_3d.parquet`, or `.jsonl`.

    The column `prompt` lists the options; Cambrian-1's evaluation asks for the letter behind it (`ade_eval.py`), and
    reads it from the reply (`ade_test.py`). CV-Bench is the mean of 2D and 3D, 2D that of ADE20K and COCO.
    """

    def item(self, sample: Sample, place: int) -> Item:
        """A prompt with its options.

        Raises:
            BadSample: `no question`; `unknown type`, of another source; `no answer`, it is no letter.
        """
        name = plain_id(first_fact(sample, ("idx", "index")))
        item = asked_as(sample, place, first_fact(sample, ("prompt",)), None if name is None else str(name))
        item.question = f"{item.question}\n{LETTER}"
        given = item.facts.get("source")
        if not isinstance(given, str) or given not in SOURCES:
            raise BadSample("unknown type", f"{sample.key}: source is {given!r}; expected {', '.join(SOURCES)}")
        answer = first_fact(sample, ("answer",))
        letter = written(answer).strip("() .").lower()
        if answer is not None and not re.fullmatch("[a-z]", letter):
            raise BadSample("no answer", f"{sample.key}: {answer!r} is not a letter such as (A)")
        item.accepted = [letter] if letter else []
        return item

    def score(self, items: Sequence[Item], records: Sequence[Record], by: str | None, lemmas: bool) -> Measured:
        """The mean of 2D and 3D, either of them, and the share of right answers."""
        right = [
            float(replies.option_letter(record["said"]) == item.accepted[0])
            for item, record in zip(items, records, strict=True)
        ]
        units = of_each(items, right, "source").units
        flat = [unit for unit in units if unit.part in SOURCES_2D]
        deep = [unit for unit in units if unit.part not in SOURCES_2D]
        scores = {
            "CV-Bench": Score(units, SOURCES),
            "2D": Score(flat, SOURCES_2D),
            "3D": Score(deep, {"Omni3D": 1}),
            "accuracy": of_each(items, right),
        }
        return measure_scores(items, scores, right, by, COLUMNS)


class BlindTest(Published):
    """Drawings that no person misreads: `data/valid-*.parquet` of XAI/vlmsareblind, with `question=prompt`.

    Prompts are asked as they are; they ask for the answer in braces, or for a number, a pair, yes or no. The authors do
    not publish how they read replies, so the rules in `qformer.metrics.replies` are ours: what stands in braces, or
    else the answer that the reply has outside of them. The score is the mean of the paper's eight tasks, one of which
    are both kinds of grids.
    """

    def item(self, sample: Sample, place: int) -> Item:
        """A prompt. Raises BadSample: `no question`; `unknown type`, of no task; `no answer`, of another kind."""
        item = asked_as(sample, place, sample.question or first_fact(sample, ("prompt",)))
        task = str(item.facts.get("task", "")).strip().lower()
        if task not in TASKS:
            raise BadSample("unknown type", f"{sample.key}: task is {item.facts.get('task')!r}; expected BlindTest's")
        name, read = TASKS[task]
        item.facts |= {"task": name, "reader": task}
        truth = next(iter(item.accepted), None) or first_fact(sample, ("groundtruth",))
        if truth is not None:
            right = read(f"({truth})" if read is replies.read_grid else str(truth))
            if right is None:
                raise BadSample("no answer", f"{sample.key}: {truth!r} is no answer of the task {name}")
            item.accepted = [right]
        return item

    def score(self, items: Sequence[Item], records: Sequence[Record], by: str | None, lemmas: bool) -> Measured:
        """The mean of the tasks, the share of right answers, and of replies that could be read."""
        said = [TASKS[item.facts["reader"]][1](record["said"]) for item, record in zip(items, records, strict=True)]
        right = [float(answer == item.accepted[0]) for item, answer in zip(items, said, strict=True)]
        scores = {
            "mean of tasks": of_each(items, right, "task"),
            "accuracy": of_each(items, right),
            "could be read": of_each(items, [float(answer is not None) for answer in said]),
        }
        measured = measure_scores(items, scores, right, by, COLUMNS)
        every = {name for name, _ in TASKS.values()}
        if lacking := sorted(every - {item.facts["task"] for item in items}):
            there = len(every) - len(lacking)
            measured.notes = [f"the mean is that of {there} tasks; there is nothing of {', '.join(lacking)}"]
        return measured


class HallusionBench(Published):
    """Questions to say yes or no to, about figures and their altered twins: `HallusionBench.json` with its figures.

    The scores are those of `utils.py` there: of questions (aAcc), of figures (fAcc) and of question pairs, the same
    question about all figures of a set (qAcc). What is right is decided by a language model there, and by the words yes
    and no in VLMEvalKit and here; a judge behind `--server` adds its own columns. Questions without a figure are
    skipped, as in VLMEvalKit and lmms-eval: 178 of 1,129.
    """

    new_tokens = 128
    judged = True

    def __init__(self) -> None:
        self.verdicts: dict[str, str] = {}  # by the id of the item
        self.judge_name = ""
        self.sizes: Counter[Key] = Counter()  # questions of the file by figure and by question pair

    def items(self, source: Source, limit: int | None = None) -> tuple[list[ImageItems], list[Record]]:
        """As of any benchmark; the sizes of figures and question pairs are those of the whole file."""
        listed, skipped = super().items(source)
        self.sizes = _sizes([item for one in listed for item in one.items])
        return listed[:limit], skipped

    def judge(
        self, items: Sequence[Item], records: Sequence[Record], ask: Callable[[list[str]], list[str]], name: str
    ) -> None:
        """Have a language model compare the answers with the references, as `qformer.suites.judging` asks it."""
        self.judge_name = name
        verdicts = judge_answers(items, records, ask)
        self.verdicts = {item.id: verdict for item, verdict in zip(items, verdicts, strict=True)}

    def item(self, sample: Sample, place: int) -> Item:
        """A question. Raises BadSample: `no question`; `unknown type`, of no set; `no answer`, neither yes nor no."""
        places = _places(sample)
        if places is None:
            raise BadSample(
                "unknown type", f"{sample.key} has no category, subcategory, set_id, figure_id, question_id"
            )
        item = asked_as(sample, place, sample.question, "_".join(places))
        item.facts |= dict(zip(PLACES, places, strict=True))
        truth = first_fact(sample, ("gt_answer", "answer"))
        right = YES_NO.get(written(truth).strip().lower())
        if truth is not None and right is None:
            raise BadSample("no answer", f"{sample.key}: {truth!r} is neither yes (1) nor no (0)")
        item.accepted = [right] if right else []
        return item

    def score(self, items: Sequence[Item], records: Sequence[Record], by: str | None, lemmas: bool) -> Measured:
        """Shares of right questions, and of figures and question pairs whose answers are all right; judged, if so.

        Figures and pairs that lack an answer count in aAcc alone.
        """
        right = [
            float(replies.read_yes_no(record["said"]) == item.accepted[0])
            for item, record in zip(items, records, strict=True)
        ]
        scores = self._of_sets(items, right)
        if self.verdicts:
            told = [self.verdicts[item.id] for item in items]
            judged = self._of_sets(items, [float(verdict == CORRECT) for verdict in told])
            scores |= {f"{name}, judged": score for name, score in judged.items()}
            scores["unclear"] = of_each(items, [float(verdict == UNCLEAR) for verdict in told])
        measured = measure_scores(items, scores, right, by, ("category", "subcategory"))
        for what, name, keys in (("figures", "fAcc", _figures(items)), ("question pairs", "qAcc", _pairs(items))):
            known = len(set(keys) - {None})
            if partial := known - len(scores[name].units):
                measured.notes.append(f"{partial} of {known} {what} lack an answer and are not in {name}")
        if self.verdicts:
            measured.notes += [
                f"judged by {self.judge_name}, asked in our words; published figures are GPT-4's, asked in the "
                "authors' words, and differ"
            ]
        return measured

    def _of_sets(self, items: Sequence[Item], right: Sequence[float]) -> dict[str, Score]:
        """The three scores of answers that are right or wrong; without a file all that is there is whole."""
        figures, pairs = _figures(items), _pairs(items)
        sizes = self.sizes or _sizes(items)
        return {
            "aAcc": Score([Unit((row,), value, _set_of(items[row])) for row, value in enumerate(right)]),
            "fAcc": Score(all_right(right, figures, lambda key: key[0], sizes)),
            "qAcc": Score(all_right(right, pairs, lambda key: key[0], sizes)),
        }


def _set_of(item: Item) -> tuple[str, ...]:
    return tuple(item.facts[name] for name in ("category", "subcategory", "set_id"))


def _figures(items: Sequence[Item]) -> list[Key | None]:
    """Figure of each question; None where no figure is shown (figure 0 of VS), as published."""
    keys: list[Key] = [(_set_of(item), "figure", item.facts["figure_id"]) for item in items]
    return [None if key[0][0] == "VS" and key[2] == "0" else key for key in keys]


def _pairs(items: Sequence[Item]) -> list[Key]:
    """Question pair of each question: the same about all figures of its set."""
    return [(_set_of(item), "question", item.facts["question_id"]) for item in items]


def _sizes(items: Sequence[Item]) -> Counter[Key]:
    """Number of questions of each figure and question pair."""
    return Counter(key for key in [*_figures(items), *_pairs(items)] if key is not None)


def _places(sample: Sample) -> tuple[str, ...] | None:
    """Category, subcategory, set, figure and question of a record, from its columns or VLMEvalKit's `index`."""
    found: list[Any] = [plain_id(sample.facts.get(name)) for name in PLACES]
    index = str(sample.facts.get("index", "")).split("_")
    if None in found and len(index) == 6:  # VD_illusion_1_0_2_3; the third is `visual_input`
        found = [*index[:2], *index[3:]]
    return None if None in found else tuple(map(str, found))
