"""docs/deploy.md: its commands are commands of ours, and the container asks the page's own health."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import typer.core
import typer.main

from qformer import cli
from qformer.demo import visits
from qformer.files import logs
from tests.demo.conftest import ROOT

PAGE = (ROOT / "docs/deploy.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)[0]


def accept(words: list[str]) -> dict[str, object]:
    group = typer.main.get_command(cli.app)
    assert isinstance(group, typer.core.TyperGroup)
    assert Path(words[0]).name == "qformer"
    return group.commands[words[1]].make_context(words[1], words[2:]).params


def test_the_unit_and_the_container_start_pages() -> None:
    unit = dict(line.split("=", 1) for line in block("ini").splitlines() if "=" in line)
    given = accept(shlex.split(unit["ExecStart"]))
    assert (given["port"], given["auth"], str(given["log"])) == (7860, "ann", "/var/log/qformer/page.log")
    assert unit["RestartPreventExitStatus"] == "2"
    recipe = block("dockerfile")
    entry, command = (json.loads(re.search(rf"^{name} (\[.*\])$", recipe, re.M)[1]) for name in ("ENTRYPOINT", "CMD"))
    given = accept([*entry, *command])
    assert (given["host"], given["port"], given["auth"]) == ("0.0.0.0", 7860, "ann")  # no password in it
    assert "USER 10001" in recipe
    assert "http://127.0.0.1:7860/health" in recipe
    extras = set(re.search(r"/src\[(.*?)\]", recipe)[1].split(","))
    assert extras <= set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.M))


def test_numbers_are_those_of_the_code() -> None:
    assert f"at most five files of {logs.MAX_BYTES / 1e6:.0f} MB" in PAGE
    assert logs.FILES == 5
    assert f"{visits.MAX_STORED / 1e9:.0f} GB at most" in PAGE
