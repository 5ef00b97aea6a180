"""Tars: patterns, any sample at once, damage that costs what is damaged and no more, shards from elsewhere."""

from __future__ import annotations

import io
import json
import tarfile
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qformer.data import fetching, sources
from qformer.data.fetching import braces, expand
from qformer.data.members import split
from qformer.data.shards import index
from qformer.types import BadSample, Sample, UsageError
from tests.data.making import encoded, number_of, photo, shard, tar

Result = list[tuple[str, Any]]


def build(path: Any, **options: Any) -> Any:
    return sources.build("webdataset", path=path, **options)


def everything(source: Any) -> list[Any]:
    """Of each place the number of the picture, or the kind of bad."""
    found: list[Any] = []
    for place in source.indices():
        try:
            found.append(number_of(source[place]))
        except BadSample as bad:
            found.append(bad.kind)
    return found


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.tar", ["a.tar"]),
        ("a{08..11}.tar", ["a08.tar", "a09.tar", "a10.tar", "a11.tar"]),
        ("{x,y}/{0..1}", ["x/0", "x/1", "y/0", "y/1"]),
        ("a{b,{1..2}}c", ["abc", "a1c", "a2c"]),
        (
            "pipe:x{1,2} | awk '{print $1}' ${A} {}",
            ["pipe:x1 | awk '{print $1}' ${A} {}", "pipe:x2 | awk '{print $1}' ${A} {}"],
        ),
    ],
)
def test_braces(pattern: str, expected: list[str]) -> None:
    assert braces(pattern) == expected


def test_patterns(tmp_path: Path) -> None:
    for name in ("b/2.tar", "a/1.tar", "a/0.tar", "a/0.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    one, two, three = str(tmp_path / "a/0.tar"), str(tmp_path / "a/1.tar"), str(tmp_path / "b/2.tar")
    assert expand(f"{tmp_path}/*/*.tar") == [one, two, three]
    assert expand([f"{tmp_path}/a/{{0..1}}.tar", f"file://{three}"]) == [one, two, three]
    assert expand("https://a.org/{0..1}.tar?x=1") == ["https://a.org/0.tar?x=1", "https://a.org/1.tar?x=1"]
    assert expand("pipe:cat *.tar") == ["pipe:cat *.tar"]
    for wrong in (f"{tmp_path}/c*.tar", str(tmp_path / "none.tar"), [], f"{tmp_path}/{{3..1}}.tar"):
        with pytest.raises(UsageError, match="no shard at"):
            expand(wrong)
    with pytest.raises(UsageError, match="cannot be listed over HTTP"):
        expand("https://a.org/*.tar")


def test_member_names() -> None:
    assert split("a/b.c/17.seg.PNG") == ("a/b.c/17", "seg.png")
    assert split("17.jpg") == ("17", "jpg")
    for none in ("17", ".hidden.jpg", "a/._17.jpg", "a/", "__MACOSX/17.jpg", "a/Thumbs.db", "a/.DS_Store"):
        assert split(none) is None


def test_samples_of_several_shards(tmp_path: Path) -> None:
    for number in range(3):
        shard(tmp_path / f"{number}.tar", range(4 * number, 4 * number + 4))
    source = build(f"{tmp_path}/{{0..2}}.tar")
    assert len(source) == 12
    assert everything(source) == list(range(12))
    sample = source[2, 1]
    assert (sample.captions, sample.key) == (["picture 9"], f"{tmp_path}/2.tar/00009")
    assert [number_of(source[i]) for i in (11, 0, 5)] == [11, 0, 5]  # by number, in any order
    with pytest.raises(IndexError):
        source[12]


def one(tmp_path: Path, *members: tuple[str, bytes], **options: Any) -> Sample:
    return build(tar(tmp_path / "one.tar", list(members)), **options)[0]


def test_layouts(tmp_path: Path) -> None:
    """img2dataset (CC3M, CC12M, SBU, LAION), several captions, questions, fields of one's own."""
    image = ("a.jpg", encoded(photo(7), "JPEG", quality=95))

    def described(**fields: Any) -> tuple[str, bytes]:
        return "a.json", json.dumps(fields).encode()

    assert one(tmp_path, image, described(caption="from json", url="u")).captions == ["from json"]
    assert one(tmp_path, image, ("a.txt", b"from\ntext")).captions == ["from\ntext"]
    assert one(tmp_path, image, ("a.txt", b"from text"), described(caption="from json")).captions == ["from text"]
    assert one(tmp_path, image, ("a.txt", b"t"), described(captions=["one", "two"])).captions == ["one", "two"]
    assert one(tmp_path, image, described(question="why?", answers=["so"])).question == "why?"
    assert one(tmp_path, image, described(alt="mine", caption="c"), caption="alt").captions == ["mine"]
    assert one(tmp_path, image, ("a.blip", b"mine"), ("a.txt", b"t"), caption="blip").captions == ["mine"]
    assert one(tmp_path, image, ("a.txt", b"t"), described(caption="c"), caption="blip").captions == []
    assert one(tmp_path, image, ("a.txt", b"t"), described(captions=[])).captions == ["t"]
    assert one(tmp_path, ("a.txt", b"t"), image, ("a.seg.json", b"{}")).captions == ["t"]
    assert number_of(one(tmp_path, image, ("a.txt", b"t"))) == 7
    assert one(tmp_path, image, ("a.txt", b"caf\xe9")).captions == ["caf\ufffd"]
    assert one(tmp_path, image).captions == []
    assert one(tmp_path, image, ("a.txt", b"t"), ("a.json", b"{broken")).captions == ["t"]
    for members, kind in (
        ([("a.txt", b"t")], "no image"),
        ([image, ("a.json", b"{broken")], "not json"),
        ([image, ("a.json", b"[" * 100_000)], "not json"),
    ):
        with pytest.raises(BadSample) as caught:
            one(tmp_path, *members)
        assert caught.value.kind == kind


def test_where_samples_begin(tmp_path: Path) -> None:
    """Folders, names without a sample, long names, one name in two places, one name with two images in a row."""
    long = "x" * 150
    members = [
        *[("a.png", encoded(photo(1))), ("a.txt", b"1"), ("README", b"no sample"), ("b.png", encoded(photo(2)))],
        *[("b.txt", b"2"), ("a.png", encoded(photo(3))), ("a.txt", b"3")],
        *[(f"{long}/{long}.png", encoded(photo(4))), (f"{long}/{long}.txt", b"4")],
        *[("c.png", encoded(photo(5))), ("c.png", encoded(photo(6))), ("c.txt", b"6")],
        ("._c.png", b"of another system"),
    ]
    path = tar(tmp_path / "a.tar", members, format=tarfile.PAX_FORMAT)
    with tarfile.open(path, "a") as file:
        file.addfile(tarfile.TarInfo("folder.d/"))
    source = build(path)
    assert everything(source) == [1, 2, 3, 4, 5, 6]
    assert [source[0, place].captions for place in range(6)] == [["1"], ["2"], ["3"], ["4"], [], ["6"]]
    assert len({source[0, place].image_id for place in range(6)}) == 6  # whatever they are called
    old = build(tar(tmp_path / "gnu.tar", members, format=tarfile.GNU_FORMAT))
    assert everything(old) == [1, 2, 3, 4, 5, 6]


def damaged(path: Path, place: int, data: bytes) -> None:
    whole = bytearray(path.read_bytes())
    whole[place : place + len(data)] = data
    path.write_bytes(whole)


def test_damage_costs_what_is_damaged(tmp_path: Path) -> None:
    path = Path(shard(tmp_path / "a.tar", range(6)))
    places = index(path)[1:]
    damaged(path, int(places[2, 0]), bytes([255]) * 512)  # the header of an image in the middle
    assert everything(build(str(path))) == [0, 1, "broken tar", "no image", 3, 4, 5]
    path = Path(shard(tmp_path / "b.tar", range(6)))
    damaged(path, int(places[2, 0]) + 512 + 30, bytes(20))  # inside an image
    assert everything(build(str(path))) == [0, 1, "undecodable", 3, 4, 5]


SIZES = (b"\xff" * 12, b"\x80" + bytes(10) + b"\x07", b"9" * 12)  # below zero, seven, not octal


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_damage_anywhere_ends_nothing(tmp_path: Path, form: int) -> None:
    """Headers of links, of long names and of sizes below zero among them."""
    rng = np.random.default_rng(0)
    name = "x" * 90 + "/" + "y" * (90 if form != tarfile.USTAR_FORMAT else 60)
    members = [(f"{name}{i}.{kind}", rng.bytes(300)) for i in range(6) for kind in ("png", "txt")]
    path = Path(tar(tmp_path / "a.tar", members, format=form))
    whole = path.read_bytes()
    for turn in range(60):
        damaged = bytearray(whole)
        for place in rng.integers(0, len(whole), 4):
            header = int(place) // 512 * 512
            kind = int(rng.integers(4))
            if kind == 0:
                damaged[header : header + 512] = rng.bytes(512)
            elif kind == 1:  # a header of another type or size whose checksum is right
                damaged[header + 156] = int(rng.choice(list(b"0125LKxgS")))
                damaged[header + 124 : header + 136] = SIZES[int(rng.integers(3))]
                damaged[header + 148 : header + 156] = b" " * 8
                damaged[header + 148 : header + 155] = b"%06o\0" % sum(damaged[header : header + 512])
            else:
                damaged[int(place)] = int(rng.integers(256))
        path.write_bytes(damaged[: int(rng.integers(len(whole) // 2, len(whole)))] if turn % 3 == 0 else damaged)
        kinds = everything(build(str(path)))
        assert set(kinds) <= {"broken tar", "no image", "undecodable"}


@pytest.mark.parametrize(("cut", "last"), [(100, ["broken tar"]), (520, ["broken tar"]), (0, [])])
def test_truncated_tars(tmp_path: Path, cut: int, last: list[str]) -> None:
    """In a header, in an image, and between two samples, where the zeros at the end are missing."""
    path = Path(shard(tmp_path / "a.tar", range(6)))
    path.write_bytes(path.read_bytes()[: int(index(path)[5, 0]) + cut])
    assert everything(build(str(path))) == [0, 1, 2, 3, *last]


def test_concatenated_tars(tmp_path: Path) -> None:
    first, second = Path(shard(tmp_path / "a.tar", range(3))), Path(shard(tmp_path / "b.tar", range(3, 6)))
    first.write_bytes(first.read_bytes() + second.read_bytes())
    assert everything(build(str(first))) == list(range(6))


def test_shards_that_cannot_be_read(tmp_path: Path) -> None:
    shard(tmp_path / "0.tar", range(2))
    (tmp_path / "2.tar").write_text("<html>not found</html>" * 100)
    (tmp_path / "3.tar").touch()
    (tmp_path / "4.tar").mkdir()
    (tmp_path / "5.tar").symlink_to(tmp_path / "5.tar")
    tar(tmp_path / "6.tar", [])
    shard(tmp_path / "7.tar", range(2, 4))
    source = build(f"{tmp_path}/{{0..7}}.tar")
    bad = ["missing shard", "broken tar", "broken shard", "broken shard", "missing shard"]
    assert everything(source) == [0, 1, *bad, 2, 3]


def test_what_was_counted_stays_counted(tmp_path: Path) -> None:
    """A resumed run counts as before: shards that are lost or changed since are bad, sample by sample."""
    for number in range(4):
        shard(tmp_path / f"{number}.tar", range(3 * number, 3 * number + 3))
    (tmp_path / "3.tar").unlink()
    cache = str(tmp_path / "cache")
    assert everything(build(f"{tmp_path}/{{0..3}}.tar", cache=cache)) == [*range(9), "missing shard"]
    (tmp_path / "1.tar").unlink()
    shard(tmp_path / "2.tar", range(5))
    shard(tmp_path / "3.tar", range(5))
    again = build(f"{tmp_path}/{{0..3}}.tar", cache=cache)
    assert len(again) == 10
    assert everything(again) == [0, 1, 2, *["missing shard"] * 3, *["changed shard"] * 3, "broken shard"]


def test_the_index_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shard(tmp_path / "0.tar", range(5))
    first = build(path, cache=str(tmp_path / "cache"))
    assert len(first) == 5
    monkeypatch.setattr("qformer.data.shards.index", lambda path: pytest.fail("counted again"))
    assert everything(build(path, cache=str(tmp_path / "cache"))) == list(range(5))


def test_pipes_and_compressed_tars(tmp_path: Path) -> None:
    shard(tmp_path / "0.tar", range(3))
    shard(tmp_path / "1.tar.gz", range(3, 6), mode="w:gz")
    shard(tmp_path / "2.tar.xz", range(6, 9), mode="w:xz")
    names = [f"pipe:cat '{tmp_path}/0.tar'", f"{tmp_path}/1.tar.gz", f"{tmp_path}/2.tar.xz"]
    names += [f"pipe:cat '{tmp_path}/1.tar.gz'"]
    cache = tmp_path / "cache"
    assert everything(build(names, cache=str(cache))) == [*range(9), 3, 4, 5]
    assert len(list(cache.glob("*.tar"))) == 4
    assert {file.suffix for file in cache.iterdir()} <= {".tar", ".npy", ".lock", ".fetch"}


def test_a_damaged_compressed_tar_is_used_as_far_as_it_goes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    members = [(f"{i}.png", rng.bytes(4000)) for i in range(20)]
    path = Path(tar(tmp_path / "1.tar.gz", members, mode="w:gz"))
    path.write_bytes(path.read_bytes()[:30_000])
    kinds = everything(build(str(path)))
    assert 4 <= kinds.count("undecodable") <= 8  # whole members that hold noise
    assert kinds[-1] == "broken tar"


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "WAIT", 0)


class Response(io.BytesIO):
    """What a server sends; `length` is what is still to come."""

    length = 0


def test_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: None) -> None:
    """The second try works, the connection is lost once, one shard is not there."""
    path = Path(shard(tmp_path / "0.tar", range(3)))
    asked: list[str] = []

    def serve(url: str, timeout: float) -> Response:
        asked.append(url)
        if "1.tar" in url:
            raise urllib.error.HTTPError(url, 404, "Not Found", None, None)  # type: ignore[arg-type]
        if len(asked) == 1:
            raise urllib.error.URLError("reset")
        answer = Response(path.read_bytes()[: 700 if len(asked) == 2 else None])
        answer.length = 5000 if len(asked) == 2 else 0
        return answer

    monkeypatch.setattr(urllib.request, "urlopen", serve)
    source = build("https://a.org/{0..1}.tar", cache=str(tmp_path / "cache"))
    assert not asked
    assert everything(source) == [0, 1, 2, "missing shard"]
    assert asked == ["https://a.org/0.tar"] * 3 + ["https://a.org/1.tar"]
    assert everything(build("https://a.org/{0..1}.tar", cache=str(tmp_path / "cache"))) == [0, 1, 2, "missing shard"]
    assert len(asked) == 4


def test_a_network_that_fails_ends_the_run_and_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: None
) -> None:
    def fail(url: str, timeout: float) -> Response:
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", fail)
    source = build("https://a.org/0.tar", cache=str(tmp_path / "cache"))
    with pytest.raises(UsageError, match=r"0.tar' could not be fetched in 3 tries \(<urlopen error no route>\)"):
        len(source)
    data = Path(shard(tmp_path / "0.tar", range(3))).read_bytes()
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: Response(data))
    assert len(source) == 3


def test_a_full_disk_is_no_missing_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: None) -> None:
    monkeypatch.setattr(fetching, "FULL", 1 << 60)
    with pytest.raises(UsageError, match="no room for 'pipe:false'"):
        len(build("pipe:false", cache=str(tmp_path / "cache")))
    assert not list((tmp_path / "cache").glob("*.npy"))


def test_a_command_that_fails(tmp_path: Path, at_once: None) -> None:
    shard(tmp_path / "0.tar", range(3))
    assert everything(build([f"pipe:cat {tmp_path}/0.tar", "pipe:false"])) == [0, 1, 2, "missing shard"]


def test_other_file_systems(tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for number in range(2):
        data = Path(shard(tmp_path / "x.tar", range(2 * number, 2 * number + 2))).read_bytes()
        memory.pipe(f"/wds/{number}.tar", data)
    assert everything(build("memory://wds/*.tar")) == [0, 1, 2, 3]
    assert everything(build("memory://wds/{0..2}.tar")) == [0, 1, 2, 3, "missing shard"]
    with pytest.raises(UsageError, match="cannot be opened"):
        build("nosuch://bucket/*.tar")


def counted(tmp_path: Path, number: int) -> list[str]:
    """Shards behind pipes that write down when they are fetched."""
    for shard_number in range(number):
        shard(tmp_path / f"{shard_number}.tar", range(3 * shard_number, 3 * shard_number + 3))
    return [f"pipe:echo {n} >> {tmp_path}/log; cat {tmp_path}/{n}.tar" for n in range(number)]


def test_fetched_shards_are_dropped_and_fetched_again(tmp_path: Path) -> None:
    names = counted(tmp_path, 4)
    size = (tmp_path / "0.tar").stat().st_size
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "of-another-source.tar").write_bytes(bytes(10 * size))
    source = build(names, cache=str(cache), keep_gb=2.5 * size / 1e9)
    assert everything(source) == list(range(12))
    assert len(list(cache.glob("*.tar"))) == 3
    assert (tmp_path / "log").read_text().split() == ["0", "1", "2", "3"]
    assert len(source.shards._files) <= 2  # a dropped tar that is open would still fill the disk
    assert everything(source) == list(range(12))
    assert (tmp_path / "log").read_text().split()[4:] == ["0", "1", "2", "3"]


def test_the_next_window_is_fetched_in_the_background(tmp_path: Path, at_once: None) -> None:
    source = build(counted(tmp_path, 6), cache=str(tmp_path / "cache"), window=2)
    source.order((0,)).at(0)
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and thread.daemon and thread.name.startswith("Thread"):
            thread.join(10)
    assert len((tmp_path / "log").read_text().split()) == 4
    missing = build([f"pipe:cat {tmp_path}/0.tar", "pipe:false"], window=1)
    missing.shards._prepare([1])  # errors are left to whoever needs the shard
    assert everything(missing) == [0, 1, 2, "missing shard"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"path": "none.tar"}, "no shard at 'none.tar'"),
        ({}, "data.path is required"),
        ({"path": "0.tar", "window": 0}, "both must be positive"),
        ({"path": "0.tar", "windows": 3}, "data.windows is not an option of 'webdataset': did you mean 'window'?"),
    ],
)
def test_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Any, expected: str) -> None:
    monkeypatch.chdir(tmp_path)
    shard(Path("0.tar"), range(2))
    with pytest.raises(UsageError) as caught:
        sources.build("webdataset", **options)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
