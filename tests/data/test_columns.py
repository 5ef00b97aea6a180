"""What is read of a record: texts however they are held, choices, pictures, and columns by the names that are given."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from qformer.data import sources
from qformer.data.columns import Columns, read_record, right_choice, strings
from qformer.types import BadSample, LeftOut, UsageError
from tests.data.making import encoded, jsonl, number_of, photo, tar


def record(**values: Any) -> dict[str, Any]:
    return {"image": "a.jpg"} | values


def texts(values: dict[str, Any], **named: Any) -> tuple[list[str], str | None, list[str]]:
    _, found = read_record(values, Columns(**named), Path())
    return found["captions"], found["question"], found["answers"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("red", ["red"]),
        (["red", None, 3, "blue"], ["red", "blue"]),
        ([{"answer": "red", "answer_confidence": "yes"}, {"answer": None}, {"x": "y"}], ["red"]),
        ({"answer": ["red", "blue"], "answer_id": [1, 2]}, ["red", "blue"]),
        ({"raw": "A kite.", "tokens": ["a"]}, ["A kite."]),
        ("['red', \"it's\"]", ["red", "it's"]),
        ('["red", "blue"]', ["red", "blue"]),
        ("['red' 'blue']", ["['red' 'blue']"]),  # of numpy, which Python would read as one text
        ("[sic] 'red'", ["[sic] 'red'"]),
        ("['red', 3]", ["['red', 3]"]),
        ("[1, 2]", ["[1, 2]"]),
    ],
)
def test_texts_however_they_are_held(value: Any, expected: list[str]) -> None:
    assert strings(value) == expected


def test_numbers_are_answers_and_no_captions() -> None:
    assert strings([3, 2.0, 1.5, float("nan"), True], numbers=True) == ["3", "2", "1.5"]
    assert texts(record(question="how many?", answer=3)) == ([], "how many?", ["3"])
    assert texts(record(caption=3)) == ([], None, [])


def test_what_text_and_label_mean_depends_on_the_others() -> None:
    assert texts(record(text="a kite")) == (["a kite"], None, [])
    assert texts(record(text="a kite?", question_id=1, label="yes")) == ([], "a kite?", ["yes"])
    assert texts(record(text="a sign", question="what?", answers=["x"])) == ([], "what?", ["x"])
    assert texts(record(text="x", question_id=1, caption="a kite")) == (["a kite"], None, [])
    assert texts(record(question="what?", label=3)) == ([], "what?", [])  # a class that nothing names
    assert texts(record(query="how many?", label=3), question="query", answers="label") == ([], "how many?", ["3"])


def test_an_answer_that_means_a_choice_is_this_choice() -> None:
    """Also to train on: never the number."""
    for said in (1, 1.0, "B", "(b)", "1", "a bus"):
        assert texts(record(question="what?", choices=["a kite", "a bus"], answer=said))[2] == ["a bus"]
    named = {"choices": ["x", "y"], "answers": "right", "question": "q"}
    assert texts(record(q="what?", x="a kite", y="a bus", right="B"), **named)[2] == ["a bus"]
    direct = record(question="what?", choices=["a kite", "a bus"], label=1, answers=["toy", "kite"])
    assert texts(direct)[2] == ["toy", "kite"]
    assert right_choice(["2", "1"], "1") == 1  # itself before its number
    assert [right_choice(["a", "b"], said) for said in (2, -1, True, None, "C", "", "9" * 5000, [])] == [None] * 8


def test_a_choice_that_is_missing_moves_no_other_up() -> None:
    for choices in (["a kite", None, "a bus"], ["a kite", "", "a bus"], ["a kite", ["x"], "a bus"]):
        assert texts(record(question="what?", choices=choices, answer=1))[2] == ["1"]
        _, found = read_record(record(question="what?", choices=choices, answer=1), Columns(), Path())
        assert found["facts"]["choices"] == choices  # which a benchmark refuses


def test_pictures_in_base64_and_names_by_patterns(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "COCO_000042.png").write_bytes(encoded(photo(3)))
    written = base64.b64encode(encoded(photo(2))).decode()
    records = [
        {"image": written, "caption": "a", "split": "train", "n": 42},
        {"image": f"data:image/png;base64,{written}", "caption": "a", "split": "x", "n": 1},
    ]
    path = jsonl(tmp_path / "a.jsonl", records)
    source = sources.build("jsonl", path=path)
    assert [number_of(source[n]) for n in range(2)] == [2, 2]
    assert "image" not in source[0].facts
    source = sources.build("jsonl", path=path, image="{split}/COCO_{n:06}.png")
    assert number_of(source[0]) == 3
    digest = "3f8a" * 16  # a name that base64 could be too
    assert read_record({"image": f"{digest}/{digest}"}, Columns(), Path())[0] == Path(f"{digest}/{digest}")


def test_a_column_that_is_named_must_be_there(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", ["{broken", {"image": "a.jpg", "text": "what?"}, {"image": "a.jpg", "label": 1}])
    assert len(sources.build("jsonl", path=path, question="text", answers="label")) == 3
    with pytest.raises(UsageError, match="has no column 'txet': did you mean 'text'"):
        sources.build("jsonl", path=path, question="txet")
    with pytest.raises(UsageError, match="has no column 'split': known are image, label, text"):
        sources.build("jsonl", path=path, image="{split}/{image}")


def test_a_record_that_lacks_something_tells_its_columns(tmp_path: Path) -> None:
    source = sources.build("jsonl", path=jsonl(tmp_path / "a.jsonl", [{"picture": "a.jpg", "words": "a"}]))
    with pytest.raises(BadSample, match=r"no image: .*a\.jsonl:1 has no 'image' path; its columns are picture, words"):
        source[0]


def test_columns_of_the_json_in_tars(tmp_path: Path) -> None:
    said = b'{"text": "what flies?", "label": "B", "A": "a bus", "B": "a kite", "question_id": 7}'
    path = tar(tmp_path / "a.tar", [("1.png", encoded(photo(1))), ("1.json", said)])
    cases: list[dict[str, Any]] = [{}, {"question": "text", "answers": "label", "choices": ["A", "B"]}]
    for named in cases:
        sample = sources.build("webdataset", path=path, **named)[0]
        assert (sample.question, sample.answers) == ("what flies?", ["a kite"])
        assert sample.facts["choices"] == ["a bus", "a kite"]


def test_a_list_is_read_where_lines_are_expected(tmp_path: Path) -> None:
    """Printed on one line or on many, with `where`, bad records one by one; a file of lines stays one."""
    (tmp_path / "a.json").write_text(
        '[{"image": "1.jpg", "s": 1},\n {"image": "2.jpg"}, 3, {"image": "4.jpg", "s": 1}]'
    )
    source = sources.build("jsonl", path=str(tmp_path / "a.json"))
    assert (len(source), source[3].image, source[3].key) == (4, tmp_path / "4.jpg", f"{tmp_path}/a.json:4")
    with pytest.raises(BadSample, match="no image"):
        source[2]
    kept = sources.build("jsonl", path=str(tmp_path / "a.json"), where={"s": 1})
    assert [kept[n].image.name for n in range(len(kept))] == ["1.jpg", "4.jpg"]
    lines = jsonl(tmp_path / "b.jsonl", [{"image": "1.jpg", "data": [{}]}, {"image": "2.jpg"}])
    assert len(sources.build("jsonl", path=lines)) == 2
    (tmp_path / "cut.json").write_text('[{"image": "1.jpg"},\n{"image"')
    with pytest.raises(UsageError, match="begins as a JSON list but is not one"):
        sources.build("jsonl", path=str(tmp_path / "cut.json"))
    for name in ("a.parquet", "a.csv"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(UsageError, match="read it by name: datasets"):
            sources.build("jsonl", path=str(tmp_path / name))


def test_choices_by_letters_and_answers_that_name_none() -> None:
    named = Columns(question="q", answers="answer", choices="options")

    def answers(said: Any, options: Any) -> list[str]:
        found: list[str] = named.texts({"q": "what?", "answer": said, "options": options})["answers"]
        return found

    assert answers("B", {"A": "red", "B": "blue", "C": None}) == ["blue"]
    assert answers("1.0", ["red", "blue"]) == answers(["blue"], ["red", "blue"]) == ["blue"]
    assert answers(-1, ["red", "blue"]) == answers("-1", ["red", "blue"]) == answers("D", ["red", "blue"]) == []
    holed = named.texts({"q": "?", "answer": "C", "options": {"A": "red", "B": None, "C": "blue"}})
    assert "choices" not in holed["facts"]


def test_empty_answers_count_unless_there_are_no_others() -> None:
    assert strings(["red"] * 9 + [""], numbers=True) == ["red"] * 9 + [""]  # one of ten people
    assert strings([""] * 10, numbers=True) == strings("", numbers=True) == []
    assert strings(b"caf\xc3\xa9") == ["caf\u00e9"]


def test_answers_in_a_form_that_is_not_read_are_known_by_any_name() -> None:
    unread = Columns(question="q", answers="gold").texts({"q": "what?", "gold": {"red": 3}})
    assert (unread["answers"], unread["facts"]["answers"]) == ([], {"red": 3})


def test_halves_of_surrogate_pairs_are_in_no_column(tmp_path: Path) -> None:
    """A page of what was asked, by kind of question, is written as UTF-8."""
    (tmp_path / "a.jsonl").write_text('{"image": "0.png", "question": "a\\ud800?", "question_type": "b\\udfff"}\n')
    sample = sources.build("jsonl", path=str(tmp_path / "a.jsonl"))[0]
    assert (sample.question, sample.facts["question_type"]) == ("a??", "b?")


def test_one_picture_in_a_list(tmp_path: Path) -> None:
    columns = Columns(image="images")
    assert columns.picture({"images": ["a.jpg"]}, tmp_path) == tmp_path / "a.jpg"
    assert columns.picture({"images": ["a.jpg", "b.jpg"]}, tmp_path) == [tmp_path / "a.jpg", tmp_path / "b.jpg"]
    assert all(columns.picture({"images": some}, tmp_path) is None for some in ([], None, ["a.jpg", None], ["", 3]))
    assert Columns(image="{n:03d}.jpg").picture({"n": 7}, tmp_path) == tmp_path / "007.jpg"


def test_ids_and_captions_that_are_not_in_a_tar_are_told(tmp_path: Path) -> None:
    members = [("1.png", encoded(photo(1))), ("1.json", b'{"caption": "a kite", "photo": 3}')]
    where, cache = tar(tmp_path / "a.tar", members), str(tmp_path / "cache")
    source = sources.build("webdataset", path=where, cache=cache, id="photo", caption="text")
    assert (source[0].captions, source[0].facts) == ([], {"photo": 3})
    with pytest.warns(LeftOut, match="not every sample has 'phot' in its JSON"):
        sources.build("webdataset", path=where, cache=cache, id="phot")[0]
    with pytest.raises(UsageError, match=r"is a folder; name the tars in it, such as '.*/\*\.tar'"):
        sources.build("webdataset", path=str(tmp_path), cache=cache)
