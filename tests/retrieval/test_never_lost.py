"""A gallery keeps what nobody could look at: disks that are not mounted, folders that are shut, too much at once."""

from __future__ import annotations

import json
import os
import random
import shutil
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qformer.retrieval import absence
from qformer.retrieval.places import digest
from qformer.retrieval.search import Retriever
from qformer.types import BadSample
from tests.data.making import tar
from tests.retrieval.photos import Counting, folder, gallery, index, model_of_tiles, names, picture

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qformer.retrieval.gallery import Gallery
    from qformer.retrieval.index import Tally


class Bench:
    """`0.png` ... `9.png` in `photos`, three more in `photos/nas`, and a gallery of them."""

    def __init__(self, root: Path) -> None:
        self.root, self.photos = root, folder(root / "photos", 10)
        self.nas = self.photos / "nas"
        self.nas.mkdir()
        for number in range(10, 13):
            (self.nas / f"{number}.png").write_bytes(picture(number))
        self.model = Counting(model_of_tiles())
        self.gallery: Gallery = gallery(root / "gallery", self.model)
        self.index()

    def index(self, path: Path | None = None, **choice: Any) -> Tally:
        self.model.images = 0
        return index(self.gallery, self.model, path=path or self.photos, **choice)

    def kept(self) -> dict[str, str]:
        lines = map(json.loads, (self.root / "gallery" / "skipped.jsonl").read_text().splitlines())
        return {Path(line["path"]).name: line["detail"] for line in lines if line["kind"] == "kept"}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.mark.parametrize("left", ["nothing", "an empty folder", "a hidden file", "a link to nowhere"])
def test_a_disk_that_is_not_mounted(bench: Bench, left: str) -> None:
    away = bench.root / "away"
    bench.nas.rename(away)
    if left == "a link to nowhere":
        bench.nas.symlink_to(bench.root / "disk")
    elif left != "nothing":
        bench.nas.mkdir()
        if left == "a hidden file":
            (bench.nas / ".mount-me").touch()
    (bench.photos / "0.png").unlink()  # which is gone for good
    tally = bench.index()
    assert (tally.removed, tally.away, tally.missing, len(bench.gallery.store)) == (1, 3, 0, 12)
    assert set(bench.kept()) == {"10.png", "11.png", "12.png"}
    if bench.nas.is_symlink():
        bench.nas.unlink()
    shutil.rmtree(bench.nas, ignore_errors=True)
    away.rename(bench.nas)
    tally = bench.index()
    assert (tally.removed, tally.added, tally.changed, bench.model.images, tally.away) == (0, 0, 0, 0, 0)
    assert len(bench.gallery.store) == 12


def test_remove_takes_out_what_is_not_there(bench: Bench) -> None:
    shutil.rmtree(bench.nas)
    assert bench.index().away == 3
    tally = bench.index(remove=True)
    assert (tally.removed, tally.away, tally.missing) == (3, 0, 0)
    assert names(bench.gallery) == sorted(f"{n}.png" for n in range(10))
    for number in range(5):
        (bench.photos / f"{number}.png").unlink()
    assert bench.index(remove=True).removed == 5


@pytest.mark.parametrize(("gone", "missing"), [(2, 0), (3, 3)])
def test_more_than_a_fifth_at_once_is_kept_and_the_rest_updated(bench: Bench, gone: int, missing: int) -> None:
    """Two of thirteen images are less than a fifth, three are more."""
    for number in range(gone):
        (bench.photos / f"{number}.png").unlink()
    (bench.photos / "new.png").write_bytes(picture(20))
    (bench.photos / "9.png").write_bytes(picture(21))
    (bench.photos / "8.png").rename(bench.photos / "eight.png")
    tally = bench.index()
    assert (tally.added, tally.missing, tally.away) == (2, missing, 0)
    assert tally.removed == 1 + gone - missing  # the old 9.png among them
    assert {"new.png", "eight.png"} <= set(names(bench.gallery))
    assert "8.png" not in names(bench.gallery)
    assert len(bench.kept()) == missing


def test_a_list_whose_files_are_all_gone(bench: Bench) -> None:
    """However small a part of the gallery it is."""
    disk = bench.root / "disk"
    disk.mkdir()
    (disk / "x.png").write_bytes(picture(30))
    (disk / "other.txt").touch()
    (bench.root / "list.jsonl").write_text('{"image": "disk/x.png"}\n')
    bench.index(bench.root / "list.jsonl", name="jsonl")
    (disk / "x.png").rename(bench.root / "x.png")
    tally = bench.index(bench.root / "list.jsonl", name="jsonl")
    assert (tally.away, tally.removed, tally.skipped, len(bench.gallery.store)) == (1, 0, {"missing": 1}, 14)


def test_a_list_that_is_cut_off(bench: Bench) -> None:
    """Half of its lines and a piece of one are left: nobody knows what the rest of it named."""
    lines = [json.dumps({"image": f"photos/{number}.png", "caption": f"photo {number}"}) for number in range(10)]
    whole = bench.root / "list.jsonl"
    whole.write_text("\n".join(lines))
    opened = gallery(bench.root / "listed", bench.model)
    assert index(opened, bench.model, name="jsonl", path=whole).added == 10
    whole.write_text("\n".join(lines[:5]) + '\n{"image": "pho')
    tally = index(opened, bench.model, name="jsonl", path=whole)
    assert (tally.removed, tally.away, len(opened.store)) == (0, 5, 10)
    whole.write_text("\n".join(lines[:9]))
    assert index(opened, bench.model, name="jsonl", path=whole).removed == 1


def test_a_record_whose_tar_is_another_one_or_gone(tmp_path: Path) -> None:
    """Told by every search; a tar that was only copied is the same."""
    model = model_of_tiles()
    packed = tmp_path / "a.tar"
    tar(packed, [("0.png", picture(0)), ("1.png", picture(1))])
    opened = gallery(tmp_path / "gallery", model)
    index(opened, model, name="webdataset", path=packed)
    found = lambda: {  # noqa: E731
        hit.path[-1]: hit.fault for hit in Retriever(opened, model).text_to_image("cat", k=2, shortlist=0)
    }
    os.utime(packed, (1, 1))
    assert found() == {"0": "", "1": ""}
    assert index(opened, model, name="webdataset", path=packed).added == 0
    tar(packed, [("0.png", picture(0)), ("1.png", picture(5))])
    assert found() == {"0": "", "1": "changed"}
    packed.unlink()
    assert found() == {"0": "missing", "1": "missing"}


def test_tars_that_a_pattern_no_longer_finds(bench: Bench) -> None:
    disks = [bench.root / "tars" / name for name in "ab"]
    for number, disk in enumerate(disks):
        disk.mkdir(parents=True)
        tar(disk / "x.tar", [(f"{30 + number}.png", picture(30 + number))])
    pattern = bench.root / "tars" / "*" / "x.tar"
    assert bench.index(pattern, name="webdataset").added == 2
    (disks[1] / "x.tar").rename(bench.root / "away.tar")
    tally = bench.index(pattern, name="webdataset")
    assert (tally.away, tally.removed, len(bench.gallery.store)) == (1, 0, 15)
    assert bench.index(pattern, name="webdataset", remove=True).removed == 1


def test_a_folder_that_cannot_be_listed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the one that holds the picture, which still answers to its name; also under --remove."""
    deep = bench.photos / "shut" / "deep"
    deep.mkdir(parents=True)
    (deep / "40.png").write_bytes(picture(40))
    bench.index()
    scandir, walk = os.scandir, os.walk

    def shut(path: Any = ".") -> Any:
        if str(path) == str(deep.parent):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    def around(top: Any, **options: Any) -> Iterator[Any]:
        yield from (found for found in walk(top, **options) if "shut/" not in f"{found[0]}/")

    monkeypatch.setattr(absence.os, "scandir", shut)
    monkeypatch.setattr(os, "walk", around)
    for remove in (False, True):
        tally = bench.index(remove=remove)
        assert (tally.away, tally.removed, len(bench.gallery.store)) == (1, 0, 14)


def test_a_copy_on_a_disk_that_is_not_mounted_keeps_its_place(bench: Bench) -> None:
    shutil.copy(bench.nas / "10.png", bench.photos / "copy.png")
    bench.index()
    bench.nas.rename(bench.root / "away")
    shutil.copy(bench.root / "away" / "11.png", bench.photos / "later.png")  # of another time: no move
    tally = bench.index()
    assert (tally.away, tally.removed) == (3, 0)
    hit = Retriever(bench.gallery, bench.model.model).image_to_image(picture(10), k=1)[0]
    assert (hit.path, hit.fault) == (str(bench.photos / "copy.png"), "")


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_compare_in_nfc(bench: Bench, form: Any) -> None:
    """A folder of a Mac's, copied by something that spells its accents anew."""
    files = [bench.photos / f"{unicodedata.normalize(form, name)}.png" for name in ("café", "Übung", "señor", "déjà")]
    for number, file in enumerate(files):
        file.write_bytes(picture(50 + number))
    bench.index()
    other = "NFD" if form == "NFC" else "NFC"
    retriever = Retriever(bench.gallery, bench.model.model)
    for spelling in ("NFC", "NFD"):
        where = [f"path~{unicodedata.normalize(spelling, 'CAFÉ')}"]
        assert [hit.path for hit in retriever.text_to_image("a cat", where=where)] == [str(files[0])]
    for file in files:
        file.rename(bench.photos / unicodedata.normalize(other, file.name))
        os.utime(bench.photos / unicodedata.normalize(other, file.name), (9, 9))
    hit = retriever.image_to_image(picture(50), k=1)[0]
    assert (Path(hit.path).name, hit.fault) == (unicodedata.normalize(other, "café.png"), "")
    tally = bench.index()
    assert (tally.added, tally.removed, tally.missing, tally.copies) == (0, 0, 0, 0)
    assert set(map(unicodedata.normalize, [other] * 17, names(bench.gallery))) == set(names(bench.gallery))


def test_a_picture_that_changed_is_not_shown_as_what_it_was(bench: Bench) -> None:
    retriever = Retriever(bench.gallery, bench.model.model)
    before = {Path(hit.path).name: hit for hit in retriever.text_to_image("a cat", k=13)}
    (bench.photos / "0.png").write_bytes(picture(60))
    os.utime(bench.photos / "1.png", (7, 7))  # touched only
    (bench.photos / "2.png").unlink()
    (bench.photos / "3.png").rename(bench.photos / "swap")
    (bench.photos / "4.png").rename(bench.photos / "3.png")
    (bench.photos / "swap").rename(bench.photos / "4.png")
    hits = retriever.text_to_image("a cat", k=13)
    faults = {Path(hit.path).name: hit.fault for hit in hits if hit.fault}
    assert faults == {"0.png": "changed", "2.png": "missing", "3.png": "changed", "4.png": "changed"}
    assert {Path(path).name for path in retriever.unread} == set(faults)
    assert [hit.itm is None for hit in hits] == [False] * 9 + [True] * 4
    assert all(hit.itc == before[Path(hit.path).name].itc for hit in hits)
    for hit in hits:
        if hit.fault:
            with pytest.raises(BadSample, match=hit.fault):
                retriever.open_image(hit)
    assert next(hit.fault for hit in retriever.image_to_image(picture(0), k=1)) == "changed"
    bench.index()
    assert not [hit for hit in retriever.text_to_image("a cat", k=20) if hit.fault]


def test_a_picture_that_changed_is_not_ranked_by_its_stored_tokens(tmp_path: Path) -> None:
    """One that is gone is: its tokens are what they were."""
    photos, model = folder(tmp_path / "photos", 4), model_of_tiles()
    opened = gallery(tmp_path / "gallery", model, "fp16")
    index(opened, model, path=photos)
    (photos / "0.png").unlink()
    (photos / "1.png").write_bytes(picture(9))
    retriever = Retriever(opened, model)
    hits = {Path(hit.path).name: hit for hit in retriever.text_to_image("a cat")}
    assert {name: hit.fault for name, hit in hits.items() if hit.fault} == {"0.png": "missing", "1.png": "changed"}
    assert [name for name, hit in hits.items() if hit.itm is None] == ["1.png"]
    assert retriever.unread == [str(photos / "1.png")]


def test_times_before_1970(bench: Bench) -> None:
    os.utime(bench.photos / "5.png", (-86_400 * 365, -86_400 * 365))
    bench.index()
    retriever = Retriever(bench.gallery, bench.model.model)
    found = retriever.text_to_image("a cat", where=["modified<1970-01-01"])
    assert [Path(hit.path).name for hit in found] == ["5.png"]
    assert len(retriever.text_to_image("a cat", k=20, where=["modified>=1969-01-01"])) == 13


class World:
    """Two folders, one of them a disk that can be unmounted, and what is true of the pictures in them."""

    def __init__(self, root: Path, draw: random.Random) -> None:
        self.root, self.draw, self.next = root, draw, 0
        self.photos, self.disk, self.away = root / "photos", root / "photos" / "disk", root / "away"
        self.disk.mkdir(parents=True)
        for _ in range(8):
            self.add()

    def files(self) -> list[Path]:
        return sorted(self.photos.rglob("*.png"))

    def add(self) -> None:
        where = self.draw.choice([self.photos, self.disk] if not self.away.exists() else [self.photos])
        self.next += 1
        (where / f"{self.next}.png").write_bytes(picture(self.next))

    def remove(self) -> None:
        if len(files := self.files()) > 3:
            self.draw.choice(files).unlink()

    def move(self) -> None:
        if files := self.files():
            self.next += 1
            file = self.draw.choice(files)
            file.rename(self.draw.choice([file.parent, self.photos]) / f"moved{self.next}.png")

    def edit(self) -> None:
        if files := self.files():
            self.next += 1
            self.draw.choice(files).write_bytes(picture(self.next))

    def unmount(self) -> None:
        if not self.away.exists() and any(self.photos.glob("*.png")):
            self.disk.rename(self.away)
            if self.draw.random() < 0.5:
                self.disk.mkdir()

    def remount(self) -> None:
        if self.away.exists():
            shutil.rmtree(self.disk, ignore_errors=True)
            self.away.rename(self.disk)

    def unseen(self) -> set[str]:
        """Names on the disk while it is away."""
        return {str(self.disk / file.name) for file in self.away.glob("*.png")} if self.away.exists() else set()


class KilledError(Exception):
    pass


def held(opened: Gallery) -> dict[str, str]:
    """The id of each place."""
    return {place.name: known.id for known in opened.store.known() for place in known.places}


@pytest.mark.parametrize("seed", range(4))
def test_no_sequence_loses_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Of pictures that are added, removed, moved, edited, on a disk that comes and goes, under updates that die."""
    draw = random.Random(seed)
    world, model = World(tmp_path, draw), Counting(model_of_tiles())
    opened = gallery(tmp_path / "gallery", model)
    whole: Tally | None = index(opened, model, path=world.photos, batch=3)
    kills = 0
    for _ in range(12):
        before = held(opened)
        for name in draw.choices(["add", "remove", "move", "edit", "unmount", "remount"], k=draw.randint(1, 4)):
            getattr(world, name)()
        commit, left = opened.store.commit, draw.choice([0, 1, 99])

        def dies(*given: Any, commit: Any = commit) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise KilledError
            commit(*given)

        with monkeypatch.context() as patched:
            patched.setattr(opened.store, "commit", dies)
            try:
                whole = index(opened, model, path=world.photos, batch=3)
            except KilledError:
                whole, kills = None, kills + 1
        after = held(opened)
        assert {name for name in world.unseen() if name in before} <= after.keys()
        for file in world.files():
            id_ = digest(file.read_bytes())
            if whole is not None or before.get(str(file)) == id_:
                assert after[str(file)] == id_
    assert kills
    world.remount()
    index(opened, model, path=world.photos, remove=True)
    assert held(opened) == {str(file): digest(file.read_bytes()) for file in world.files()}
