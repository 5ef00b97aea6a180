"""A training run in progress: its parts, its clock, and its metric records."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator

from qformer import distributed
from qformer.data.loader import Skipped
from qformer.files.records import append_record
from qformer.progress import console
from qformer.schema import Config

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn


@dataclass
class Run:
    """A training run in progress. `step` counts finished optimizer steps."""

    config: Config
    folder: Path
    accelerator: Accelerator
    model: nn.Module
    optimizer: Any
    skipped: Skipped
    extra: Callable[[Path], object] | None
    extent: Any = None  # size of the data, see `qformer.data.orders`
    step: int = 0
    pending: list[tuple[int, dict[str, Tensor]]] = field(default_factory=list)
    clock: float = field(default_factory=time.perf_counter)

    @property
    def inner(self) -> Any:
        """The model without accelerate's wrapper."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def precision(self) -> str:
        """The dtype of autocast; the configuration may leave it to the device."""
        taken = self.accelerator.mixed_precision
        return "fp32" if taken == "no" else taken


def write_record(run: Run, record: dict[str, float], kind: str) -> None:
    """Write one record to `metrics.jsonl` and to TensorBoard; only rank 0 writes."""
    if distributed.rank() > 0:
        return
    try:
        append_record(run.folder / "metrics.jsonl", {"kind": kind, **record})
        named = {f"{kind}/{name}": value for name, value in record.items() if name != "step"}
        run.accelerator.log(named, step=run.step)
    except OSError as error:  # a full disk may have space again by the next checkpoint
        console.print(f"step {run.step}: its losses could not be written ({error})")


def is_due(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0
