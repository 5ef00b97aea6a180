"""Drawing of slices, under its documented name."""

from __future__ import annotations

from qformer.figures.tiles import slices

__all__ = ["slices"]
