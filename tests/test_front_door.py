"""What meets a newcomer: links lead somewhere, named files exist, the citation and llms.txt have their form."""

from __future__ import annotations

import ast
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "llms.txt", *(ROOT / "docs").glob("*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")
#: `qformer/types.py`, `stages/plan`, and names of files alone after one with a folder: `docs/x.md` is a link's job.
NAMED = re.compile(r"`((?:qformer|stages|demo|configs|tests|benchmarks|\.ci)/[\w./-]*)`")
LLMS_LINE = re.compile(r"- \[[^\]]+\]\(([^)]+)\): \S.*")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(path: Path) -> str:
    """The text without its blocks of code."""
    return re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)


@cache
def anchors(path: Path) -> set[str]:
    """The anchors that GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", prose(path), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in LINK.findall(prose(page)):
        file, _, anchor = link.partition("#")
        if "://" in file:
            continue
        target = (page.parent / file).resolve() if file else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_are_named_exist(page: Path) -> None:
    assert not [path for path in set(NAMED.findall(prose(page))) if not (ROOT / path).exists()]


def test_functions_that_the_architecture_names_exist() -> None:
    """A function, class, method, argument or key of the product is called that, whatever stands before its last dot."""
    known: set[str] = set()
    for file in (file for package in ("qformer", "stages", "demo") for file in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                known.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                known.add(node.id)
            elif isinstance(node, ast.arg):
                known.add(node.arg)
    text = prose(ROOT / "docs" / "architecture.md").partition("## The path of a batch")[2]
    named = {word for word in re.findall(r"`([A-Za-z_][\w.]*)`", text) if not (ROOT / word).exists()}
    assert len(named) > 40
    assert not {word for word in named if word.split(".")[-1] not in known}


def test_every_page_is_listed() -> None:
    pages = {name(page) for page in (ROOT / "docs").glob("*.md")} - {"docs/index.md"}
    assert {f"docs/{link}" for link in LINK.findall((ROOT / "docs" / "index.md").read_text())} >= pages
    assert set(LINK.findall((ROOT / "llms.txt").read_text())) >= pages


def test_llms_txt_has_the_form_of_llmstxt_org() -> None:
    """A title, a summary in a quote, then sections of nothing but links with a phrase each."""
    text = (ROOT / "llms.txt").read_text(encoding="utf-8")
    head, *sections = text.split("\n## ")
    title, summary = head.strip().splitlines()[0], head.strip().splitlines()[2]
    assert title == "# qformer"
    assert summary.startswith("> ")
    assert "#" not in head.strip()[2:]
    assert len(sections) >= 3
    for section in sections:
        _, *lines = section.strip().splitlines()
        assert lines[1:]
        assert not [line for line in lines[1:] if not LLMS_LINE.fullmatch(line)]


def test_the_citation_is_valid() -> None:
    """The required keys of CFF 1.2.0, and the version of the package."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= cited.keys()
    assert all(author.keys() in ({"name"}, {"family-names", "given-names"}) for author in cited["authors"])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert cited["version"] == project["version"]
    assert cited["license"] == project["license"]
    (paper,) = cited["references"]
    assert {"type", "title", "authors", "year"} <= paper.keys()
    assert paper["title"].startswith("BLIP-2: Bootstrapping Language-Image Pre-training")


def test_what_the_rules_say_is_what_the_tests_hold() -> None:
    """CONTRIBUTING.md has the numbers of `tests/test_architecture.py`."""
    rules = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    held = (ROOT / "tests" / "test_architecture.py").read_text(encoding="utf-8")
    (file,) = re.findall(r"if lines > (\d+)\]", held)
    (function,) = re.findall(r"if lines > (\d+):", held)
    assert f"at most {file} lines" in rules
    assert f"at most {function} lines" in rules
