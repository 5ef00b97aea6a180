"""`qformer towers`: a table of the towers that have names of their own."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from qformer.files import pretrained, real_towers
from qformer.files.real_towers import REAL_TOWERS, SCHEME

if TYPE_CHECKING:
    from pathlib import Path

HEAD = ("name", "for", "size", "state", "source", "license of the package", "of the weights")
OURS = "Apache-2.0"
#: By model type; else a language model.
KEYS = {
    "bert": "text.bert",
    "clip": "vision.path",
    "dinov2": "vision.path",
    "qwen2_vl": "vision.weights",
    "vit": "vision.path",
}


def table() -> str:
    """Table of the shipped towers and of those out of packages, as wide as it must be: names are there to be copied."""
    rows = [HEAD]
    for name, folder in sorted(pretrained.shipped().items()):
        key = KEYS.get(json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"], "llm.path")
        rows.append((f"{pretrained.MINI}{name}", key, _size(_bytes(folder)), "shipped", "qformer", OURS, OURS))
    for name, tower in REAL_TOWERS.items():
        is_here, wheel = real_towers.is_fetched(name), tower.wheel
        size = _size(_bytes(real_towers.folder(name)) if is_here else tower.size)
        state = "fetched" if is_here else "not fetched"
        source = f"{wheel.pin} ({_size(wheel.size)})"
        rows.append((f"{SCHEME}{name}", tower.key, size, state, source, wheel.license, tower.license))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
