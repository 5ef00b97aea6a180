"""What tells sound files and weights from damaged ones: checksums, and whether every number is finite.

Checksums are CRC-32: they find any damage of up to 32 neighbouring bits and all but one in four billion of the rest, at
some GB/s. They are no protection against somebody who means harm. `unchecked` is for haste: inside, nothing is checked.
"""

from __future__ import annotations

import json
import zlib
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

PIECE = 8 << 20  # bytes read at a time
SEAL = "checksum"  # key of what `seal` adds
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # in which is trained

_checks: ContextVar[bool] = ContextVar("checks", default=True)


@contextmanager
def unchecked(skip: bool = True) -> Iterator[None]:
    """Inside, files and weights are taken as they are, unless `skip` is false."""
    before = _checks.set(_checks.get() and not skip)
    try:
        yield
    finally:
        _checks.reset(before)


def checks() -> bool:
    """Whether files and weights are to be checked here."""
    return _checks.get()


def checksum(path: Path) -> str:
    """Of the bytes of a file, 8 hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    found, buffer = 0, memoryview(bytearray(PIECE))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            found = zlib.crc32(buffer[:count], found)
    return f"{found:08x}"


def checksum_of(tensors: Mapping[str, Tensor], text: str) -> str:
    """Of names, dtypes, shapes and bytes of tensors on the CPU, whatever their order, and of a text beside them."""
    found = zlib.crc32(text.encode())
    for name, tensor in sorted(tensors.items()):
        found = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), found)
        found = zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().data, found)
    return f"{found:08x}"


def seal(values: dict[str, Any]) -> dict[str, Any]:
    """Plain data, as JSON will give them back, with a checksum of all the rest under the key `checksum`."""
    bare = json.loads(json.dumps({key: value for key, value in values.items() if key != SEAL}))
    return bare | {SEAL: _checksum_json(bare)}


def seal_holds(values: dict[str, Any]) -> bool:
    """Whether sealed data are as they were; those without a seal are taken to be."""
    bare = {key: value for key, value in values.items() if key != SEAL}
    return SEAL not in values or values[SEAL] == _checksum_json(bare)


def _checksum_json(values: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(values, sort_keys=True).encode()):08x}"


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of a tensor that holds NaN or infinity, None if there is none; waits for the device once."""
    named = {name: tensor.detach() for name, tensor in tensors.items() if tensor.dtype in FLOATS and tensor.numel()}
    if not named:
        return None
    # The smallest and the largest are NaN where anything is; one pass that writes nothing.
    ends = torch.stack([torch.stack(torch.aminmax(tensor)).double() for tensor in named.values()])
    fine = ends.isfinite().all(dim=1).tolist()
    return next((name for name, is_fine in zip(named, fine, strict=True) if not is_fine), None)
