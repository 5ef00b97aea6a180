"""Code shared by the image encoders of BLIP-2: weights in half precision, and loading of released tensors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qformer.devices import DTYPES
from qformer.files.tensors import listed
from qformer.types import UsageError
from qformer.vision.base import CLIP_MEAN, CLIP_STD, resize_positions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from qformer.vision.base import VisionEncoder

#: Kinds of devices on which layers stored in half compute in single.
SLOW_IN_HALF = frozenset({"cpu"})
#: The tensor by which a tower is found inside a larger model.
FIRST = "patch_embed.proj.weight"


class Sizes(Protocol):
    """Options that all these encoders read (`qformer.vision.options`)."""

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_hidden: int
    weights: str | None
    layers: tuple[int, ...] | None


class ViTOptions(Sizes, Protocol):
    """Options of the encoders of BLIP-2."""

    precision: Literal["fp16", "fp32"]


class TowerOptions(Sizes, Protocol):
    """Options of the encoders of pictures at their own size."""

    precision: Literal["fp32", "fp16", "bf16"]


class Linear(nn.Linear):
    """A linear layer whose input can have another precision than the stored weights."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(*one_dtype(x, self.weight, self.bias))


def one_dtype(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Convert the operands of a layer to the dtype of its weights; under autocast, which converts them, do nothing.

    On a CPU the kernels for half precision are slow (torch 2.13, layers of ViT-g: a linear layer takes 3 times and the
    patch convolution 50 times as long as in single), so weights stored in half precision are used in single there.
    """
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return x, weight, bias
    dtype = torch.promote_types(weight.dtype, torch.float32) if device in SLOW_IN_HALF else weight.dtype
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def store(module: nn.Module, precision: str) -> None:
    """Convert Linear and Conv layers to fp16 or bf16; CLS, positions, q_bias, v_bias and norms stay in fp32."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.Conv3d):
            layer.to(DTYPES[precision])


@torch.no_grad()
def assign(
    encoder: VisionEncoder,
    state: Mapping[str, Tensor],
    source: str,
    positions: str | None = "pos_embed",
    statistics: tuple[Sequence[float], Sequence[float]] = (CLIP_MEAN, CLIP_STD),
) -> None:
    """Replace the parameters, which can be on the meta device, by the tensors of a checkpoint.

    Every tensor takes the dtype of the parameter; the table named `positions` is resized to the image size.
    `statistics` are the mean and std of the encoder.

    Raises:
        UsageError: names are left over or missing, or a shape differs.
    """
    target = encoder.state_dict()
    unknown, missing = state.keys() - target.keys(), target.keys() - state.keys()
    if unknown or missing:
        raise UsageError(
            f"the image encoder in '{source}' does not fit: missing {listed([*missing])}, left over "
            f"{listed([*unknown])}; give a file of this encoder alone and set depth to its blocks"
        )
    tensors = dict(state)
    if positions is not None:
        tensors[positions] = _fit_positions(encoder, state[positions], target[positions].ndim)
    wrong = [
        f"{name} {list(tensors[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in target.items()
        if tensors[name].shape != tensor.shape
    ]
    if wrong:
        raise UsageError(
            f"'{source}' holds an image encoder of another size: {listed(wrong)}; "
            "set width, mlp_hidden and patch_size to those of the file"
        )
    encoder.load_state_dict({name: tensors[name].to(tensor.dtype) for name, tensor in target.items()}, assign=True)
    # in no checkpoint, hence still without values if the encoder was made on the meta device
    device = next(iter(tensors.values())).device
    encoder.mean, encoder.std = (torch.tensor(values, device=device).view(3, 1, 1) for values in statistics)


def of_tower(state: Mapping[str, Tensor], source: str, unused: Sequence[str]) -> dict[str, Tensor]:
    """Tensors of a vision transformer by their names in it, out of a model that has it under any prefix.

    Args:
        unused: beginnings of names, in the transformer, that are left out.

    Raises:
        UsageError: there is no such transformer, or more than one.
    """
    starts = [name.removesuffix(FIRST) for name in state if name == FIRST or name.endswith(f".{FIRST}")]
    if len(starts) != 1:
        raise UsageError(
            f"'{source}' holds {len(starts)} tensors named {FIRST}, and one is that of an image encoder; give a file "
            "or folder that holds the encoder"
        )
    inside = {name.removeprefix(starts[0]): tensor for name, tensor in state.items() if name.startswith(starts[0])}
    return {name: tensor for name, tensor in inside.items() if not name.startswith(tuple(unused))}


def _fit_positions(encoder: VisionEncoder, table: Tensor, dims: int) -> Tensor:
    """Resize a table float[(1,) extra + side * side, D] to the image size; other shapes are returned, for the error.

    This is done once, and bicubic for every encoder, as Oryx made its large table; `interpolation` is for tiles.
    """
    side = encoder.image_size // encoder.patch_size
    patches = table.shape[-2] - encoder.extra if table.ndim == dims else 0
    if patches < 1 or math.isqrt(patches) ** 2 != patches:
        return table
    resized = resize_positions(
        table.float().view(1, *table.shape[-2:]),
        encoder.extra,
        (side, side),
        encoder.align_corners,
    )
    return resized.view(*table.shape[:-2], *resized.shape[-2:])
