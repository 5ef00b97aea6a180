"""The shape of the code, read from its syntax trees: floors, who may import what, sizes, and the shipped YAML files."""

from __future__ import annotations

import ast
import socket
from pathlib import Path

import pytest

from qformer.config import load_config

ROOT = Path(__file__).parent.parent
PACKAGES = ("qformer", "stages", "demo")
PRODUCT = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
SHIPPED = sorted((ROOT / "configs").rglob("*.yaml"))
FLOORS = (
    (
        "types",
        "brightness",
        "compat",
        "config",
        "devices",
        "lookup",
        "distributed",
        "formats",
        "identity",
        "images",
        "jpeg",
        "orientation",
        "tiff",
        "cleaning",
        "names",
        "packing",
        "pretrained",
        "progress",
        "records",
        "releases",
        "schema",
        "soundness",
        "tensors",
        "trust",
    ),
    ("vision", "resolution", "losses", "checkpoint", "convert"),
    ("model", "data", "mini"),
    ("retrieval",),
    ("evaluation", "harness"),
    ("stages", "demo"),
)
FLOOR = {unit: floor for floor, units in enumerate(FLOORS) for unit in units}
ABOVE = (
    "qformer.cli",
    "qformer.cli_demo",
    "qformer.cli_eval",
    "qformer.cli_gallery",
    "qformer.cli_hub",
    "qformer.cli_language",
    "qformer.cli_options",
    "qformer.__main__",
    "qformer",
)  # they import inside functions only
LAZY = {
    "load": "model",
    "Retriever": "retrieval",
    "QFormer": "model",
    "ImageTextModel": "model",
    "VisionLanguageModel": "model",
}
ONLY_BY = {
    "transformers": {
        "stages/capfilt/models.py",
        "qformer/llm/decoding.py",
        "qformer/checkpoints/convert.py",
        "qformer/model/foreign.py",
        "qformer/llm/base.py",
        "qformer/llm/loading.py",
        "qformer/model/assembly.py",
        "stages/plan/outline.py",
        "qformer/llm/plain_text.py",
        "qformer/llm/quantize.py",
        "qformer/llm/steps.py",
        "qformer/vision/hf.py",
        "stages/towers/build.py",
        "qformer/files/pretrained.py",
    },
    "accelerate": {"qformer/compat.py", "qformer/model/foreign.py", "stages/loop.py"},
    "gradio": {f"demo/{file}.py" for file in ("app", "asking", "endpoints", "looking", "server", "tabs")},
    "bitsandbytes": {"qformer/llm/quantize.py"},
    "lancedb": {"qformer/retrieval/lance.py"},
    "peft": {"qformer/llm/lora.py"},
    "qdrant_client": {"qformer/retrieval/qdrant.py"},
    "lmms_eval": {"qformer/evaluation/harness.py"},
    "pillow_heif": {"qformer/images/__init__.py"},
    "simplejpeg": {"qformer/images/jpeg.py"},
    "lavis": set(),
}


def name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def module(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def unit(imported: str) -> str:
    """The unit of a floor to which a module belongs: `qformer.model.bert` is of `model`, `stages.loop` of `stages`."""
    parts = imported.split(".")
    return parts[1] if parts[0] == "qformer" and len(parts) > 1 else parts[0]


def imports(tree: ast.AST, own: str = "") -> list[str]:
    """Dotted names of everything imported below `tree`, wherever it stands; relative ones made absolute."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*own.split(".")[: -node.level], *filter(None, [base])])
            found += [f"{base}.{alias.name}" for alias in node.names]
    return found


def units(file: Path) -> set[str]:
    """The units of ours that a file imports."""
    ours = [
        imported
        for imported in imports(ast.parse(file.read_text()), module(file))
        if imported.split(".")[0] in PACKAGES
    ]
    found = set()
    for imported in ours:
        first = unit(imported)
        found.add(LAZY.get(first, first))
    return found


def test_every_file_stands_on_a_floor() -> None:
    unplaced = [name(f) for f in PRODUCT if unit(module(f)) not in FLOOR and module(f) not in ABOVE]
    assert not unplaced


def test_nothing_imports_upward_or_sideways() -> None:
    """Files of floor 0 may read one another; on the others a unit reads itself and lower floors."""
    wrong = []
    for file in PRODUCT:
        own = unit(module(file))
        if module(file) in ABOVE:
            continue
        for other in units(file) - {own}:
            assert other in FLOOR, f"{name(file)} imports '{other}', which stands on no floor"
            if not (FLOOR[other] < FLOOR[own] or FLOOR[other] == FLOOR[own] == 0):
                wrong.append(f"{name(file)} (floor {FLOOR[own]}) imports {other} (floor {FLOOR[other]})")
    assert not wrong


@pytest.mark.parametrize(
    "file",
    [*(f"cli{kind}.py" for kind in ("", "_demo", "_eval", "_gallery", "_hub", "_language", "_options")), "__init__.py"],
)
def test_what_stands_above_imports_inside_functions(file: str) -> None:
    outside = [
        node for node in ast.parse((ROOT / "qformer" / file).read_text()).body if not isinstance(node, ast.FunctionDef)
    ]
    tops = [node for node in outside if isinstance(node, ast.Import | ast.ImportFrom)]
    roots = {i.split(".")[0] for node in tops for i in imports(node) if not i.startswith("qformer.cli_")}
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


def test_the_library_never_imports_configs_or_tests() -> None:
    for file in PRODUCT:
        roots = {imported.split(".")[0] for imported in imports(ast.parse(file.read_text()))}
        assert not roots & {"configs", "tests"}, name(file)


def test_files_and_functions_stay_small() -> None:
    lengths = {file: len(file.read_text().splitlines()) for file in PRODUCT}
    assert not [f"{name(file)}: {lines}" for file, lines in lengths.items() if lines > 400]
    assert sum(lengths.values()) < 32000
    long = []
    for file in PRODUCT:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > 60:
                    long.append(f"{name(file)} {node.name}: {lines}")
    assert not long


def test_every_module_says_what_it_is() -> None:
    assert not [
        name(file)
        for file in PRODUCT
        if not ast.get_docstring(ast.parse(file.read_text())) and file.name != "__main__.py"
    ]


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
