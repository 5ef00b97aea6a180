"""Parameter groups, AdamW and the learning rate schedule (BLIP-2, section 3.4)."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from qformer.schema import TrainConfig

ENCODER = "frontend.encoder."
MIXED = (f"{ENCODER}first.", f"{ENCODER}second.")  # of a mixture of features
#: What texts pass in the Q-Former, by name; its query feed-forward starts as BERT's too, but is the bridge's own.
FROM_BERT = re.compile(r"(connector\.)?qformer\.(embeddings|layers\.\d+\.(attention|text_ffn))\.")
ENCODER_BLOCK = re.compile(r"frontend\.encoder\.(.+\.)?(blocks|resblocks|layers?)\.\d+")  # EVA, CLIP, transformers


def adamw(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Build AdamW over the trained parameters.

    Parameters with fewer than two dimensions (biases, LayerNorms, the temperature) get no weight decay. Each group has
    a `scale` for the learning rate: 1, or less toward the first layers of a trained image encoder and for BERT's part
    of the Q-Former.
    """
    scales = layer_scales(model, config.layer_decay)
    scales |= {name: config.bert_rate for name, _ in model.named_parameters() if FROM_BERT.match(name)}
    groups: dict[tuple[float, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((scales.get(name, 1.0), parameter.ndim >= 2), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": members, "weight_decay": config.weight_decay if decays else 0.0, "scale": scale}
            for (scale, decays), members in groups.items()
        ],
        lr=config.lr,
        betas=config.betas,
    )


def layer_scales(model: nn.Module, decay: float) -> dict[str, float]:
    """Compute the learning-rate scale of each image encoder parameter, by name (BLIP-2, appendix).

    As in BEiT, the last block gets `decay`, and each earlier block gets `decay` times the scale of the next one. The
    embeddings before the first block (patches, CLS, positions) count as one more block. The encoders of a mixture count
    their blocks apart.
    """
    every = [name for name, _ in model.named_modules() if ENCODER_BLOCK.fullmatch(name)]
    scales = {}
    for name, _ in model.named_parameters():
        if name.startswith(ENCODER):
            part = next((part for part in MIXED if name.startswith(part)), ENCODER)
            blocks = [block for block in every if block.startswith(part)]
            number = next((i for i, block in enumerate(blocks) if name.startswith(f"{block}.")), -1)
            scales[name] = decay ** (len(blocks) - number)
    return scales


def learning_rate(step: int, config: TrainConfig) -> float:
    """Compute the rate of a step (from 0): linear warm-up to `lr`, then a cosine to `min_lr` at the last step."""
    if step < config.warmup:
        return config.warmup_lr + (config.lr - config.warmup_lr) * step / config.warmup
    done = (step - config.warmup) / max(config.steps - 1 - config.warmup, 1)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
