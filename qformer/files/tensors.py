"""Reading of tensors by name from torch checkpoints, safetensors, and sharded transformers folders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from qformer.files import pretrained
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: Keys of the state dict in the files of LAVIS, Lightning, DeepSpeed and custom training loops.
STATE_DICTS = ("model", "state_dict", "model_state_dict", "module")
#: Parts of tensor names that wrappers add: DDP, `torch.compile`, FSDP, activation checkpointing.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
WHOLE = ("model.safetensors", "pytorch_model.bin")  # unsharded weights; the second name is of transformers before 4.35


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a file or of a transformers folder by name; no code in it is executed.

    Args:
        path: a `.safetensors` file; any other file, which is read as a torch checkpoint with the state dict at the top
            or under one of `STATE_DICTS`; or a folder with one of `WHOLE`, or its index and shards.

    Returns:
        Tensors under their names in the model, without the parts that DDP, `torch.compile` or FSDP add.

    Raises:
        UsageError: the path does not exist, is damaged, needs code to run, or holds anything but tensors.
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
        if objects := _find_objects(path):
            raise UsageError(
                f"'{path}' holds code (which is not run): {listed(objects)}; save the state dict alone, by "
                "torch.save(model.state_dict(), path)"
            ) from error
        raise UsageError(
            f"'{path}' is not a checkpoint, is damaged, or holds code (which is not run); download it again"
        ) from error
    while isinstance(held, dict) and (inner := _find_state_dicts(held)):
        held = held[inner[0]]
    if not _is_state_dict(held):
        there = f" ({listed([str(key) for key in held])})" if isinstance(held, dict) and held else ""
        raise UsageError(f"'{path}' does not hold tensors by name{there}; give a checkpoint")
    return _unwrap({str(name): tensor for name, tensor in held.items()}, path)


def _is_state_dict(held: Any) -> bool:
    return isinstance(held, dict) and bool(held) and all(isinstance(value, Tensor) for value in held.values())


def _find_state_dicts(held: dict[Any, Any]) -> list[Any]:
    """Find the keys of a state dict: the usual ones, or else the only key that holds tensors of modules."""
    usual = [key for key in STATE_DICTS if isinstance(held.get(key), dict)]
    others = [key for key, value in held.items() if _is_state_dict(value) and any("." in str(name) for name in value)]
    return usual or (others if len(others) == 1 else [])


def _find_objects(path: Path) -> list[str]:
    """List the classes and functions, other than those of tensors, that a torch checkpoint would import."""
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # any bytes, see above
        return []


def _unwrap(held: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Restore the names that tensors had before the model was wrapped."""
    bare = {".".join(part for part in name.split(".") if part not in WRAPPERS): name for name in held}
    if len(bare) < len(held):
        twice = next(name for name in held if name not in bare.values())
        raise UsageError(f"'{path}' holds '{twice}' twice, wrapped and not; give a checkpoint of one model")
    return {name: held[wrapped] for name, wrapped in bare.items()}


def _read_folder(path: Path) -> dict[str, Tensor]:
    pretrained.check_indexes(path)
    there = [path / name for name in (*WHOLE, *(f"{name}.index.json" for name in WHOLE)) if (path / name).is_file()]
    if not there:
        raise UsageError(
            f"'{path}' holds none of {', '.join(WHOLE)} and no index of their shards; give a folder from "
            "save_pretrained"
        )
    if there[0].name in WHOLE:
        return _read_file(there[0])
    index = there[0]
    places = pretrained.shards(index)
    shards = sorted(set(places.values()))
    if gone := [shard for shard in shards if not (path / shard).is_file()]:
        raise UsageError(f"'{path}' lacks {listed(gone)}, which its index names; download it again")
    held = {name: tensor for shard in shards for name, tensor in _read_file(path / shard).items()}
    if gone := sorted(places.keys() ^ held.keys()):
        raise UsageError(f"the shards in '{path}' do not match its index: {listed(gone)}; download it again")
    return held


def listed(names: Sequence[str], limit: int = 20) -> str:
    """Join names for a message, at most `limit` of them."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(sorted(names)[:limit]) + more) or "nothing"


def refuse(missing: Sequence[str], left_over: Sequence[str], what: str, system: str = "BLIP-2") -> None:
    """Raise a UsageError that lists missing and left-over names, if there are any; `system` is the model's title."""
    if missing or left_over:
        raise UsageError(
            f"{what} does not fit {system}: missing {listed(missing)}; left over {listed(left_over)}; "
            "give one of its files as it was released or saved"
        )
