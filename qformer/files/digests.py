"""Digests of the weights of towers that have names of ours: a name fixes bytes, and checkpoints say which."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from qformer.files import pretrained, real_towers
from qformer.files.soundness import digest_of
from qformer.files.tensors import read_tensors

if TYPE_CHECKING:
    from pathlib import Path


def digest(name: str) -> str | None:
    """Digest of the weights of `mini:NAME` or `real:NAME`, fetched or not; None for any other path or unknown name."""
    scheme, own = name[: len(pretrained.MINI)], name[len(pretrained.MINI) :]
    if scheme == real_towers.SCHEME and own in real_towers.REAL_TOWERS:
        return real_towers.REAL_TOWERS[own].digest
    if scheme == pretrained.MINI and own in pretrained.shipped():
        return _hash_weights(pretrained.shipped()[own])
    return None


@lru_cache
def _hash_weights(folder: Path) -> str:
    return digest_of(read_tensors(folder))
