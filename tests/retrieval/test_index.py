"""A gallery follows its images: what is new, changed, moved, copied, deleted or broken, in folders, lists and tars."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qformer.retrieval.search import Retriever
from tests.data.making import tar
from tests.retrieval.photos import Counting, captions, folder, gallery, index, model_of_tiles, names, picture, stored

if TYPE_CHECKING:
    from qformer.retrieval.gallery import Gallery
    from qformer.retrieval.index import Tally


class Bench:
    """Photos `0.png` ... `5.png`, the even ones with captions, and a gallery of them."""

    def __init__(self, root: Path) -> None:
        self.root, self.photos = root, folder(root / "photos", 6, captions=True)
        self.model = Counting(model_of_tiles())
        self.gallery: Gallery = gallery(root / "gallery", self.model)
        self.index()

    def index(self, path: Path | None = None, **choice: Any) -> Tally:
        self.model.images = 0
        return index(self.gallery, self.model, path=path or self.photos, **choice)

    @property
    def version(self) -> int:
        return self.gallery.store._images.version  # type: ignore[attr-defined]

    def skipped(self) -> dict[str, str]:
        lines = (self.root / "gallery" / "skipped.jsonl").read_text().splitlines()
        return {Path(json.loads(line)["path"]).name: json.loads(line)["kind"] for line in lines}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_what_is_stored(bench: Bench) -> None:
    assert bench.model.images == 6
    assert names(bench.gallery) == [f"{n}.png" for n in range(6)]
    assert captions(bench.gallery) == {
        f"{n}.png": sorted([f"a photo of a cat {n}", f"a dog on the beach, {n}"]) for n in (0, 2, 4)
    }
    entry = next(iter(bench.gallery.store.get([next(iter(stored(bench.gallery)))]).values()))
    number = int(Path(entry.path).stem)
    assert entry.bytes == len(picture(number))
    assert entry.modified == int((bench.photos / f"{number}.png").stat().st_mtime)


def test_nothing_changed_commits_nothing(bench: Bench) -> None:
    version = bench.version
    tally = bench.index()
    assert (tally.seen, tally.added, tally.changed, tally.removed, bench.model.images) == (6, 0, 0, 0, 0)
    assert bench.version == version


def test_added_changed_deleted(bench: Bench) -> None:
    before = stored(bench.gallery)
    (bench.photos / "deep").mkdir()
    (bench.photos / "deep" / "6.png").write_bytes(picture(6))
    (bench.photos / "1.png").write_bytes(picture(7))
    (bench.photos / "3.png").unlink()
    tally = bench.index()
    assert (tally.added, tally.removed, bench.model.images) == (2, 2, 2)
    after = stored(bench.gallery)
    assert names(bench.gallery) == ["0.png", "1.png", "2.png", "4.png", "5.png", "6.png"]
    assert {id_ for id_ in before if id_ not in after} == {
        i for i, (own, _) in before.items() if own[0] in "1.png3.png"
    }


def test_renamed_and_touched_are_not_embedded_again(bench: Bench) -> None:
    before = set(stored(bench.gallery))
    (bench.photos / "0.png").rename(bench.photos / "zero.png")
    (bench.photos / "0.txt").rename(bench.photos / "zero.txt")
    os.utime(bench.photos / "2.png", (0, 0))
    tally = bench.index()
    assert (tally.added, tally.changed, tally.removed, bench.model.images) == (0, 2, 0, 0)
    assert set(stored(bench.gallery)) == before
    assert names(bench.gallery) == ["1.png", "2.png", "3.png", "4.png", "5.png", "zero.png"]
    assert len(captions(bench.gallery)["zero.png"]) == 2


@pytest.mark.parametrize("batch", [2, 100])
def test_names_that_are_swapped(bench: Bench, batch: int) -> None:
    before = {own[0]: id_ for id_, (own, _) in stored(bench.gallery).items()}
    for a, b in (("0.png", "5.png"), ("5.png", "1.png")):  # a ring of three
        for old, new in ((a, "swap"), (b, a), ("swap", b)):
            (bench.photos / old).rename(bench.photos / new)
    bench.index(batch=batch)
    after = {own[0]: id_ for id_, (own, _) in stored(bench.gallery).items()}
    contents = {f"{n}.png": (bench.photos / f"{n}.png").read_bytes() for n in range(6)}
    of = {picture(n): before[f"{n}.png"] for n in range(6)}
    assert after == {name: of[data] for name, data in contents.items()}
    assert after != before
    assert set(captions(bench.gallery)) == {"0.png", "2.png", "4.png"}


def test_copies_are_one_entry(bench: Bench) -> None:
    shutil.copy(bench.photos / "3.png", bench.photos / "copy.png")
    assert bench.index().copies == 1
    assert bench.model.images == 0
    assert ["3.png", "copy.png"] in [own for own, _ in stored(bench.gallery).values()]
    (bench.photos / "3.png").unlink()
    tally = bench.index()
    assert (tally.copies, tally.removed, len(bench.gallery.store)) == (0, 0, 6)
    assert "copy.png" in names(bench.gallery)
    (bench.photos / "copy.png").unlink()
    assert bench.index().removed == 1
    assert len(stored(bench.gallery)) == 5


def test_captions_of_a_folder(bench: Bench) -> None:
    (bench.photos / "1.txt").write_text("A new caption!\n...\n")
    (bench.photos / "2.txt").write_text("a photo of a cat 2\nanother one\n")
    (bench.photos / "4.txt").unlink()
    assert bench.index().changed == 3
    assert bench.model.images == 0
    assert captions(bench.gallery) == {
        "0.png": ["a dog on the beach, 0", "a photo of a cat 0"],
        "1.png": ["a new caption"],
        "2.png": ["a photo of a cat 2", "another one"],
    }
    found = Retriever(bench.gallery, bench.model.model).image_to_text(picture(1), k=99, shortlist=0)
    assert {hit.caption for hit in found} == {text for texts in captions(bench.gallery).values() for text in texts}


def test_captions_of_a_list(bench: Bench) -> None:
    def write(rows: list[tuple[int, str]]) -> Path:
        lines = [json.dumps({"image": f"photos/{n}.png", "caption": text}) for n, text in rows]
        (bench.root / "list.jsonl").write_text("\n".join(lines))
        return bench.root / "list.jsonl"

    bench.gallery = gallery(bench.root / "listed", bench.model)
    rows = [(0, "one"), (1, "two"), (0, "three"), (1, "two"), (2, "four\nlines\tof text"), (0, "five")]
    bench.index(write(rows), name="jsonl", batch=2)
    expected = {"0.png": ["five", "one", "three"], "1.png": ["two"], "2.png": ["four lines of text"]}
    assert captions(bench.gallery) == expected
    assert bench.model.images == 3
    version = bench.version
    bench.index(write(rows), name="jsonl", batch=2)
    assert bench.version == version
    bench.index(write([(0, "one"), (1, "six"), (0, "five")]), name="jsonl", batch=2)
    assert captions(bench.gallery) == {"0.png": ["five", "one"], "1.png": ["six"]}
    assert names(bench.gallery) == ["0.png", "1.png"]  # the file of the third stands, but nobody lists it


def test_two_sources(bench: Bench) -> None:
    other = folder(bench.root / "other", 9)
    for number in range(4):
        (other / f"{number}.png").unlink()
    tally = bench.index(other)
    assert (tally.added, tally.copies) == (3, 2)  # 6, 7, 8; 4 and 5 are known
    assert bench.model.images == 3
    (other / "4.png").unlink()
    (other / "8.png").unlink()
    assert bench.index(other).removed == 1
    (bench.photos / "5.png").unlink()
    assert bench.index().removed == 0
    assert names(bench.gallery) == sorted([f"{n}.png" for n in range(8)])
    assert set(captions(bench.gallery)) == {"0.png", "2.png", "4.png"}


def test_two_sources_with_the_same_files(bench: Bench) -> None:
    (bench.root / "some.jsonl").write_text("".join(f'{{"image": "photos/{n}.png"}}\n' for n in (1, 2)))
    bench.index(bench.root / "some.jsonl", name="jsonl")
    assert bench.model.images == 0
    version = bench.version
    bench.index()
    bench.index(bench.root / "some.jsonl", name="jsonl")
    assert bench.version == version
    (bench.root / "some.jsonl").write_text('{"image": "photos/2.png"}\n')
    bench.index(bench.root / "some.jsonl", name="jsonl")
    assert set(names(bench.gallery)) == {f"{n}.png" for n in range(6)}
    assert set(captions(bench.gallery)) == {"0.png", "2.png", "4.png"}


def test_a_folder_that_was_moved(bench: Bench) -> None:
    bench.photos.rename(bench.root / "elsewhere")
    tally = bench.index(bench.root / "elsewhere")
    assert (tally.added, tally.removed, tally.copies, bench.model.images) == (0, 0, 0, 0)
    places = [place for one in bench.gallery.store.known() for place in one.places]
    assert {Path(place.name).parent.name for place in places} == {"elsewhere"}
    assert len(captions(bench.gallery)) == 3


def test_tars(bench: Bench) -> None:
    members = [(f"{n}.png", picture(n)) for n in range(4, 8)]
    members.insert(1, ("4.txt", b"A train\nat the station"))
    members += [("8.png", b"no picture"), ("9.txt", b"no image")]
    tar(bench.root / "a.tar", members)
    tar(bench.root / "b.tar", [("0.png", picture(10))])
    pattern = str(bench.root / "{a,b}.tar")
    tally = bench.index(Path(pattern), name="webdataset")
    assert (tally.added, tally.copies, bench.model.images) == (3, 2, 3)
    assert tally.skipped == {"undecodable": 1, "no image": 1}
    assert "a train at the station" in captions(bench.gallery)["4"]
    hit = Retriever(bench.gallery, bench.model.model).image_to_image(picture(10))[0]
    assert hit.path == f"{bench.root}/b.tar/0"
    version = bench.version
    bench.index(Path(pattern), name="webdataset")
    assert (bench.version, bench.model.images) == (version, 0)

    (bench.root / "b.tar").rename(bench.root / "away.tar")  # a disk that is not there today
    assert bench.index(Path(pattern), name="webdataset").skipped["missing shard"] == 1
    assert len(bench.gallery.store) == 9
    (bench.root / "away.tar").rename(bench.root / "b.tar")
    tar(bench.root / "a.tar", members[:3])
    assert bench.index(Path(pattern), name="webdataset").removed == 2
    assert set(captions(bench.gallery)) == {"0.png", "2.png", "4"}
    assert len(bench.gallery.store) == 7


def test_a_tar_with_damage(bench: Bench) -> None:
    path = Path(tar(bench.root / "a.tar", [(f"{n}.png", picture(n)) for n in range(10, 16)]))
    bench.index(path, name="webdataset")
    data = bytearray(path.read_bytes())
    middle = data.index(b"12.png")
    data[middle : middle + 512] = b"\xff" * 512
    path.write_bytes(data)
    tally = bench.index(path, name="webdataset")
    assert set(tally.skipped) == {"broken tar"}
    assert (tally.removed, len(bench.gallery.store)) == (0, 12)


def test_a_tar_that_was_written_anew_is_not_taken_for_the_old_one(bench: Bench) -> None:
    path = bench.root / "a.tar"
    tar(path, [("x.png", picture(20)), ("y.png", picture(25))])
    bench.index(path, name="webdataset")
    retriever = Retriever(bench.gallery, bench.model.model)
    hit = retriever.image_to_image(picture(25))[0]
    assert hit.path.endswith("a.tar/y")
    tar(path, [("y.png", picture(25)), ("z.png", picture(30))])
    shown = Retriever(bench.gallery, bench.model.model)
    with pytest.raises(Exception, match="missing"):
        shown.open_image(hit)


NAMES = [
    'it\'s "quoted".png',
    "new\nline.png",
    "🐈 emoji é.png",
    "[bold]markup[bold].png",
    "a: b.png",
    "100%_.png",
    "-x.png",
]


def test_names(bench: Bench) -> None:
    for number, name in enumerate(NAMES):
        (bench.photos / name).write_bytes(picture(10 + number))
    Path(os.fsdecode(bytes(bench.photos) + b"/\xff.png")).write_bytes(picture(40))
    tally = bench.index()
    assert (tally.added, dict(tally.skipped)) == (len(NAMES), {"not utf-8": 1})
    assert names(bench.gallery) == sorted([*NAMES, *(f"{n}.png" for n in range(6))])
    retriever = Retriever(bench.gallery, bench.model.model)
    for number, name in enumerate(NAMES):
        hit = retriever.image_to_image(picture(10 + number), k=1)[0]
        assert Path(hit.path).name == name
        assert [one.path for one in retriever.text_to_image("cat", where=[f"path={hit.path}"])] == [hit.path]
    for name in NAMES:
        (bench.photos / name).unlink()
    assert bench.index(remove=True).removed == len(NAMES)


def test_files_that_are_no_images(bench: Bench) -> None:
    (bench.photos / "empty.png").touch()
    (bench.photos / "text.jpg").write_text("no picture")
    (bench.photos / "cut.png").write_bytes(picture(11)[:300])
    (bench.photos / "folder.png").mkdir()
    (bench.photos / "nowhere.png").symlink_to(bench.root / "nothing")
    (bench.photos / "loop").symlink_to(bench.photos)
    tally = bench.index()
    assert bench.skipped() == {
        "empty.png": "undecodable",
        "text.jpg": "undecodable",
        "cut.png": "undecodable",
        "folder.png": "unreadable",
        "nowhere.png": "missing",
    }
    assert (tally.added, sum(tally.skipped.values()), len(bench.gallery.store)) == (0, 5, 6)
    (bench.photos / "cut.png").write_bytes(picture(11))  # mended
    assert bench.index().added == 1
    (bench.photos / "cut.png").write_bytes(b"")
    (bench.photos / "0.png").write_bytes(picture(0)[:100])
    assert bench.index().removed == 2
    assert names(bench.gallery) == [f"{n}.png" for n in range(1, 6)]


def test_what_cannot_be_looked_at_stays(bench: Bench) -> None:
    """A file that is a folder today cannot be read, as one without permission cannot, also by root."""
    (bench.photos / "a: b.png").write_bytes(picture(9))
    bench.index()
    for name in ("3.png", "a: b.png"):
        (bench.photos / name).unlink()
        (bench.photos / name).mkdir()
    (bench.photos / "2.txt").unlink()
    (bench.photos / "2.txt").mkdir()
    tally = bench.index()
    assert (tally.removed, len(bench.gallery.store)) == (0, 7)
    assert tally.skipped["unreadable"] == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_without_permission(bench: Bench) -> None:
    locked = bench.photos / "locked"
    locked.mkdir()
    for number in (6, 7):
        (locked / f"{number}.png").write_bytes(picture(number))
    bench.index()
    (bench.photos / "1.png").chmod(0)
    locked.chmod(0)
    tally = bench.index()
    locked.chmod(0o700)
    assert (tally.removed, len(bench.gallery.store)) == (0, 8)
    assert tally.skipped == {}  # its size and time are known without reading it


def test_an_interrupted_update_goes_on(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    more = folder(bench.root / "more", 14)
    commits, commit = [], bench.gallery.store.commit

    def fails(*given: Any) -> None:
        if len(commits) == 2:
            raise OSError("no space left on device")
        commits.append(commit(*given))

    monkeypatch.setattr(bench.gallery.store, "commit", fails)
    with pytest.raises(OSError, match="no space"):
        bench.index(more, batch=3)
    monkeypatch.undo()
    done = len(stored(bench.gallery))
    assert 6 <= done < 14
    bench.index(more, batch=3)
    assert (bench.model.images, len(stored(bench.gallery))) == (14 - done, 14)


def test_a_format_that_is_read_no_more_stays(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where pillow-heif is installed on one machine of two that keep a gallery."""
    from qformer.data import folders

    (bench.photos / "6.webp").write_bytes(picture(6))
    assert bench.index().added == 1
    monkeypatch.setattr(folders, "SUFFIXES", folders.SUFFIXES - {".webp"})
    monkeypatch.setattr(folders, "UNREAD", folders.UNREAD | {".webp"})
    monkeypatch.setattr("qformer.retrieval.absence.UNREAD", frozenset({".webp"}))
    assert bench.index().removed == 0
    assert "6.webp" in names(bench.gallery)
    (bench.photos / "6.webp").unlink()
    assert bench.index().removed == 1
