"""MMVP as it is published: folders with their quirks, scores worked out by hand, and labeled answers for the parser."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from qformer.canvases.pairs import Twins, write_pairs
from qformer.data import sources
from qformer.evaluation.benchmarks import Item, choose
from qformer.evaluation.mmvp import (
    PATTERNS,
    correlation,
    graded,
    pair_accuracy,
    parse_choice,
    pattern_accuracy,
    read_mmvp,
    read_mmvp_vlm,
    statements_right,
)
from qformer.metrics.proportions import share_interval
from qformer.mmvp.folder import name_kinds
from qformer.suites.mmvp_statements import measure_pairs, pair_up
from qformer.types import UsageError

HERE = Path(__file__).parent
ROWS = [("Is the door open?", "(a) Open (b) Closed", "(a)"), ("Is the door open?", "(a) Open (b) Closed", "(b)")]


def write_mmvp(folder: Path, rows: list[tuple[str, str, str]] = ROWS, ending: str = "jpg", head: str = "") -> Path:
    images = folder / "MMVP Images"
    images.mkdir(parents=True)
    lines = [head or "Index,Question,Options,Correct Answer"]
    for number, row in enumerate(rows, start=1):
        lines.append(",".join([str(number), *(f'"{cell}"' for cell in row)]))
        Image.new("RGB", (28, 28), (number % 256, 0, 0)).save(images / f"{number}.{ending}", "JPEG")
    (folder / "Questions.csv").write_text("\ufeff" + "\r\n".join(lines) + "\r\n\r\n", encoding="utf-8")
    return folder


def write_vlm(folder: Path, kinds: tuple[str, ...] = ("Orientation", "Camera Perspective"), name: str = "") -> Path:
    lines = ["Question ID,Type,Statement"]
    for number in range(1, 2 * len(kinds) + 1):
        kind = kinds[(number - 1) // 2]
        place = folder / (name or "MLLM_VLM Images") / (kind.replace(" ", "_") if name else kind)
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (28, 28), (40 * number % 256, 0, 0)).save(place / f"{number}.jpg")
        lines.append(f'{number},{kind},"a dog, number {number}"')
    (folder / "Questions.csv").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.mark.parametrize("ending", ["jpg", "JPG", "jpeg"])
def test_a_folder_with_a_byte_order_mark_and_any_ending_is_read(tmp_path: Path, ending: str) -> None:
    first, second = read_mmvp(write_mmvp(tmp_path / "mmvp", ending=ending))
    assert (first.number, first.answer, second.answer, second.choices) == (1, "a", "b", ("Open", "Closed"))
    assert first.prompt == "Is the door open? (a) Open (b) Closed"
    assert first.image.name == f"1.{ending}"
    assert (first.swapped().options, first.swapped().answer) == ("(a) Closed (b) Open", "b")


def test_two_rows_are_corrected_and_no_others(tmp_path: Path) -> None:
    rows = [(f"Is it {number}?", "(a) Yes(b) No, not at all", "(b)") for number in range(1, 301)]
    folder = write_mmvp(tmp_path / "mmvp", rows)
    changed = [
        one.number
        for one, other in zip(read_mmvp(folder), read_mmvp(folder, corrected=True), strict=True)
        if one != other
    ]
    assert changed == [100, 280]


def test_drawn_pairs_are_read_with_their_patterns(tmp_path: Path) -> None:
    written = write_pairs(tmp_path / "pairs", Twins(), pairs=9)
    read = read_mmvp(tmp_path / "pairs")
    assert [one.answer for one in read] == ["ab"[right] for pair in written for right in pair.right]
    assert tuple(one.pattern for one in read[::2]) == PATTERNS
    assert all(one.choices == pair.options for one, pair in zip(read[::2], written, strict=True))


@pytest.mark.parametrize("name", ["", "MMVP_VLM_Images"])
def test_statements_are_read_under_both_names_of_the_folder(tmp_path: Path, name: str) -> None:
    read = read_mmvp_vlm(write_vlm(tmp_path / "vlm", name=name))
    assert [one.number for one in read] == [1, 2, 3, 4]
    assert read[2].prompt == "a photo of a dog, number 3"
    assert (read[3].image.name, read[3].kind) == ("4.jpg", "Camera Perspective")


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ("Index,Question,Options\n1,Is it?,(a) A (b) B", "expected Question, Options and Correct Answer"),
        ("Question,Options,Correct Answer\nIs it?,(a) Open", "row 1 .* is broken"),
        ("Question,Options,Correct Answer\nIs it?,Open or closed,(a)", "row 1 .* is broken"),
        ("Question,Options,Correct Answer\nIs it?,(a) A (b) B,(c)", "not \\(a\\) or \\(b\\)"),
        ('Question,Options,Correct Answer\n"Is it?,(a) A (b) B,(a)', "cannot be read"),
        ("Question,Options,Correct Answer\nIs it?,(a) A (b) B (c) C,(a)", "row 1 .* is broken"),
        ("Question,Options,Correct Answer\nIs it?,(a) A (b) B,(a)", "row 1 .* its pair has no other"),
        ("Question,Options,Correct Answer\n", "has no rows"),
        ("", "has the columns"),
    ],
)
def test_a_broken_table_is_told_in_a_sentence(tmp_path: Path, table: str, told: str) -> None:
    folder = write_mmvp(tmp_path / "mmvp")
    (folder / "Questions.csv").write_text(table)
    with pytest.raises(UsageError, match=told):
        read_mmvp(folder)


def test_missing_images_and_bytes_that_are_no_text_are_told(tmp_path: Path) -> None:
    folder = write_mmvp(tmp_path / "mmvp")
    (folder / "MMVP Images" / "2.jpg").unlink()
    with pytest.raises(UsageError, match=r"1 of 2 images .* missing \(2.jpg\)"):
        read_mmvp(folder)
    (folder / "Questions.csv").write_bytes(b"Question,Options\xff\xfe")
    with pytest.raises(UsageError, match="cannot be read"):
        read_mmvp(folder)
    vlm = write_vlm(tmp_path / "vlm")
    (vlm / "MLLM_VLM Images" / "Orientation" / "1.jpg").unlink()
    with pytest.raises(UsageError, match=r"Orientation/1.jpg"):
        read_mmvp_vlm(vlm)
    (vlm / "Questions.csv").write_text("id,type,statement\n1,../../x,a dog\n2,../../x,a dog")
    with pytest.raises(UsageError, match="missing"):
        read_mmvp_vlm(vlm)
    with pytest.raises(UsageError, match="no folder"):
        read_mmvp(tmp_path / "none")


def test_a_grader_must_say_yes_and_nothing_else() -> None:
    assert [graded(text) for text in ("yes", "YES", "yes.", " yes", "yes\n", "no", "")] == [True, True, *[False] * 5]


def test_a_pair_counts_if_both_are_right() -> None:
    assert pair_accuracy([True, True, True, False, False, False]) == pytest.approx(1 / 3)
    for right in ([], [True]):
        with pytest.raises(UsageError, match="two for each pair"):
            pair_accuracy(right)
    low, high = share_interval(0, 150)
    assert (low, round(high, 3)) == (0.0, 0.025)


def test_a_tie_is_the_second_photo_and_patterns_follow_each_other() -> None:
    assert statements_right(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]])) == [True, True, False, True]
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(18, 1)  # two pairs of each pattern, all right
    logits[2] = 0  # the second pair is wrong
    found = pattern_accuracy(logits)
    assert list(found) == list(PATTERNS)
    assert list(found.values()) == [50.0, *[100.0] * 8]
    with pytest.raises(UsageError, match="nine equal patterns"):
        pattern_accuracy(logits[:4])


def test_correlation_is_pearsons() -> None:
    assert correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1)
    assert correlation([1, 2, 4], [3, 2, 1]) == pytest.approx(-0.981981, abs=1e-6)
    assert str(correlation([1, 1], [1, 2])) == "nan"
    assert str(correlation([0.1, 0.1, 0.1], [1, 2, 3])) == "nan"  # their mean differs from 0.1 in the last digit
    assert correlation([1e-200, 2e-200, 4e-200], [3e200, 2e200, 1e200]) == pytest.approx(-0.981981, abs=1e-6)
    assert correlation(torch.tensor([1.0, 2.0, 4.0]), [3, 2, 1]) == pytest.approx(-0.981981, abs=1e-6)
    with pytest.raises(UsageError, match="one length"):
        correlation([1], [1, 2])


def labeled(half: str) -> list[dict[str, Any]]:
    lines = (HERE / f"choice_answers_{half}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("half", "least", "right"), [("unseen", 250, 360), ("tuning", 250, 372), ("checked", 390, 390)]
)
def test_the_parser_reads_answers_as_a_person_does(half: str, least: int, right: int) -> None:
    """The figures of the documentation; the unseen half was labeled before the parser was written."""
    rows = labeled(half)
    wrong = [row for row in rows if parse_choice(row["reply"], row["options"]) != row["label"]]
    assert len(rows) >= least
    assert len(rows) - len(wrong) >= right, wrong
    assert right / len(rows) >= 0.99


def test_the_parser_reads_later_answers_of_a_small_model_less_well() -> None:
    """Greedy answers of a model of 135 million weights, read and labeled after the parser was done."""
    rows = labeled("later")
    assert sum(parse_choice(row["reply"], row["options"]) == row["label"] for row in rows) >= 35


def test_the_labeled_answers_are_many_and_a_model_gave_a_hundred() -> None:
    rows = labeled("unseen") + labeled("tuning")
    assert len(rows) >= 500
    assert sum(row["source"] != "written" for row in rows) >= 100
    assert set(Counter(row["label"] for row in rows)) == {"a", "b", None}


def test_an_article_at_which_a_reply_was_cut_off_is_no_letter() -> None:
    assert parse_choice("The image shows a dog that looks at a", "(a) Open (b) Closed") is None
    assert parse_choice("The best choice is a", "(a) Open (b) Closed") == "a"


def test_a_loop_of_a_model_or_a_huge_cell_costs_little() -> None:
    """The time of this process alone; both took many times as long when every mention was looked at in all the text."""
    start = time.process_time()
    assert parse_choice("(a) " * 500, "(a) Open (b) Closed") == "a"
    assert parse_choice("is a " * 400, "(a) Open (b) Closed") == "a"
    with pytest.raises(UsageError, match="give two") as refused:
        parse_choice("(a)", "(a) " + "," * 30_000)
    assert len(str(refused.value)) < 300
    assert time.process_time() - start < 3


def test_options_may_be_a_text_or_a_list_and_their_order_counts() -> None:
    said = "The butterfly is facing left, as in a mirror."
    assert parse_choice(said, "(a) Left (b) Right") == "a"
    assert parse_choice(said, ["Right", "Left"]) == "b"
    for options in ("Left or right", ["Left"], ["a", "b", "c"], "(a) Left (b) Right (c) Neither"):
        with pytest.raises(UsageError, match="give two"):
            parse_choice(said, options)


def records_of(source: Any, said: dict[str, str]) -> tuple[list[Item], list[dict[str, Any]]]:
    """Items of a folder; the option's own words are said unless told, and the first option is always likelier."""
    items = [choose("mmvp").item(source[index], index) for index in range(len(source))]
    return items, [{"said": said.get(item.id, item.accepted[0]), "losses": [1.0, 2.0]} for item in items]


def test_pairs_are_scored_by_both_readings_in_three_ways_of_asking(tmp_path: Path) -> None:
    """Two pairs; in the second one reply is wrong as published, and one cannot be read when options are swapped."""
    folder = write_mmvp(tmp_path / "mmvp", ROWS * 2)
    (tmp_path / "human.csv").write_text("Index,Answer\n1,(a)\n2,closed\n3,b\n4,")
    (tmp_path / "grades.txt").write_text("yes\nYes\nyes\nyes.\n")
    (tmp_path / "patterns.csv").write_text("Index,Pattern\n1,State\n2,State\n")
    files = {name.split(".")[0]: str(tmp_path / name) for name in ("human.csv", "patterns.csv", "grades.txt")}
    source = sources.build("mmvp", path=str(folder), **files)
    bench = choose("mmvp")
    bench.items(source)
    items, records = records_of(source, {"3": "(b)", "4 options swapped": "I cannot tell."})
    assert items[1].question == "Is the door open? (a) Closed (b) Open"
    measured = bench.score(items, records, None, False)
    assert measured.total == {
        "parser": 0.5,
        "likelier": 0.0,
        "grader": 0.5,
        "people": 1.0,
        "single": 0.75,
        "unread": 0.0,
    }
    assert measured.groups["asked"]["options swapped"]["parser"] == 0.5
    assert measured.groups["asked"]["reworded"]["parser"] == 1.0
    assert measured.groups["pattern"]["State"]["parser"] == 1.0
    assert measured.groups["answered by"]["people"] == {"count": 2, "people": 1.0}
    assert measured.intervals["all"]["parser"] == pytest.approx((0.0945, 0.9055), abs=1e-3)
    assert "answers" not in measured.groups  # these are not MMVP's own rows
    submitted = [json.loads(line) for line in bench.submission(items, {"1": {"said": "Open"}}).splitlines()]
    prompt = "Is the door open? (a) Open (b) Closed"
    assert submitted[0] == {"question_id": 1, "prompt": prompt, "answer": "(a)", "response": "Open"}
    assert len(submitted) == 4


def test_both_label_sets_are_counted_for_mmvp_itself(tmp_path: Path) -> None:
    rows = [("Is it?", "(a) Yes (b) No", "(b)")] * 300
    rows[99] = ("Does the elephant have long or short tusks?", "(a) Long (b) Short", "(b)")
    rows[279] = ("Is the elderly person standing or sitting in the picture?", "(a) Standing (b) Sitting", "(b)")
    source = sources.build("mmvp", path=str(write_mmvp(tmp_path / "mmvp", rows)))
    bench = choose("mmvp")
    bench.items(source)
    items, records = records_of(source, {"100": "Long"})
    found = bench.score(items, records, None, False).groups["answers"]
    assert [round(150 * found[name]["parser"]) for name in ("published", "corrected")] == [149, 149]
    items, records = records_of(source, {"100": "Long", "280": "Standing"})
    found = bench.score(items, records, None, False).groups["answers"]
    assert [round(150 * found[name]["parser"]) for name in ("published", "corrected")] == [148, 150]


@pytest.mark.parametrize(
    ("option", "content", "told"),
    [
        ("grades", "yes\n", "has 1 lines"),
        ("human", "Index,Answer\n1,\n", "answers no question"),
        ("human", "Index,Answer\n1,a\n2,b\n1,b\n", "row 3 .* has the Index 1 again, with 'b' and not 'a'"),
        ("human", "Index,Said\n1,a\n", "expected Index and Answer"),
        ("human", f"Index,Answer\n{'9' * 5000},a\n", "has the Index '9999"),
        ("patterns", "Index,Pattern\nx,State\n", "Index 'x'"),
        ("patterns", "Index,Pattern\n9,State\n", "tells the pattern of no question"),
    ],
)
def test_files_beside_the_questions_are_checked_first(tmp_path: Path, option: str, content: str, told: str) -> None:
    (tmp_path / "beside").write_text(content)
    options = {"path": str(write_mmvp(tmp_path / "mmvp")), option: str(tmp_path / "beside")}
    with pytest.raises(UsageError, match=told):
        choose("mmvp").items(sources.build("mmvp", **options))


def test_patterns_are_taken_from_equal_photos_of_mmvp_vlm(tmp_path: Path) -> None:
    folder, vlm = write_mmvp(tmp_path / "mmvp"), write_vlm(tmp_path / "vlm")
    for number in (1, 2):
        photo = (folder / "MMVP Images" / f"{number}.jpg").read_bytes()
        (vlm / "MLLM_VLM Images" / "Camera Perspective" / f"{number + 2}.jpg").write_bytes(photo)
    source = sources.build("mmvp", path=str(folder), patterns=str(vlm))
    assert source[0].facts["pattern"] == "Viewpoint and Perspective"


TYPES = ["Orientation", "Presence", "State", "Quantity", "Spatial", "Color", "Structural Character", "Text"]
TYPES += ["Camera Perspective"]


def test_patterns_of_mmvp_vlm_are_named_by_the_types_of_its_table(tmp_path: Path) -> None:
    """In any order of the rows, and of the first three pairs alone; types of other names by their order."""
    for order in (TYPES, sorted(TYPES)):
        read = read_mmvp_vlm(write_vlm(tmp_path / order[0], tuple(order)))
        assert [name_kinds(read)[kind] for kind in TYPES] == list(PATTERNS)
    right = [{"itc": [[1.0, 0.0], [0.0, 1.0]]}] * 3
    found = measure_pairs(pair_up(read)[:3], right).groups["pattern"]  # sorted: camera, color, orientation
    assert list(found) == [PATTERNS[8], PATTERNS[5], PATTERNS[0]]
    read = read_mmvp_vlm(write_vlm(tmp_path / "other", ("x", "camera_perspective", "y", *"ABCDEF")))
    assert list(name_kinds(read).values()) == [PATTERNS[8], *PATTERNS[:8]]
    assert name_kinds(read[:6]) == {"camera_perspective": PATTERNS[8], "x": "x", "y": "y"}
    pairs = pair_up(read)
    assert list(measure_pairs(pairs[:1], right[:1]).groups["pattern"]) == [PATTERNS[0]]


@pytest.mark.parametrize("numbers", [(1, 4, 3, 2), (2, 3, 4, 5), (1, 1, 3, 4)])
def test_rows_of_two_pairs_are_none(tmp_path: Path, numbers: tuple[int, ...]) -> None:
    folder = write_vlm(tmp_path / "vlm", ("Color",) * 3)
    rows = [f"{number},Color,a dog" for number in numbers]
    (folder / "Questions.csv").write_text("\n".join(["id,type,statement", *rows]))
    with pytest.raises(UsageError, match=r"has no pair in .*an odd number and the next"):
        read_mmvp_vlm(folder)
