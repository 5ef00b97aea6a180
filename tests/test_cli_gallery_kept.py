"""`qformer index` where pictures are not there, and `qformer search` where they are others by now: what is told."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qformer.commands import searching as module
from qformer.files.records import to_json
from tests.retrieval.photos import folder, model_of_tiles, picture
from tests.test_cli import one_sentence

if TYPE_CHECKING:
    from collections.abc import Callable

    Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def indexed(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A gallery of six photos, some with captions."""
    model = model_of_tiles()
    monkeypatch.setattr(module, "load", lambda *_, **__: model)
    folder(tmp_path / "photos", 6, captions=True)
    assert run("index", "one", "photos", "-o", "gallery")[0] == 0
    return "gallery"


@pytest.mark.parametrize("left", ["nothing", "an empty folder"])
def test_a_source_on_a_disk_that_is_not_mounted(run: Run, indexed: str, left: str) -> None:
    Path("photos").rename("away")
    if left == "an empty folder":
        Path("photos").mkdir()
    code, out, err = run("index", "one", "photos", "-o", indexed)
    shown = " ".join((out + err).split())
    assert code == 0
    assert "what the gallery has of it is kept" in shown
    assert "gallery: 6 images (0 embedded now, 0 changed, 0 removed)" in shown
    assert "kept 6 images that could not be looked at" in shown
    if left == "an empty folder":
        Path("photos").rmdir()
    Path("away").rename("photos")
    code, out, err = run("index", "one", "photos", "-o", indexed)
    assert (code, "gallery: 6 images (0 embedded now, 0 changed, 0 removed)" in out + err) == (0, True)
    assert "kept" not in out + err


def test_remove(run: Run, indexed: str) -> None:
    for number in range(3):
        Path(f"photos/{number}.png").unlink()
    code, out, err = run("index", "one", "photos", "-o", indexed)
    shown = " ".join((out + err).split())
    assert (code, "0 removed" in shown) == (0, True)
    assert "kept 3 images that are gone, more than a fifth of the gallery at once; --remove takes them out" in shown
    code, out, err = run("index", "one", "photos", "-o", indexed, "--remove")
    assert (code, "gallery: 3 images (0 embedded now, 0 changed, 3 removed)" in out + err) == (0, True)
    Path("photos").rename("away")
    code, out, err = run("index", "one", "photos", "-o", indexed, "--remove")
    assert (code, "gallery: 0 images (0 embedded now, 0 changed, 3 removed)" in out + err) == (0, True)
    code, _, err = run("index", "one", "elsewhere", "-o", indexed, "--remove")
    assert (code, "no file at" in one_sentence(err)) == (2, True)


def test_what_changed_is_told(run: Run, indexed: str) -> None:
    Path("photos/3.png").write_bytes(picture(9))
    Path("photos/4.png").unlink()
    code, out, err = run("search", "one", indexed, "a cat", "--json", "--html", "sheet.html", "-k", "6")
    assert code == 0
    assert {Path(hit["path"]).name: hit["fault"] for hit in json.loads(out) if hit["fault"]} == {
        "3.png": "changed",
        "4.png": "missing",
    }
    assert "or are others by now, could not be re-ranked and stand last: 2" in err
    page = Path("sheet.html").read_text()
    assert (page.count("changed since it was indexed"), page.count("not where it was indexed")) == (1, 1)
    code, out, err = run("search", "one", indexed, "--image", "photos/0.png", "-k", "6")
    assert "no longer as they were indexed: 2" in err
    assert "(changed since it was indexed)" in " ".join(out.split())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["search", "one", "gallery", "a cat\udcff"], "which is not UTF-8 text"),
        (["search", "one", "gallery", "cat", "--where", "path~\udcff"], "is not a condition in UTF-8 text"),
        (["index", "one", "photos/0.png", "-o", "new"], "'photos/0.png' is a single image; give the folder"),
    ],
)
def test_what_is_refused(run: Run, indexed: str, arguments: list[str], expected: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert expected in one_sentence(err)


def test_a_text_in_letters_that_nobody_knows(run: Run, indexed: str) -> None:
    code, _, err = run("search", "one", indexed, "猫 🐈", "-k", "6")
    assert (code, "the model knows no letter of '猫 🐈'" in err) == (0, True)
    code, _, err = run("search", "one", indexed, "a cat 🐈", "-k", "6")
    assert (code, err) == (0, "")


def test_json_of_a_name_that_is_no_utf8(monkeypatch: pytest.MonkeyPatch) -> None:
    said: Any = {"path": os.fsdecode(b"/photos/\xff.png"), "caption": "déjà"}
    for encoding in ("utf-8", "ascii"):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding))
        print(to_json(said), flush=True)
        assert json.loads(written.getvalue()) == said
    assert "déjà" not in to_json({"caption": "déjà"})
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "utf-8"))
    assert "déjà" in to_json({"caption": "déjà"})
