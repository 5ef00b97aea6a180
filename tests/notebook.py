"""Runs a notebook without Jupyter: `python -m tests.notebook FILE` runs its cells and renews their outputs."""

from __future__ import annotations

import ast
import base64
import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from PIL import Image


def run(notebook: dict[str, Any], changes: str = "") -> dict[str, Any]:
    """Run the code cells in order in one namespace, put their outputs in, and return the namespace.

    Args:
        changes: code to run after the cell that is tagged `parameters`.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells, start=1):
        printed = io.StringIO()
        with redirect_stdout(printed):
            value = _execute("".join(cell["source"]), names, f"cell {number}")
        if "parameters" in cell["metadata"].get("tags", ()):
            exec(changes, names)
        cell |= {"execution_count": number, "outputs": _outputs(printed.getvalue(), value, number)}
    return names


def _execute(code: str, names: dict[str, Any], cell: str) -> Any:
    """Run a cell and return the value of its last line if that is an expression."""
    tree = ast.parse(code, cell)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, cell, "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), cell, "eval"), names)


def _outputs(printed: str, value: Any, number: int) -> list[dict[str, Any]]:
    """What Jupyter would show: what was printed, and a last value, pictures as PNG."""
    found: list[dict[str, Any]] = []
    if printed:
        found.append({"name": "stdout", "output_type": "stream", "text": printed.splitlines(keepends=True)})
    if value is not None:
        data: dict[str, Any] = {"text/plain": [repr(value)]}
        if isinstance(value, Image.Image):
            stream = io.BytesIO()
            value.convert("RGB").quantize(64).save(stream, "PNG", optimize=True)
            data = {"image/png": base64.b64encode(stream.getvalue()).decode(), "text/plain": ["<a picture>"]}
        found.append({"data": data, "execution_count": number, "metadata": {}, "output_type": "execute_result"})
    return found


def main() -> None:
    file = Path(sys.argv[1])
    notebook = json.loads(file.read_text(encoding="utf-8"))
    run(notebook)
    file.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
