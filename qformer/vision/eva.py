"""EVA-CLIP ViT-g/14, the image encoder of BLIP-2: a plain pre-norm ViT that ends without a norm and keeps every token.

Sources: EVA (arXiv 2211.07636) and BLIP-2 (arXiv 2301.12597, section 3.4). Parameters are named as under
`visual_encoder` in LAVIS's checkpoints, so that those load by stripping the prefix.

BLIP-2 stores Linear and Conv weights in fp16 and the rest in fp32; `store_fp16` is that rule. The residual stream and
the output are always fp32, inside and outside autocast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from qformer.types import UsageError
from qformer.vision.base import CLIP_MEAN, CLIP_STD, VisionEncoder, resize_positions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: What a released file may hold beyond the encoder: EVA's final norm and classification head. BLIP-2 uses neither.
LEFTOVERS = ("norm.", "fc_norm.", "head.")
#: ViT-g has 40 blocks and BLIP-2 reads the output of the 39th, so a depth of 39 drops this one.
LAST_BLOCK = "blocks.39."


@dataclass
class EvaConfig:
    """Options of the encoder; the defaults are the ViT-g/14 of BLIP-2.

    Attributes:
        image_size: side in pixels for which the position table is made.
        precision: "fp16" stores Linear and Conv weights in half (for a frozen encoder), "fp32" everything in single.
        weights: a `.pth` or `.safetensors` file; None starts from random weights.
    """

    image_size: int = 224
    patch_size: int = 14
    width: int = 1408
    depth: int = 39
    heads: int = 16
    mlp_hidden: int = 6144
    precision: Literal["fp16", "fp32"] = "fp16"
    weights: str | None = None

    def __post_init__(self) -> None:
        if self.heads < 1 or self.width % self.heads:
            raise UsageError(
                f"width {self.width} does not divide into {self.heads} heads; use a multiple of {self.heads}"
            )
        if self.patch_size < 1 or self.image_size % self.patch_size:
            raise UsageError(
                f"image_size {self.image_size} does not divide into patches of {self.patch_size}; "
                f"use a multiple of {self.patch_size}"
            )

    def build(self) -> EvaViT:
        """The encoder, with random weights or those of the file.

        Raises:
            UsageError: the file is missing, is no checkpoint, or does not hold this encoder.
        """
        if self.weights is None:
            return EvaViT(self)
        state = read_state(self.weights)
        with torch.device("meta"):  # ViT-g is a billion numbers: do not draw them only to overwrite them
            encoder = EvaViT(self)
        encoder.assign(state, source=self.weights)
        return encoder


class EvaViT(VisionEncoder):
    """The vision transformer; tokens are CLS, then the patches row by row."""

    def __init__(self, config: EvaConfig) -> None:
        super().__init__(width=config.width, patch_size=config.patch_size, image_size=config.image_size, extra=1)
        side = config.image_size // config.patch_size
        self.patch_embed = PatchEmbed(config.patch_size, config.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.extra + side * side, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.reset_parameters()
        if config.precision == "fp16":
            store_fp16(self)

    def encode(self, pixels: Tensor) -> Tensor:
        """Normalised pixels float[N, 3, h, w] -> float32[N, 1 + rows * columns, D]."""
        positions = resize_positions(self.pos_embed, self.extra, self.grid(pixels.shape[-1], pixels.shape[-2]))
        patches = self.patch_embed(pixels)
        cls = self.cls_token.expand(len(patches), -1, -1)
        x = torch.cat([cls, patches], dim=1) + positions  # (N, S, D); CLS and positions are fp32, so x is
        for block in self.blocks:
            x = block(x)
        return x

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Random weights: truncated normal of 0.02, and as in BEiT the outputs of block n are divided by sqrt(2n)."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for number, block in enumerate(self.blocks, start=1):
            assert isinstance(block, Block)
            block.attn.proj.weight /= math.sqrt(2 * number)
            block.mlp.fc2.weight /= math.sqrt(2 * number)

    def assign(self, state: Mapping[str, Tensor], source: str) -> None:
        """Put the tensors of a checkpoint in the place of the parameters, which may be on the meta device.

        Every tensor takes the dtype that the parameter had; a position table of another size is resized.

        Args:
            state: tensors by parameter name; a final norm, a head and (for a depth of 39) the 40th block are dropped.
            source: names the checkpoint in messages.

        Raises:
            UsageError: other names are left over or missing, or a shape differs.
        """
        target = self.state_dict()
        dropped = (*LEFTOVERS, LAST_BLOCK) if len(self.blocks) == 39 else LEFTOVERS
        state = {name: tensor for name, tensor in state.items() if not name.startswith(dropped)}
        unknown, missing = sorted(state.keys() - target.keys()), sorted(target.keys() - state.keys())
        if unknown or missing:
            raise UsageError(
                f"vision.weights '{source}' do not fit this EVA encoder: missing {_some(missing)}, "
                f"left over {_some(unknown)}; give a file of the visual encoder alone and set depth to its blocks"
            )
        state["pos_embed"] = self._fit_positions(state["pos_embed"])
        wrong = [
            f"{name} {list(state[name].shape)} instead of {list(tensor.shape)}"
            for name, tensor in target.items()
            if state[name].shape != tensor.shape
        ]
        if wrong:
            raise UsageError(
                f"vision.weights '{source}' hold an EVA encoder of another size: {_some(wrong)}; "
                "set width, mlp_hidden and patch_size to those of the file"
            )
        self.load_state_dict({name: state[name].to(tensor.dtype) for name, tensor in target.items()}, assign=True)
        # in no checkpoint, hence still without values if the encoder was made on the meta device
        device = self.cls_token.device
        self.mean, self.std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))

    def _fit_positions(self, table: Tensor) -> Tensor:
        """A table float[1, 1 + side * side, D] resized to this image size; anything else as it is, to be refused."""
        side = self.image_size // self.patch_size
        patches = table.shape[1] - self.extra if table.ndim == 3 else 0
        if patches < 1 or math.isqrt(patches) ** 2 != patches:
            return table
        return resize_positions(table.float(), self.extra, (side, side))


class PatchEmbed(nn.Module):
    """Square patches through one convolution: float[N, 3, h, w] -> [N, rows * columns, D]."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        pixels, weight, bias = _one_dtype(pixels, self.proj.weight, self.proj.bias)
        patches = F.conv2d(pixels, weight, bias, stride=self.proj.stride)  # (N, D, rows, columns)
        return patches.flatten(2).transpose(1, 2)  # (N, rows * columns, D)


class Block(nn.Module):
    """Pre-norm transformer block on a residual stream float32[N, S, D]."""

    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=1e-6)
        self.attn = Attention(config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width, eps=1e-6)
        self.mlp = Mlp(config.width, config.mlp_hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    """Self-attention, [N, S, D] -> [N, S, D]. Queries and values have a bias, keys have none: softmax cancels it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        tiles, length, width = x.shape
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        qkv = F.linear(*_one_dtype(x, self.qkv.weight, bias))
        qkv = qkv.view(tiles, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind()  # (N, heads, S, D / heads) each
        x = F.scaled_dot_product_attention(query, key, value)
        return self.proj(x.transpose(1, 2).reshape(tiles, length, width))  # (N, S, D)


class Mlp(nn.Module):
    """Two layers around an exact (erf) GELU, [N, S, D] -> [N, S, D]."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Linear(nn.Linear):
    """`nn.Linear` for an input of another precision than the stored weights."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(*_one_dtype(x, self.weight, self.bias))


def _one_dtype(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands of a layer in the dtype of its weights; where autocast is on, it converts by itself.

    A CPU has kernels for half, but slow ones (torch 2.13, layers of ViT-g: a linear takes 3 times and the patch
    convolution 50 times as long as in single), so there weights stored in half are used in single.
    """
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return x, weight, bias
    dtype = torch.promote_types(weight.dtype, torch.float32) if device == "cpu" else weight.dtype
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def store_fp16(module: nn.Module) -> None:
    """Weights and biases of Linear and Conv layers become fp16; CLS, positions, q_bias, v_bias and norms stay fp32."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.half()


def read_state(path: str) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, or of any other file as a torch checkpoint (weights only).

    Raises:
        UsageError: no such file, or it does not hold tensors by name.
    """
    if not Path(path).is_file():
        raise UsageError(f"vision.weights '{path}' does not exist; give a .pth or .safetensors file")
    try:
        if path.endswith(".safetensors"):
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # any bytes are a pickle of sorts, so reading them can fail in any way
        raise UsageError(f"vision.weights '{path}' cannot be read; give an intact .pth or .safetensors file") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UsageError(f"vision.weights '{path}' holds something else than tensors by name; give a plain state dict")
    return state


def _some(names: Sequence[str], limit: int = 10) -> str:
    """A list for an error message, cut to be readable."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) + more) or "nothing"
