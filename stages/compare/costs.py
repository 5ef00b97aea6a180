"""Costs of a system: tokens, parameters and operations that are counted, seconds that are measured here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qformer.model.vision_language import VisionLanguageModel
    from qformer.schema import Config
    from qformer.types import Sample


@dataclass(frozen=True)
class Cost:
    """What a system takes. Operations are FLOPs, two per multiply-add.

    Attributes:
        tokens: mean number of vectors that the language model reads in place of what a row shows, markers included.
        trained: parameters that are trained.
        encoder_flops, connector_flops, prefill_flops: of one row, forward, with its prompt.
        step_flops: of one training step, backward through the frozen language model included, and without the
            image encoder where its tokens are stored.
        stored_flops: of encoding all pictures of the store once; 0 without a store.
        before_flops: of the whole of stage one, where the system begins with one.
        first_token_seconds, images_per_second: measured on this machine.
        peak_bytes: of all tensors at the peak of a training step.
    """

    tokens: float
    trained: int
    encoder_flops: float
    connector_flops: float
    prefill_flops: float
    step_flops: float
    stored_flops: float
    before_flops: float
    first_token_seconds: float
    images_per_second: float
    peak_bytes: int

    def training_flops(self, steps: int) -> float:
        """All operations of a training of so many steps."""
        return self.before_flops + self.stored_flops + steps * self.step_flops


def measure_cost(
    config: Config, model: VisionLanguageModel, rows: Sequence[Sample], stage_one: Config | None = None
) -> Cost:
    """Count and measure what a system takes for these rows (questions, or captions to write)."""
    raise NotImplementedError
