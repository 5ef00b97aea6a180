"""Files of a feature store: the schema of `store.json`, and shards, which are safetensors of rows and lists.

A checksum of tensors and faults is part of the shard, so that a shard is a single file that is written atomically.
Shards of earlier versions have no checksum and are accepted. The lists are checked against the rows before any row is
read.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from qformer.fields import Count, Positive
from qformer.files import soundness
from qformer.files.records import Form, replacing

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

ROWS = "tokens"
LISTS = ("lengths", "tiles", "sizes", "marks")
FILES = "files"  # long[n, 3], size, time and digest of each sample's file; missing in shards of earlier versions
PARTS = "parts"  # int[n, 4], number of a crop, width, height and frames of what it shows; of crops of several pictures
FAULTS = "faults"
CHECKSUM = "checksum"  # long[1]; a tensor, since safetensors writes several metadata texts in any order


class Unsound(ValueError):
    """Shard that differs from what was written; the message says how."""


class Sizes(Form):
    """Sizes of the image encoder."""

    width: Positive
    patch_size: Positive
    image_size: Positive
    extra: Count


class Amounts(Form):
    """Numbers of stored samples and crops."""

    samples: Positive
    crops: Positive


class Made(Form):
    """Configuration of a store, by sections."""

    __pydantic_extra__: dict[str, dict[str, Any]] = Field(init=False)
    data: Amounts


class Manifest(Form):
    """Content of `store.json`, see `FeatureStore`; those of earlier versions have no checksum."""

    made: Made
    encoder: Sizes
    per_shard: Positive
    bytes_per_sample: Positive


def write_shard(path: Path, tensors: dict[str, Tensor], faults: dict[str, tuple[str, str]]) -> None:
    """Write a shard atomically.

    Raises:
        OSError: the shard cannot be written, as on a full disk.
    """
    told = json.dumps(faults)
    try:
        sealed = tensors | {CHECKSUM: torch.tensor([int(soundness.checksum_of(tensors, told), 16)])}
        with replacing(path) as partial:
            save_file(sealed, partial, {FAULTS: told})
    except SafetensorError as error:  # what it makes of a full disk
        raise OSError(str(error)) from error


def read_shard(path: Path, verify: bool) -> tuple[Any, dict[str, list[Any]], dict[str, tuple[str, str]]]:
    """Open a shard, and return the open file, its lists by name, and its faults by place.

    Args:
        verify: read all tensors and compare them with their checksum.

    Raises:
        Unsound: something is missing, has another type, or differs from what was written.
    """
    try:
        file = safe_open(path, "pt")
        metadata, names = file.metadata() or {}, set(file.keys())
        if gone := {ROWS, *LISTS} - names:
            raise Unsound(f"it lacks {min(gone)}")
        if FAULTS not in metadata:
            raise Unsound(f"it lacks {FAULTS}")
        lists = {name: file.get_tensor(name) for name in LISTS}
        more = {name: file.get_tensor(name) for name in (FILES, PARTS) if name in names}
        if verify and CHECKSUM in names:
            found = soundness.checksum_of(lists | more | {ROWS: file.get_tensor(ROWS)}, metadata[FAULTS])
            known = file.get_tensor(CHECKSUM).flatten().tolist()
            if [int(found, 16)] != known:
                written = f"{known[0]:08x}" if len(known) == 1 and isinstance(known[0], int) else "a number"
                raise Unsound(f"its checksum is {found} instead of {written}")
    except (SafetensorError, OSError, RuntimeError) as error:
        raise Unsound(str(error)) from error
    _check_sizes(lists, file.get_slice(ROWS))
    for name, size in ((FILES, [len(lists["marks"]), 3]), (PARTS, [len(more.get(PARTS, ())), 4])):
        if name in more and (more[name].dtype != torch.int64 or list(more[name].shape) != size):
            raise Unsound(f"its {name} are {more[name].dtype} {list(more[name].shape)}")
    return (
        file,
        {name: tensor.tolist() for name, tensor in (lists | more).items()},
        _parse_faults(metadata[FAULTS], lists),
    )


def _check_sizes(lists: dict[str, Tensor], rows: Any) -> None:
    """Check that the numbers of samples, crops, tiles and rows agree. Raises Unsound: they do not."""
    for name, tensor in lists.items():
        if tensor.dtype not in (torch.int32, torch.int64) or tensor.ndim != (2 if name == "sizes" else 1):
            raise Unsound(f"its {name} are {tensor.dtype} {list(tensor.shape)}")
        if tensor.numel() and int(tensor.min()) < 0:
            raise Unsound(f"its {name} hold numbers below zero")
    crops, shape = len(lists["tiles"]), rows.get_shape()
    if len(shape) != 2 or shape[0] != int(lists["lengths"].sum()):
        raise Unsound(f"its {ROWS} are {shape}, but its lengths sum to {int(lists['lengths'].sum())}")
    if len(lists["lengths"]) != int(lists["tiles"].sum()):
        raise Unsound(f"it has lengths of {len(lists['lengths'])} tiles, but {int(lists['tiles'].sum())} tiles")
    if list(lists["sizes"].shape) != [crops, 2] or not len(lists["marks"]) or crops % len(lists["marks"]):
        raise Unsound(
            f"it has {len(lists['marks'])} marks, {crops} crops and sizes of shape {list(lists['sizes'].shape)}"
        )


def _parse_faults(text: str, lists: dict[str, Tensor]) -> dict[str, tuple[str, str]]:
    """Parse the faults of samples by place, and check that all other samples have tiles."""
    try:
        faults = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unsound(f"its {FAULTS} are not JSON") from error
    samples = len(lists["marks"])
    places = [str(place) for place in range(samples)]
    pairs = faults.values() if isinstance(faults, dict) else [None]
    if not all(isinstance(pair, list) and list(map(type, pair)) == [str, str] for pair in pairs):
        raise Unsound(f"its {FAULTS} are not pairs of texts by place")
    if odd := faults.keys() - set(places):
        raise Unsound(f"its {FAULTS} name place {min(odd)!r} of {samples}")
    stored = torch.tensor([place not in faults for place in places])
    tiles, sizes = (lists[name].view(samples, -1) for name in ("tiles", "sizes"))
    if not (tiles[stored] > 0).all() or not (sizes[stored] > 0).all():
        raise Unsound("a sample that has no fault has no tiles")
    return {place: (pair[0], pair[1]) for place, pair in faults.items()}
