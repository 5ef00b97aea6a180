"""One name in site-packages: stages/, demo/ and configs/ stand beside qformer/ and are packages of it everywhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("configs", "demo", "stages")
SETUP = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]

# As `python -m qformer` in a user's folder, which is the first to be searched; of all packages that are installed for
# development only the one under test is seen (`-S`).
PROGRAM = """
import runpy, site, sys
sys.path.insert(0, sys.argv[1])
site.addsitedir(sys.argv.pop(1))
sys.path.insert(0, "")
try:
    runpy.run_module("qformer", run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert not end.code, end.code
import qformer.demo, qformer.stages
for module in (qformer, qformer.demo, qformer.stages, sys.modules["qformer.configs"]):
    print(module.__path__[0])
from qformer.stages import checking
assert not {name.split(".")[0] for name in sys.modules} & {"configs", "demo", "stages"}
"""


def run_beside_strangers(site: Path, here: Path) -> list[Path]:
    """Run `qformer config` from `here`, where other packages have the names of our folders.

    Returns where `qformer`, its demo, stages and configs were found.
    """
    for name in FOLDERS:
        (here / name).mkdir(parents=True)
        (here / name / "__init__.py").write_text("raise RuntimeError('a package of the user')")
    paths = sysconfig.get_paths()
    ended = subprocess.run(
        [sys.executable, "-S", "-c", PROGRAM, str(site), "config", "quickstart/stage1.yaml"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join({paths["purelib"], paths["platlib"]})},
        cwd=here,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "stage: stage1\n" in ended.stdout
    return [Path(line).resolve() for line in ended.stdout.splitlines()[-4:]]


def packages(folder: str) -> list[str]:
    return [".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / folder).rglob("__init__.py")]


def test_every_package_is_in_the_wheel() -> None:
    beside = [f"qformer.{package}" for folder in FOLDERS for package in packages(folder)]
    assert sorted(SETUP["packages"]) == SETUP["packages"] == sorted([*packages("qformer"), *beside])
    assert SETUP["package-dir"] == {f"qformer.{folder}": folder for folder in FOLDERS}


def test_the_type_checker_sees_the_same_folders() -> None:
    links = list((ROOT / ".ci/types/qformer").iterdir())
    assert {link.name: link.resolve() for link in links} == {folder: ROOT.resolve() / folder for folder in FOLDERS}


def test_the_tree_runs_without_installation(tmp_path: Path) -> None:
    found = run_beside_strangers(ROOT, tmp_path)
    assert found == [ROOT.resolve() / part for part in ("qformer", "demo", "stages", "configs")]


@pytest.mark.slow
def test_a_wheel_and_an_editable_installation_run(tmp_path: Path) -> None:
    tree, built = tmp_path / "tree", tmp_path / "built"
    for name in ("pyproject.toml", "README.md", "LICENSE", "qformer", "tests", *FOLDERS):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        tree.mkdir(exist_ok=True)
        copy(ROOT / name, tree / name)
    for kind in ("wheel", "editable"):
        command = f"from setuptools import build_meta; build_meta.build_{kind}({str(built / kind)!r})"
        ended = subprocess.run([sys.executable, "-c", command], cwd=tree, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        (wheel,) = (built / kind).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(tmp_path / kind)

    installed = {file.relative_to(tmp_path / "wheel").as_posix() for file in (tmp_path / "wheel").rglob("*")}
    assert {name.split("/")[0] for name in installed} == {"qformer", "qformer_bridge-0.1.0.dist-info"}
    for folder in ("qformer", *FOLDERS):
        inside = "qformer/" if folder in FOLDERS else ""
        wanted = {
            f"{inside}{file.relative_to(tree)}" for file in (tree / folder).rglob("*") if "__pycache__" not in str(file)
        }
        assert wanted <= installed

    parts = ("", "demo", "stages", "configs")
    package = (tmp_path / "wheel/qformer").resolve()
    assert run_beside_strangers(tmp_path / "wheel", tmp_path / "user") == [package / part for part in parts]
    found = run_beside_strangers(tmp_path / "editable", tmp_path / "developer")
    assert found == [tree.resolve() / part for part in ("qformer", "demo", "stages", "configs")]


def test_nothing_names_a_module_by_its_folder_alone() -> None:
    """Neither imports, nor tables, nor what tests replace, nor what documents say."""
    imported = re.compile(
        r"^\s*(?:from (?:configs|demo|stages)(?:\.[\w.]+)? import|import (?:configs|demo|stages)[\w.]*$)", re.M
    )
    dotted = re.compile(r"(?<![\w./@-])(?:configs|demo|stages)\.\w+(?![\w/-])")
    wrong = []
    for file in (file for kind in ("*.py", "*.md", "*.yaml") for file in ROOT.rglob(kind)):
        if not {"qformer", "tests", "benchmarks", "docs", *FOLDERS} & {file.relative_to(ROOT).parts[0]}:
            continue
        text = file.read_text(encoding="utf-8")
        parts = [ROOT.joinpath(*name.split(".")) for name in dotted.findall(text)]
        wrong += [f"{file}: {found}" for found in imported.findall(text)]
        wrong += [f"{file}: {part}" for part in parts if part.is_dir() or part.with_suffix(".py").is_file()]
    assert not wrong
