"""What GPUs can do at best, and memory that is taken before the first tensor.

Peaks are those of NVIDIA's data sheets: dense tensor cores with 32-bit sums for 16 bits, and no TF32 for single
precision, which is how PyTorch computes unless it is told otherwise. GB are 10^9 bytes here. A card of "80 GB" has 80
GiB, 7 % more; that is left for what the allocator loses between tensors.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

import torch

from qformer import lookup
from qformer.types import UsageError

CPU = "cpu"
#: Context of CUDA, kernels and work space of cuBLAS. An assumption: 0.4 to 0.8 GB are usual.
CONTEXT = 600_000_000
#: On a CPU: the program itself, with Python, PyTorch and transformers, before there is a model (measured 0.39 GB).
PROGRAM = 400_000_000
#: On a CPU: libraries that the first step loads, and the share of its tensors that glibc's heap holds in pieces between
#: them (measured 10 to 24 % on models of 0.05 to 1.3 GB that are not among those of docs/plan.md).
LIBRARIES, PIECES = 70_000_000, 0.15


@dataclass(frozen=True)
class Device:
    """Memory in GB; peak of 16 bits and of fp32 in TFLOP/s (None: not planned for); whether it computes in bf16."""

    memory: float
    half: float | None
    single: float | None
    has_bf16: bool = True

    def rate(self, dtype: torch.dtype) -> float | None:
        """FLOP/s at best.

        Raises:
            UsageError: it cannot compute in this dtype.
        """
        if dtype == torch.bfloat16 and not self.has_bf16:
            raise UsageError("this GPU does not compute in bf16; use --precision fp16, and fp16 for llm.dtype")
        peak = self.single if dtype == torch.float32 else self.half
        return None if peak is None else peak * 1e12


GPUS = {
    "A100-40GB": Device(40, 312, 19.5),
    "A100-80GB": Device(80, 312, 19.5),
    "H100-80GB": Device(80, 989.4, 67),
    "H100-PCIe": Device(80, 756, 51),
    "H200": Device(141, 989.4, 67),
    "B200": Device(180, 2250, 75),
    "L40S": Device(48, 362, 91.6),
    "L4": Device(24, 121, 30.3),
    "A10": Device(24, 125, 31.2),
    "A6000": Device(48, 154.8, 38.7),
    "RTX3060": Device(12, 25.6, 12.8),
    "RTX3090": Device(24, 71, 35.6),
    "RTX4070": Device(12, 58.3, 29.1),
    "RTX4090": Device(24, 165.2, 82.6),
    "RTX5090": Device(32, 209.5, 104.8),
    "V100": Device(16, 125, 15.7, has_bf16=False),
    "T4": Device(16, 65, 8.1, has_bf16=False),
}


#: What stands in a GPU's full name and tells it from no other of the table.
MAKERS = {"nvidia", "geforce", "tesla", "quadro", "rtx", "gpu", "sxm", "sxm2", "sxm4", "sxm5", "hbm2", "hbm3", "hbm3e"}


def full_name(name: str) -> str:
    """The name in `GPUS` of a GPU as people write it (`a100 40gb`, `4090`, `NVIDIA H200`), or `cpu`.

    Raises:
        UsageError: none of the table is meant, or several may be.
    """
    asked = _words(name)
    whole = "".join(asked)
    exact = [known for known in (*GPUS, CPU) if whole == "".join(_words(known))]
    words = set(asked) - MAKERS
    found = exact or [known for known in GPUS if words and words <= _parts(known)]
    if len(found) > 1:
        raise UsageError(f"GPU '{name}' may be {' or '.join(found)}; give one of them")
    if not found:
        raise UsageError(f"unknown GPU '{name}': {lookup.nearest(name.upper(), GPUS)}; or 'cpu', which is this machine")
    return found[0]


def _words(name: str) -> list[str]:
    """The words of a name in small letters: `A100-40GB` has a100 and 40gb."""
    return re.findall("[a-z0-9]+", name.lower())


def _parts(name: str) -> set[str]:
    """The words by which a GPU of the table may be called: `RTX4090` also 4090, 40GB also 40."""
    words = _words(name)
    return {*words, *(word.removeprefix("rtx") for word in words), *(word.removesuffix("gb") for word in words)}


def find(name: str) -> Device:
    """A GPU by its name in `GPUS`, or `cpu`: this machine, with all its memory and no peak.

    Raises:
        UsageError: another name.
    """
    if name == CPU:
        return Device(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, None, None)
    return lookup.find(GPUS, name, "GPU")


def reserve(name: str, tensors: int) -> int:
    """Bytes of a process beside so many of tensors, in the memory that `name` has."""
    return int(PROGRAM + LIBRARIES + PIECES * tensors) if name == CPU else CONTEXT


def parse_memory(text: str) -> float:
    """`80GB`, `80 GiB` or `80` (GB) as bytes.

    Raises:
        UsageError: anything else.
    """
    compact = text.replace(" ", "").lower()
    unit = next((unit for unit in ("gib", "gb", "g") if compact.endswith(unit)), "")
    try:
        amount = float(compact.removesuffix(unit))
    except ValueError:
        amount = 0.0
    if not 0 < amount < 1e6:
        raise UsageError(f"'{text}' is no amount of memory; write it in GB, such as 80GB")
    return amount * (2**30 if unit == "gib" else 1e9)
