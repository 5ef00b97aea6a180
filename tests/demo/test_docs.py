"""docs/demo.md and docs/look.md: Python that runs as it stands, commands that are accepted, numbers of the code."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.core
import typer.main
from PIL import Image

from qformer import cli
from qformer.cli import page as page_command
from qformer.demo import app, backend, guard, limits, password, server, shown, visits
from qformer.demo.backend import Models
from qformer.videos import STRANGERS
from tests.demo.conftest import ROOT

PAGE = (ROOT / "docs/demo.md").read_text(encoding="utf-8")
LOOK = (ROOT / "docs/look.md").read_text(encoding="utf-8")


def blocks(text: str, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.fixture
def place(models: Models, trained: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the names of the documents stand for what the tests have."""
    assert models.retriever is not None
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/quickstart").symlink_to(trained.parent)
    (tmp_path / "gallery").symlink_to(Path(str(models.retriever.gallery.folder)))
    for name in ("picture.png", "photo.jpg"):
        Image.open(picture).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_python_of_the_page(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    exec(blocks(PAGE)[0], names)
    assert "Context: the square is red. Question: what color is the square? Answer:" in capsys.readouterr().out
    assert names["reranked"]
    assert {file.name for file in place.glob("*.png")} >= {"queries.png", "relevance.png"}


def test_python_of_its_clients(place: Path, no_network: None, models: Models) -> None:
    gate = server.Gate()
    with server.workplace() as folder:
        page = app.build(models, gate, [])
        _, url, _ = server.launch(page, folder=folder, gate=gate, block=False)
        (code,) = blocks(PAGE)[1:]
        assert '"http://127.0.0.1:7860"' in code
        exec(code.replace("http://127.0.0.1:7860", url), {})
        info = page.get_api_info()["named_endpoints"]
        server.close(page, gate)
    listed = dict(re.findall(r"^\| `(/\w+)` \| ([^|]+) \|", PAGE.partition("as an API")[2], flags=re.MULTILINE))
    assert set(listed) == set(info)
    for name, takes in listed.items():
        parameters = [one["parameter_name"] for one in info[name]["parameters"]]
        assert re.sub(r" \(.*?\)", "", takes).split(", ") == parameters


def test_python_of_look(place: Path) -> None:
    for block in blocks(LOOK):
        exec(block, {})
    assert (place / "fixed.png").is_file()


@pytest.mark.parametrize("line", [line for block in blocks(PAGE, "sh") for line in block.splitlines()])
def test_commands_are_accepted(line: str) -> None:
    group = typer.main.get_command(cli.app)
    assert isinstance(group, typer.core.TyperGroup)
    words = shlex.split(line.partition("#")[0])
    if words[0] == "export":
        assert words[1].startswith(f"{page_command.PASSWORD}=")
        return
    _, command, *words = words
    assert group.commands[command].make_context(command, words)


def test_limits_are_those_of_the_code() -> None:
    for said in (
        f"{server.Gate().timeout:.0f} seconds in the model",
        f"{limits.MAX_BYTES / 1e6:.0f} MB, {limits.MAX_PIXELS / 1e6:.0f} million pixels",
        f"a question {limits.MAX_QUESTION:,} characters, a context {limits.MAX_CONTEXT:,}",
        f"{visits.MAX_STORED / 1e9:.0f} GB at once",
        f"{STRANGERS.seconds} seconds, {STRANGERS.frames:,} frames, {STRANGERS.pixels / 1e6:.0f} million pixels in a "
        f"frame, {STRANGERS.in_all / 1e6:,.0f} million in all frames and {STRANGERS.kept / 1e6:.0f} million in those",
        f"{guard.MAX_UPLOAD / 1e6:.0f} MB in one go, {limits.MAX_BYTES / 1e6:.0f} MB a file",
        f"| a question | {shown.MOST_SHOWN} pictures and clips",
        f"a client has {password.EACH[0]} tries, then one in {password.EACH[1]:.0f} seconds",
        f"all together {password.ALL[0]}, then one in {password.ALL[1]:.0f} seconds",
    ):
        assert said in PAGE
    assert (visits.KEEP_FILES, visits.KEEP_SESSION) == (3600, 600)
    assert set(backend.LIMITS) <= set(re.findall(r"`(\w+)`", PAGE))
