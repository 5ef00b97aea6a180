"""Activation checkpointing: layers keep their inputs and recompute the rest in the backward pass (arXiv:1604.06174)."""

from __future__ import annotations

from contextlib import nullcontext
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qformer.vision.base import VisionEncoder

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager


def recompute_layers(model: nn.Module, again: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
    """Enable recomputation in every transformer layer that passes gradients: Q-Former, LLM and a trained encoder.

    Names, weights and results do not change: random states are restored for the recomputation.

    Args:
        again: makes a context for the recomputation.
    """
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, VisionEncoder) and module.frozen:
            inside.update(module.modules())
        if isinstance(module, nn.ModuleList) and module not in inside:
            for layer in module:
                layer.forward = _recomputed(layer.forward, again)
                inside.update(layer.modules())


def _recomputed(forward: Callable[..., Any], again: Callable[[], AbstractContextManager[Any]]) -> Callable[..., Any]:
    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), again()

    @wraps(forward)
    def twice(*arguments: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments, **options)
        return checkpoint(forward, *arguments, use_reentrant=False, context_fn=contexts, **options)

    return twice
