"""How benchmarks ask, and what answers are worth: every score here was worked out by hand."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from qformer.data import sources
from qformer.evaluation.benchmarks import BENCHMARKS, COLUMNS, Benchmark, Item, choose, said_of
from qformer.evaluation.tasks import statement_question
from qformer.metrics.lemmas import lemmatize
from qformer.stages.evaluate.settings import Settings, open_data
from qformer.types import BadSample, Sample, UsageError


def sample(**fields: Any) -> Sample:
    return Sample(image=Path("0.jpg"), key="line 1", **fields)


def test_vqa_by_question_type_and_answer_type() -> None:
    """Ten people: 2 of them earn 0.6, 3 earn 0.9, 4 or more all. `is` 1 and 0.6, `how many` 0.9; other 0.6."""
    told = [
        ("yes", ["yes"] * 10, {"question_type": "is", "answer_type": "yes/no"}),
        ("Two.", ["2"] * 3 + ["3"] * 7, {"question_type": "how many", "answer_type": "number"}),
        ("the bus", ["bus"] * 2 + ["car"] * 8, {"question_type": "is", "answer_type": "other"}),
    ]
    items = [Item(str(n), n, "?", accepted, facts=facts) for n, (_, accepted, facts) in enumerate(told)]
    measured = choose("vqa").score(items, [{"said": text} for text, _, _ in told], None, False)
    assert measured.each == pytest.approx([1.0, 0.9, 0.6])
    assert measured.total == pytest.approx({"accuracy": 2.5 / 3, "all normalised": 2.5 / 3})
    assert measured.groups["question_type"] == {
        "how many": {"count": 1, "accuracy": pytest.approx(0.9), "all normalised": pytest.approx(0.9)},
        "is": {"count": 2, "accuracy": pytest.approx(0.8), "all normalised": pytest.approx(0.8)},
    }
    assert measured.groups["answer_type"]["other"]["accuracy"] == pytest.approx(0.6)


def test_what_ten_people_spelled_alike_is_scored_by_both_rules() -> None:
    """The rule of the data comes first: of VQAv2's own annotations that of its script, else that which normalises."""
    facts = {"question_type": "is", "answer_type": "yes/no"}
    ours = Item("0", 0, "?", ["Yes"] * 10)
    official = Item("0", 0, "?", ["Yes"] * 10, facts=facts)
    said = [{"said": "Yes"}]
    for item, wanted in (
        (ours, [("accuracy", 1.0), ("VQAv2's script", 0.0)]),
        (official, [("accuracy", 0.0), ("all normalised", 1.0)]),
    ):
        measured = choose("vqa").score([item], said, None, False)
        assert list(measured.total.items()) == wanted
        assert measured.each == [wanted[0][1]]
    assert choose("vqa").score([Item("0", 0, "?", ["Yes"] * 9)], said, None, False).total == {"accuracy": 1.0}


def test_drawn_data_are_not_walked_to_their_end() -> None:
    """They have a million samples where no count is given, and no two of one picture."""
    drawn = sources.build("canvases", questions=True)
    listed, skipped = choose("vqa").items(drawn, 3)
    assert [one.image.key.partition(":")[0] for one in listed] == [f"canvases/train/0/{number}" for number in range(3)]
    assert not skipped
    with pytest.raises(UsageError, match=r"'canvases' draws as many samples as it is asked for; give --limit N"):
        open_data(Settings("run", "vqa", ["name=canvases", "questions=true"]), "jsonl")
    assert len(open_data(Settings("run", "vqa", ["name=canvases"], limit=3), "jsonl")) == 1_000_000


def test_gqa_counts_the_normalised_and_the_exact_answer() -> None:
    items = [Item(str(n), n, "?", [truth]) for n, truth in enumerate(("yes", "dog", "left"))]
    measured = choose("gqa").score(items, [{"said": "Yes"}, {"said": "a dog."}, {"said": "left"}], None, False)
    assert measured.total == pytest.approx({"accuracy": 1, "exact": 1 / 3})


def test_choices_by_the_sum_and_by_the_mean_of_losses() -> None:
    """The long answer has the larger sum and the smaller mean."""
    items = [Item("0", 0, "?", choices=["cat", "a very small dog"], right=0, facts={"level": "easy"})]
    records = [{"losses": [2.0, 4.0], "tokens": [1, 4]}]
    measured = choose("choice").score(items, records, "level", False)
    assert measured.total == {"accuracy": 1.0, "by mean loss": 0.0}
    assert said_of(items[0], records[0]) == "cat"
    assert measured.groups == {"level": {"easy": {"count": 1, "accuracy": 1.0, "by mean loss": 0.0}}}


def test_statements_tell_how_often_yes_was_said() -> None:
    items = [Item(str(n), n, "?", choices=["yes", "no"], right=n % 2) for n in range(4)]
    records = [{"losses": [1.0, 2.0], "tokens": [1, 1]}] * 3 + [{"losses": [3.0, 2.0], "tokens": [1, 1]}]
    assert choose("statement").score(items, records, None, False).total == {"accuracy": 0.75, "said yes": 0.75}


def test_captions_by_domain_are_scored_apart() -> None:
    """CIDEr of a domain weighs words by its own references alone."""
    said = ["a red bus in the street", "two dogs", "a red bus in the street", "people eat at some table"]
    known = [
        "a red bus in the street",
        "a cat on grass far away",
        "people eat at some table",
        "a red bus in the street",
    ]
    domains = ["in-domain", "in-domain", "out-domain", "out-domain"]
    items = [Item(str(n), n, accepted=[text], facts={"domain": domains[n]}) for n, text in enumerate(known)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qformer.evaluation.caption.shutil.which", lambda name: None)
        measured = choose("caption").score(items, [{"said": text} for text in said], None, False)
    assert measured.groups["domain"]["in-domain"]["CIDEr"] == pytest.approx(5, abs=1e-6)
    assert measured.groups["domain"]["out-domain"]["CIDEr"] == pytest.approx(0, abs=1e-6)
    assert measured.groups["domain"]["in-domain"]["count"] == 2
    assert measured.missing.keys() == {"METEOR", "SPICE"}


@pytest.mark.parametrize(
    ("facts", "right"),
    [
        ({"label": 1}, 1),
        ({"answer": "B"}, 1),
        ({"answer": "b"}, 1),
        ({"answer": " a dog"}, 1),
        ({"label": 0}, 0),
        ({}, None),
    ],
)
def test_the_right_choice_is_a_number_a_letter_or_the_text(facts: dict[str, Any], right: int | None) -> None:
    item = choose("choice").item(sample(question="What?", facts={"choices": ["a cat", "a dog"], **facts}), 3)
    assert (item.id, item.right, item.known) == ("3", right, right is not None)


@pytest.mark.parametrize(
    ("bench", "fields", "kind"),
    [
        ("vqa", {}, "no question"),
        ("choice", {"question": "What?"}, "no choices"),
        ("choice", {"question": "What?", "facts": {"choices": ["a", "b"], "label": 2}}, "no answer"),
        ("choice", {"question": "What?", "facts": {"choices": ["x", "y"], "answer": "z"}}, "no answer"),
        ("statement", {"question": "What?"}, "no statement"),
        ("statement", {"facts": {"statement": "..."}}, "no statement"),
        ("statement", {"facts": {"statement": "It is red.", "label": "perhaps"}}, "no answer"),
    ],
)
def test_what_cannot_be_asked_is_a_bad_sample(bench: str, fields: dict[str, Any], kind: str) -> None:
    with pytest.raises(BadSample) as caught:
        choose(bench).item(sample(**fields), 0)
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    ("label", "right"), [(True, 0), (False, 1), ("true", 0), ("False", 1), ("yes", 0), (0, 1), (None, None)]
)
def test_labels_of_statements(label: Any, right: int | None) -> None:
    facts = {"sentence": "There is a tower."} | ({} if label is None else {"label": label})
    item = choose("statement").item(sample(facts=facts), 0)
    assert (item.question, item.right) == ("is it true that there is a tower?", right)


@pytest.mark.parametrize(
    ("bench", "facts", "image", "number"),
    [
        ("caption", {}, "val2014/COCO_val2014_000000000073.jpg", 73),
        ("caption", {}, "val2017/000000000042.jpg", 42),
        ("caption", {"image_id": 7}, "COCO_val2014_000000000073.jpg", 7),
        ("caption", {"image_id": "42"}, "0.jpg", "42"),
        ("caption", {"image_id": 42.0}, "0.jpg", 42),
        ("caption", {"image_id": "coco_73"}, "COCO_val2014_000000000073.jpg", 73),
        ("caption", {"image_id": "0013ea2087020901"}, "0.jpg", "0013ea2087020901"),
        ("caption", {"img_id": 5, "id": 9}, "nocaps/val/0013ea2087020901.jpg", 5),
        ("caption", {"cocoid": 73, "question_id": 9}, "a.jpg", 73),
        ("caption", {"id": 9}, "COCO_val2014_000000000073.jpg", 73),
        ("caption", {"id": 9}, "a.jpg", 9),
        ("caption", {"image_id": None, "id": math.nan}, "a.jpg", None),
        ("vqa", {"question_id": 42000, "image_id": 42}, "a.jpg", 42000),
        ("vqa", {"questionId": "201"}, "a.jpg", "201"),
        ("vqa", {"qid": 5, "id": 6}, "a.jpg", 5),
        ("vqa", {"image_id": 42}, "COCO_val2014_000000000042.jpg", None),  # of the picture, not of the question
    ],
)
def test_a_submission_has_the_ids_of_the_data(bench: str, facts: dict[str, Any], image: str, number: Any) -> None:
    record = Sample(image=Path(image), key="line 1", question="what?", captions=["a"], facts=facts)
    item = choose(bench).item(record, 1234)
    assert (item.number, item.has_id) == (1234 if number is None else number, number is not None)


def test_statements_are_cleaned() -> None:
    assert statement_question("  The Bus is red!! ") == "is it true that the bus is red?"


def test_submissions_are_of_the_official_forms() -> None:
    items = [Item("7", 7, "?", []), Item("8", 8, "?", [])]
    records = {"7": {"id": "7", "said": "red"}}
    assert choose("vqa").submit(items, records) == [
        {"question_id": 7, "answer": "red"},
        {"question_id": 8, "answer": ""},
    ]
    assert choose("caption").submit(items, records)[0] == {"image_id": 7, "caption": "red"}
    assert choose("gqa").submit(items, records)[0] == {"questionId": "7", "prediction": "red"}


def test_difficult_direct_answers_are_asked_and_not_scored() -> None:
    """As A-OKVQA's own evaluation has it; its server takes an object by question."""

    def item(difficult: bool, bench: str = "vqa") -> Item:
        facts = {"question_id": "q", "difficult_direct_answer": difficult, "choices": ["a kite", "a bus"], "label": 1}
        return choose(bench).item(sample(question="what?", answers=["kite"], facts=facts), 0)

    assert [item(difficult).known for difficult in (False, True)] == [True, False]
    assert item(True, "choice").right == 1
    direct = choose("vqa").submit([item(True)], {"q": {"id": "q", "said": "red"}})
    assert direct == {"q": {"direct_answer": "red"}}
    chosen = choose("choice").submit([item(True, "choice")], {"q": {"id": "q", "losses": [2.0, 1.0]}})
    assert chosen == {"q": {"multiple_choice": "a bus"}}


def test_without_spacy_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qformer.metrics.lemmas.MODEL", "no_such_pipeline")
    with pytest.raises(UsageError, match=r"pip install spacy|spacy download"):
        lemmatize(["two dogs"])


def test_the_page_of_the_documentation_has_every_benchmark_and_column() -> None:
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert all(f"| `{bench}` |" in page and f"--bench {bench} " in page for bench in BENCHMARKS if bench != "retrieval")
    assert all(f"`{column}`" in page for column in COLUMNS)


def test_labels_that_are_kept_secret_and_answers_that_are_not_read() -> None:
    secret = {"choices": ["red", "blue"], "answer": -1}
    for bench in ("choice", "vqa"):
        assert not choose(bench).item(sample(question="what?", facts=secret), 0).known
    assert choose("choice").item(sample(question="what?", facts=secret | {"answer": ["blue"]}), 0).right == 1
    for unread in ({"red": 3}, [["red"]], True):
        with pytest.raises(BadSample, match="no text in 'answers'"):
            choose("vqa").item(sample(question="what?", facts={"answers": unread}), 0)
    for empty in ([""] * 10, [], None, ""):
        assert not choose("vqa").item(sample(question="what?", facts={"answers": empty}), 0).known
    gaps = {"sentence": "There is a dog.", "label": 0.0}  # a column of numbers with gaps
    assert choose("statement").item(sample(facts=gaps), 0).right == 1


def test_vizwiz_knows_its_questions_by_their_images() -> None:
    asked = Sample(image=Path("val/VizWiz_val_00000003.jpg"), key="line 1", question="What is this?")
    assert choose("vqa").submit([item := choose("vqa").item(asked, 0)], {item.id: {"said": "a can"}}) == [
        {"image": "VizWiz_val_00000003.jpg", "answer": "a can"}
    ]
    assert item.has_id


class Unfinished(Benchmark):
    """Lacks all that a benchmark must have."""


def test_the_table_holds_benchmarks_of_both_stages() -> None:
    made = {name: choose(name) for name in BENCHMARKS}
    assert {name for name, bench in made.items() if bench.stage == "stage1"} == {"retrieval", "mmvp-vlm"}
    assert {name for name, bench in made.items() if not bench.writes} == {
        "retrieval",
        "choice",
        "statement",
        "mmvp-vlm",
    }
    assert {name for name, bench in made.items() if bench.lemmatizes} == {"vqa", "gqa"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("captoin", "unknown benchmark 'captoin': did you mean 'caption'?"),
        ("nothing.at_all:Here", "benchmark 'nothing.at_all:Here' cannot be imported"),
        ("qformer.types:Sample", "'qformer.types:Sample' is no benchmark; give a class made from"),
        (f"{__name__}:Unfinished", "cannot be made"),
    ],
)
def test_what_is_no_benchmark(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        choose(name)
