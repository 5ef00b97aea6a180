"""The shape of the code, read from its syntax trees: floors, who may import what, sizes, and the shipped YAML files."""

from __future__ import annotations

import ast
import socket
from collections import Counter
from pathlib import Path

import pytest

from qformer.config import load_config
from tests.architecture import (
    FLOOR,
    PACKAGES,
    PRODUCT,
    ROOT,
    circles,
    folders,
    graph,
    imports,
    module,
    name,
    unit,
    upward,
)

OPENINGS = {"Of", "By", "Whether", "That", "How", "What", "In", "Where"}
SHIPPED = sorted((ROOT / "configs").rglob("*.yaml"))
LARGER = {"qformer/data": 4400, "qformer/evaluation": 3400, "demo": 4100}
ONLY_BY = {
    "transformers": {
        "qformer/answering/models.py",
        "qformer/checkpoints/hugging_face.py",
        "qformer/checkpoints/internvl.py",
        "qformer/checkpoints/onevision.py",
        "qformer/checkpoints/ours.py",
        "qformer/checkpoints/parts.py",
        "qformer/checkpoints/qwen2vl.py",
        "qformer/checkpoints/systems.py",
        "qformer/checkpoints/whole.py",
        "qformer/files/pretrained.py",
        "qformer/llm/base.py",
        "qformer/llm/decoding.py",
        "qformer/llm/loading.py",
        "qformer/llm/plain_text.py",
        "qformer/llm/quantize.py",
        "qformer/llm/steps.py",
        "qformer/llm/tokenization.py",
        "qformer/model/bert.py",
        "qformer/retrieval/embedders.py",
        "qformer/vision/hf.py",
        "stages/capfilt/models.py",
        "stages/plan/outline.py",
        "stages/towers/build.py",
        "stages/towers/encoders.py",
        "stages/towers/global_clip.py",
        "stages/towers/masked.py",
        "stages/towers/matching.py",
        "qformer/wheels/check.py",
        "qformer/wheels/convert.py",
    },
    "accelerate": {
        "qformer/compat.py",
        "qformer/llm/loading.py",
        "qformer/vision/hf.py",
        "stages/loop.py",
        "stages/run.py",
    },
    "av": {"qformer/videos/__init__.py"},
    "gradio": {f"demo/{file}.py" for file in ("app", "asking", "endpoints", "looking", "searching", "server", "tabs")},
    "bitsandbytes": {"qformer/llm/quantize.py"},
    "lancedb": {"qformer/retrieval/lance.py"},
    "peft": {"qformer/llm/lora.py"},
    "qdrant_client": {"qformer/retrieval/qdrant.py"},
    "open_clip": {"qformer/retrieval/embedders.py"},
    "lmms_eval": {"qformer/evaluation/harness.py"},
    "gguf": set(),  # transformers imports it
    "onnx": {"qformer/wheels/convert.py"},
    "pillow_heif": {"qformer/images/__init__.py"},
    "simplejpeg": {"qformer/images/jpeg.py"},
    "lavis": set(),
}


def test_every_file_stands_on_a_floor() -> None:
    assert not [name(file) for file in PRODUCT if unit(module(file)) not in FLOOR]


def test_nothing_imports_upward() -> None:
    """Also inside functions and for annotations; `config` and what it is made of may read one another."""
    assert not upward(graph())


@pytest.mark.parametrize("by", ["file", "folder"])
def test_nothing_imports_in_a_circle(by: str) -> None:
    edges = graph()
    assert not circles(edges if by == "file" else folders(edges))


def test_circles_and_upward_imports_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    by_file: dict[str, set[str]] = {
        "qformer.data.x": {"qformer.llm.y"},
        "qformer.llm.z": {"qformer.data.x"},
        "qformer.llm.y": set(),
        "qformer.stages.plan.a": {"qformer.stages.loop"},
    }
    assert folders(by_file) == {
        "qformer.data": {"qformer.llm"},
        "qformer.llm": {"qformer.data"},
        "qformer.stages.plan": {"qformer.stages.loop"},
    }
    assert (
        len(upward({"qformer.vision.eva": {"qformer.model.bert"}, "qformer.stages.loop": {"qformer.model.bert"}})) == 1
    )
    assert imports(ast.parse("def f():\n    from qformer.stages.loop import fit"), "qformer.data") == [
        "qformer.stages.loop.fit"
    ]
    assert "qformer.checkpoints.loading" in graph()["qformer.stages.quickstart.run"], "`from qformer import load`"


@pytest.mark.parametrize("file", [*sorted((ROOT / "qformer/cli").glob("*.py")), ROOT / "qformer/__init__.py"], ids=name)
def test_the_command_line_imports_inside_functions(file: Path) -> None:
    outside = [node for node in ast.parse(file.read_text()).body if not isinstance(node, ast.FunctionDef)]
    tops = [node for node in outside if isinstance(node, ast.Import | ast.ImportFrom)]
    roots = {i.split(".")[0] for node in tops for i in imports(node) if not i.startswith("qformer.cli.")}
    assert not roots & {*PACKAGES, "torch", "transformers", "numpy", "yaml", "pydantic", "PIL"}


@pytest.mark.parametrize("package", ONLY_BY)
def test_third_parties_stay_where_they_belong(package: str) -> None:
    users = {name(f) for f in PRODUCT if any(i.split(".")[0] == package for i in imports(ast.parse(f.read_text())))}
    assert users <= ONLY_BY[package]


def test_pillow_opens_files_in_one_place() -> None:
    """Where its formats are those that are meant: `qformer.images`."""
    opening = [name(file) for file in PRODUCT for node in ast.walk(ast.parse(file.read_text())) if _opens(node)]
    assert opening == ["qformer/images/__init__.py"]


def _opens(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Attribute)
        and node.attr == "open"
        and isinstance(node.value, ast.Name)
        and node.value.id == "Image"
    )


def test_nothing_imports_configs_or_tests() -> None:
    """Shipped configurations are read as resources, by name."""
    for file in PRODUCT:
        found = {".".join(imported.split(".")[:2]) for imported in imports(ast.parse(file.read_text()))}
        assert not {i for i in found if i == "qformer.configs" or i.split(".")[0] == "tests"}, name(file)


def test_files_and_functions_stay_small() -> None:
    lengths = {file: len(file.read_text().splitlines()) for file in PRODUCT}
    assert not [f"{name(file)}: {lines}" for file, lines in lengths.items() if lines > 400]
    long = []
    for file in PRODUCT:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > 60:
                    long.append(f"{name(file)} {node.name}: {lines}")
    assert not long


def test_folders_stay_small() -> None:
    """A folder can be read in a day; two are larger than that, and must not grow."""
    lines: Counter[str] = Counter()
    for file in PRODUCT:
        parts = file.relative_to(ROOT).parts
        lines["/".join(parts[:2]) if len(parts) > 2 else parts[0]] += len(file.read_text().splitlines())
    assert not {folder: count for folder, count in lines.items() if count > LARGER.get(folder, 2800)}


def test_every_module_says_what_it_is() -> None:
    assert not [
        name(file)
        for file in PRODUCT
        if not ast.get_docstring(ast.parse(file.read_text())) and file.name != "__main__.py"
    ]


def test_docstrings_begin_with_a_noun_or_a_verb() -> None:
    """A docstring that begins with one of `OPENINGS` hides what the function does or returns."""
    found = []
    for file in PRODUCT:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                if text.partition(" ")[0] in OPENINGS:
                    found.append(f"{name(file)}: {text.partition(chr(10))[0]}")
    assert not found


def test_configs_are_shipped() -> None:
    assert SHIPPED


@pytest.mark.parametrize("path", SHIPPED, ids=name)
def test_a_shipped_config_opens_with_its_command_and_is_valid(path: Path) -> None:
    comments = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        comments.append(line)
    commands = [line.lstrip("# ") for line in comments if f"qformer train {name(path)}" in line]
    assert commands, f"{path.name} does not open with the command that runs it"
    overrides = commands[0].split(path.name)[1].split()
    load_config(path)
    config = load_config(path, overrides)  # as the comment says to run it
    for override in overrides:
        key, _, value = override.partition("=")
        assert f"{value}" in str(config.model_dump()), f"{key} of the command is not taken"


def test_no_test_reaches_the_network() -> None:
    with pytest.raises(RuntimeError, match="network"), socket.socket() as opened:
        opened.connect(("127.0.0.1", 9))
    with pytest.raises(RuntimeError, match="network"):
        socket.create_connection(("huggingface.co", 443))
