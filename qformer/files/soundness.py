"""Detection of damaged files and weights by checksums and by values that are not finite.

Checksums are CRC-32, at some GB/s: they detect any damage of up to 32 adjacent bits, and all but one in four billion of
other cases. They do not protect against an attacker. `unchecked` turns all checks off to save time.
"""

from __future__ import annotations

import hashlib
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
SEAL = "checksum"  # key that `seal` adds
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # dtypes of trained weights

_checks: ContextVar[bool] = ContextVar("checks", default=True)


@contextmanager
def unchecked(skip: bool = True) -> Iterator[None]:
    """Context in which files and weights are not checked, unless `skip` is false."""
    before = _checks.set(_checks.get() and not skip)
    try:
        yield
    finally:
        _checks.reset(before)


def checks() -> bool:
    """Return False inside `unchecked`, else True."""
    return _checks.get()


def checksum(path: Path) -> str:
    """Compute the checksum of a file, 8 hexadecimal digits.

    Raises:
        OSError: the file cannot be read.
    """
    found, buffer = 0, memoryview(bytearray(PIECE))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            found = zlib.crc32(buffer[:count], found)
    return f"{found:08x}"


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, in the order of its numbers; digests of weights are made of them."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def digest_weights(tensors: Mapping[str, Tensor]) -> str:
    """Hash the names, dtypes, shapes and bytes of tensors, in any order, to 32 hexadecimal digits."""
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(raw(tensor))
    return found.hexdigest()


def checksum_of(tensors: Mapping[str, Tensor], text: str) -> str:
    """Compute a checksum of a text and of the names, dtypes, shapes and bytes of CPU tensors, in any order."""
    found = zlib.crc32(text.encode())
    for name, tensor in sorted(tensors.items()):
        found = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), found)
        found = zlib.crc32(raw(tensor), found)
    return f"{found:08x}"


def seal(values: dict[str, Any]) -> dict[str, Any]:
    """Convert plain data to their JSON form and add a checksum of all other keys under `checksum`."""
    bare = json.loads(json.dumps({key: value for key, value in values.items() if key != SEAL}))
    return bare | {SEAL: _checksum_json(bare)}


def seal_holds(values: dict[str, Any]) -> bool:
    """Check if sealed data are unchanged; data without a seal pass."""
    bare = {key: value for key, value in values.items() if key != SEAL}
    return SEAL not in values or values[SEAL] == _checksum_json(bare)


def _checksum_json(values: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(values, sort_keys=True).encode()):08x}"


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Find a tensor that holds NaN or infinity and return its name, else None; waits for the device once."""
    named = {name: tensor.detach() for name, tensor in tensors.items() if tensor.dtype in FLOATS and tensor.numel()}
    if not named:
        return None
    # Minimum and maximum are NaN if any value is; this takes one pass and writes nothing.
    ends = torch.stack([torch.stack(torch.aminmax(tensor)).double() for tensor in named.values()])
    fine = ends.isfinite().all(dim=1).tolist()
    return next((name for name, is_fine in zip(named, fine, strict=True) if not is_fine), None)
