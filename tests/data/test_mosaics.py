"""Mosaics: places are checked on pixels, texts by the table of places, balance by counting, splits by photo."""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter, defaultdict
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from qformer.config import load_config
from qformer.data import sources
from qformer.data.held_out import held_out
from qformer.data.loader import Batches
from qformer.data.texts import clean_question, draw_texts, usable_captions
from qformer.evaluation.benchmarks import choose
from qformer.evaluation.tasks import Vqa
from qformer.mosaics.album import TENTHS, telling, tenth
from qformer.mosaics.layout import grids
from qformer.mosaics.source import Mosaics
from qformer.mosaics.texts import KINDS
from qformer.resolution import build
from qformer.resolution.fixed import Fixed
from qformer.schema import DataConfig
from qformer.types import BadSample, LeftOut, Sample, UsageError
from tests.data.making import encoded, jsonl, photo

if TYPE_CHECKING:
    from collections.abc import Iterator

PHOTOS = 200  # no two of one color in `making.photo`, which has 216
WORDS = """
    dog cat bus tree kite boat horse clown tent lamp duck piano rocket shovel candle
    sleeps jumps waits shines breaks grows leans spins melts floats sinks burns rolls rings
"""
THINGS, DEEDS = (line.split() for line in WORDS.strip().splitlines())
SMALLEST = re.compile(r"^(?:at the (?P<words>[a-z ]+)|in (?P<cell>row \d, column \d)), (?P<caption>.*)$")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of one color each, of several sizes, two captions each, no two with most of their words in common."""
    made = tmp_path_factory.mktemp("album")
    records = []
    for number in range(PHOTOS):
        width, height = (40 + number % 7 * 30, 40 + number % 5 * 40)
        (made / f"{number}.jpg").write_bytes(encoded(photo(number, width, height), "JPEG", quality=95))
        records.append({"image": f"{number}.jpg", "captions": captions(number)})
    jsonl(made / "photos.jsonl", records)
    return made


def captions(number: int) -> list[str]:
    thing, deed = THINGS[number % 15], DEEDS[number // 15]
    return [f"A {thing} {deed} at number{number} .", f"number{number}: the {thing} that {deed}!"]


@pytest.fixture(scope="module")
def mosaics(folder: Path) -> Any:
    @cache
    def of_split(split: str = "train", questions: Any = True, **options: Any) -> Mosaics:
        made = sources.build(
            "mosaics",
            photos={"name": "jsonl", "path": str(folder / "photos.jsonl")},
            split=split,
            questions=questions,
            **options,
        )
        assert isinstance(made, Mosaics)
        return made

    return of_split


def number_in(caption: str) -> int:
    """Number of the photo that a caption is of."""
    found = re.search(r"number(\d+)", caption)
    assert found is not None
    return int(found[1])


def shown(sample: Sample) -> dict[str, int]:
    """Number of the photo at each place, as its pixels say: the color is the number in base 6."""
    found = {}
    assert isinstance(sample.image, np.ndarray)
    for row in sample.facts["places"]:
        left, top, right, bottom = row["box"]
        middle = sample.image[top + 3 : bottom - 3, left + 3 : right - 3].reshape(-1, 3).astype(float)
        assert middle.std(axis=0).max() < 2, "one photo fills its box"
        digits = np.rint(middle.mean(axis=0) / 40).astype(int).tolist()
        found[row["place"]] = sum(digit * 6**place for place, digit in enumerate(digits))
    return found


def test_photos_lie_where_the_table_says(mosaics: Any) -> None:
    own, scaled = 0, 0
    for index in range(30):
        sample = mosaics()[index]
        height, width = sample.image.shape[:2]
        assert 448 <= min(width, height) <= max(width, height) <= 896
        pixels = shown(sample)
        assert len(pixels) == sample.facts["photos"] == len(sample.facts["places"]), "every place has another name"
        untouched = np.ones((height, width), dtype=bool)
        for row in sample.facts["places"]:
            number = number_in(row["captions"][0])
            assert pixels[row["place"]] == number
            left, top, right, bottom = row["box"]
            assert untouched[top:bottom, left:right].all(), "no two photos lie on each other"
            untouched[top:bottom, left:right] = False
            size = (40 + number % 7 * 30, 40 + number % 5 * 40)
            own += (right - left, bottom - top) == size
            scaled += (right - left, bottom - top) != size
            assert abs((right - left) / (bottom - top) / (size[0] / size[1]) - 1) < 0.08, "photos keep their shape"
        assert (sample.image[untouched] == mosaics().mosaic(index).ground).all(), "the rest is ground"
    assert min(own, scaled) > 80


def test_names_of_places_follow_the_middles_of_the_boxes(mosaics: Any) -> None:
    """Above, below, left and right in the names are so in the pixels."""
    ranks = {word: rank for rank, word in enumerate(("top", "center", "bottom"))}
    sides = {word: rank for rank, word in enumerate(("left", "center", "right"))}

    def rank(name: str) -> tuple[int, int]:
        if found := re.fullmatch(r"row (\d), column (\d)", name):
            return int(found[1]), int(found[2])
        row, _, column = (name if " " in name else f"{name} {name}").partition(" ")
        return ranks[row], sides[column]

    for sample in map(mosaics().__getitem__, range(60)):
        for one, other in combinations(sample.facts["places"], 2):
            (row, column), (next_row, next_column) = rank(one["place"]), rank(other["place"])
            if row < next_row:
                assert one["box"][3] <= other["box"][1]
            if column != next_column:
                first, second = (one, other) if column < next_column else (other, one)
                assert first["box"][2] <= second["box"][0]


def test_captions_are_of_the_photo_at_their_place(mosaics: Any) -> None:
    for sample in map(mosaics().__getitem__, range(60)):
        pixels = shown(sample)
        assert len(usable_captions(sample)) == 5
        pair, *single = usable_captions(sample)
        for text in [*pair.split(", and "), *single]:
            read = SMALLEST.match(text)
            assert read is not None, text
            assert pixels[read["words"] or read["cell"]] == number_in(read["caption"])
        assert len({*single}) == 4


def test_answers_are_right(mosaics: Any) -> None:
    for sample in map(mosaics().__getitem__, range(150)):
        pixels, answer, question = shown(sample), sample.answers[0], sample.question or ""
        kind = sample.facts["question_type"]
        assert sample.key.endswith(f":{kind}")
        assert answer in sample.facts["choices"]
        assert clean_question(question).endswith("?"), "nothing is cut off"
        place = re.search(r"(?:at the ([a-z ]+)|in (row \d, column \d))(?:,| show)", question)
        at = None if place is None else pixels[place[1] or place[2]]
        if kind == "yes/no":
            assert (at == number_in(question)) == (answer == "yes")
            assert number_in(question) in pixels.values(), "a false caption is that of another photo of the mosaic"
        elif kind == "presence":
            assert (number_in(question) in pixels.values()) == (answer == "yes")
        elif kind == "where":
            assert pixels[answer] == number_in(question)
        elif kind == "count":
            assert answer == numbers()[len(pixels)]
        else:
            assert {number_in(text) for text in sample.answers} == {at}
            others = [number_in(text) for text in sample.facts["choices"] if text != answer]
            assert len({*others}) == 3
            assert {*others} <= {*pixels.values()} - {at}


def numbers() -> dict[int, str]:
    words = "four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
    return dict(enumerate(words.split(), 4))


@pytest.fixture(scope="module")
def asked(mosaics: Any) -> list[Any]:
    """Mosaics with a question, not pasted."""
    source = mosaics(seed=3)
    return [source.pose(index, source._rng(index)) for index in range(5000)]


def test_answers_of_each_kind_are_balanced(asked: list[Any]) -> None:
    found: dict[str, Counter[str]] = defaultdict(Counter)
    places: dict[str, Counter[int]] = defaultdict(Counter)
    for _, question in asked:
        found[question.kind][question.answer] += 1
        places[question.kind][question.choices.index(question.answer)] += question.kind in ("where", "count", "content")
    assert found.keys() == set(KINDS)
    for kind, number in {"yes/no": 2, "presence": 2, "where": 25, "count": 13}.items():
        total = found[kind].total()
        slack = 4 * (total / number) ** 0.5
        assert len(found[kind]) == number
        assert all(abs(times - total / number) < slack for times in found[kind].values()), (kind, found[kind])
    for kind in ("where", "count", "content"):
        assert len(places[kind]) == 4, "the right one is at every place among the choices"
        assert max(places[kind].values()) / places[kind].total() < 0.25 + 4 * (3 / 16 / 1000) ** 0.5


def test_no_word_of_a_question_gives_its_answer_away(asked: list[Any]) -> None:
    """True and false statements have the same places, and captions of as frequent photos."""
    words: dict[str, Counter[bool]] = defaultdict(Counter)
    total = 0
    for _, question in asked:
        if question.kind in ("yes/no", "presence"):
            total += 1
            for word in {*question.question.replace(",", "").removesuffix("?").split()}:
                words[word][question.answer == "yes"] += 1
    for word, counts in words.items():
        assert abs(counts[True] - counts[False]) < 5 * counts.total() ** 0.5 + 1, (word, counts)


@pytest.mark.parametrize("number", range(4, 17))
def test_the_grid_can_be_seen(mosaics: Any, number: int) -> None:
    assert grids(number)
    for index in range(5):
        mosaic = mosaics(questions=False, per_mosaic=(number, number)).mosaic(index)
        rows, columns = (Counter(one.cell[axis] for one in mosaic.placed) for axis in (0, 1))
        assert len(mosaic.placed) == number == rows.total()
        assert (len(columns), len(rows)) == (max(rows.values()), max(columns.values())), "one of each is full"


def test_photos_of_one_split_are_never_in_another(mosaics: Any, folder: Path, tmp_path: Path) -> None:
    used = {}
    for split in ("train", "val", "test"):
        source = mosaics(split)
        every = [source.mosaic(index) for index in range(60)]
        numbers = {one.photo for mosaic in every for one in mosaic.placed} | {mosaic.absent for mosaic in every}
        used[split] = {number_in(source._album.records[number].captions[0]) for number in numbers}
    assert not any(used[one] & used[other] for one, other in combinations(used, 2))
    assert len(used["test"]) >= 17 <= len(used["val"])
    moved = tmp_path / "elsewhere" / folder.name
    moved.parent.mkdir()
    moved.symlink_to(folder)
    assert tenth(f"/a/{folder.name}/7.jpg") == tenth(f"/b/c/{folder.name}/7.jpg")
    again = sources.build(
        "mosaics", photos={"name": "jsonl", "path": str(moved / "photos.jsonl")}, split="test", questions=True
    )
    assert (again[0].image == mosaics("test")[0].image).all()
    assert sorted(tenth for tenths in TENTHS.values() for tenth in tenths if len(tenths) < 10) == list(range(10))


def test_records_of_one_photo_are_in_one_split(folder: Path, tmp_path: Path) -> None:
    """A line for each caption: a photo is not in two splits because it is in two lines."""
    lines = [{"image": f"{n}.jpg", "caption": text} for n in range(PHOTOS) for text in captions(n)]
    photos = {"name": "jsonl", "path": jsonl(tmp_path / "lines.jsonl", lines), "images": str(folder)}
    assert all(len(record.captions) == 2 for record in Mosaics(photos=photos, split="test")._album.records)


def test_a_mosaic_is_a_function_of_its_number(mosaics: Any, folder: Path) -> None:
    first = [mosaics()[index] for index in (5, 3)]
    again = sources.build(
        "mosaics", photos={"name": "jsonl", "path": str(folder / "photos.jsonl")}, questions=True, count=6
    )
    for one, other in zip(first, [again[index] for index in (5, 3)], strict=True):
        assert (one.image == other.image).all()
        assert (one.question, one.answers, one.captions, one.facts, one.image_id) == (
            other.question,
            other.answers,
            other.captions,
            other.facts,
            other.image_id,
        )
    assert mosaics(seed=1)[5].image_id != first[0].image_id
    with pytest.raises(IndexError):
        again[6]


def test_captions_that_could_be_true_of_both_are_never_false(tmp_path: Path) -> None:
    """Equal or nearly equal captions are not of two photos of one mosaic, nor of the absent one."""
    records: list[Any] = []
    for number in range(90):
        (tmp_path / f"{number}.jpg").write_bytes(encoded(photo(number, 40, 40), "JPEG"))
        text = f"a {THINGS[number % 10]} {DEEDS[number % 30 // 10]}"
        records.append({"image": f"{number}.jpg", "caption": text if number < 45 else f"{text} on some red mats"})
    photos = {"name": "jsonl", "path": jsonl(tmp_path / "a.jsonl", records)}
    source = Mosaics(photos=photos, split="any", per_mosaic=(4, 6))
    assert telling("a dog sleeps on some red mats, near the wall") == {"dog", "sleep", "red", "mat", "wall"}
    for index in range(50):
        mosaic = source.mosaic(index)
        numbers = [*(one.photo for one in mosaic.placed), mosaic.absent]
        said = [source._album.records[number].captions[0].split()[1:3] for number in numbers]
        assert len({*map(tuple, said)}) == len(said)
    same = [record | {"caption": "a dog sleeps"} for record in records[:40]]
    photos = {"name": "jsonl", "path": jsonl(tmp_path / "same.jsonl", same)}
    with pytest.raises(UsageError, match="of the 40 photos differ in what their captions say"):
        Mosaics(photos=photos, split="any").mosaic(0)


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> Iterator[Mosaics]:
    """Forty photos, of which one is no picture, one a line of a pixel's height, one has no caption to be used."""
    for number in range(40):
        (tmp_path / f"{number}.jpg").write_bytes((folder / f"{number}.jpg").read_bytes())
    (tmp_path / "7.jpg").write_bytes(b"<html>")
    (tmp_path / "8.jpg").write_bytes(encoded(photo(8, 900, 1), "JPEG"))
    records = [{"image": f"{number}.jpg", "captions": captions(number)} for number in range(40)]
    records[9]["captions"] = ["word " * 60]
    records[10]["captions"] = ["!"]
    with pytest.warns(LeftOut, match="2 records of data.photos are left out"):
        yield Mosaics(photos={"name": "jsonl", "path": jsonl(tmp_path / "a.jsonl", records)}, split="any")


def test_damaged_photos_are_skipped_and_recorded(damaged: Mosaics) -> None:
    bad = Counter()
    for index in range(60):
        numbers = {number_in(damaged._album.records[one.photo].captions[0]) for one in damaged.mosaic(index).placed}
        assert not numbers & {9, 10}
        if not numbers & {7, 8}:
            damaged[index]
            continue
        with pytest.raises(BadSample) as caught:
            damaged[index]
        bad[caught.value.kind] += 1
        line = 8 if caught.value.kind == "undecodable" else 9
        assert re.search(rf"\(a photo of the mosaic, .*a\.jsonl:{line}\)", caught.value.detail)
    assert min(bad["undecodable"], bad["refused"]) > 3
    data = DataConfig.model_validate({"train": {"name": "mosaics"}, "batch": 8, "crop": [1, 1], "flip": 0})
    loaded = Batches(damaged, Fixed(8), data, 0)[0]
    assert len(loaded.keys) == 8
    assert {record["kind"] for record in loaded.skipped} <= {"undecodable", "refused"}


def test_training_validation_and_benchmarks_read_them(mosaics: Any) -> None:
    source = mosaics("val", count=10)
    held = held_out(source, Fixed(8), None, 4)
    assert held.asks
    assert len(held) == 10
    assert len(held.groups) == 3
    assert not held_out(mosaics("val", questions=False, count=4), Fixed(8), None, 4).asks
    text, answer = draw_texts(source[2], np.random.default_rng(0))
    assert text in usable_captions(source[2])
    assert answer == source[2].answers[0]
    for name in ("vqa", "choice"):
        images, skipped = choose(name).items(source)
        items = [item for image in images for item in image.items]
        assert (len(items), skipped) == (10, [])
        assert all(item.known for item in items)
    asked = [Vqa().item(source[index], index) for index in range(10)]
    measured = Vqa().score(asked, [{"said": item.accepted[-1]} for item in asked], None, lemmas=False)
    assert measured.groups["question_type"].keys() == set(KINDS)
    assert measured.total["accuracy"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"photos": {"path": "a"}}, "data.photos.name is required"),
        ({"photos": {"name": "jsonl", "pth": "a"}}, "data.photos.pth is not an option of 'jsonl'"),
        ({"photos": {"name": "jsonl", "path": "a", "weight": 2}}, "data.photos.weight is not an option"),
        ({"questions": ["color"]}, "questions has 'color'; give true for every kind, or some of those that mosaics"),
        ({"per_mosaic": [2, 9]}, "per_mosaic is .*from 4 to 16"),
        ({"sides": [100, 200]}, "sides is .*from 224"),
        ({"captions": 0}, "captions is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_wrong_options_are_refused(folder: Path, options: dict[str, Any], message: str) -> None:
    photos = {"name": "jsonl", "path": str(folder / "photos.jsonl")}
    with pytest.raises(UsageError, match=message):
        sources.build("mosaics", **({"photos": photos} | options))
    if "photos" in options:
        with pytest.raises(UsageError, match=message):
            sources.check("mosaics", options, "data")


def test_tokens_of_systems_on_mosaics_are_those_of_the_page() -> None:
    """The table of docs/real.md, by which time is planned."""
    root = Path(__file__).parent.parent.parent
    text = (root / "docs" / "real.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\w. -]+) \| `(resolution\.[^`]+)` \| (\d+), (\d+) \|", text, flags=re.MULTILINE)
    assert len(rows) == 6
    for name, options, mean, most in rows:
        short = name.lower().replace("llava-uhd", "llava_uhd")
        file = f"system_{re.sub('[ .-]', '', short)}.yaml"
        resolution = load_config(root / "configs" / "real" / file, options.split()).resolution
        strategy = build(resolution.name, **resolution.options)
        plans = [strategy.plan(width, height) for width in range(448, 897, 64) for height in range(448, 897, 64)]
        tokens = [plan.tokens + plan.markers for plan in plans]
        assert max(tokens) <= int(most)
        assert abs(sum(tokens) / len(tokens) - int(mean)) < 5, name


def test_too_few_photos_are_refused(folder: Path, tmp_path: Path) -> None:
    records = [json.loads(line) for line in (folder / "photos.jsonl").read_text().splitlines()[:30]]
    photos = {"name": "jsonl", "path": jsonl(tmp_path / "a.jsonl", records), "images": str(folder)}
    with pytest.raises(UsageError, match=r"of the 30 photos .* 'test', and a mosaic needs 17; .* split: any"):
        sources.build("mosaics", photos=photos, split="test")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(sources.build("mosaics", photos=photos, split="any", count=3)) == 3
