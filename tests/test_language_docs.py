"""docs/language.md says what is true: its commands are accepted, its Python runs, its tables hold what there is."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import typer.core
import typer.main
from PIL import Image

from qformer import cli, stages
from qformer.llm.decoding import GenerateConfig
from qformer.llm.prompts import PRESETS, TASKS
from tests.workspace import config, make_workspace

DOCS = (Path(__file__).parent.parent / "docs" / "language.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCS, flags=re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line.partition(" #")[0] for block in blocks("sh") for line in block.splitlines()]
    return [shlex.split(re.split(" [<>] ", line)[0])[1:] for line in lines if line.startswith("qformer ")]


def command(name: str) -> typer.core.TyperCommand:
    group = typer.main.get_command(cli.app)
    assert isinstance(group, typer.core.TyperGroup)
    found = group.commands[name]
    assert isinstance(found, typer.core.TyperCommand)
    return found


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_the_command_line_knows_every_option(words: list[str]) -> None:
    assert command(words[0]).make_context(words[0], words[1:], resilient_parsing=False).args == []


@pytest.mark.parametrize("name", ["caption", "ask"])
def test_every_option_is_told(name: str) -> None:
    options = [name for p in command(name).params if p.param_type_name == "option" for name in p.opts]
    assert len(options) > 10
    assert not [option for option in options if f"`{option}`" not in DOCS and option != "--help"]


def test_the_table_of_decoding_has_every_option_and_its_default() -> None:
    rows = [line.split(" | ") for line in DOCS.splitlines() if line.startswith("| `")]
    told = {row[0].strip("| `"): row[2] for row in rows if len(row) == 4}
    assert told == {field.name: str(field.default) for field in fields(GenerateConfig)}


def test_the_table_of_prompts_is_the_one_that_is_used() -> None:
    rows = {line.split("`")[1]: line for line in DOCS.splitlines() if line.startswith("| `")}
    for task, wordings in TASKS.items():
        for wording in wordings.values():
            context = f"{wording.context} " if wording.context != "{}" else ""
            assert f"`{context}{wording.template}`" in rows[task]
            assert wording.generate["num_beams"] == 5
            assert f"{wording.generate['max_new_tokens']} tokens" in rows[task].replace("as `vqa`", "10 tokens")
    assert PRESETS["lavis"]["vqa"]["causal"].template in DOCS.partition("The preset `lavis`")[2].splitlines()[0]


@pytest.mark.filterwarnings("ignore:.*were left out")
def test_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_workspace(tmp_path / "space")
    made = config(tmp_path / "space", "stage1", run="runs/quickstart/stage1", train={"steps": 2})
    stages.train(made)
    second = {"run": "runs/quickstart/opt", "init": "runs/quickstart/stage1", "train": {"steps": 2}}
    stages.train(config(tmp_path / "space", "stage2", **second))
    for number, name in enumerate(("photo.jpg", "a.jpg", "b.jpg", "c.jpg")):
        Image.new("RGB", (40, 30), (60 * number, 0, 0)).save(name)
    names: dict[str, object] = {}
    assert len(blocks("python")) == 5
    for block in blocks("python"):
        exec(block, names)
