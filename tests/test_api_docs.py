"""docs/api.md and docs/extending.md: their Python runs, from top to bottom."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

import qformer
from tests.commands import command
from tests.fixtures import reading

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the trained runs, pictures and gallery that the pages speak of."""
    root = reading.copy(tmp_path / "old")
    (tmp_path / "here" / "runs").mkdir(parents=True)
    for run in ("stage1", "stage2"):
        (tmp_path / "here" / "runs" / run).symlink_to(root / run)
    (tmp_path / "here" / "gallery").symlink_to(root / "gallery")
    shutil.copytree(root / "data" / "images", tmp_path / "here" / "photos")
    (tmp_path / "here" / "captions.jsonl").write_text('{"image": "photos/0.png", "caption": "a photo of a cat"}\n')
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def test_the_examples_of_the_python_names_run(workplace: Path) -> None:
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    examples = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(examples) == 7
    for example in examples:
        exec(compile(example, "docs/api.md", "exec"), names)
    assert len(names["captions"]) == len(names["answers"]) == 2
    assert [len(row) for row in names["several"]] == [2]


def examples(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture
def additions(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modules of docs/extending.md, written as files that can be imported; their names."""
    monkeypatch.syspath_prepend(str(workplace))
    names = []
    for example in examples("extending.md", "python"):
        name, _, code = example.partition("\n")
        (workplace / name.removeprefix("# ")).write_text(code, encoding="utf-8")
        names.append(name.removeprefix("# ").removesuffix(".py"))
    return names


def test_an_addition_is_short() -> None:
    for example in examples("extending.md", "python"):
        assert len([line for line in example.splitlines()[1:] if line.strip()]) <= 15, example


def write_run(workplace: Path, stage: str, **changes: Any) -> None:
    """Write own.yaml: a stage of the old files with every section of docs/extending.md that this stage has."""
    run = yaml.safe_load((workplace.parent / "old" / f"{stage}.yaml").read_text())
    for text in examples("extending.md", "yaml"):
        section = yaml.safe_load(text)
        if "llm" not in section and not (stage == "stage1" and "connector" in section):
            run |= section
    run["data"]["batch"] = 3
    (workplace / "own.yaml").write_text(yaml.safe_dump(run | {"train": {"steps": 2, "warmup": 0}} | changes))


def test_additions_train(additions: list[str], workplace: Path) -> None:
    """An encoder, a strategy and a source of one's own, named `module:Class`, in stage one."""
    assert additions == ["gray", "halves", "linear", "squares", "brevity"]
    write_run(workplace, "stage1", run="runs/own")
    command("train", "own.yaml")
    model = qformer.load("runs/own", device="cpu", trust=True)
    assert isinstance(model, qformer.ImageTextModel)
    tiles = model.frontend.tiles(["photos/0.png"])
    assert tiles.counts == [2]
    embeds, _ = model.embed_images(tiles)
    assert embeds.shape[1] == 2 * model.qformer.config.queries


def test_a_connector_and_a_benchmark_of_ones_own(additions: list[str], workplace: Path) -> None:
    write_run(workplace, "stage2", run="runs/own", init=None)
    command("train", "own.yaml")
    model = qformer.load("runs/own", device="cpu", trust=True)
    assert isinstance(model, qformer.VisionLanguageModel)
    tiles = model.frontend.tiles(["photos/0.png"])
    assert model.prefix(tiles)[0].shape[1] == model.count_tokens(tiles.plans[0]) == 2 * 4 * 4  # patches of two tiles
    (measure,) = examples("extending.md", "sh")
    assert "short" in command(*measure.split()[1:], "--trust")
