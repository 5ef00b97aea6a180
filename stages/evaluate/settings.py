"""Settings of `qformer eval`, and how a checkpoint is measured whatever the benchmark."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qformer import distributed
from qformer.data import sources
from qformer.data.arguments import pairs
from qformer.devices import DTYPES
from qformer.types import UsageError

if TYPE_CHECKING:
    from qformer.data.base import Source

AUTOCAST = {precision: dtype for precision, dtype in DTYPES.items() if precision != "fp32"}


@dataclass(frozen=True)
class Settings:
    """Options of `qformer eval`; its `--help` explains each."""

    checkpoint: str
    bench: str
    data: list[str]
    k: int = 128
    limit: int | None = None
    batch: int = 64
    precision: str = "fp32"
    output: Path | None = None
    html: Path | None = None
    device: str | None = None
    preset: str = "paper"
    prompt: str | None = None
    predictions: Path | None = None
    submission: Path | None = None
    by: str | None = None
    lemmatize: bool = False
    quantize: str | None = None
    beams: int | None = None
    trust: bool = False
    others: tuple[str, ...] = ()
    server: str | None = None
    model: str | None = None


def open_data(settings: Settings, usual: str) -> Source:
    """Open the data that were given; `usual` is the source that is meant where they name none.

    Raises:
        UsageError: data that cannot be used, or drawn ones without an end.
    """
    options = pairs(settings.data)
    name = str(options.pop("name", usual))
    if name in sources.DRAWN and "count" not in options and settings.limit is None:
        raise UsageError(f"'{name}' draws as many samples as it is asked for; give --limit N, or --data count=N")
    return sources.build(name, **options)


def own_device(settings: Settings) -> str | None:
    """The GPU of this process, where several share the work."""
    if settings.device is None and torch.cuda.is_available() and distributed.world() > 1:
        return f"cuda:{distributed.local_rank()}"
    return settings.device


def autocast(model: Any, precision: str) -> Any:
    return (
        torch.autocast(next(model.parameters()).device.type, AUTOCAST[precision])
        if precision in AUTOCAST
        else nullcontext()
    )


def writable(*paths: Path | None) -> None:
    """Before hours of work, not behind them."""
    for path in filter(None, paths):
        if path.is_dir() or not path.resolve().parent.is_dir():
            raise UsageError(f"cannot write '{path}'; give a file in a folder that exists")
