"""Packing of image tokens for storage: rows of fp16, or of int8 followed by the scale of each token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from qformer.fields import Packing

MOST = 127
SMALLEST = 2.0**-24  # smallest positive number of fp16


def pack(tokens: Tensor, packing: Packing) -> Tensor:
    """Pack tokens float[n, D] to float16[n, D], or to int8[n, D + 2], whose last two bytes are the scale in fp16.

    Raises:
        OverflowError: a value is not finite or too large for fp16.
    """
    if packing == "fp16":
        rows = tokens.half()
        fits = rows.isfinite().all()
    else:
        tokens = tokens.float()
        scale = (tokens.abs().amax(dim=1, keepdim=True) / MOST).clamp(min=SMALLEST).half()  # (n, 1)
        fits = scale.isfinite().all()
        codes = (tokens / scale.float()).round().clamp(-MOST, MOST).to(torch.int8)
        rows = torch.cat([codes, scale.view(torch.int8)], dim=1)  # (n, D + 2)
    if not fits:
        raise OverflowError(f"{packing} cannot hold a token whose largest value is {float(tokens.abs().max()):.3g}")
    return rows


def unpack(rows: Tensor) -> Tensor:
    """Undo `pack`: float16[..., D] stays unchanged, int8[..., D + 2] becomes float32[..., D]."""
    if rows.dtype != torch.int8:
        return rows
    return rows[..., :-2].float() * rows[..., -2:].contiguous().view(torch.float16).float()
