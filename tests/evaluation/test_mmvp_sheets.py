"""MMVP's tables as people leave them: rows not filled in yet, sheets of answers, and what people are scored beside."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from qformer.data import sources
from qformer.evaluation.benchmarks import choose
from qformer.evaluation.mmvp import PATTERNS, read_mmvp
from qformer.metrics.proportions import share_interval
from qformer.mmvp.folder import read_answers
from qformer.types import LeftOut, UsageError
from tests.evaluation.test_mmvp import ROWS, records_of, write_mmvp

BLANK = [("", "", "")] * 2


def sheet(folder: Path, *lines: str) -> Path:
    """A folder with four photos whose table has these rows below the head of a mined sheet."""
    write_mmvp(folder, ROWS * 2)
    text = "\n".join(["Index,Question,Options,Correct Answer,Pattern", *lines])
    (folder / "Questions.csv").write_text(text + "\n", encoding="utf-8")
    return folder


DOOR = "Is it open?,(a) Open (b) Closed"


def test_pairs_that_nobody_filled_in_are_left_out_and_counted(tmp_path: Path) -> None:
    """The first of two pairs is blank but for a pattern, which a model may have named."""
    folder = sheet(tmp_path / "m", "1,,,,Texts", "2,,,,Texts", f"3,{DOOR},(a),Texts", f"4,{DOOR},(b),", ",,,,")
    with pytest.warns(LeftOut, match=r"^1 of 2 pairs are not filled in yet and are left out$"):
        read = read_mmvp(folder)
    assert [(one.number, one.answer, one.image.name) for one in read] == [(3, "a", "3.jpg"), (4, "b", "4.jpg")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = sources.build("mmvp", path=str(folder), grades=str(grades(tmp_path, "yes", "no")))
        bench = choose("mmvp")
        bench.items(source)
    items, records = records_of(source, {})
    measured = bench.score(items, records, None, False)
    assert (measured.total["parser"], measured.total["grader"]) == (1.0, 0.0), "verdicts are of the rows that are asked"
    assert measured.notes == ["1 of 2 pairs are not filled in yet and are left out"]


def grades(folder: Path, *lines: str) -> Path:
    (folder / "grades.txt").write_text("\n".join(lines))
    return folder / "grades.txt"


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (
            (f"1,{DOOR},(a),", "2,,,,"),
            "row 2 of .* it is empty, and row 1 of its pair is not; fill both in",
        ),
        (("1,,,,", f"2,{DOOR},(a),"), "row 1 of .* it is empty, and row 2 of its pair"),
        ((f"1,{DOOR},(a),", f"2,{DOOR},,"), "row 2 of .* its answer is ''"),
        ((f"1,{DOOR},(a),", "2,Is it open?,,(a),"), "row 2 of .* expected a question, and options"),
        (("1,,,,", "2,,,,", "3,,,,", "4,,,,"), "has 4 rows, and none is filled in"),
        ((f"1,{DOOR},(a),", f"2,{DOOR},(b),", f"5,{DOOR},(a),"), "row 3 of .* Index is 5 behind 2; photos are counted"),
        ((f"1,{DOOR},(a),", f"2,{DOOR},(b),", ",,,,", f"4,{DOOR},(a),"), "row 3 of .* it is empty, and row 4"),
    ],
)
def test_what_is_half_filled_in_names_its_row(tmp_path: Path, lines: tuple[str, ...], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        read_mmvp(sheet(tmp_path / "m", *lines))


def test_photos_of_unfinished_pairs_may_be_missing(tmp_path: Path) -> None:
    folder = sheet(tmp_path / "m", f"1,{DOOR},(a),", f"2,{DOOR},(b),", "3,,,,", "4,,,,")
    (folder / "MMVP Images" / "3.jpg").unlink()
    with pytest.warns(LeftOut):
        assert len(read_mmvp(folder)) == 2


@pytest.mark.parametrize(
    "text",
    [
        "Index,Answer\r\n1,(a)\r\n2,(b)\r\n3,(a)\r\n4,(a)\r\n",  # answers.csv of a sheet
        "row,answer\n1,a\n2,closed\n3,Open\n4,open\n",  # words of the options
        "1,a\n2,b\n3,a\n4,a\n",  # without a head
        "Index,Question,Options,Correct Answer\n1,,,(a)\n2,,,(b)\n3,,,(a)\n4,,,(a)\n",
    ],
)
def test_people_stand_beside_the_model(tmp_path: Path, text: str) -> None:
    """People are right about the first pair of two; the model, which says the right words, about both."""
    folder = sheet(tmp_path / "m", *(f"{n},{DOOR},{'(a)' if n % 2 else '(b)'},{PATTERNS[n > 2]}" for n in range(1, 5)))
    (tmp_path / "people.csv").write_text("\ufeff" + text, encoding="utf-8")
    source = sources.build("mmvp", path=str(folder), human=str(tmp_path / "people.csv"))
    bench = choose("mmvp")
    bench.items(source)
    measured = bench.score(*records_of(source, {}), None, False)
    assert (measured.total["parser"], measured.total["people"]) == (1.0, 0.5)
    assert measured.groups["answered by"] == {"people": {"count": 4, "people": 0.5}}
    by_pattern = measured.groups["pattern"]
    assert [by_pattern[name]["people"] for name in PATTERNS[:2]] == [1.0, 0.0]
    assert measured.intervals["answered by: people"] == {"people": share_interval(1, 2)}
    assert measured.intervals[f"pattern: {PATTERNS[1]}"]["people"] == share_interval(0, 1)
    assert "people" not in measured.groups["asked"]["options swapped"]
    assert not measured.notes


def test_people_who_answered_a_part_are_compared_on_it(tmp_path: Path) -> None:
    """The model is wrong about the pair that people have answered, and right about the other."""
    folder = sheet(tmp_path / "m", *(f"{n},{DOOR},{'(a)' if n % 2 else '(b)'}," for n in range(1, 5)))
    (tmp_path / "people.csv").write_text("Index,Answer\n1,(a)\n2,(b)\n3,(a)\n")
    source = sources.build("mmvp", path=str(folder), human=str(tmp_path / "people.csv"))
    bench = choose("mmvp")
    bench.items(source)
    measured = bench.score(*records_of(source, {"1": "(b)"}), None, False)
    rows = measured.groups["answered by"]
    assert rows["people"] == {"count": 2, "people": 1.0}
    assert rows["the model, the same pairs"] == {"count": 2, "parser": 0.0, "likelier": 0.0}
    assert measured.total["parser"] == 0.5
    assert measured.notes == ["people answered 1 of 2 pairs; their shares are of these, by pattern too"]


def test_people_without_a_whole_pair_are_told(tmp_path: Path) -> None:
    folder = write_mmvp(tmp_path / "m")
    (tmp_path / "people.csv").write_text("Index,Answer\n1,(a)\n")
    source = sources.build("mmvp", path=str(folder), human=str(tmp_path / "people.csv"))
    bench = choose("mmvp")
    bench.items(source)
    measured = bench.score(*records_of(source, {}), None, False)
    assert "answered by" not in measured.groups
    assert "both questions of no pair" in measured.missing["people"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("Answer\n(a)\n\n(a)\n(b)\n", {1: "a", 3: "a", 4: "b"}),  # an empty line is the row of a question
        ("Answer,Note\n(a),\n,\n(a),\n(b),\n", {1: "a", 3: "a", 4: "b"}),
        ("Answer,Note\n(a),\n\n(a),\n,\n(b),\n", {1: "a", 2: "a", 4: "b"}),  # here a blank line is none
        ("Note,Answer\n1,(a)\n,\n3,(b)\n", {1: "a", 3: "b"}),
        ("Nr,Note,Answer\n1,,(a)\n,,\n3,,(b)\n\n", {1: "a", 3: "b"}),  # it counts the rows
        ("lndex,Question,Answer\n4,x,(b)\n3,x,(a)\n", {3: "a", 4: "b"}),  # as in the published file
        ("ID,Name,Answer\n4,x,(b)\n\n3,x,(a)\n", {3: "a", 4: "b"}),
        ("Name,Question ID,Answer\nx,4,(b)\ny,3,(a)\n", {3: "a", 4: "b"}),
        ("question_id,q,answer\n2,x,(b)\n", {2: "b"}),
        ("Number,Note,Answer\n2,x,(b)\n", {2: "b"}),
        ("ID,Index,Answer\n1,4,(b)\n", {4: "b"}),  # an Index goes before
        ("Note,Answer,Index\nx,(a)\n", "row 1 .* has the Index ''"),  # a short row is not counted in its place
        ("Place,Note,Answer\n4,x,(b)\n3,x,(a)\n", "numbers under 'place' that do not count its rows; call"),
        ("Place,Note,Answer\n1,x,(b)\n3,x,(a)\n", "numbers under 'place'"),
    ],
)
def test_an_answer_stays_with_its_question(tmp_path: Path, text: str, told: dict[int, str] | str) -> None:
    questions = read_mmvp(write_mmvp(tmp_path / "m", ROWS * 2))
    (tmp_path / "people.csv").write_text(text, encoding="utf-8")
    if isinstance(told, str):
        with pytest.raises(UsageError, match=told):
            read_answers(tmp_path / "people.csv", questions)
    else:
        assert read_answers(tmp_path / "people.csv", questions) == told


def test_rows_taken_from_the_published_file_are_told(tmp_path: Path) -> None:
    folder = sheet(tmp_path / "m", f"1,{DOOR},(a),", f"2,{DOOR},(b),", f"5,{DOOR},(a),", f"6,{DOOR},(b),")
    table = folder / "Questions.csv"
    table.write_text(table.read_text().replace("Index", "lndex"))
    with pytest.raises(UsageError, match=r"row 3 of .* Index is 5 behind 2"):
        read_mmvp(folder)


@pytest.mark.parametrize(
    ("limit", "lines", "told"),
    [
        (None, ("yes", "no", "yes", "yes"), {1: True, 2: False, 3: True, 4: True}),
        (None, ("yes", "no", "yes", "yes", "", ""), {1: True, 2: False, 3: True, 4: True}),
        (None, ("yes", "no", "yes", "", ""), {1: True, 2: False, 3: True, 4: False}),  # the last reply is empty
        (2, ("yes", "no", ""), {1: True, 2: False}),  # as many as --limit 2 submits
        (2, ("yes", "no", "yes", "yes"), {1: True, 2: False, 3: True, 4: True}),
        (None, ("yes", "no", "yes", ""), "has 3 lines; give a verdict for each of 4"),
        (None, ("yes", "no"), "has 2 lines; give a verdict for each of 4"),
        (2, ("yes", "no", "yes"), "has 3 lines; give a verdict for each of 2 or 4"),
        (1, ("",), "has 0 lines; give a verdict for each of 1 or 4"),
    ],
)
def test_verdicts_are_of_the_rows_that_were_submitted(
    tmp_path: Path, limit: int | None, lines: tuple[str, ...], told: dict[int, bool] | str
) -> None:
    folder = write_mmvp(tmp_path / "m", ROWS * 2)
    source = sources.build("mmvp", path=str(folder), grades=str(grades(tmp_path, *lines)))
    bench: Any = choose("mmvp")
    if isinstance(told, str):
        with pytest.raises(UsageError, match=told):
            bench.items(source, limit)
        return
    listed, _ = bench.items(source, limit)
    assert bench.verdicts == told
    items = [item for one in listed for item in one.items]
    assert len(bench.submission(items, {}).splitlines()) == (limit or 4)
    answers = [{"said": item.accepted[0], "losses": [1.0, 2.0]} for item in items]
    assert bench.score(items, answers, None, False).total["grader"] == (0.5 if limit is None and told[4] else 0.0)


def test_a_pattern_that_stands_in_one_row_of_a_pair_is_that_of_both(tmp_path: Path) -> None:
    (tmp_path / "patterns.csv").write_text("Index,Pattern\n2,Texts\n3,Color\n")
    folder = write_mmvp(tmp_path / "m", ROWS * 2)
    source = sources.build("mmvp", path=str(folder), patterns=str(tmp_path / "patterns.csv"))
    groups = choose("mmvp").score(*records_of(source, {}), None, False).groups["pattern"]
    assert {name: values["count"] for name, values in groups.items()} == {"Texts": 2, "Color": 2}
