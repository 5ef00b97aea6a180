"""Options of the built-in image encoders, separate from the encoders so that they are checked without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from qformer.fields import Epsilon, Positive
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from qformer.vision.clip import ClipViT
    from qformer.vision.eva import EvaViT
    from qformer.vision.hf import HFVisionEncoder


@dataclass
class EvaConfig:
    """Options of `qformer.vision.eva`; the defaults are the ViT-g/14 of BLIP-2.

    Attributes:
        image_size: side in pixels for which the position table is made.
        precision: "fp16" stores Linear and Conv weights in half (for a frozen encoder), "fp32" everything in single.
        weights: a `.pth` or `.safetensors` file, or `eva_vit_g`, the released one; None starts from random weights.
    """

    image_size: Positive = 224
    patch_size: Positive = 14
    width: Positive = 1408
    depth: Positive = 39
    heads: Positive = 16
    mlp_hidden: Positive = 6144
    norm_eps: Epsilon = 1e-6
    precision: Literal["fp16", "fp32"] = "fp16"
    weights: str | None = None

    def __post_init__(self) -> None:
        check_sizes(self.width, self.heads, self.image_size, self.patch_size)

    def build(self) -> EvaViT:
        """The encoder, with random weights or those of the file.

        Raises:
            UsageError: the file is missing, is no checkpoint, or does not hold this encoder.
        """
        from qformer.vision import eva

        return eva.build(self)

    def build_from(self, state: Mapping[str, Tensor], source: str) -> EvaViT:
        """The encoder with these tensors, by parameter name; `source` names them in messages.

        A final norm, a head and (for a depth of 39) the 40th block are dropped.

        Raises:
            UsageError: other names are left over or missing, or a shape differs.
        """
        from qformer.vision import eva

        return eva.build_from(self, state, source)


@dataclass
class ClipConfig:
    """Options of `qformer.vision.clip`; the defaults are the ViT-L/14 of BLIP-2.

    Attributes:
        image_size: side in pixels for which the position table is made.
        depth: blocks that run; LAVIS's release 1.0.2 runs 21 of the 24, its later tree 23, the paper's second-last.
        precision: "fp16" stores Linear and Conv weights in half (for a frozen encoder), "fp32" everything in single.
        weights: a `.pth` or `.safetensors` file, or `clip_vit_L`, the released one; None starts from random weights.
    """

    image_size: Positive = 224
    patch_size: Positive = 14
    width: Positive = 1024
    depth: Positive = 23
    heads: Positive = 16
    mlp_hidden: Positive = 4096
    precision: Literal["fp16", "fp32"] = "fp16"
    weights: str | None = None

    def __post_init__(self) -> None:
        check_sizes(self.width, self.heads, self.image_size, self.patch_size)

    def build(self) -> ClipViT:
        """The encoder, with random weights or those of the file.

        Raises:
            UsageError: the file is missing, is no checkpoint, or does not hold this encoder.
        """
        from qformer.vision import clip

        return clip.build(self)

    def build_from(self, state: Mapping[str, Tensor], source: str) -> ClipViT:
        """The encoder with these tensors, by parameter name; `source` names them in messages.

        Of the whole tower the last block, the final norm and the projection are dropped.

        Raises:
            UsageError: other names are left over or missing, or a shape differs.
        """
        from qformer.vision import clip

        return clip.build_from(self, state, source)


@dataclass
class HFVisionConfig:
    """Options of `qformer.vision.hf`.

    Attributes:
        path: a folder written by `save_pretrained`, or the id of a model on the hub. The mean and std of its
            `preprocessor_config.json` are used, those of its family where there is none.
        layer: which hidden state, see the top of that module.
        precision: how all weights are stored; tokens come out in fp32 all the same.
    """

    path: str
    layer: int = -1
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"

    def build(self) -> HFVisionEncoder:
        """The encoder with the weights of the folder or hub id.

        Raises:
            UsageError: nothing can be read there, it holds no vision transformer, or weights are missing in it.
        """
        from qformer.vision import hf

        return hf.build(self.path, self.layer, self.precision)


def check_sizes(width: int, heads: int, image_size: int, patch_size: int) -> None:
    """Refuse sizes that do not divide.

    Raises:
        UsageError: the width into heads, or the image into patches.
    """
    if heads < 1 or width % heads:
        raise UsageError(f"width {width} does not divide into {heads} heads; use a multiple of {heads}")
    if patch_size < 1 or image_size % patch_size:
        raise UsageError(
            f"image_size {image_size} does not divide into patches of {patch_size}; use a multiple of {patch_size}"
        )
