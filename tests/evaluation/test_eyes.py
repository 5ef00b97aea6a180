"""Benchmarks of seeing and of reading: what each makes of a record, and scores that were worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qformer.data import sources
from qformer.evaluation.benchmarks import Item, Measured, choose
from qformer.evaluation.vqa import is_vqav2
from qformer.types import BadSample, Sample


def sample(question: str | None = "What?", answers: tuple[str, ...] = (), image: str = "0.jpg", **facts: Any) -> Sample:
    return Sample(image=Path(image), key="line 1", question=question, answers=list(answers), facts=facts)


def item(bench: str, *given: Any, **facts: Any) -> Item:
    return choose(bench).item(sample(*given, **facts), 0)


def score(bench: str, items: list[Item], said: list[str], by: str | None = None) -> Measured:
    return choose(bench).score(items, [{"said": text} for text in said], by, False)


def group(number: int, kind: str = "yes_no") -> list[Item]:
    """The four questions of a group: yes, no, no, yes."""
    right = {"yes_no": "Yes No No Yes", "multiple_choice": "A B B A"}[kind].split()
    return [
        item("naturalbench", "Is it?", (right[index],), Index=4 * number + index, Question_Type=kind)
        for index in range(4)
    ]


def test_naturalbench_counts_answers_questions_pictures_and_groups() -> None:
    """By hand. Group 0 all right; in group 1 question 0 is right for picture 0 alone, question 1 for both, so that of
    its pictures 0 is right; group 2 says B to all, which is right for question 0 of picture 1 and 1 of picture 0."""
    items = [*group(0), *group(1), *group(2, "multiple_choice")]
    said = ["yes", "no", "No.", "Yes!", "yes", "yes", "no", "yes", "B", "b", "(B)", "B."]
    measured = score("naturalbench", items, said)
    assert measured.total == pytest.approx({"Acc": 9 / 12, "Q-Acc": 3 / 6, "I-Acc": 3 / 6, "G-Acc": 1 / 3})
    assert measured.groups["Question_Type"]["multiple_choice"] == {
        "count": 4,
        "Acc": 0.5,
        "Q-Acc": 0.0,
        "I-Acc": 0.0,
        "G-Acc": 0.0,
    }
    low, high = measured.intervals["all"]["G-Acc"]
    assert (low, high) == (0.0, 1.0), "three groups tell little"
    assert items[0].question == "Is it? Please answer Yes or No."
    assert items[8].question == "Is it? Please output the letter corresponding to the correct option."
    assert len({one.id for one in items}) == 12


def test_naturalbench_with_an_answer_twice_says_so() -> None:
    measured = score("naturalbench", [*group(0), *group(1), group(1)[0]], ["yes", "no", "no", "yes"] * 2 + ["yes"])
    assert measured.notes == ["1 of 2 groups have one twice and are not in G-Acc"]


def test_naturalbench_without_an_answer_leaves_the_group_out_of_what_needs_all_four() -> None:
    """The last answer of group 1 is not there: its question 0 and picture 0 are whole, and both are right."""
    items = [*group(0), *group(1)][:-1]
    measured = score("naturalbench", items, ["no", "no", "no", "yes", "yes", "no", "no"])
    assert measured.total == pytest.approx({"Acc": 6 / 7, "Q-Acc": 2 / 3, "I-Acc": 2 / 3, "G-Acc": 0})
    assert measured.notes == ["1 of 2 groups lack an answer and are not in G-Acc"]


def cv(source: str, answer: str | None = "(B)", number: int = 0, task: str = "Count") -> Item:
    prompt = "How many? Select from the following choices.\n(A) 3\n(B) 2"
    return item("cvbench", "How many?", ("2",), idx=number, source=source, answer=answer, prompt=prompt, task=task)


def test_cvbench_is_the_mean_of_2d_and_3d() -> None:
    """ADE20K 1 of 1, COCO 1 of 3, Omni3D 1 of 2: 2D is 2/3, 3D 1/2, all 7/12, where 3 of 6 answers are right."""
    items = [cv(source, number=n) for n, source in enumerate(["ADE20K", *["COCO"] * 3, *["Omni3D"] * 2])]
    measured = score("cvbench", items, ["(B) 2", "B", "2", "a", "The answer is (B).", "A"])
    assert measured.total == pytest.approx({"CV-Bench": 7 / 12, "2D": 2 / 3, "3D": 1 / 2, "accuracy": 1 / 2})
    assert measured.groups["source"]["COCO"] == {"count": 3, "accuracy": pytest.approx(1 / 3)}
    assert items[0].question.endswith("(B) 2\nAnswer with the option's letter from the given choices directly.")
    flat = score("cvbench", items[:4], ["B"] * 4)
    assert flat.total == {"2D": 1.0, "accuracy": 1.0}
    assert flat.missing == {
        "CV-Bench": "the data have nothing of Omni3D",
        "3D": "the data have nothing of Omni3D",
    }


def test_blindtest_is_the_mean_of_its_tasks() -> None:
    """Grids 1 of 2 in both kinds together, circles 1 of 1, letters 0 of 1: a mean of 1/2, where 2 of 4 are right."""
    items = [
        item("blindtest", "rows={5}?", ("5,6",), task="Counting Grid - Word Grids"),
        item("blindtest", "rows={5}?", ("5,6",), task="Counting Grid - Blank Grids"),
        item("blindtest", None, prompt="Touch?", groundtruth="Yes", task="Touching Circles"),
        item("blindtest", "Which letter?", ("o",), task="CircledWord"),
    ]
    measured = score("blindtest", items, ["rows={5} columns={6}", "(6,5)", "Yes.", "the last one"])
    assert measured.total == pytest.approx({"mean of tasks": 1 / 2, "accuracy": 1 / 2, "could be read": 3 / 4})
    assert measured.groups["task"]["Counting Grid"]["accuracy"] == 0.5
    assert measured.notes[0].startswith("the mean is that of 3 tasks; there is nothing of Line Plot Intersections")
    assert items[2].question == "Touch?"


def hallusion(place: str, truth: str | None) -> Item:
    category, subcategory, of, figure, question = place.split()
    facts = {"category": category, "subcategory": subcategory, "set_id": of, "figure_id": figure}
    return item("hallusionbench", question_id=question, gt_answer=truth, **facts)


def test_hallusionbench_counts_questions_figures_and_pairs() -> None:
    """By hand: two figures with two questions each, of which the second is right about the first figure alone; and a
    chart of its own, whose set 0 is another one. 4 of 5 questions, 2 of 3 figures, 2 of 3 pairs."""
    places = ["VD ocr 0 0 0", "VD ocr 0 0 1", "VD ocr 0 1 0", "VD ocr 0 1 1", "VS ocr 0 1 0"]
    items = [hallusion(place, truth) for place, truth in zip(places, "11001", strict=True)]
    said = ["Yes, it is.", "yes", "No.", "Yes", "yes"]
    measured = score("hallusionbench", items, said)
    assert measured.total == pytest.approx({"aAcc": 4 / 5, "fAcc": 2 / 3, "qAcc": 2 / 3})
    assert measured.groups["category"]["VD"] == {"count": 4, "aAcc": 0.75, "fAcc": 0.5, "qAcc": 0.5}
    assert score("hallusionbench", items[:1], ["yes and no"]).total["aAcc"] == 0.0
    table = item("hallusionbench", index="VD_illusion_1_0_2_3", answer="No")  # as VLMEvalKit has it
    assert (table.id, table.accepted) == ("VD_illusion_0_2_3", ["no"])


def test_a_figure_that_is_not_shown_is_no_figure() -> None:
    """VS questions about figure 0 are asked without a picture, and are not in the published fAcc."""
    items = [hallusion("VS map 0 0 0", "1"), hallusion("VS map 0 1 0", "1")]
    assert score("hallusionbench", items, ["no", "yes"]).total == {"aAcc": 0.5, "fAcc": 1.0, "qAcc": 0.0}


@pytest.mark.parametrize(
    ("limit", "answered", "total", "notes"),
    [
        (None, 4, {"aAcc": 1.0, "fAcc": 1.0, "qAcc": 1.0}, []),
        (
            None,
            1,
            {"aAcc": 1.0},
            [
                "1 of 1 figures lack an answer and are not in fAcc",
                "1 of 1 question pairs lack an answer and are not in qAcc",
            ],
        ),
        (1, 2, {"aAcc": 1.0, "fAcc": 1.0}, ["2 of 2 question pairs lack an answer and are not in qAcc"]),
    ],
)
def test_a_figure_or_set_that_lacks_answers_is_not_taken_for_whole(
    tmp_path: Path, limit: int | None, answered: int, total: dict[str, float], notes: list[str]
) -> None:
    """A set of two figures and two questions; all answers that are there are right."""
    bench = choose("hallusionbench")
    rows = [
        {"category": "VD", "subcategory": "chart", "set_id": "0", "figure_id": figure, "question_id": question}
        | {"question": "Is it?", "gt_answer": "1", "image": f"{figure}.png"}
        for figure, question in ("00", "01", "10", "11")
    ]
    for number in range(2):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = sources.build("jsonl", path=str(tmp_path / "rows.jsonl"), images=str(tmp_path))
    listed, _ = bench.items(source, limit)
    items = [item for one in listed for item in one.items]
    assert len(items) == (4 if limit is None else 2)
    measured = bench.score(items[:answered], [{"said": "yes"}] * answered, None, False)
    assert measured.total == total
    assert measured.notes == notes
    assert measured.missing.keys() == {"aAcc", "fAcc", "qAcc"} - total.keys()


def test_docvqa_averages_similarities_and_submits_by_its_own_ids() -> None:
    items = [item("docvqa", "What?", ("ITC Limited", "itc"), questionId=7), item("docvqa", "Who?", questionId=8)]
    measured = score("docvqa", items[:1], ["itc limitd"])
    assert measured.total == {"ANLS": pytest.approx(10 / 11)}
    assert not items[1].known
    assert choose("docvqa").submit(items, {"7": {"said": "itc"}}) == [
        {"questionId": 7, "answer": "itc"},
        {"questionId": 8, "answer": ""},
    ]


@pytest.mark.parametrize(
    ("key", "facts", "kind"),
    [
        ("data/test_human.json:3", {}, "human"),
        ("data/test_augmented.json:3", {}, "augmented"),
        ("human/test.json:3", {}, None),
        ("line 1", {"type": "augmented_test"}, "augmented"),
        ("line 1", {"human_or_machine": "machine"}, "augmented"),
        ("line 1", {"human_or_machine": 0}, "human"),
    ],
)
def test_chartqa_tells_its_two_sets_apart(key: str, facts: dict[str, Any], kind: str | None) -> None:
    made = choose("chartqa").item(Sample(Path("0.png"), key, question="How many?", answers=["10"], facts=facts), 0)
    assert made.facts.get("set") == kind
    assert score("chartqa", [made], ["10.5"]).total == {"relaxed accuracy": 1.0}


def test_ocrbench_counts_by_type_of_a_thousand() -> None:
    asked = [("IIIT5K", "Regular Text Recognition", "CENTRE"), ("IAM", "Handwriting Recognition", "put down")]
    asked += [("HME100k", "Handwritten Mathematical Expression Recognition", "y _ 2 = 1\n")]
    items = [
        item("ocrbench", "What is written?", (text,), dataset_name=data, id=5, type=kind) for data, kind, text in asked
    ]
    measured = score("ocrbench", items, ["It says centre.", "putdown", "y_2=1"])
    assert measured.total == {"accuracy": pytest.approx(2 / 3)}
    assert measured.groups["part"]["Text Recognition"] == {"count": 2, "accuracy": 0.5}
    assert measured.notes == [
        "OCRBench: 2 of 3 (Text Recognition 1 of 2, Handwritten Mathematical Expression Recognition 1 of 1); the "
        "published score is of all 1,000"
    ]
    assert [one.id for one in items] == ["IIIT5K 5", "IAM 5", "HME100k 5"]


@pytest.mark.parametrize(
    ("bench", "facts", "kind"),
    [
        ("naturalbench", {"Question_Type": "essay", "Index": 0}, "unknown type"),
        ("naturalbench", {"Question_Type": "yes_no"}, "unknown type"),
        ("naturalbench", {"Question_Type": "yes_no", "Index": 0, "Answer": "perhaps"}, "no answer"),
        ("naturalbench", {"Question_Type": ["yes_no"], "Index": 0}, "unknown type"),
        ("naturalbench", {"Question_Type": "yes_no", "Index": "9" * 5000}, "unknown type"),
        ("naturalbench", {"Question_Type": "yes_no", "question_number": 0}, "unknown type"),
        ("cvbench", {"source": ["COCO"], "prompt": "What?"}, "unknown type"),
        ("ocrbench", {"type": {"a": 1}}, "unknown type"),
        ("cvbench", {"source": "COCO"}, "no question"),
        ("cvbench", {"source": "ImageNet", "prompt": "What?"}, "unknown type"),
        ("cvbench", {"source": "COCO", "prompt": "What?", "answer": "two"}, "no answer"),
        ("blindtest", {"task": "Counting Stars"}, "unknown type"),
        ("blindtest", {"task": "Nested Squares", "groundtruth": "many"}, "no answer"),
        ("hallusionbench", {"category": "VD"}, "unknown type"),
        ("hallusionbench", {"index": "VD_ocr_1_0_0_0", "gt_answer": "2"}, "no answer"),
        ("ocrbench", {"type": "Poetry"}, "unknown type"),
        ("docvqa", {"question": None}, "no question"),
        ("chartqa", {"question": " "}, "no question"),
    ],
)
def test_what_cannot_be_asked_or_scored_is_a_bad_sample(bench: str, facts: dict[str, Any], kind: str) -> None:
    with pytest.raises(BadSample) as caught:
        item(bench, **facts)
    assert caught.value.kind == kind


def test_columns_of_odd_types_are_of_no_group() -> None:
    """A list for a set, a height beyond all numbers, and a value that commands a terminal."""
    assert "set" not in item("chartqa", type=[1]).facts
    odd = [item("docvqa", "What?", ("a",), question_type=kind, print_height=10**400) for kind in ("\x1b[31mred", ["x"])]
    told = choose("docvqa").score(odd, [{"said": "a", "scale": 1.0}] * 2, "question_type", False)
    assert (told.total["ANLS"], list(told.groups), list(told.groups["question_type"])) == (
        *(1.0, ["question_type"], ["?[31mred"]),
    )
    assert not is_vqav2([{"question_type": "x", "answer_type": ["number"]}])


@pytest.mark.parametrize("bench", ["naturalbench", "cvbench", "blindtest", "hallusionbench", "ocrbench"])
def test_hidden_answers_are_asked_and_not_scored(bench: str) -> None:
    facts = {"Question_Type": "yes_no", "index": "VD_ocr_1_0_0_0", "Index": 0, "source": "COCO", "prompt": "What?"}
    kind = {"ocrbench": "Doc-oriented VQA"}.get(bench, "")
    assert not item(bench, task="Nested Squares", type=kind, **facts).known
