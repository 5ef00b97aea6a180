"""docs/ecosystem.md and docs/quantization.md: commands are accepted, Python parses, links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.core
import typer.main

from qformer import cli
from qformer.config import load_config

DOCS = Path(__file__).parent.parent / "docs"
TEXT = {name: (DOCS / f"{name}.md").read_text(encoding="utf-8") for name in ("ecosystem", "quantization")}


def blocks(language: str) -> list[str]:
    return [block for text in TEXT.values() for block in re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)]


def commands() -> list[list[str]]:
    lines = [line.partition("#")[0] for block in blocks("sh") for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("qformer ")]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_the_command_line_knows_every_option(words: list[str]) -> None:
    group = typer.main.get_command(cli.app)
    assert isinstance(group, typer.core.TyperGroup)
    assert group.commands[words[1]].make_context(words[1], words[2:]).args == []  # parsed, not run
    if words[1] == "train":
        load_config(DOCS.parent / words[2], words[3:])


def test_python_parses() -> None:
    assert len(blocks("python")) == 3
    for block in blocks("python"):
        compile(block, "docs", "exec")


def test_links_lead_somewhere() -> None:
    for text in TEXT.values():
        for file in re.findall(r"\]\(([\w./]+\.md)(?:#[\w-]+)?\)", text):
            assert (DOCS / file).is_file(), file
        for file in re.findall(r"`((?:tests|qformer|benchmarks)/[\w/.]+\.py)`", text):
            assert (DOCS.parent / file).is_file(), file
