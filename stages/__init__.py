"""How to train and measure: one script per stage, one loop for all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qformer import lookup

if TYPE_CHECKING:
    from pathlib import Path

    from qformer.schema import Config

STAGES = {
    "vision": "qformer.stages.towers.train:train_vision",
    "language": "qformer.stages.towers.train:train_language",
    "stage1": "qformer.stages.stage1:train",
    "stage2": "qformer.stages.stage2:train",
}


def train(config: Config, trust: bool = False) -> Path:
    """Train what `config.stage` says; the same call resumes. Returns the newest checkpoint, or the folder of a tower.

    The seed covers what is drawn before the first step, too: the random weights of whatever starts untrained.

    Args:
        trust: stage two, which has its image encoder from `init`, may run the code that this names.

    Raises:
        UsageError: what `qformer.stages.checking` refuses, or what cannot be trained.
    """
    from qformer.stages.checking import check

    check(config)
    import torch

    from qformer.config import anchor

    torch.manual_seed(config.seed)
    inherits = {"trust": trust} if config.stage == "stage2" else {}
    return lookup.find(STAGES, config.stage, "stage")(anchor(config), **inherits)


def fill_features(config: Config, trust: bool = False) -> Path:
    """Fill the store of `data.features` without training; the same call goes on. Returns its folder.

    `trust` is as of `train`.
    """
    from qformer.stages.checking import check

    check(config)
    import torch

    from qformer.config import anchor
    from qformer.stages.features import fill_alone

    torch.manual_seed(config.seed)
    return fill_alone(anchor(config), trust)
