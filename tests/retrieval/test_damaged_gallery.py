"""Galleries whose files were damaged at random: one sentence that names what is damaged, nothing good overwritten."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from qformer.commands import searching as stage
from qformer.retrieval import index as update
from qformer.retrieval.gallery import Gallery
from qformer.retrieval.places import parse_places
from qformer.retrieval.search import Retriever
from qformer.types import UsageError
from tests.retrieval.photos import folder, gallery, model_of_tiles, picture
from tests.retrieval.photos import index as indexed

if TYPE_CHECKING:
    from collections.abc import Callable

EDITS = 60
#: Files that any update writes anew: of the galleries that are not refused.
WRITTEN = ("gallery.json", "skipped.jsonl", "lance/images.lance/_versions/latest_version_hint.json")
VALUES: list[Any] = [None, True, -1, 1.5, "", "x", [], [1], {}, {"a": 1}, [[1]], "9" * 50]


def flip(file: Path, draw: random.Random) -> str:
    data = bytearray(file.read_bytes())
    place = draw.randrange(len(data))
    data[place] ^= 1 << draw.randrange(8)
    file.write_bytes(data)
    return f"bit of byte {place} of {len(data)}"


def cut(file: Path, draw: random.Random) -> str:
    size = draw.choice([0, 1, draw.randrange(file.stat().st_size)])
    file.write_bytes(file.read_bytes()[:size])
    return f"cut at {size}"


def noise(file: Path, draw: random.Random) -> str:
    data = bytearray(file.read_bytes())
    place = draw.randrange(len(data))
    data[place : place + 16] = draw.randbytes(min(16, len(data) - place))
    file.write_bytes(data)
    return f"noise from byte {place} of {len(data)}"


def lose_key(file: Path, draw: random.Random) -> str:
    said = json.loads(file.read_text())
    key = draw.choice(sorted(said))
    del said[key]
    file.write_text(json.dumps(said))
    return f"without {key}"


def other_type(file: Path, draw: random.Random) -> str:
    said = json.loads(file.read_text())
    key = draw.choice(sorted(said))
    said[key] = draw.choice([value for value in VALUES if type(value) is not type(said[key])])
    file.write_text(json.dumps(said))
    return f"{key} is {said[key]!r}"


ANY, OF_JSON = (flip, cut, noise), (lose_key, other_type, flip, cut)


def contents(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*")) if file.is_file()}


@pytest.fixture
def whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A gallery after some updates, so that it has several versions, deletions and an index of its columns."""
    monkeypatch.chdir(tmp_path)
    model = model_of_tiles()
    monkeypatch.setattr(stage, "load", lambda *_, **__: model)
    photos = folder(tmp_path / "photos", 8, captions=True)
    index("whole")
    (photos / "0.png").unlink()
    (photos / "1.png").write_bytes(picture(20))
    index("whole")
    return tmp_path / "whole"


def index(into: str) -> None:
    stage.index("model", ["photos"], Path(into), batch=4, device="cpu")


def search(within: str) -> None:
    stage.search("model", Path(within), "a cat", k=3, shortlist=2, as_json=True, device="cpu")


def refusal(run: Callable[[str], None], name: str) -> str:
    try:
        run(name)
    except UsageError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_a_damaged_gallery_is_named_and_left_alone(whole: Path, tmp_path: Path) -> None:
    """By a search and by an update upon it; edits that LanceDB does not notice may pass."""
    draw, good, refused = random.Random(0), contents(whole), 0
    names = [name for name, data in good.items() if data]
    for number in range(EDITS):
        damaged = tmp_path / f"damaged{number}"
        shutil.copytree(whole, damaged)
        name = "gallery.json" if number % 3 == 0 else draw.choice(names)
        edit: Callable[[Path, random.Random], str] = draw.choice(OF_JSON if name.endswith(".json") else ANY)
        what = f"{name}: {edit(damaged / name, draw)}"
        for run in (search, index):
            if told := refusal(run, damaged.name):
                refused += 1
                assert f"'{damaged.name}" in told, f"{what}: {told}"
                assert "\n" not in told, f"{what}: {told}"
                if " cut at " in what and "txn" not in what:
                    assert Path(name).name in told, f"{what}: {told}"
        left = contents(damaged)
        lost = [one for one in good if one not in (name, *WRITTEN) and left.get(one) != good[one]]
        assert not lost, f"{what}: {lost}"
        shutil.rmtree(damaged)
    assert refused > EDITS / 2


def test_a_gallery_whose_table_is_gone_is_not_begun_anew(whole: Path) -> None:
    for lost in ("lance/images.lance", "lance"):
        shutil.rmtree(whole / lost)
        for run in (search, index):
            with pytest.raises(UsageError, match="the store in 'whole' is damaged or gone"):
                run("whole")
        assert not (whole / "lance" / "images.lance").exists()
    shutil.rmtree(whole)
    with pytest.raises(UsageError, match="no gallery at 'whole'"):
        search("whole")


def test_a_gallery_that_goes_while_it_is_searched(whole: Path) -> None:
    retriever = Retriever(whole, model_of_tiles())
    assert len(retriever.text_to_image("a cat", k=3)) == 3
    shutil.rmtree(whole)
    with pytest.raises(UsageError, match="is damaged or gone"):
        retriever.text_to_image("a cat")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("IO: No space left on device")])
def test_a_full_disk_is_told(whole: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    (whole.parent / "photos" / "new.png").write_bytes(picture(30))

    def full(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(type(Gallery.open(whole).store._images), "add", full)  # type: ignore[attr-defined]
        with pytest.raises(
            UsageError, match=r"'whole' cannot be .*No space left on device.*what was committed is kept"
        ):
            index("whole")
    with monkeypatch.context() as patched:
        patched.setattr(update, "replace_records", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(UsageError, match=r"'whole' cannot be written"):
            index("whole")
    index("whole")
    assert len(Gallery.open(whole).store) == 8


def test_rows_that_are_no_numbers(tmp_path: Path) -> None:
    """One flipped bit makes 65,504 infinite; such a row would stand first in every search."""
    model = model_of_tiles()
    opened = gallery(tmp_path / "gallery", model)
    indexed(opened, model, path=folder(tmp_path / "photos", 3))
    known = next(iter(opened.store.known())).id
    entry = opened.store.get([known])[known]
    entry.embeds = np.full_like(entry.embeds, np.nan)
    opened.store.commit([], [entry], [])
    with pytest.raises(UsageError, match="rows of an image are not finite"):
        Retriever(opened, model).text_to_image("a cat")


@pytest.mark.parametrize("text", ["", "5", "[[0, 1, 2, 3, 4]]", "[[0]]", "{", '[[0, "a", 1, 2, "3"]]'])
def test_places_that_are_none(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - of JSON or of ours
        parse_places(text)
