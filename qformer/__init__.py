"""BLIP-2's Q-Former bridge from a frozen image encoder to a frozen language model."""

from __future__ import annotations

import importlib
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
