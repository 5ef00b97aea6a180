"""Cost of the first token: operations of image encoder, connector and prefill, and an estimate of the seconds.

The seconds are operations divided by a rate: that of matrix products on this machine, measured for a moment, or one
that is given. Reading weights from memory, small operations and everything outside the model come on top.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch

from qformer import devices
from qformer.vision.options import EvaConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from qformer.types import Plan

    Operations = Mapping[str, Mapping[torch.dtype, float]]  # part of the model -> dtype -> FLOPs

#: Sizes of the encoder for which costs are computed: BLIP-2's ViT-g/14.
VIT_G = EvaConfig()
#: Sizes of the language model for which they are computed: Qwen2-7B.
LAYERS, WIDTH, KEYS, INNER, VOCABULARY = 28, 3584, 512, 18944, 152064
PARTS = ("encoder", "connector", "prefill")
NAMES = {dtype: name for name, dtype in devices.DTYPES.items()}


class Machine:
    """A rate in FLOP/s for each dtype, of whatever does the operations.

    Args:
        name: whose rate it is, and how it is known, with a comma between.
        rate: gives FLOP/s in a dtype.
        dtype: that of a model which may have any.
    """

    def __init__(self, name: str, rate: Callable[[torch.dtype], float], dtype: torch.dtype) -> None:
        self.name, self.dtype, self._rate = name, dtype, rate
        self._known: dict[torch.dtype, float] = {}

    def rate(self, dtype: torch.dtype) -> float:
        """FLOP/s in a dtype, asked for once."""
        if dtype not in self._known:
            self._known[dtype] = self._rate(dtype)
        return self._known[dtype]

    def describe(self, dtypes: Iterable[torch.dtype]) -> str:
        """The name and the rates in these dtypes, in TFLOP/s."""
        rates = (f"{self.rate(dtype) / 1e12:.3g} TFLOP/s in {NAMES[dtype]}" for dtype in dtypes)
        return f"{self.name}: {', '.join(rates)}"


@cache
def this_machine() -> Machine:
    """The GPU of this machine, or else its CPU, with rates that are measured once."""
    device = devices.choose(None)
    fastest = devices.DTYPES[devices.fastest_precision(device.type)[0]]
    return Machine("this machine, measured", lambda dtype: devices.matmul_rate(device, dtype), fastest)


@dataclass(frozen=True)
class Cost:
    """Operations until the first token, two per multiply-add, in 10^9 (GFLOP), and the estimated seconds.

    Attributes:
        machine: the rates that the estimate rests on; its name comes first.
    """

    encoder: float
    connector: float
    prefill: float
    seconds: float
    machine: str

    @classmethod
    def of(cls, operations: Operations, machine: Machine) -> Cost:
        """Add up the operations of `PARTS` and estimate how long the machine takes for them."""
        counts = [item for part in PARTS for item in operations[part].items()]
        seconds = sum(count / machine.rate(dtype) for dtype, count in counts)
        dtypes = dict.fromkeys(dtype for dtype, _ in counts)
        encoder, connector, prefill = (sum(operations[part].values()) / 1e9 for part in PARTS)
        return cls(encoder, connector, prefill, seconds, machine.describe(dtypes))


def in_words(seconds: float) -> str:
    """Write seconds with two digits: `0.12 ms`, `3.4 s`, `120 s`."""
    if seconds >= 9.95:
        return f"{seconds:,.0f} s"
    return f"{seconds:.2g} s" if seconds >= 0.995 else f"{float(f'{1000 * seconds:.2g}'):g} ms"


def usual(plan: Plan, machine: Machine | None = None) -> Cost:
    """Cost of a plan with one model for all strategies: ViT-g/14 on its tiles, an MLP on every patch, Qwen2-7B.

    The language model reads the plan's tokens and markers and no text. The MLP has two layers, as LLaVA-1.5's.

    Args:
        machine: by default this one, in the dtype in which it is fastest.
    """
    machine = machine or this_machine()
    patches = sum(len(tile.frames) * tile.size[0] * tile.size[1] for tile in plan.tiles) / VIT_G.patch_size**2
    counts = (1e9 * gflops(plan), 2 * patches * (VIT_G.width + WIDTH) * WIDTH, _prefill(plan.tokens + plan.markers))
    return Cost.of({part: {machine.dtype: count} for part, count in zip(PARTS, counts, strict=True)}, machine)


def _prefill(tokens: int) -> float:
    """Operations of Qwen2-7B for so many tokens, of whose logits the last are computed."""
    linear = 2 * WIDTH * (WIDTH + KEYS) + 3 * WIDTH * INNER  # multiplications per token and layer
    return 2 * (LAYERS * (tokens * linear + 2 * tokens**2 * WIDTH) + VOCABULARY * WIDTH)


def gflops(plan: Plan) -> float:
    """Count 10^9 operations of BLIP-2's ViT-g/14 on the tiles, two per multiply-add, without norms and the like."""
    return sum(len(tile.frames) * _gflops(*tile.size) for tile in plan.tiles)


def _gflops(width: int, height: int) -> float:
    size = VIT_G
    tokens = width * height / size.patch_size**2 + 1
    linear = 4 * size.width**2 + 2 * size.width * size.mlp_hidden  # multiplications per token and block
    blocks = size.depth * (tokens * linear + 2 * tokens**2 * size.width)
    return 2 * (blocks + (tokens - 1) * 3 * size.patch_size**2 * size.width) / 1e9
