"""Peak speed and memory of GPUs, and the memory that a process takes before its first tensor.

Peaks are from NVIDIA's data sheets: dense tensor cores with 32-bit accumulation for 16-bit types, and no TF32 for
single precision, as is PyTorch's default. A GB is 10^9 bytes here. A card of "80 GB" has 80 GiB, 7% more; the
difference is left for fragmentation in the allocator.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

import torch

from qformer import lookup
from qformer.types import UsageError

CPU = "cpu"
#: CUDA context, kernels and cuBLAS workspace. An assumption: 0.4 to 0.8 GB is common.
CONTEXT = 600_000_000
#: On a CPU: Python, PyTorch and transformers, before a model is built (0.39 GB measured).
PROGRAM = 400_000_000
#: On a CPU: libraries that the first step loads, and the heap fragmentation of glibc as a share of the tensors (10% to
#: 24% measured on models of 0.05 to 1.3 GB, other than those in docs/plan.md).
LIBRARIES, PIECES = 70_000_000, 0.15


@dataclass(frozen=True)
class Device:
    """A GPU or CPU: memory in GB, peak TFLOP/s in 16 bits and in fp32 (None: unknown), and support of bf16."""

    memory: float
    half: float | None
    single: float | None
    has_bf16: bool = True

    def rate(self, dtype: torch.dtype) -> float | None:
        """Return the peak FLOP/s in a dtype, None if it is unknown.

        Raises:
            UsageError: the device does not support this dtype.
        """
        if dtype == torch.bfloat16 and not self.has_bf16:
            raise UsageError("this GPU does not support bf16; use --precision fp16, and fp16 for llm.dtype")
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


#: Words in the full names of GPUs that do not distinguish those of the table.
MAKERS = {"nvidia", "geforce", "tesla", "quadro", "rtx", "gpu", "sxm", "sxm2", "sxm4", "sxm5", "hbm2", "hbm3", "hbm3e"}


def full_name(name: str) -> str:
    """Find the name in `GPUS` for a name as people write it (`a100 40gb`, `4090`, `NVIDIA H200`); or `cpu`.

    Raises:
        UsageError: no GPU of the table matches, or several do.
    """
    given = _words(name)
    whole = "".join(given)
    exact = [known for known in (*GPUS, CPU) if whole == "".join(_words(known))]
    words = set(given) - MAKERS
    found = exact or [known for known in GPUS if words and words <= _parts(known)]
    if len(found) > 1:
        raise UsageError(f"GPU '{name}' can mean {' or '.join(found)}; give one of them")
    if not found:
        raise UsageError(f"unknown GPU '{name}': {lookup.nearest(name.upper(), GPUS)}; or 'cpu' for this machine")
    return found[0]


def _words(name: str) -> list[str]:
    """Split a name into words in lower case: `A100-40GB` has a100 and 40gb."""
    return re.findall("[a-z0-9]+", name.lower())


def _parts(name: str) -> set[str]:
    """List the words that can name a GPU of the table: `RTX4090` also 4090, 40GB also 40."""
    words = _words(name)
    return {*words, *(word.removeprefix("rtx") for word in words), *(word.removesuffix("gb") for word in words)}


def find(name: str) -> Device:
    """Look up a GPU by its name in `GPUS`; `cpu` is this machine, with all its memory and no known peak.

    Raises:
        UsageError: the name is unknown.
    """
    if name == CPU:
        return Device(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, None, None)
    return lookup.find(GPUS, name, "GPU")


def reserve(name: str, tensors: int) -> int:
    """Estimate the bytes that a process needs on a device in addition to those of its `tensors`."""
    return int(PROGRAM + LIBRARIES + PIECES * tensors) if name == CPU else CONTEXT


def parse_memory(text: str) -> float:
    """Parse `80GB`, `80 GiB` or `80` (GB) into bytes.

    Raises:
        UsageError: the text is not an amount of memory.
    """
    compact = text.replace(" ", "").lower()
    unit = next((unit for unit in ("gib", "gb", "g") if compact.endswith(unit)), "")
    try:
        amount = float(compact.removesuffix(unit))
    except ValueError:
        amount = 0.0
    if not 0 < amount < 1e6:
        raise UsageError(f"'{text}' is not an amount of memory; give it in GB, such as 80GB")
    return amount * (2**30 if unit == "gib" else 1e9)
