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
    """Public names arrive on first use, so that `qformer --help` does not import torch."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'qformer' has no attribute '{name}'")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


class _Beside:
    """A finder for the packages of this one that the repository keeps in folders beside it.

    An installation has them inside (`package-dir` in pyproject.toml) and does not need it. No other module of the
    repository is found by a second name, as it would be with the whole root on `__path__`, and the folders of the same
    names that a user has are never asked.
    """

    names = frozenset(f"{__name__}.{folder}" for folder in ("configs", "demo", "stages"))
    root = Path(__file__).parent.parent

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [str(cls.root)]) if name in cls.names else None


if not Path(__file__).with_name("stages").is_dir():
    sys.meta_path.insert(0, _Beside)  # first, so that an editable installation of another checkout is not mixed in
