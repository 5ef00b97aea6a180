"""Drawing of slices, by the name under which it is known."""

from __future__ import annotations

from qformer.figures.tiles import slices

__all__ = ["slices"]
