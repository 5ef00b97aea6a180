"""Layers of an image encoder that are read, counted and in the order in which their tokens are concatenated."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence


def levels(layers: Sequence[int] | None, depth: int) -> tuple[int, ...]:
    """The layers that an encoder of `depth` blocks reads, the last one first: in this order tokens are concatenated.

    Args:
        layers: counted like `hidden_states` in transformers: 0 are the embeddings, n is the n-th block, -1 the last
            one. None reads the last one alone.

    Raises:
        UsageError: none at all, one that does not exist, or one twice.
    """
    given = [depth] if layers is None else list(layers)
    if wrong := [layer for layer in given if not -depth - 1 <= layer <= depth]:
        raise UsageError(f"layer {wrong[0]} does not exist in a model of {depth} blocks; use {-depth - 1} to {depth}")
    read = sorted({layer % (depth + 1) for layer in given}, reverse=True)
    if not given or len(read) < len(given):
        raise UsageError(f"vision.layers is {given}; name one layer or more, each of them once")
    return tuple(read)
