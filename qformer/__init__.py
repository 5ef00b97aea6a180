"""BLIP-2's Q-Former bridge from a frozen image encoder to a frozen language model."""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "load": "qformer.checkpoints.loading",
    "QFormer": "qformer.model.qformer",
    "ImageTextModel": "qformer.model.image_text",
    "Retriever": "qformer.retrieval.search",
    "VisionLanguageModel": "qformer.model.vision_language",
}
__all__ = ["ImageTextModel", "QFormer", "Retriever", "VisionLanguageModel", "load"]


def __getattr__(name: str) -> Any:
    """Import public names on first use, so that `qformer --help` does not import torch."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'qformer' has no attribute '{name}'")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


class _SiblingFinder:
    """Import hook for the subpackages that the repository keeps in folders next to `qformer/`.

    In an installation they are inside (`package-dir` in pyproject.toml), and the hook is not used. Adding the root of
    the repository to `__path__` instead would give every other module there a second name. Folders with the same names
    in the user's working directory are never searched.
    """

    names = frozenset(f"{__name__}.{folder}" for folder in ("configs", "demo", "stages"))
    root = Path(__file__).parent.parent

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [str(cls.root)]) if name in cls.names else None


if not Path(__file__).with_name("stages").is_dir():
    sys.meta_path.insert(0, _SiblingFinder)  # first, so that modules of another editable checkout are not mixed in
