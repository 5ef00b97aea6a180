"""Training and evaluation: one script per stage, one loop for all of them."""

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
    """Train the stage named by `config.stage`; calling it again resumes the run.

    The seed is set before any model is built, so it also covers the weights of parts that start untrained.

    Args:
        trust: allow stage two to run code that `init` names for its image encoder.

    Returns:
        The newest checkpoint, or the folder of a tower.

    Raises:
        UsageError: `qformer.stages.checking` rejects the configuration, or it cannot be trained.
    """
    from qformer.stages.checking import check

    check(config)
    import torch

    from qformer.config import anchor

    torch.manual_seed(config.seed)
    inherits = {"trust": trust} if config.stage == "stage2" else {}
    return lookup.find(STAGES, config.stage, "stage")(anchor(config), **inherits)


def fill_features(config: Config, trust: bool = False) -> Path:
    """Fill the store of `data.features` without training and return its folder; calling it again continues.

    Args:
        trust: see `train`.
    """
    from qformer.stages.checking import check

    check(config)
    import torch

    from qformer.config import anchor
    from qformer.stages.features import fill_alone

    torch.manual_seed(config.seed)
    return fill_alone(anchor(config), trust)
