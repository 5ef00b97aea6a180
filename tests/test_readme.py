"""The README and the first pages say what is true: Python runs, commands and configurations are accepted."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import typer.core
import typer.main
from PIL import Image

from qformer import cli, stages
from qformer.checkpoints import folder as checkpoint
from qformer.commands.searching import index
from qformer.config import load_config
from qformer.files.releases import RELEASES, SITE
from tests.workspace import config, make_workspace

if TYPE_CHECKING:
    from collections.abc import Iterable

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FIRST = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "docs/guide.md", "docs/quickstart.md", "docs/measured.md", "docs/checkpoints.md")
}


def blocks(language: str, texts: Iterable[str] = tuple(FIRST.values())) -> list[str]:
    return [block for text in texts for block in re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)]


def test_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_workspace(tmp_path / "space")
    stages.train(config(tmp_path / "space", "stage1", run="runs/quickstart/stage1"))
    stages.train(config(tmp_path / "space", "stage2", run="runs/quickstart/opt", init="runs/quickstart/stage1"))
    index("runs/quickstart/stage1", ["space/images"], Path("gallery"), device="cpu")
    for name in ("photo.jpg", "a.jpg", "b.jpg"):
        Image.new("RGB", (40, 30), "red").save(name)
    names: dict[str, object] = {}
    assert len(blocks("python")) == 3
    for block in blocks("python"):
        exec(block, names)
    assert checkpoint.find("runs/quickstart/opt").name == "step-0000004"


def commands() -> list[list[str]]:
    """The words of every shell line that calls qformer."""
    lines = [line.partition("#")[0] for block in blocks("sh") for line in block.splitlines()]
    return [
        list(words) for words in dict.fromkeys(tuple(shlex.split(line)) for line in lines if line[:8] == "qformer ")
    ]


def test_training_commands_are_accepted() -> None:
    training = [words for words in commands() if words[1] == "train"]
    assert len(training) == 4
    for _, _, path, *overrides in training:
        assert load_config(ROOT / path, overrides).run.startswith("runs/")


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_the_command_line_knows_every_option(words: list[str]) -> None:
    command, rest = typer.main.get_command(cli.app), words[1:]
    assert isinstance(command, typer.core.TyperGroup)
    while isinstance(command, typer.core.TyperGroup) and rest[:1] and rest[0] in command.commands:
        command, rest = command.commands[rest[0]], rest[1:]
    assert command is not typer.main.get_command(cli.app)
    assert command.make_context(words[1], rest, resilient_parsing=False).args == []  # parsed, not run


def test_the_readme_shows_pictures_and_is_short() -> None:
    """That the pictures exist is a test of `tests/test_front_door.py`, as of all links."""
    assert len(re.findall(r"!\[[^\]]*\]\([^)]+\)", README)) >= 2
    assert len(README.splitlines()) <= 120


def test_the_two_commands_are_single_lines_that_install_and_run() -> None:
    lines = [line for block in blocks("sh", [README]) for line in block.splitlines()]
    first, second = (line for line in lines if line.startswith("python -m venv"))
    assert first.endswith("&& .venv/bin/qformer quickstart")
    assert second.endswith("&& .venv/bin/python -m pytest")
    assert first in blocks("sh", [FIRST["docs/quickstart.md"]])[0].splitlines()


def test_official_files_are_listed_with_their_addresses() -> None:
    listed = (ROOT / "docs" / "checkpoints.md").read_text()
    for name, release in RELEASES.items():
        assert f"| `{name}` | [{release.file}]({SITE}{release.file}) | {release.use} |" in listed
