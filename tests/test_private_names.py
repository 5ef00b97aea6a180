"""Nothing private of another library is used outside of `qformer/compat.py`, read from the syntax trees.

Private is a name that begins with an underscore, or a module with such a part in its path. What is foreign cannot
always be told from a syntax tree, so a private name counts as foreign when it hangs on something imported from
elsewhere, or when the product itself defines it nowhere.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
PACKAGES = ("qformer", "stages", "demo")
COMPAT = "qformer/compat.py"
DOCUMENTED = {"os._exit": "the standard library documents it: the end of a process without its clean-up"}
BY_NAME = {"getattr", "setattr", "hasattr", "delattr", "attrgetter", "methodcaller", "__getattribute__", "__setattr__"}
BY_PATH = {"import_module", "__import__", "find_spec", "getLogger", "resolve_name"}


def is_private(name: str) -> bool:
    return name.startswith("_") and name != "_" and not (name.startswith("__") and name.endswith("__"))


def has_private(path: str) -> bool:
    return any(map(is_private, path.split(".")))


def is_ours(path: str) -> bool:
    return path.split(".")[0] in PACKAGES


def last(node: ast.expr) -> str:
    """`c` of `a.b.c`."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def text(node: ast.expr | None) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def given_names(call: ast.Call) -> list[str]:
    """Names of attributes that a call says in strings: `getattr(x, "_y")`."""
    return [text(argument) for argument in call.args] if last(call.func) in BY_NAME else []


def defined(tree: ast.AST) -> set[str]:
    """The private names that a class, or the classes of a file, give: methods, attributes, fields."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            found.add(node.attr)
        if isinstance(node, ast.Call) and last(node.func) == "__setattr__" and is_self(node.args[0]):
            found.add(text(node.args[1]))
        if isinstance(node, ast.ClassDef):
            found |= directly(node)
    return set(filter(is_private, found))


def directly(scope: ast.Module | ast.ClassDef) -> set[str]:
    """The names that the lines of a file or class themselves define: functions, classes, variables."""
    found = {n.name for n in scope.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    targets = [target for part in scope.body if isinstance(part, ast.Assign) for target in part.targets]
    targets += [part.target for part in scope.body if isinstance(part, ast.AnnAssign)]
    return found | {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}


def imports_of(tree: ast.AST) -> dict[str, str]:
    """Local name -> path of what is imported: {"nn": "torch.nn"}."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def foreign_imports(tree: ast.AST) -> dict[str, str]:
    """Those from elsewhere."""
    return {name: path for name, path in imports_of(tree).items() if not is_ours(path)}


def foreign_path(node: ast.expr, imports: dict[str, str]) -> str:
    """`torch.nn.Linear` of `nn.Linear`; empty where the expression does not begin with a foreign import."""
    if isinstance(node, ast.Attribute):
        before = foreign_path(node.value, imports)
        return f"{before}.{node.attr}" if before else ""
    return imports.get(node.id, "") if isinstance(node, ast.Name) else ""


@dataclass
class Product:
    """What all files of the product define.

    Attributes:
        own: private names of attributes. modules: of what stands in files.
        bases: class -> its bases, each a path of a foreign one or the name of another of ours.
    """

    own: set[str] = field(default_factory=set)
    modules: set[str] = field(default_factory=set)
    bases: dict[str, set[str]] = field(default_factory=dict)

    def add(self, tree: ast.Module) -> None:
        self.own |= defined(tree)
        self.modules |= directly(tree)
        imports = foreign_imports(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                self.bases[node.name] = {foreign_path(base, imports) or last(base) for base in node.bases}

    def foreign_bases(self, name: str) -> set[str]:
        """Paths of all foreign classes above a class of ours."""
        known, found = {name}, set()
        ahead = [name]
        while ahead:
            for base in self.bases.get(ahead.pop(), set()) - known:
                known.add(base)
                (ahead if base in self.bases else []).append(base)
                if "." in base:
                    found.add(base)
        return found


def uses(tree: ast.AST, product: Product) -> Iterator[tuple[int, str]]:
    """Line and private name of everything foreign that a file uses."""
    imports, ours = foreign_imports(tree), imports_of(tree).keys() - foreign_imports(tree).keys()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((node.lineno, path) for path in imported(node) if has_private(path) and not is_ours(path))
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            path = foreign_path(node, imports)
            known = product.own | (product.modules if last(node.value) in ours else set())
            if path or node.attr not in known:
                yield node.lineno, path or node.attr
        elif isinstance(node, ast.Call):
            for name in given_names(node):
                foreign = bool(node.args) and foreign_path(node.args[0], imports)
                if is_private(name) and (foreign or name not in product.own | product.modules):
                    yield node.lineno, name
            if last(node.func) in BY_PATH and node.args and has_private(path := text(node.args[0])):
                yield from [] if is_ours(path) else [(node.lineno, path)]
            for keyword in node.keywords:
                if keyword.arg and is_private(keyword.arg) and keyword.arg not in product.own:
                    yield node.lineno, keyword.arg
        elif isinstance(node, ast.Subscript) and is_private(name := text(node.slice)) and name not in product.own:
            whole = node.value
            if last(whole) == "__dict__" or (isinstance(whole, ast.Call) and last(whole.func) == "vars"):
                yield node.lineno, name
        elif isinstance(node, ast.ClassDef):
            for base in sorted(product.foreign_bases(node.name)):
                yield from ((node.lineno, f"{base}.{name}") for name in sorted(defined(node)) if belongs(base, name))


def imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [] if node.level else [f"{node.module}.{alias.name}" for alias in node.names]


def belongs(base: str, name: str) -> bool:
    """Whether a foreign class, where its library is installed, has a private attribute or method of that name."""
    parts = base.split(".")
    for end in range(len(parts) - 1, 0, -1):
        try:
            kind: Any = reduce(getattr, parts[end:], import_module(".".join(parts[:end])))
        except (ImportError, AttributeError):
            continue
        fields = {field for parent in getattr(kind, "__mro__", ()) for field in vars(parent).get("__annotations__", ())}
        return hasattr(kind, name) or name in fields
    return False


def files() -> dict[str, ast.Module]:
    """Name -> tree of all files of the product."""
    found = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
    return {file.relative_to(ROOT).as_posix(): ast.parse(file.read_text()) for file in found}


def test_private_names_of_others_stay_in_compat() -> None:
    product, trees = Product(), files()
    for tree in trees.values():
        product.add(tree)
    found = {
        (file, line, used)
        for file, tree in trees.items()
        if file != COMPAT
        for line, used in uses(tree, product)
        if used not in DOCUMENTED
    }
    wrong = {f"{file}:{line}: {used}" for file, line, used in found}
    assert not wrong, f"put these behind a function of {COMPAT}, or find a public way: {sorted(wrong)}"


OURS = """
_table = {}
class Own:
    _field: int = 0
    def __init__(self): self._kept = 0; object.__setattr__(self, "_frozen", 1)
    def _method(self): pass
"""


def used(source: str) -> list[str]:
    product, tree = Product(), ast.parse(source)
    product.add(ast.parse(OURS))
    product.add(tree)
    return [name for _, name in uses(tree, product)]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("from torch._subclasses.fake_tensor import FakeTensorMode", "torch._subclasses.fake_tensor.FakeTensorMode"),
        ("from torch.utils import _pytree as trees", "torch.utils._pytree"),
        ("import torch.utils._pytree", "torch.utils._pytree"),
        ("if TYPE_CHECKING:\n    from torch._ops import OpOverload", "torch._ops.OpOverload"),
        ("import torch\ntorch._C.f()", "torch._C"),
        ("from torch import nn\nnn.Module._apply(m, f)", "torch.nn.Module._apply"),
        ("import atexit\natexit._kept()", "atexit._kept"),  # although a name of ours
        ("aten = torch.ops.aten\naten._softmax(x)", "_softmax"),
        ("def f(page): return len(page._queue)", "_queue"),
        ("def f(module): module._parameters = {}", "_parameters"),  # giving it does not make it ours
        ("def f(x): return x.y().z[0].__hidden", "__hidden"),
        ("def f(x): return x._table", "_table"),  # ours, but of a file
        ("class A(B):\n    def f(self): return self._inherited", "_inherited"),
        ("def f(x): return getattr(x, '_y', None)", "_y"),
        ("def f(x): x.__setattr__('_y', 1)", "_y"),
        ("import torch\nhasattr(torch, '_kept')", "_kept"),
        ("from operator import attrgetter\nget = attrgetter('_y')", "_y"),
        ("def f(x): return vars(x)['_y']", "_y"),
        ("def f(x): return x.__dict__['_y']", "_y"),
        ("import logging\nlogging.getLogger('bitsandbytes.autograd._functions')", "bitsandbytes.autograd._functions"),
        ("import importlib\nimportlib.import_module('torch._C')", "torch._C"),
        ("from accelerate import State\nState(_from_accelerator=True)", "_from_accelerator"),
        ("from torch import nn\nclass A(nn.Module):\n    def _apply(self, f): pass", "torch.nn.Module._apply"),
        ("from torch import nn\nclass A(nn.Module):\n    def f(self): self._buffers = {}", "torch.nn.Module._buffers"),
        (
            "from torch import nn\nclass A(nn.Linear): pass\nclass C(A):\n    def _call_impl(self): pass",
            "torch.nn.Linear._call_impl",
        ),
    ],
)
def test_what_is_foreign_is_found(source: str, name: str) -> None:
    assert name in used(source)


@pytest.mark.parametrize(
    "source",
    [
        "from qformer.cli import _sibling",
        "from . import _beside",
        "from qformer import own\nown._table[0]",
        "def f(x): return x._kept + x._field + x._frozen + x._method()",
        "def f(x): return getattr(x, '_kept'), vars(x)['_field']",
        "class A:\n    def __init__(self): self._mine = 0\n    def f(self): return self._mine",
        "from torch import nn\nclass A(nn.Module):\n    def _encode(self, x): return self._encode(x)",
        "def f(x): return x.__class__.__name__, x.__dict__['y'], getattr(x, '__len__')",
        "import logging\nlogging.getLogger('bitsandbytes'), logging.getLogger(__name__)",
        "for _, _unused in []: pass",
        "def f(table): return table['_distance'], table.select(['_distance'])",
        "from __future__ import annotations",
    ],
)
def test_what_is_ours_or_public_is_not_found(source: str) -> None:
    assert used(source) == []


def test_what_the_standard_library_documents() -> None:
    assert set(DOCUMENTED) == {"os._exit"}
    assert used("import os\nos._exit(1)") == used("from os import _exit") == ["os._exit"]
