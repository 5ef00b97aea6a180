"""Files of tensors by name: torch checkpoints, safetensors, and the sharded folders of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from qformer import pretrained
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file, or of a folder in the form of transformers, by name; nothing in it is executed.

    Args:
        path: a `.safetensors` file; any other file, read as a torch checkpoint whose state dict may stand under
            `model`, as LAVIS writes it; a folder with `model.safetensors`, or an index and its shards.

    Raises:
        UsageError: nothing is there, it is damaged, wants to run code, or holds something else.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise UsageError(f"there is no file or folder '{path}'; give the checkpoint's path")
    return _read_file(path)


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        held: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # any bytes are a pickle of sorts, so reading them can fail in any way
        raise UsageError(
            f"'{path}' is no checkpoint, is damaged, or holds code (which is not run); download it again"
        ) from error
    held = held.get("model", held) if isinstance(held, dict) else held
    if not isinstance(held, dict) or not held or not all(isinstance(value, Tensor) for value in held.values()):
        raise UsageError(f"'{path}' holds something else than tensors by name; give a checkpoint")
    return {str(name): tensor for name, tensor in held.items()}


def _read_folder(path: Path) -> dict[str, Tensor]:
    pretrained.check_indexes(path)
    whole, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if whole.is_file():
        return _read_file(whole)
    if not index.is_file():
        raise UsageError(f"'{path}' holds neither {whole.name} nor {index.name}; give a folder of save_pretrained")
    places = pretrained.shards(index)
    shards = sorted(set(places.values()))
    if gone := [shard for shard in shards if not (path / shard).is_file()]:
        raise UsageError(f"'{path}' lacks {listed(gone)}, which its index names; download it again")
    held = {name: tensor for shard in shards for name, tensor in _read_file(path / shard).items()}
    if gone := sorted(places.keys() ^ held.keys()):
        raise UsageError(f"the shards in '{path}' are not those of its index: {listed(gone)}; download it again")
    return held


def listed(names: Sequence[str], limit: int = 20) -> str:
    """Names for a message, cut to be readable."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(sorted(names)[:limit]) + more) or "nothing"
