"""Devices by name, with an error if this machine does not have the one asked for; and dtypes by name."""

from __future__ import annotations

import torch

from qformer.types import UsageError

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
