"""Devices by name, with an error if this machine does not have the one asked for; and dtypes by name."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from qformer.types import UsageError

CPU_INFO = Path("/proc/cpuinfo")
#: Instructions with which a CPU multiplies bf16: without them it takes about four times as long as in fp32.
FAST_BF16 = ("amx_bf16", "avx512_bf16")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def choose(name: str | torch.device | None) -> torch.device:
    """Choose a device by name, such as `cpu`, `cuda`, `cuda:1` or `mps`; None is the GPU if there is one, else the CPU.

    Raises:
        UsageError: the name is not that of a device, or this machine has no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"device is '{name}'; give cpu, cuda, or one of several such as cuda:1") from error
    if device.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if device.type == "cuda" and torch.cuda.is_available() else None
    try:
        if device.type == "meta" or (count is not None and (device.index or 0) >= count):
            raise RuntimeError
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError, NotImplementedError) as error:  # depending on the build of PyTorch
        there = f"the last GPU of this machine is cuda:{count - 1}" if count else "there is none on this machine"
        raise UsageError(f"device is '{name}', but {there}; give another, cpu for one, or leave it out") from error
    return device


def fastest_precision(kind: str) -> tuple[str, str]:
    """Choose the dtype in which a kind of device, such as `cpu` or `cuda`, trains fastest: its name, and the reason."""
    if kind == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "this GPU computes in it"
        return "fp16", "this GPU does not compute in bf16"
    if kind != "cpu":
        return "fp32", f"lower precisions are not tried on {kind}"
    found = [name for name in FAST_BF16 if name in cpu_features()]
    if found:
        return "bf16", f"this CPU has {found[0]}"
    return "fp32", f"this CPU has neither {' nor '.join(FAST_BF16)}"


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure how fast a device multiplies two square matrices: the best FLOP/s within a tenth of a second."""
    side = 8192 if device.type == "cuda" else 1024
    matrix = torch.ones(side, side, dtype=dtype, device=device)
    best, end = float("inf"), time.perf_counter() + 0.1
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for a GPU
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def cpu_features() -> set[str]:
    """List the instruction sets of this CPU by the names that Linux uses; empty if the system does not tell."""
    ask = getattr(torch.cpu, "get_capabilities", None)  # of newer versions of PyTorch, on every system
    if ask is not None:
        return {name for name, there in ask().items() if there is True}
    if sys.platform != "linux":
        return set()
    try:
        lines = CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    return {word for line in lines if line.startswith("flags") for word in line.split()}
