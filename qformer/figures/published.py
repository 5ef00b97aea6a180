"""Published losses for the sizes of BLIP-2, to compare with those of a run.

One run has public logs: BLIText (github.com/yiren-jian/BLIText) trained both stages on 4.6 million pairs (COCO,
Visual Genome, CC3M, SBU) with ViT-g, 10 epochs at a batch of 1,024 over all processes. The paper publishes no losses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qformer import distributed
from qformer.schema import QFormerConfig

if TYPE_CHECKING:
    from qformer.schema import Config

PAIRS, BATCH = 4_600_000, 1024
#: Sum of ITC, ITM and ITG: at these steps, and averaged over each epoch.
STAGE1_STEPS = {0: 17.76, 100: 15.09, 500: 9.73, 1000: 8.35}
STAGE1_EPOCHS = (7.93, 6.31, 5.95, 5.75, 5.60, 5.48, 5.38, 5.30, 5.24, 5.20)
#: Stage two with OPT-2.7B, averaged over each epoch.
STAGE2_EPOCHS = (2.84, 2.48, 2.40, 2.35, 2.31, 2.28, 2.24, 2.22, 2.20, 2.19)


def losses(config: Config) -> dict[str, list[tuple[float, float]]]:
    """Points (step, loss) by name of the loss, at the step where this run has seen as many pairs; often none.

    They are comparable only for equal sizes: ViT-g, the Q-Former of the paper, and in stage one (`loss`) the same
    batch, since ITC grows with its logarithm; in stage two (`lm`) OPT-2.7B without a prompt.
    """
    sizes = config.qformer.model_copy(update={"dropout": QFormerConfig().dropout})
    if config.vision.name != "eva" or {"width", "depth"} & config.vision.options.keys() or sizes != QFormerConfig():
        return {}
    batch = config.data.batch * distributed.world()
    seen = batch * config.train.accumulate
    middles = [(epoch + 0.5) * PAIRS / seen for epoch in range(len(STAGE1_EPOCHS))]
    if config.stage == "stage1" and batch == BATCH and config.data.train.name != "scenes":
        early = [(step * BATCH / seen, loss) for step, loss in STAGE1_STEPS.items()]
        return {"loss": _within(early + list(zip(middles, STAGE1_EPOCHS, strict=True)), config)}
    if config.stage == "stage2" and config.llm and config.llm.path == "facebook/opt-2.7b" and not config.llm.prompt:
        return {"lm": _within(list(zip(middles, STAGE2_EPOCHS, strict=True)), config)}
    return {}


def _within(points: list[tuple[float, float]], config: Config) -> list[tuple[float, float]]:
    """Points within the steps of the run."""
    return sorted(point for point in points if point[0] <= config.train.steps)
