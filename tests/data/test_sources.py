"""Sources: what a record becomes, which records are kept, and what is refused at once."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qformer.data import base, sources
from qformer.formats import FORMATS
from qformer.images import read_image
from qformer.types import BadSample, LeftOut, Sample, UsageError
from tests.data.making import encoded, photo


def jsonl(path: Path, *records: Any) -> str:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_captions_and_questions(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "a.jsonl",
        {"image": "x/1.jpg", "captions": ["one", "two"]},
        {"image": "x/1.jpg", "caption": "three"},
        {"image": "2.jpg", "question": "What?", "answers": ["this", "that"]},
        {"image": "2.jpg", "question": "What?", "answer": "this"},
        {"image": "2.jpg"},
    )
    source = sources.build("jsonl", path=path)
    samples = [source[i] for i in range(len(source))]
    assert [sample.captions for sample in samples] == [["one", "two"], ["three"], [], [], []]
    assert [sample.question for sample in samples] == [None, None, "What?", "What?", None]
    assert [sample.answers for sample in samples] == [[], [], ["this", "that"], ["this"], []]
    assert samples[0].image == tmp_path / "x" / "1.jpg"
    assert samples[0].image_id == samples[1].image_id != samples[2].image_id
    assert [sample.key for sample in samples] == [f"{path}:{number}" for number in range(1, 6)]


def test_images_folder_and_absolute_paths(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    path = jsonl(tmp_path / "a.jsonl", {"image": "1.jpg", "caption": "a"}, {"image": "/abs/2.jpg", "caption": "b"})
    source = sources.build("jsonl", path=path, images=str(tmp_path / "pictures"))
    assert source[0].image == tmp_path / "pictures" / "1.jpg"
    assert source[1].image == Path("/abs/2.jpg")


def test_where_keeps_records_whose_fields_all_equal(tmp_path: Path) -> None:
    records = [
        {"image": f"{i}", "caption": str(i), "split": s, "year": y}
        for i, (s, y) in enumerate([("a", 1), ("b", 1), ("a", 2)])
    ]
    path = jsonl(tmp_path / "a.jsonl", *records, {"image": "3", "caption": "3"})
    assert [s.captions for s in _all(sources.build("jsonl", path=path, where={"split": "a"}))] == [["0"], ["2"]]
    assert [s.key for s in _all(sources.build("jsonl", path=path, where={"split": "a", "year": 2}))] == [f"{path}:3"]
    assert len(sources.build("jsonl", path=path)) == 4


def _all(source: base.Source) -> list[Sample]:
    return [source[i] for i in range(len(source))]


@pytest.mark.parametrize("where", [{}, {"split": "a"}])
def test_a_bad_line_is_bad_only_when_it_is_asked_for(tmp_path: Path, where: dict[str, str]) -> None:
    good = {"image": "1.jpg", "caption": "a", "split": "a"}
    source = sources.build("jsonl", path=jsonl(tmp_path / "a.jsonl", good, "{not json", "", good), where=where)
    assert len(source) == 3  # the empty line is no record
    assert source[0].captions == source[2].captions == ["a"]
    assert source[2].key.endswith(":4")
    with pytest.raises(BadSample) as caught:
        source[1]
    assert caught.value.kind == "not json"


@pytest.mark.parametrize("record", [[1, 2], "text", 3, None, {"caption": "a"}, {"image": None}, {"image": 3}])
def test_records_without_an_image(tmp_path: Path, record: Any) -> None:
    source = sources.build("jsonl", path=jsonl(tmp_path / "a.jsonl", json.dumps(record)))
    with pytest.raises(BadSample) as caught:
        source[0]
    assert caught.value.kind == "no image"


def test_values_of_another_type_are_no_text(tmp_path: Path) -> None:
    record = {"image": "1", "captions": ["a", None, 3, ["b"]], "question": 7, "answers": "yes"}
    sample = sources.build("jsonl", path=jsonl(tmp_path / "a.jsonl", record))[0]
    assert (sample.captions, sample.question, sample.answers) == (["a"], None, ["yes"])


def test_empty_fields_give_way(tmp_path: Path) -> None:
    records = [
        {"image": "1", "captions": none, "caption": "a", "answers": none, "answer": "b"} for none in (None, [], [3])
    ]
    source = sources.build("jsonl", path=jsonl(tmp_path / "a.jsonl", *records))
    assert [(sample.captions, sample.answers) for sample in _all(source)] == [
        (["a"], [answer]) for answer in ("b", "b", "3")
    ]


def test_lines_are_read_where_they_stand(tmp_path: Path) -> None:
    """Not kept in memory: a file that is gone makes its records bad, one by one."""
    lines = [json.dumps({"image": str(i), "caption": "ä" * i}, ensure_ascii=False) for i in range(50)]
    source = sources.build("jsonl", path=jsonl(tmp_path / "a.jsonl", *lines[:20], "", *lines[20:]))
    assert [sample.captions for sample in _all(source)] == [["ä" * i] for i in range(50)]
    assert source[20].key.endswith(":22")
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(BadSample) as caught:
        source[3]
    assert caught.value.kind == "unreadable"


def test_files_of_other_editors(tmp_path: Path) -> None:
    """A byte-order mark, Windows line ends, bytes that are not UTF-8, and U+2028, which ends no line of JSON."""
    path = tmp_path / "a.jsonl"
    line = json.dumps({"image": "1", "caption": "a\u2028b"}, ensure_ascii=False).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n" + b'{"image": "2", "caption": "caf\xe9"}\r\n')
    source = sources.build("jsonl", path=str(path))
    assert source[0].captions == ["a\u2028b"]
    assert source[1].captions == ["caf\ufffd"]


def test_several_files_of_lines(tmp_path: Path) -> None:
    """Each with its own folder of images, and each line named after its own file."""
    for number, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        lines = [{"image": "x.png", "caption": f"{name} {i}"} for i in range(2 + number)]
        jsonl(tmp_path / name / "part-[x].jsonl", *lines)
    source = sources.build("jsonl", path=f"{tmp_path}/*/part-*.jsonl")
    assert len(source) == 5
    assert source[2].image == tmp_path / "b" / "x.png"
    assert source[4].captions == ["b 2"]
    assert source[4].key == f"{tmp_path}/b/part-[x].jsonl:3"
    listed = sources.build("jsonl", path=[f"{tmp_path}/{{b,a}}/part-*.jsonl"])
    assert [listed[i].captions for i in (0, 3)] == [["b 0"], ["a 0"]]
    alone = sources.build("jsonl", path=str(tmp_path / "a" / "part-[x].jsonl"))  # a name, no pattern
    assert len(alone) == 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"path": "none.jsonl"}, "no file at"),
        ({"path": "."}, "'.' is a folder; data.path must name files, such as './*.json'"),
        ({"path": "empty.jsonl"}, "has no record; check"),
        ({"path": "blank.jsonl"}, "has no record; check"),
        ({"path": "good.jsonl", "where": {"split": "x"}}, "has no record with {'split': 'x'}"),
        ({"path": "good.jsonl", "images": "nowhere"}, "no folder at 'nowhere'"),
        ({"path": "good.jsonl", "wher": {}}, "data.wher is not an option of 'jsonl': did you mean 'where'?"),
        ({"path": 3}, "data.path"),
        ({}, "data.path is required"),
    ],
)
def test_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Any, expected: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").touch()
    Path("blank.jsonl").write_text("\n \n")
    jsonl(Path("good.jsonl"), {"image": "1", "caption": "a"})
    with pytest.raises(UsageError) as caught:
        sources.build("jsonl", **options)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folder(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("b.JPG", "deep/er/a.png", "c.webp"):
        (tmp_path / name).touch()
    (tmp_path / "notes.md").touch()
    (tmp_path / "b.txt").write_bytes("\ufeffone dog\r\ntwo dogs\n".encode())
    (tmp_path / "deep" / "er" / "a.txt").write_text("a cat")
    source = sources.build("folder", path=str(tmp_path))
    assert len(source) == 3
    assert (source[0].image, source[0].captions) == (tmp_path / "b.JPG", ["one dog", "two dogs"])
    assert (source[2].image, source[2].captions) == (tmp_path / "deep" / "er" / "a.png", ["a cat"])
    assert source[0].image_id != source[2].image_id
    assert source[1].captions == []  # for who writes captions; who trains on it says "no caption"


def test_images_of_a_folder_that_are_not_read_are_named(tmp_path: Path) -> None:
    """AVIF and JFIF are read; other formats are left out, and a folder of them alone is refused."""
    for name in ("c.JXL", "d.jp2"):
        (tmp_path / name).write_bytes(b"\0\0\0\x18JXL \r\n")
    with pytest.raises(UsageError, match=r"in a supported format, left out: .* 1 \.jxl, 1 \.jp2; put \.apng, \.avif"):
        sources.build("folder", path=str(tmp_path))
    (tmp_path / "a.avif").write_bytes(encoded(photo(3), "AVIF"))
    (tmp_path / "b.jfif").write_bytes(encoded(photo(4), "JPEG", quality=100))
    with pytest.warns(LeftOut, match=r"formats that are not supported \(convert them\): 1 \.jxl, 1 \.jp2"):
        source = sources.build("folder", path=str(tmp_path))
    assert [read_image(source[number].image).shape for number in range(len(source))] == [(3, 16, 20)] * 2
    with pytest.raises(BadSample, match="undecodable: not an image in a supported format"):
        read_image(tmp_path / "d.jp2")
    if "HEIF" not in FORMATS:
        with pytest.raises(BadSample, match="undecodable: an image in HEIC; install pillow-heif to read it, or"):
            read_image(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")


@pytest.mark.parametrize("kind", ["utf-16", "utf-16-le", "utf-32"])
def test_lines_of_windows_are_refused(kind: str, tmp_path: Path) -> None:
    """A line feed is a byte of other characters in UTF-16, so that lines would be cut anywhere."""
    (tmp_path / "a.jsonl").write_bytes('{"image": "1.png", "caption": "a"}\n'.encode(kind))
    with pytest.raises(UsageError, match=f"is {kind.upper()} text; save it as UTF-8, such as with iconv -f"):
        sources.build("jsonl", path=str(tmp_path / "a.jsonl"))


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UsageError, match="no image below"):
        sources.build("folder", path=str(tmp_path))
    for path in (tmp_path / "none", tmp_path / "notes.txt"):
        with pytest.raises(UsageError, match="no folder at"):
            sources.build("folder", path=str(path))


def test_scenes_by_name() -> None:
    source = sources.build("scenes", split="val", count=3, size=[40, 32])
    assert len(source) == 3
    image: Any = source[1].image
    assert image.shape == (32, 40, 3)
    assert source[1].captions
    with pytest.raises(UsageError, match="empty"):
        sources.build("scenes", count=0)


@dataclass(frozen=True)
class Mine:
    """A user's own source."""

    count: int = 2

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        return Sample(image=b"", key=str(index))


def test_a_class_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    own = types.ModuleType("my_sources")
    own.Mine = Mine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_sources", own)
    assert len(sources.build("my_sources:Mine", count="5")) == 5
    with pytest.raises(UsageError, match="unknown data 'jsonlines': did you mean 'jsonl'"):
        sources.build("jsonlines")


def test_what_ends_a_caption_of_a_folder(tmp_path: Path) -> None:
    """Line feeds of every system; neither U+2028 nor a form feed, which stand within captions from the web."""
    (tmp_path / "a.jpg").touch()
    (tmp_path / "a.txt").write_bytes("one\u2028line\r\nand\x0canother\n\nthird\rfourth".encode())
    expected = ["one\u2028line", "and\x0canother", "third", "fourth"]
    assert sources.build("folder", path=str(tmp_path))[0].captions == expected
