"""Options of the built-in image encoders, separate from the encoders so that they are checked without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from qformer.fields import Epsilon, Positive
from qformer.types import UsageError
from qformer.vision.levels import levels

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from qformer.vision.clip import ClipViT
    from qformer.vision.eva import EvaViT
    from qformer.vision.hf import HFVisionEncoder
    from qformer.vision.oryx import OryxViT
    from qformer.vision.qwen2vl import Qwen2VLViT

Precision = Literal["fp32", "fp16", "bf16"]


@dataclass
class EvaConfig:
    """Options of `qformer.vision.eva`; the defaults are the ViT-g/14 of BLIP-2.

    Attributes:
        image_size: side in pixels for which the position table is made.
        precision: "fp16" stores Linear and Conv weights in half (for a frozen encoder), "fp32" everything in single.
        weights: a `.pth` or `.safetensors` file, or `eva_vit_g`, the released one; None starts from random weights.
        layers: layers whose tokens are concatenated, see `qformer.vision.levels`; None reads the last one.
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
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_sizes(self.width, self.heads, self.image_size, self.patch_size)
        levels(self.layers, self.depth)

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
        layers: layers whose tokens are concatenated, see `qformer.vision.levels`; None reads the last one.
    """

    image_size: Positive = 224
    patch_size: Positive = 14
    width: Positive = 1024
    depth: Positive = 23
    heads: Positive = 16
    mlp_hidden: Positive = 4096
    precision: Literal["fp16", "fp32"] = "fp16"
    weights: str | None = None
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_sizes(self.width, self.heads, self.image_size, self.patch_size)
        levels(self.layers, self.depth)

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
        layers: layers whose tokens are concatenated, in place of `layer`; see `qformer.vision.levels`.
        final_norm: pass the last layer through the model's own final norm, where it has one for its patches.
            LLaVA-OneVision reads SigLIP without it.
    """

    path: str
    layer: int = -1
    precision: Precision = "fp32"
    layers: tuple[int, ...] | None = None
    final_norm: bool = True

    def __post_init__(self) -> None:
        if self.layers is not None and self.layer != -1:
            raise UsageError(
                f"vision.layer is {self.layer} and vision.layers is {list(self.layers)}; give one of the two"
            )

    def build(self) -> HFVisionEncoder:
        """The encoder with the weights of the folder or hub id.

        Raises:
            UsageError: nothing can be read there, it holds no vision transformer, or weights are missing in it.
        """
        from qformer.vision import hf

        return hf.build(self.path, self.layer, self.precision, self.layers, self.final_norm)


@dataclass
class Qwen2VLConfig:
    """Options of `qformer.vision.qwen2vl`; the defaults are the tower of every published Qwen2-VL.

    Attributes:
        image_size: side in pixels of a picture that no strategy cuts; there is no table that depends on it.
        temporal_patch: frames of one patch.
        merge: side of the blocks of patches in `encode_patches`, which the published merger makes one token of.
        weights: a folder or hub id of a Qwen2-VL of transformers, or a file that holds its tower, under whatever
            prefix; None starts from random weights.
        precision: how Linear and Conv weights are stored.
        layers: layers whose tokens are concatenated, see `qformer.vision.levels`; None reads the last one.
    """

    image_size: Positive = 224
    patch_size: Positive = 14
    temporal_patch: Positive = 2
    merge: Positive = 2
    width: Positive = 1280
    depth: Positive = 32
    heads: Positive = 16
    mlp_hidden: Positive = 5120
    weights: str | None = None
    precision: Precision = "fp32"
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_sizes(self.width, self.heads, self.image_size, self.patch_size)
        levels(self.layers, self.depth)
        if self.width // self.heads % 4:
            raise UsageError(
                f"width {self.width} and {self.heads} heads make heads of {self.width // self.heads}, but rows and "
                "columns turn a quarter each; use heads whose width is a multiple of 4"
            )

    def build(self) -> Qwen2VLViT:
        """The encoder, with random weights or published ones.

        Raises:
            UsageError: nothing can be read there, or it does not hold this encoder.
        """
        from qformer.vision import qwen2vl

        return qwen2vl.build(self)

    def build_from(self, state: Mapping[str, Tensor], source: str) -> Qwen2VLViT:
        """The encoder with these tensors, by their released names; `source` names them in messages.

        The merger, and everything that is not of the tower, is dropped.

        Raises:
            UsageError: names are left over or missing, or a shape differs.
        """
        from qformer.vision import qwen2vl

        return qwen2vl.build_from(self, state, source)


@dataclass
class OryxConfig:
    """Options of `qformer.vision.oryx`; the defaults are the published Oryx-ViT.

    Attributes:
        image_size: side in pixels for which the position table is made.
        weights: a file that holds the tower, under whatever prefix; None starts from random weights.
        precision: how Linear and Conv weights are stored.
        layers: layers whose tokens are concatenated, see `qformer.vision.levels`; None reads the last one.
    """

    image_size: Positive = 2048
    patch_size: Positive = 16
    width: Positive = 1152
    depth: Positive = 27
    heads: Positive = 16
    mlp_hidden: Positive = 4304
    weights: str | None = None
    precision: Precision = "fp32"
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_sizes(self.width, self.heads, self.image_size, self.patch_size)
        levels(self.layers, self.depth)

    def build(self) -> OryxViT:
        """The encoder, with random weights or those of the file.

        Raises:
            UsageError: the file is missing, is no checkpoint, or does not hold this encoder.
        """
        from qformer.vision import oryx

        return oryx.build(self)

    def build_from(self, state: Mapping[str, Tensor], source: str) -> OryxViT:
        """The encoder with these tensors, by their released names; `source` names them in messages.

        The final norm and the pooling head of SigLIP, and everything that is not of the tower, are dropped.

        Raises:
            UsageError: names are left over or missing, or a shape differs.
        """
        from qformer.vision import oryx

        return oryx.build_from(self, state, source)


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
