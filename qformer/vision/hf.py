"""Encoders made from the vision transformers of `transformers`: CLIP, SigLIP, DINOv2, InternViT, ViT and such.

Only the vision tower of a model is kept, and only the parts that the chosen layer needs: later blocks, the final norm
where it does not apply, poolers, heads and mask tokens are removed, so that no computation is wasted and every
remaining parameter gets a gradient.

`layer` is counted like `hidden_states` in transformers (0 are the embeddings, n is the n-th block):

* the last layer (-1) is the `last_hidden_state` that the model itself returns: after the final norm for SigLIP, DINOv2
  and ViT, before it for CLIP, whose final norm was trained on the pooled CLS token only;
* with `final_norm: false` the last layer is read before that norm, too;
* any other layer is the residual stream after that block, without a norm. LLaVA and BLIP-2 read CLIP at -2.

With `layers` the tokens of several are concatenated, the last one first.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.image_processing_base import ImageProcessingMixin

from qformer.devices import DTYPES
from qformer.files import pretrained
from qformer.types import UsageError
from qformer.vision.base import CLIP_MEAN, CLIP_STD, VisionEncoder
from qformer.vision.levels import levels

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager

    from transformers import PreTrainedModel


CLIP = (CLIP_MEAN, CLIP_STD)
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

#: Mean and std that a family was trained with, by the model type of its vision tower.
STATISTICS = {
    "clip_vision_model": CLIP,
    "siglip_vision_model": HALF,
    "dinov2": IMAGENET,
    "dinov2_with_registers": IMAGENET,
    "dinov3_vit": IMAGENET,
    "internvl_vision": IMAGENET,
    "vit": HALF,
    "deit": IMAGENET,
}
#: Families whose final norm is meant for the pooled CLS token: patch tokens never pass through it.
NORM_OF_CLS_ONLY = (
    "clip_vision_model",
    "altclip_vision_model",
    "chinese_clip_vision_model",
    "metaclip_2_vision_model",
    "mlcd_vision_model",
)
FINAL_NORMS = ("post_layernorm", "layernorm", "norm")
#: Parameters that are tokens in front of the patches.
FRONT_TOKENS = ("class_embedding", "cls_token", "distillation_token", "register_tokens")

NO_ENCODER = (
    "no image encoder can be loaded from {where} ({reason}); give vision.path a folder written by save_pretrained, or "
    "the id of a model"
)
INSTEAD = "use CLIP, SigLIP, DINOv2, ViT or a model that is built like them"


def build(
    given: str, layer: int, precision: str, layers: tuple[int, ...] | None = None, final_norm: bool = True
) -> HFVisionEncoder:
    """Build the encoder; see `HFVisionConfig.build`."""
    path = pretrained.tower(given)
    config = pretrained.read(AutoConfig, path, NO_ENCODER)
    vision = getattr(config, "vision_config", config)
    _check(vision)  # before the weights, which may have to be downloaded
    mean, std = pixel_statistics(path, vision.model_type)
    loading = {"dtype": DTYPES[precision], "output_loading_info": True}
    model, report = pretrained.read(AutoModel, path, NO_ENCODER, **loading)
    encoder = HFVisionEncoder(model, layer, mean, std, layers, final_norm)
    missing = {key.removeprefix("vision_model.") for key in report["missing_keys"]}
    missing &= encoder.tower.state_dict().keys()  # transformers fills them with random numbers; a pooler may miss
    if missing:
        raise UsageError(f"vision.path '{given}' lacks weights, {min(missing)} for one; give a complete model")
    return encoder


def with_tensors(config: Any, tensors: Mapping[str, Tensor], source: str) -> PreTrainedModel:
    """Make the model of a configuration of transformers with these tensors, which are not copied.

    Raises:
        UsageError: they do not fit; `source` names them.
    """
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModel.from_config(config, trust_remote_code=False)
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split("\n\t")[1:2]).rstrip(". ")
        raise UsageError(
            f"the image encoder in '{source}' does not fit its configuration ({reason}); save it again"
        ) from error
    return model.eval()


class HFVisionEncoder(VisionEncoder):
    """The vision tower of a transformers model; CLS, distillation and register tokens come first, as `extra`.

    For tiles of any size, the position table is resized in the model's own way. A model that does not read its pictures
    to the edge (SigLIP at 384: 27 patches of 14) leaves the rest of a tile unread (`floors`).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layer: int = -1,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        layers: tuple[int, ...] | None = None,
        final_norm: bool = True,
    ) -> None:
        """Takes the tower out of `model` and removes from it what `layer` does not need, so the model is used up.

        Args:
            model: CLIP, SigLIP, DINOv2, ViT or one built like them, or a model with such a `vision_model`.
            layer: which hidden state, see the top of this module.
            mean, std: pixel statistics, given together; those of the family where they are not.
            layers: hidden states that are concatenated, in place of `layer`; see `qformer.vision.levels`.
            final_norm: pass the last layer through the model's final norm, where it has one for its patches.

        Raises:
            UsageError: it is no vision transformer, has no such layers, or its statistics are not known.
        """
        tower: Any = getattr(model, "vision_model", model)
        config = tower.config
        _check(config)
        if mean is None or std is None:
            mean, std = _family(config.model_type)
        front = sum(p.numel() for name, p in tower.named_parameters() if name.endswith(FRONT_TOKENS))
        patch_size, image_size = _side(config.patch_size), _side(config.image_size)
        read = levels((layer,) if layers is None else layers, config.num_hidden_layers)
        super().__init__(
            width=config.hidden_size * len(read),
            patch_size=patch_size,
            image_size=image_size // patch_size * patch_size,
            extra=front // config.hidden_size,
            mean=mean,
            std=std,
        )
        _cut(tower, read[0], final_norm)
        self.tower = tower
        self.layers, self._read = layers, read
        self.floors = image_size % patch_size > 0
        # DINOv2 has no such argument and always resizes
        has_switch = "interpolate_pos_encoding" in inspect.signature(tower.forward).parameters
        self._arguments = {"interpolate_pos_encoding": True} if has_switch else {}
        if len(read) > 1:
            self._arguments["output_hidden_states"] = True

    def encode(self, pixels: Tensor) -> Tensor:
        """Normalized pixels float[N, 3, h, w] -> float32[N, extra + rows * columns, D].

        Raises:
            UsageError: the model does not give one token for each patch.
        """
        with self._own_precision(pixels.device.type):
            output = self.tower(pixel_values=pixels, **self._arguments)
        tokens = output.last_hidden_state
        if before := [output.hidden_states[level].float() for level in self._read[1:]]:
            tokens = torch.cat([tokens.float(), *before], dim=-1)
        rows, columns = self.grid(pixels.shape[-1], pixels.shape[-2])
        if tokens.shape[1:] != (self.extra + rows * columns, self.width):
            raise UsageError(
                f"a '{self.tower.config.model_type}' model gave {list(tokens.shape[1:])} numbers for {rows}x{columns} "
                f"patches and {self.extra} extra tokens of width {self.width}; {INSTEAD}"
            )
        return tokens.float()

    def _own_precision(self, device: str) -> AbstractContextManager[Any]:
        """Disable autocast for weights in half precision, where it can fail on a mixture of fp16 and bf16."""
        if self.tower.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(device, enabled=False)


def _cut(tower: Any, last: int, final_norm: bool) -> None:
    """Remove the parts of the tower that its `last_hidden_state` after `last` blocks does not depend on."""
    total = tower.config.num_hidden_layers
    blocks = next((m for m in tower.modules() if isinstance(m, nn.ModuleList) and len(m) == total), None)
    if blocks is None:
        raise UsageError(f"a '{tower.config.model_type}' model is no row of {total} blocks; {INSTEAD}")
    del blocks[last:]
    if last < total or not final_norm or tower.config.model_type in NORM_OF_CLS_ONLY:
        for name in FINAL_NORMS:
            if hasattr(tower, name):
                setattr(tower, name, nn.Identity())
    for name in ("pooler", "head"):
        if hasattr(tower, name):
            setattr(tower, name, None)
    if hasattr(tower, "use_head"):  # SigLIP asks this and not whether its head is there
        tower.use_head = False
    for module in tower.modules():
        if hasattr(module, "mask_token"):
            module.mask_token = None


def _check(config: Any) -> None:
    """Check by its configuration that a model is a stack of transformer blocks over image patches."""
    if not all(hasattr(config, key) for key in ("image_size", "patch_size", "hidden_size", "num_hidden_layers")):
        raise UsageError(f"a '{config.model_type}' model is no vision transformer; {INSTEAD}")


def pixel_statistics(path: str, model_type: str) -> tuple[Sequence[float], Sequence[float]]:
    """Read the pixel mean and std from the preprocessor file at `path`; those of the family if there is none."""
    try:
        processor, _ = ImageProcessingMixin.get_image_processor_dict(path)
    except OSError as error:
        if (Path(path) / "preprocessor_config.json").exists():
            raise UsageError(f"'{path}/preprocessor_config.json' is not valid JSON; repair or remove it") from error
        processor = {}
    if not processor.get("do_normalize", True):
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if "image_mean" not in processor:
        return _family(model_type)
    return processor["image_mean"], processor["image_std"]


def _family(model_type: str) -> tuple[Sequence[float], Sequence[float]]:
    """Look up the pixel mean and std that models of this type are trained with."""
    if model_type not in STATISTICS:
        raise UsageError(
            f"the pixel mean and std of a '{model_type}' model are not known; "
            "put a preprocessor_config.json with image_mean and image_std beside its weights"
        )
    return STATISTICS[model_type]


def _side(size: int | Sequence[int]) -> int:
    """Return the side of a square, which some configurations give as a pair."""
    return size if isinstance(size, int) else size[0]
