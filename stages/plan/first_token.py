"""Cost of the first token of a configuration: operations of the real modules, counted while they read a picture.

The model has no numbers (`outline.py`), so that published sizes cost no memory; each operation is seen as it happens
(`ledger.py`). `qformer tiles --config` shows what comes of it, and so does `benchmarks/cost.py`.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch

from qformer import compat, devices
from qformer.figures.cost import PARTS, Machine
from qformer.model.vision_language import VisionLanguageModel
from qformer.resolution.base import cut_all
from qformer.stages.checking import check
from qformer.stages.plan import hardware
from qformer.stages.plan.ledger import Ledger
from qformer.stages.plan.outline import outline
from qformer.types import Tiles, UsageError

if TYPE_CHECKING:
    from qformer.schema import Config
    from qformer.types import Plan

EFFICIENCY = 0.4  # share of its peak that a GPU reaches, as `qformer plan` assumes
UNCUT = 1 << 20  # tokens, more than any prompt has
OF_PART = {"image encoder": "encoder", "language model": "prefill"}


class Reader:
    """The model of a configuration without numbers, which reads pictures of any size.

    Args:
        config: of stage two.
        device: `cpu` or `cuda`, for which the dtype of a language model may differ.

    Raises:
        UsageError: another stage, or a tower whose sizes are not known.
    """

    def __init__(self, config: Config, device: str = "cpu") -> None:
        if config.stage != "stage2":
            raise UsageError(f"the stage of this configuration is '{config.stage}', which writes no text; give stage2")
        made, self._mode = outline(check(config), device)
        assert isinstance(made, VisionLanguageModel)
        self.model = made.eval()
        self.strategy = config.resolution.name

    def plan(self, width: int, height: int) -> Plan:
        """Plan a picture of this size with the strategy of the configuration, within its limits."""
        return self.model.frontend.strategy.plan(width, height)

    def tokens(self, plan: Plan) -> int:
        """Count what the connector makes of a plan, without markers."""
        return self.model.connector.count_tokens(plan)

    @torch.no_grad()
    def operations(self, width: int, height: int) -> dict[str, Counter[torch.dtype]]:
        """Count the operations for a picture of this size and no text.

        Returns:
            For each of `PARTS` (dtype -> FLOPs). Prefill ends with the logits of one token.
        """
        cut = cut_all([torch.zeros(3, height, width, dtype=torch.uint8)], self.model.frontend.strategy)
        tiles = Tiles([self._mode.from_tensor(tile) for tile in cut.pixels], cut.plans)
        return count_operations(self.model, tiles)[0]


@torch.no_grad()
def count_operations(
    model: VisionLanguageModel, tiles: Tiles, prompt: str = "", question: str = ""
) -> tuple[dict[str, Counter[torch.dtype]], int]:
    """Count the operations of a model, with numbers or without, for one row until the first token.

    Args:
        tiles: of the row. prompt: the text behind it.
        question: what a connector that reads questions reads.

    Returns:
        For each of `PARTS` (dtype -> FLOPs), prefill ending with the logits of one token; and the number of vectors
        that the language model reads in place of the row.
    """
    ledger = Ledger()
    with ledger.watching(model), compat.seeing_operations(ledger.see):
        seen = model.prefix(tiles, [question])
        model.llm.predict(*seen, [""], [prompt], UNCUT, seen.places)
    found: dict[str, Counter[torch.dtype]] = {part: Counter() for part in PARTS}
    for (_, part, dtype), flops in ledger.flops.items():
        found[OF_PART.get(part, "connector")][dtype] += flops
    return found, seen.mask.shape[1]


def gpu(name: str) -> Machine:
    """A GPU of the table of `qformer plan` at `EFFICIENCY` of its peak.

    Raises:
        UsageError: it is not in the table.
    """
    full = hardware.full_name(name)
    known = hardware.find(full)
    if known.half is None:
        raise UsageError("'cpu' has no rate in the table of GPUs; leave --gpu out, and this machine is measured")

    def rate(dtype: torch.dtype) -> float:
        return EFFICIENCY * (known.rate(dtype) or 0.0)

    return Machine(f"{full}, {EFFICIENCY} of its peak", rate, devices.DTYPES["bf16" if known.has_bf16 else "fp16"])
