"""`qformer index` and `qformer search` as people meet them: tables, JSON, sheets, and one sentence when it is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from filelock import FileLock

from qformer.commands import searching as module
from tests.retrieval.photos import folder, model_of_tiles, picture
from tests.test_cli import one_sentence

if TYPE_CHECKING:
    from collections.abc import Callable

    Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def models(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Checkpoints by name: `one` and `other` of stage one, `two` of stage two."""
    made: dict[str, Any] = {"one": model_of_tiles(), "other": model_of_tiles(), "two": torch.nn.Linear(1, 1)}
    with torch.no_grad():
        made["other"].vision_proj.weight.mul_(0.5)
    monkeypatch.setattr(module, "load", lambda path, device=None, trust=False: made[path])
    return made


@pytest.fixture
def indexed(run: Run, tmp_path: Path) -> str:
    """A gallery of six photos, some with captions."""
    folder(tmp_path / "photos", 6, captions=True)
    assert run("index", "one", "photos", "-o", "gallery")[0] == 0
    return "gallery"


def test_index(run: Run, tmp_path: Path) -> None:
    folder(tmp_path / "photos", 6, captions=True)
    (tmp_path / "photos" / "bad.png").write_bytes(b"no picture")
    shutil.copy("photos/1.png", "photos/copy.png")
    code, out, err = run("index", "one", "photos", "--output", "deep/gallery", "--batch", "2")
    assert code == 0, err
    shown = out + err
    assert "deep/gallery: 6 images" in shown
    assert "6 embedded" in shown
    assert "skipped 1 (1 undecodable); see deep/gallery/skipped.jsonl" in shown
    assert json.loads(Path("deep/gallery/skipped.jsonl").read_text())["path"] == str(tmp_path / "photos" / "bad.png")
    (tmp_path / "photos" / "2.png").unlink()
    code, out, err = run("index", "one", "photos", "-o", "deep/gallery")
    assert code == 0
    assert "deep/gallery: 5 images" in out + err
    assert "1 removed" in out + err


def test_search_prints_a_table(run: Run, indexed: str) -> None:
    code, out, err = run("search", "one", indexed, "a cat on the beach", "-k", "4")
    assert (code, err) == (0, "")
    assert "4 of 6 images" in out
    for name in ("score", "match", "logit", "cosine", "photos/"):
        assert name in out
    assert "%" in out
    code, out, err = run("search", "one", indexed, "--image", "photos/3.png", "-k", "2")
    assert (code, err) == (0, "")
    assert "2 of 6 images" in out
    assert "similarity" in out
    assert "match" not in out
    assert out.index("photos/3.png") > 0
    code, out, err = run("search", "one", indexed, "cat", "--where", "width=40", "--where", "path~/0.png")
    assert (code, err) == (0, "")
    assert "1 of 6 images" in out
    code, out, err = run("search", "one", indexed, "cat", "--where", "width=41")
    assert code == 0
    assert "0 of 6 images" in out


def test_a_narrow_terminal(run: Run, indexed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    long = Path("photos") / ("a_very_long_folder_name_" * 4) / "x.png"
    long.parent.mkdir()
    long.write_bytes(picture(8))
    long.with_suffix(".txt").write_text("a [bold]caption[/bold] of [a cat] [/] " + "and so on " * 8)
    assert run("index", "one", "photos", "-o", indexed)[0] == 0
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run("search", "one", indexed, "cat", "-k", "7")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    flat = "".join(out.split())
    assert "[bold]caption[/bold]" in flat
    assert str(long) in flat


def test_json_and_sheet(run: Run, indexed: str) -> None:
    Path("photos/[b]<i>&.png").write_bytes(picture(9))
    Path("photos/[b]<i>&.txt").write_text("a <script>alert(1)</script> & [red]")
    assert run("index", "one", "photos", "-o", indexed)[0] == 0
    Path("photos/1.png").unlink()
    arguments = ("a bus", "--image", "photos/2.png", "--html", "sheet.html", "--json", "-k", "7")
    code, out, err = run("search", "one", indexed, *arguments)
    assert code == 0
    hits = json.loads(out)
    assert len(hits) == 7
    assert {"id", "path", "score", "itc", "itm", "probability", "similarity", "captions"} <= set(hits[0])
    assert hits[-1]["path"].endswith("1.png")
    assert hits[-1]["itm"] is None
    assert "stand last: 1, such as" in err
    page = Path("sheet.html").read_text()
    assert page.count("<img") == 1 + 6  # the query and all hits but one
    assert page.count("not where it was indexed") == 1
    assert "[b]&lt;i&gt;&amp;.png" in page
    assert "<script>" not in page
    scores = [hit["score"] for hit in hits[:-1]]
    assert scores == sorted(scores, reverse=True)


def test_notes(run: Run, indexed: str) -> None:
    code, _, err = run("search", "one", indexed, "cat " * 10_000)
    assert code == 0
    assert "the text has 10,000 words" in err
    assert "fewer than -k 10" in err
    assert "Token indices" not in err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["one", "none", "cat"], "no gallery at 'none'"),
        (["one", "photos", "cat"], "no gallery at 'photos'"),
        (["one", "gallery"], "nothing to search for"),
        (["one", "gallery", ""], "no letter or digit"),
        (["one", "gallery", "?"], "no letter or digit"),
        (["two", "gallery", "cat"], "'two' is a checkpoint of stage two"),
        (["other", "gallery", "cat"], "was embedded by another model ('one')"),
        (["one", "gallery", "--image", "none.png"], "'none.png' cannot be read as an image (missing"),
        (["one", "gallery", "--image", "photos/0.txt"], "cannot be read as an image (undecodable"),
        (["one", "gallery", "cat", "--where", "size=3"], "'size=3' is not a condition"),
        (["one", "gallery", "cat", "--html", "no/folder/sheet.html"], "no/folder"),
        (["one", "broken", "cat"], "is damaged"),
    ],
)
def test_searches_that_are_refused(run: Run, indexed: str, arguments: list[str], expected: str) -> None:
    Path("broken").mkdir()
    Path("broken/gallery.json").write_text('{"name": "x"')
    code, out, err = run("search", *arguments)
    assert (code, out) == (2, "")
    assert expected in one_sentence(err)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["two", "photos", "-o", "new"], "'two' is a checkpoint of stage two"),
        (["one", "none", "-o", "new"], "no file at"),
        (["one", "empty", "-o", "new"], "no image below"),
        (["one", "photos", "-o", "photos"], "holds something else than a gallery"),
        (["one", "photos", "-o", "photos/0.png"], "cannot be written"),
        (["other", "photos", "-o", "gallery"], "was embedded by another model ('one')"),
        (["one", "photos", "-o", "gallery", "--features", "int8"], "was made with --features none, not int8"),
        (["one", "photos", "-o", "gallery", "--store", "qdrant://nowhere:1"], "was made with --store lance"),
        (["one", "photos", "-o", "new", "--store", "sqlite"], "unknown store 'sqlite'"),
    ],
)
def test_indexing_that_is_refused(run: Run, indexed: str, arguments: list[str], expected: str) -> None:
    Path("empty").mkdir()
    code, _, err = run("index", *arguments)
    assert code == 2
    assert expected in one_sentence(err)
    assert not list(Path().glob("new/*.json"))
    code, out, _ = run("search", "one", indexed, "cat", "--json", "-k", "6")
    assert (code, len(json.loads(out))) == (0, 6)


def test_only_images_that_cannot_be_read(run: Run) -> None:
    Path("photos").mkdir()
    Path("photos/0.png").write_bytes(b"no picture")
    code, _, err = run("index", "one", "photos", "-o", "gallery")
    assert code == 2
    assert "no image could be indexed; see gallery/skipped.jsonl" in err


def test_a_second_index_at_the_same_time_is_refused(run: Run, indexed: str) -> None:
    with FileLock("gallery/.lock"):
        code, _, err = run("index", "one", "photos", "-o", indexed)
        assert (code, "another process indexes into 'gallery'" in one_sentence(err)) == (2, True)
        assert run("search", "one", indexed, "cat")[0] == 0
    assert run("index", "one", "photos", "-o", indexed)[0] == 0


def test_a_search_during_indexing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path / "photos", 6)
    found, update = [], module.update

    def watched(*given: Any, **named: Any) -> Any:
        tell = given[5]

        def told(tally: Any) -> None:
            hits = module.Retriever("gallery", given[1]).text_to_image("cat")
            found.append((tally.seen, len(hits)))
            tell(tally)

        return update(*given[:5], told, **named)

    monkeypatch.setattr(module, "update", watched)
    assert run("index", "one", "photos", "-o", "gallery", "--batch", "2")[0] == 0
    assert found == [(2, 2), (4, 4), (6, 6)]


@pytest.mark.parametrize("left", [["gallery.json.partial"], [".lock"], [".lock", "gallery.json"]])
def test_a_folder_in_which_a_kill_came_early(run: Run, tmp_path: Path, left: list[str]) -> None:
    """What is there before the first commit does not keep the same command from going on."""
    folder(tmp_path / "photos", 3)
    assert run("index", "one", "photos", "-o", "whole")[0] == 0
    Path("gallery").mkdir()
    for name in left:
        Path("gallery", name).touch()
    if "gallery.json" in left:
        about = json.loads(Path("whole/gallery.json").read_text())
        Path("gallery/gallery.json").write_text(json.dumps(about | {"sources": []}))
    code, out, err = run("index", "one", "photos", "-o", "gallery")
    assert (code, "gallery: 3 images" in out + err) == (0, True)


def test_paths_are_found_from_another_folder(run: Run, indexed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    code, out, err = run("index", "one", "../photos", "-o", "../gallery")
    assert (code, "(0 embedded now, 0 changed, 0 removed" in out + err) == (0, True)
    code, out, _ = run("search", "one", "../gallery", "cat", "--json")
    assert code == 0
    assert all(Path(hit["path"]).is_file() for hit in json.loads(out))
