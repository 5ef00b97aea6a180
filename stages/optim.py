"""Parameter groups, AdamW and the learning rate of every step (BLIP-2, section 3.4)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import nn

    from qformer.config import TrainConfig


def adamw(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over what is trained. Biases, LayerNorms and the temperature (fewer than two dimensions) do not decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Of the step numbered from 0: linear warm-up to `lr`, then a cosine to `min_lr` at the last step."""
    if step < config.warmup:
        return config.warmup_lr + (config.lr - config.warmup_lr) * step / config.warmup
    done = (step - config.warmup) / max(config.steps - 1 - config.warmup, 1)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
