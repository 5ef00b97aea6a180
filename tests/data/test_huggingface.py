"""The `datasets` library: hub folders, parquet, Arrow; whole and streamed, which give the same samples."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow
import pyarrow.parquet
import pytest

from qformer.data import sources
from qformer.types import BadSample, UsageError
from tests.data.making import encoded, number_of, photo, shard

datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")


def rows(numbers: range) -> dict[str, list[Any]]:
    images = [{"bytes": encoded(photo(number)), "path": None} for number in numbers]
    return {"image": images, "caption": [[f"picture {number}", f"the {number}"] for number in numbers]}


def files(folder: Path, count: int = 3) -> str:
    folder.mkdir()
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.List(datasets.Value("string"))})
    for number in range(count):
        part = datasets.Dataset.from_dict(rows(range(4 * number, 4 * number + 4)), features=features)
        part.to_parquet(folder / f"train-{number}.parquet")
    return f"{folder}/train-*.parquet"


def build(path: Any, **options: Any) -> Any:
    return sources.build("datasets", path=path, **options)


def everything(source: Any) -> list[Any]:
    found: list[Any] = []
    for place in source.indices():
        try:
            sample = source[place]
            found.append((number_of(sample), sample.captions))
        except BadSample as bad:
            found.append(bad.kind)
    return found


WHOLE = [(number, [f"picture {number}", f"the {number}"]) for number in range(12)]


@pytest.mark.canary
@pytest.mark.parametrize("streaming", [False, True])
def test_parquet(tmp_path: Path, streaming: bool) -> None:
    source = build(files(tmp_path / "data"), streaming=streaming)
    assert everything(source) == WHOLE
    assert len(source) == 12
    order = source.order((1,))
    assert sorted(order.at(position) for position in range(12)) == list(source.indices())
    keys = {source[place].key for place in source.indices()}
    assert len(keys) == 12


@pytest.mark.parametrize("streaming", [False, True])
def test_other_places(tmp_path: Path, streaming: bool) -> None:
    """A folder as on the hub, save_to_disk with and without splits, Arrow files, part of a split."""
    files(tmp_path / "data", 1)
    assert everything(build(str(tmp_path / "data"), streaming=streaming)) == WHOLE[:4]
    saved = datasets.Dataset.from_dict(rows(range(4)))
    saved.save_to_disk(tmp_path / "saved")
    assert everything(build(str(tmp_path / "saved"), streaming=streaming)) == WHOLE[:4]
    datasets.DatasetDict(dev=saved).save_to_disk(tmp_path / "splits")
    assert everything(build(str(tmp_path / "splits"), split="dev", streaming=streaming)) == WHOLE[:4]
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    assert everything(build(str(arrow), streaming=streaming)) == WHOLE[:4]
    if not streaming:
        assert everything(build(str(tmp_path / "data"), split="train[1:3]")) == WHOLE[1:3]


def numbers(source: Any) -> list[int]:
    return [number_of(source[place]) for place in source.indices()]


@pytest.mark.parametrize("streaming", [False, True])
def test_the_split_of_a_saved_data_set_is_obeyed(tmp_path: Path, streaming: bool) -> None:
    """Validation on a slice, or on another split, never sees what is trained on; what is not there is refused."""
    one = datasets.Dataset.from_dict(rows(range(10)))
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=one, test=one.select(range(3))).save_to_disk(tmp_path / "both")
    files(tmp_path / "data", 1)
    held = datasets.load_dataset(str(tmp_path / "data"), split="train[2:]")
    held.save_to_disk(tmp_path / "held")
    datasets.Dataset.from_dict(rows(range(2)), split=datasets.Split.TEST).save_to_disk(tmp_path / "test")

    def read(name: str, split: str | None = None) -> list[int]:
        return numbers(build(str(tmp_path / name), split=split, streaming=streaming))

    for name in ("one", "both"):
        assert read(name, "train[:80%]") == [*range(8)]
        assert read(name, "train[80%:]") == [8, 9]
        assert read(name) == read(name, "train") == [*range(10)]
    assert read("both", "test") == [0, 1, 2]
    assert read("both", "test[:1]+train[9:]") == [0, 9]
    assert read("held") == read("held", "train[2:]") == read("held", "train") == [2, 3]
    assert read("held", "train[1:]") == [3]
    table(tmp_path / "val-0.parquet", **rows(range(3)))
    assert read("val-0.parquet") == read("val-0.parquet", "validation") == [0, 1, 2]
    assert read("test") == read("test", "test") == [0, 1]
    for name, split, told in (("one", "test", "train"), ("both", "dev", "train, test"), ("test", "train", "test")):
        with pytest.raises(UsageError, match=rf"has no split '{split}' \(.*\); it has {told}$"):
            read(name, split)


@pytest.mark.parametrize("streaming", [False, True])
def test_classes_are_read_by_their_names(tmp_path: Path, streaming: bool) -> None:
    kinds = datasets.ClassLabel(names=["a kite", "a bus"])
    columns = rows(range(3)) | {"kind": [1, 0, None], "question": ["what?"] * 3}
    features = datasets.Features({"image": datasets.Image(), "kind": kinds, "question": datasets.Value("string")})
    del columns["caption"]
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "saved")
    source = build(str(tmp_path / "saved"), caption="kind", streaming=streaming)
    assert everything(source) == [(0, ["a bus"]), (1, ["a kite"]), (2, [])]
    asked = build(str(tmp_path / "saved"), answers="kind", streaming=streaming)
    samples = [asked[place] for place in asked.indices()]
    assert [(sample.question, sample.answers) for sample in samples] == [
        ("what?", ["a bus"]),
        ("what?", ["a kite"]),
        ("what?", []),
    ]
    assert [sample.facts["kind"] for sample in samples] == ["a bus", "a kite", None]


@pytest.mark.parametrize("streaming", [False, True])
def test_cells_of_tables_in_text_stay_as_they_stand(tmp_path: Path, streaming: bool) -> None:
    """What pandas would take for a missing value or a number; with the column of row numbers that it writes."""
    (tmp_path / "0.png").write_bytes(encoded(photo(4)))
    (tmp_path / "a.csv").write_text(",image,caption\n0,0.png,None\n1,0.png,007\n2,0.png,\n3,,a kite\n", "utf-8-sig")
    source = build(str(tmp_path / "a.csv"), images=str(tmp_path), streaming=streaming)
    assert everything(source) == [(4, ["None"]), (4, ["007"]), (4, [""]), "no image"]


@pytest.mark.parametrize("streaming", [False, True])
def test_what_a_row_says_besides_is_known(tmp_path: Path, streaming: bool) -> None:
    """Facts of a row, without pictures; a row's other columns are told where the picture is missing."""
    image = {"bytes": encoded(photo(1)), "path": None}
    path = table(tmp_path / "a.parquet", image=[image, None], image_2=[image] * 2, caption=["a"] * 2, task=["x"] * 2)
    source = build(path, streaming=streaming)
    first, second = source.indices()
    assert source[first].facts == {"caption": "a", "task": "x"}
    with pytest.raises(BadSample) as caught:
        source[second]
    assert streaming or "its columns are image, image_2, caption, task" in caught.value.detail


@pytest.mark.parametrize("streaming", [False, True])
def test_tars_through_datasets(tmp_path: Path, streaming: bool) -> None:
    """As of the hub's `-wds` data sets, whose columns are the members."""
    for number in range(2):
        shard(tmp_path / "wds" / f"train-{number}.tar", range(3 * number, 3 * number + 3))
    source = build(str(tmp_path / "wds"), image="png", caption="txt", streaming=streaming)
    assert everything(source) == [(number, [f"picture {number}"]) for number in range(6)]


def table(path: Path, **columns: Any) -> str:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


@pytest.mark.parametrize("streaming", [False, True])
def test_columns(tmp_path: Path, streaming: bool) -> None:
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(encoded(photo(number)))
    path = table(
        tmp_path / "a.parquet",
        file=["0.png", "1.png", "0.png"],
        question=["what?", None, "why?"],
        answer=["a", "b", "c"],
        alt=["x", "y", "z"],
        number=[0, 1, 0],
    )
    names = {"image": "file", "caption": "alt", "question": "question", "answers": "answer", "id": "number"}
    source = build(path, images=str(tmp_path), streaming=streaming, **names)
    samples = [source[place] for place in source.indices()]
    assert [number_of(sample) for sample in samples] == [0, 1, 0]
    assert [sample.captions for sample in samples] == [["x"], ["y"], ["z"]]
    assert [(sample.question, sample.answers) for sample in samples] == [
        ("what?", ["a"]),
        (None, ["b"]),
        ("why?", ["c"]),
    ]
    assert samples[0].image_id == samples[2].image_id != samples[1].image_id
    asked = build(path, images=str(tmp_path), streaming=streaming, image="file", question="question", answers="answer")
    assert [asked[place].captions for place in asked.indices()] == [[], [], []]


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_rows(tmp_path: Path, streaming: bool) -> None:
    """What pandas makes of missing values, numbers for captions, images that are none."""
    good = encoded(photo(5))
    frame = pandas.DataFrame({"image": [good, None, b"<html>", good], "caption": ["a dog", "b", "c", math.nan]})
    frame.to_parquet(tmp_path / "a.parquet")
    found = everything(build(str(tmp_path / "a.parquet"), streaming=streaming))
    assert found == [(5, ["a dog"]), "no image", "undecodable", (5, [])]
    pandas.DataFrame({"image": [good, good], "caption": [3.0, math.nan]}).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(UsageError, match=r"column 'caption' of '.*b\.parquet' holds numbers"):
        build(str(tmp_path / "b.parquet"), streaming=streaming)
    nested = table(tmp_path / "c.parquet", image=[good, good], caption=[[["a"], ["b"]], None])
    assert everything(build(nested, streaming=streaming)) == [(5, []), (5, [])]


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    """One row of it; streamed, what stands in front of it is used, and the rest of the shard counts as one sample."""
    raw = pyarrow.array([b"a dog", b"caf\xe9", b"a cat"])
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, raw.buffers())
    path = table(tmp_path / "a.parquet", image=pyarrow.array([encoded(photo(n)) for n in range(3)]), caption=text)
    assert everything(build(path)) == [(0, ["a dog"]), "not utf-8", (2, ["a cat"])]
    assert everything(build(path, streaming=True))[-1] == "broken tar"


def test_a_stream_goes_on_behind_damage(tmp_path: Path) -> None:
    path = files(tmp_path / "data")
    (tmp_path / "data" / "train-1.parquet").write_bytes(b"no parquet")
    assert everything(build(path, streaming=True)) == [*WHOLE[:4], "broken tar", *WHOLE[8:]]
    with pytest.raises(UsageError, match="cannot be read as a data set") as caught:
        build(path)
    assert "\n" not in str(caught.value)


def test_a_shard_of_a_stream_that_vanished(tmp_path: Path) -> None:
    source = build(files(tmp_path / "data"), streaming=True)
    (tmp_path / "data" / "train-1.parquet").unlink()
    assert everything(source) == [*WHOLE[:4], "missing shard", *WHOLE[8:]]


def test_a_stream_is_not_read_again(tmp_path: Path) -> None:
    path = files(tmp_path / "data")
    assert everything(build(path, streaming=True, cache=str(tmp_path / "kept"))) == WHOLE
    again = build(path, streaming=True, cache=str(tmp_path / "kept"))
    object.__setattr__(again, "rows", None)
    assert everything(again) == WHOLE


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"path": "nobody/nothing"}, "is not a local file or folder, and the hub cannot be reached"),
        ({"path": "nobody/nothing", "streaming": True}, "the hub cannot be reached"),
        ({"path": "none.parquet"}, "no file at 'none.parquet'"),
        ({"path": ["a.parquet", "none.parquet"]}, "no file at 'none.parquet'"),
        ({"path": "none*.parquet"}, "no file at 'none*.parquet'"),
        ({"path": "a.parquet", "caption": "captoin"}, "no column 'captoin': did you mean 'caption'?"),
        ({"path": "a.parquet", "image": "jpg"}, "no column 'jpg': known are caption, image"),
        ({"path": "c.parquet"}, "has no column captions, caption, text; set data.caption to one of image, words"),
        (
            {"path": "d.parquet"},
            "has no column image, image_path, file_name, images, video; set data.image to",
        ),
        ({"path": "a.parquet", "choices": ["x", "y"], "question": "caption"}, "no column 'x'"),
        ({"path": "notes.txt"}, "'notes.txt' is a file of a kind that is not supported; give .parquet"),
        ({"path": "notes.txt", "streaming": True}, "'notes.txt' is a file of a kind that is not supported"),
        ({"path": "a.parquet", "split": "train[:0]"}, "corresponds to no data"),
        ({"path": "saved"}, "'saved' has no split 'train'"),
        ({"path": "saved", "split": "train"}, "; it has dev"),
        ({"path": "a.parquet", "split": "test"}, "the files of 'a.parquet' are one split, and 'test' is not in their"),
        ({"path": "a.parquet", "split": "validation[:5]"}, "such as train[80%:]"),
        ({"path": "a.parquet", "spilt": "x"}, "data.spilt is not an option of 'datasets': did you mean 'split'?"),
    ],
)
def test_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Any, expected: str) -> None:
    monkeypatch.chdir(tmp_path)
    table(Path("a.parquet"), image=[b""], caption=["a"])
    table(Path("c.parquet"), image=[b""], words=["a"])
    table(Path("d.parquet"), words=["a"])
    Path("notes.txt").write_text("a")
    datasets.DatasetDict(dev=datasets.Dataset.from_dict({"image": [b""], "caption": ["a"]})).save_to_disk("saved")
    with pytest.raises(UsageError) as caught:
        build(**options)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
