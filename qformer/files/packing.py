"""Image tokens as they are stored: rows of fp16, or of int8 with the scale of each token behind them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from qformer.fields import Packing

MOST = 127
SMALLEST = 2.0**-24  # above zero that fp16 has


def pack(tokens: Tensor, packing: Packing) -> Tensor:
    """Tokens float[n, D] -> float16[n, D]; or int8[n, D + 2], whose last two bytes are the token's scale in fp16.

    Raises:
        OverflowError: a value that is not finite or that fp16 cannot hold.
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
    """What `pack` made: float16[..., D], as it is, or int8[..., D + 2] -> float32[..., D]."""
    if rows.dtype != torch.int8:
        return rows
    return rows[..., :-2].float() * rows[..., -2:].contiguous().view(torch.float16).float()
