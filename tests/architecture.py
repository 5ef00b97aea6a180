"""The import graph of the product, read from syntax trees: `python -m tests.architecture` prints it.

Every import counts, wherever it stands: at the top of a file, inside a function, or for annotations only. A folder of
`qformer`, and each single file beside the folders, is a unit; units stand on floors and read only those below.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path

import qformer

ROOT = Path(__file__).parent.parent
PACKAGES = ("qformer", "stages", "demo")
PRODUCT = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
CONFIG = ("fields", "template", "data_schema", "language_schema", "schema", "config")
FLOORS = (
    ("formats", "identity", "memory", "ragged", "types", "trust", "lookup", *CONFIG),
    ("compat", "devices", "distributed", "files", "images", "progress"),
    ("alignment", "losses", "metrics", "resolution", "vision", "wheels"),
    ("videos",),
    ("data", "llm", "scenes"),
    ("canvases", "connectors"),
    ("mmvp", "model", "mosaics", "probing"),
    ("checkpoints",),
    ("figures", "retrieval"),
    ("answering",),
    ("evaluation",),
    ("suites",),
    ("commands", "stages", "demo"),
    ("cli",),
    ("__main__", "qformer"),
)
FLOOR = {unit: floor for floor, units in enumerate(FLOORS) for unit in units}
GROUND = 0  # whose units read one another


def name(file: Path) -> str:
    """Path from the root of the project."""
    return file.relative_to(ROOT).as_posix()


def module(file: Path) -> str:
    """Dotted name of the module in a file; `stages/` and `demo/` are packages of `qformer`."""
    dotted = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return dotted if dotted.split(".")[0] == "qformer" else f"qformer.{dotted}"


def unit(imported: str) -> str:
    """Unit of a floor to which a module belongs: `qformer.model.bert` is of `model`, `qformer.cli` of `cli`."""
    return imported.split(".")[1] if "." in imported else imported


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


def graph() -> dict[str, set[str]]:
    """Modules of the product, and which others of them each imports."""
    modules = {module(file): file for file in PRODUCT}
    edges: dict[str, set[str]] = {}
    for own, file in modules.items():
        edges[own] = set()
        for imported in imports(ast.parse(file.read_text(encoding="utf-8")), own):
            package, _, last = imported.rpartition(".")
            if package == "qformer" and last in qformer._PUBLIC:  # public names that are fetched on first use
                imported = qformer._PUBLIC[last]
            while imported and imported not in modules:
                imported = imported.rpartition(".")[0]
            if imported and imported != own:
                edges[own].add(imported)
    return edges


def folders(edges: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The graph by folder: one of `qformer` or of its `stages`, or a file that stands beside such folders."""
    found: dict[str, set[str]] = {}
    for own, others in edges.items():
        mine = _folder(own)
        found.setdefault(mine, set()).update(set(map(_folder, others)) - {mine})
    return found


def _folder(dotted: str) -> str:
    parts = dotted.split(".")
    return ".".join(parts[: 3 if parts[1:2] == ["stages"] else 2])


def circles(edges: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Groups of modules that import one another, directly or by way of others (Tarjan 1972)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for other in edges.get(node, ()):
            if other not in order:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], order[other])
        if low[node] == order[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in edges:
        if node not in order:
            visit(node)
    return found


def upward(edges: Mapping[str, Iterable[str]]) -> list[str]:
    """Imports of units that do not stand lower; on the ground, units may read one another."""
    wrong = []
    for own, others in edges.items():
        for other in others:
            mine, theirs = unit(own), unit(other)
            if mine != theirs and not (FLOOR[theirs] < FLOOR[mine] or FLOOR[mine] == FLOOR[theirs] == GROUND):
                wrong.append(f"{own} (floor {FLOOR[mine]}) imports {other} (floor {FLOOR[theirs]})")
    return wrong


def main() -> None:
    """Print floors from the top down, the units of each with those that they read, and lines of code."""
    edges = graph()
    lines = {module(file): len(file.read_text(encoding="utf-8").splitlines()) for file in PRODUCT}
    for floor in reversed(range(len(FLOORS))):
        print(f"floor {floor}")
        for mine in FLOORS[floor]:
            own = [dotted for dotted in edges if unit(dotted) == mine]
            read = sorted({unit(other) for dotted in own for other in edges[dotted]} - {mine})
            print(f"  {mine:12} {len(own):3} files {sum(lines[dotted] for dotted in own):6} lines  <- {' '.join(read)}")
    found = circles(edges) + circles(folders(edges))
    print(f"{len(PRODUCT)} files, {sum(lines.values())} lines, {sum(map(len, edges.values()))} imports, ", end="")
    print(f"{len(found)} circles, {len(upward(edges))} upward")
    for line in [*map(" <-> ".join, found), *upward(edges)]:
        print(line)


if __name__ == "__main__":
    main()
