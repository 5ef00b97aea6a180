"""docs/retrieval.md says what is true: its commands are accepted, its Python runs (Ray by a stand-in)."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import typer.core
import typer.main
from PIL import Image
from qdrant_client import QdrantClient

import qformer
from qformer import cli, stages
from qformer.commands.searching import index
from qformer.retrieval import qdrant
from qformer.retrieval.entries import COLUMNS, OPERATORS
from qformer.retrieval.gallery import Gallery
from qformer.retrieval.search import Retriever
from tests.workspace import config, make_workspace

DOCS = (Path(__file__).parent.parent.parent / "docs" / "retrieval.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCS, flags=re.DOTALL)


def commands() -> list[list[str]]:
    """The words of the commands about a gallery, whoever starts them."""
    lines = [line.partition(" #")[0] for block in blocks("sh") for line in block.replace("\\\n", "").splitlines()]
    words = [shlex.split(line.partition(" > ")[0]) for line in lines if "qformer" in line]
    ours = [line[line.index("qformer") + 1 :] for line in words]
    return [line for line in ours if line[0] in ("index", "search")]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_the_command_line_knows_every_option(words: list[str]) -> None:
    group = typer.main.get_command(cli.app)
    assert isinstance(group, typer.core.TyperGroup)
    assert group.commands[words[0]].make_context(words[0], words[1:], resilient_parsing=False).args == []


@pytest.mark.parametrize("command", ["index", "search"])
def test_every_option_is_told(command: str) -> None:
    group = typer.main.get_command(cli.app)
    assert isinstance(group, typer.core.TyperGroup)
    options = [name for p in group.commands[command].params if p.param_type_name == "option" for name in p.opts]
    assert len(options) > 5
    assert not [name for name in options if f"`{name}`" not in DOCS and name not in ("--k", "--help")]
    assert all(f"`{name}`" in DOCS for name in (*COLUMNS, "~", "!="))
    assert len(OPERATORS) == 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    root = make_workspace(folder / "space")
    stages.train(config(root, "stage1", run=str(folder / "runs" / "stage1"), train={"steps": 2}))
    (folder / "photos" / "more").mkdir(parents=True)
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 255, (1030, 1040, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((1040 - number, 40)).save(folder / "photos" / f"{number}.jpg")
    (folder / "photos" / "more" / "copy.jpg").write_bytes((folder / "photos" / "3.jpg").read_bytes())
    (folder / "photos" / "0.txt").write_text("a man on a red bicycle\n")
    for name in ("3a.jpg", "3b.jpg"):
        (folder / "photos" / name).write_bytes(b"no image")
    (folder / "bicycle.jpg").write_bytes((folder / "photos" / "1.jpg").read_bytes())
    return folder


class Rows:
    """As much of a dataset of Ray's as the example calls: rows in batches of columns, through one actor."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def batches(self, size: int) -> list[dict[str, np.ndarray]]:
        parts = [self.rows[start : start + size] for start in range(0, len(self.rows), size)]
        return [{key: np.array([row[key] for row in part], object) for key in part[0]} for part in parts]

    def map_batches(self, actor: type, *, batch_size: int, num_gpus: float, concurrency: int) -> Rows:
        made, rows = actor(), []
        for batch in self.batches(2):  # the third of which has nothing that can be read
            columns = made(batch)
            assert len({len(column) for column in columns.values()}) == 1
            rows += [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return Rows(rows)

    def iter_batches(self, *, batch_size: int) -> list[dict[str, np.ndarray]]:
        return self.batches(3)


def test_python_runs(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Embedding over Ray, then the gallery's own update, then the searches."""
    monkeypatch.chdir(folder)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(data=SimpleNamespace(from_items=Rows)))
    (ray,) = (block for block in blocks("python") if "import ray" in block)
    exec(ray, {})
    before = list(Gallery.open("gallery").store.known())
    assert len(before) == 5
    assert {len(known.places) for known in before} == {1}
    index("runs/stage1", ["photos"], Path("gallery"), device="cpu")
    told = " ".join(capsys.readouterr().out.split())
    assert "5 images (0 embedded now, 2 changed, 0 removed; 1 further files are copies of these)" in told
    gallery = Gallery.open("gallery")
    assert len(gallery.about["sources"]) == 1
    fresh = Path("fresh")
    index("runs/stage1", ["photos"], fresh, device="cpu")
    direct = Gallery.open(fresh).store
    for one in direct.known():
        mine, theirs = gallery.store.get([one.id])[one.id], direct.get([one.id])[one.id]
        assert np.abs(mine.embeds.astype(float) - theirs.embeds).max() < 2e-3
        assert sorted(mine.places) == sorted(theirs.places)
        assert (mine.bytes, mine.width, mine.height) == (theirs.bytes, theirs.width, theirs.height)
        assert mine.captions == theirs.captions
    (python,) = (block for block in blocks("python") if "Retriever(" in block)
    names: dict[str, Any] = {}
    exec(python, names)
    assert names["hit"].width >= 1024
    assert names["retriever"].unread == []


@pytest.mark.filterwarnings("ignore:Payload indexes have no effect", "ignore:Local mode performs exact")
def test_a_gallery_on_qdrant_is_updated_and_searched_like_one_in_a_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    client = QdrantClient(":memory:")
    monkeypatch.setattr(qdrant, "connect", lambda _: client)
    model = qformer.load("runs/stage1", "cpu")
    for _ in range(2):
        found = []
        for name, store in (("in-folder", None), ("on-server", "qdrant://localhost:6333")):
            index("runs/stage1", ["photos"], Path(name), store=store, batch=2, device="cpu")
            retriever = Retriever(name, model, trust=store is not None)
            hits = retriever.text_to_image("a cat", k=3, shortlist=4, where=["path~PHOTOS/"])
            hits += retriever.search("a dog", "bicycle.jpg") + retriever.image_to_text("bicycle.jpg")
            found.append(hits)
        assert [hit.id for hit in found[0]] == [hit.id for hit in found[1]]
        assert [hit.score for hit in found[0]] == pytest.approx([hit.score for hit in found[1]], abs=1e-4)
        moved = Path("photos") / "1.jpg"
        if moved.exists():
            moved.rename(moved.with_name("moved.jpg"))
            Path("photos/4.jpg").unlink()
    told = " ".join(capsys.readouterr().out.split())
    assert told.count("(0 embedded now, 1 changed, 1 removed; 1 further files are copies of these)") == 2
    assert sorted(file.name for file in Path("on-server").iterdir()) == [".lock", "gallery.json", "skipped.jsonl"]
