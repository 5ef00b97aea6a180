"""What is declared, pinned and imported agree, and `.ci/pins.py` makes the pins and the lowest versions of them."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONSTRAINTS = (ROOT / "constraints.txt").read_text()
PINS = dict(line.split("==") for line in CONSTRAINTS.splitlines() if not line.startswith("#"))
#: Names under which packages are imported, where they differ from those of the package.
IMPORTED_AS = {"PIL": "pillow", "open_clip": "open_clip_torch", "pydantic_core": "pydantic", "yaml": "pyyaml"}
#: Imported only where somebody has installed it for that: their harness, a lemmatizer, and others' CLIPs.
OPTIONAL = {"lmms-eval", "open-clip-torch", "spacy"}

spec = importlib.util.spec_from_file_location("pins", ROOT / ".ci" / "pins.py")
assert spec is not None
assert spec.loader is not None
pins = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pins)


def test_what_is_imported_is_declared() -> None:
    declared = {canonicalize_name(made.name) for made in pins.requirements(PROJECT)}
    own = {"qformer", "tests", "benchmarks"}
    found = set()
    for file in (file for package in ("qformer", "stages", "demo") for file in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                found.add(node.module.split(".")[0])
    foreign = found - own - set(sys.stdlib_module_names)
    assert {canonicalize_name(IMPORTED_AS.get(name, name)) for name in foreign} - declared <= OPTIONAL


def test_every_direct_dependency_is_pinned_at_a_version_that_it_allows() -> None:
    for made in pins.requirements(PROJECT):
        assert PINS[canonicalize_name(made.name)] in made.specifier, made


def test_pins_are_for_every_machine() -> None:
    """No local versions, addresses or CUDA libraries: the same line takes the right torch everywhere."""
    assert all(re.fullmatch(r"[a-z0-9-]+", name) and str(Version(pin)) == pin for name, pin in PINS.items())
    assert not [name for name in PINS if pins.FREE.fullmatch(name)]
    assert list(PINS) == sorted(PINS)


def test_floors_that_known_holes_set() -> None:
    """docs/security.md has their numbers."""
    floors = dict(line.split("==") for line in pins.lowest(PROJECT, CONSTRAINTS).splitlines())
    assert Version(floors["gradio"]) >= Version("6.20")
    assert Version(floors["pillow"]) >= Version("12.3")
    (torch,) = (made for made in pins.requirements(PROJECT) if made.name == "torch")
    assert "2.9.9" not in torch.specifier


def test_the_two_commands_of_the_readme_use_the_pins() -> None:
    lines = re.findall(r"^python -m venv .*", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert len(lines) == 2
    assert all(" -c constraints.txt " in line for line in lines)


def test_errors_and_docs_ask_for_the_declared_versions() -> None:
    """Where one says `pip install 'peft>=0.20'`."""
    floors = {str(made).replace(" ", "") for made in pins.requirements(PROJECT)}
    files = [*(ROOT / "qformer").rglob("*.py"), *(ROOT / "docs").glob("*.md")]
    asked = {line for file in files for line in re.findall(r"pip install '([a-z-]+>=[\d.]+)'", file.read_text("utf-8"))}
    assert asked
    assert asked <= floors


def test_what_no_test_needs_is_not_installed_by_ci() -> None:
    """Neither by name nor by the extra that its environment takes; see tests/test_wheels.py for what stands for it."""
    extras = PROJECT["project"]["optional-dependencies"]
    apart = {made.name for made in pins.requirements(PROJECT)} - {
        made.name for made in pins.requirements(PROJECT, pins.APART)
    }
    assert apart == {"gguf", "onnx"}
    assert "real" not in "".join(extras["dev"])


def test_an_old_install_line_goes_on_working() -> None:
    assert PROJECT["project"]["optional-dependencies"]["fast"] == []


PROJECT_OF_TWO = {
    "project": {
        "name": "Own_Name",
        "dependencies": ["torch>=2.10", "Zope.Interface >= 5, < 9"],
        "optional-dependencies": {"more": ["own-name[most]"], "most": ["b[x]>=1.0.2"]},
    }
}


def test_lowest_versions() -> None:
    made = pins.lowest(PROJECT_OF_TWO, "# a comment\na==1\ntorch==2.13.0\n")
    assert made == "b==1.0.2\ntorch==2.13.0\nzope-interface==5\n"


@pytest.mark.parametrize("line", ["b", "b<3", "b>1"])
def test_a_dependency_without_a_floor_is_told(line: str) -> None:
    project = {"project": {"name": "own", "dependencies": [line], "optional-dependencies": {}}}
    with pytest.raises(ValueError, match=r"must name the lowest version that works, as in 'b>=1\.0'"):
        pins.lowest(project, "")


def test_pins_of_what_is_installed() -> None:
    freeze = """\
# Editable install with no version control (own==0.1.0)
-e /home/somebody/own
Zope.Interface==9.1
torch @ file:///wheels/torch-2.13.0%2Bcpu-cp311-cp311-linux_x86_64.whl#sha256=0a
nvidia-cublas==13.0
triton==3.7
a_package==1.0+local
"""
    body = [line for line in pins.pinned(freeze).splitlines() if not line.startswith("#")]
    assert body == ["a-package==1.0", "torch==2.13.0", "zope-interface==9.1"]
    with pytest.raises(ValueError, match="has no version; install it from a package index"):
        pins.pinned("own @ git+https://somewhere/own\n")
