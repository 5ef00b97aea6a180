"""LLaVA-OneVision's row of `systems.py`: its configuration and the files of its processor, read and written.

Sizes are (height, width) there and (width, height) here.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from transformers import LlavaOnevisionConfig, LlavaOnevisionImageProcessorPil

from qformer.checkpoints import processors
from qformer.resolution import anyres, chosen
from qformer.types import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from qformer.checkpoints.parts import OpenCheckpoint
    from qformer.schema import Config

TITLE = "LLaVA-OneVision"
#: Turns where a folder's tokenizer has no template.
TEMPLATE = "{bos}<|im_start|>user\n{image}\n{text}<|im_end|><|im_start|>assistant\n{answer}<|im_end|>"
TOWER = "siglip_vision_model"
ASPECT = "anyres_max_"
COMPUTED = (
    ("projector_hidden_act", "gelu"),
    ("vision_feature_select_strategy", "full"),
    ("multimodal_projector_bias", True),
)


def values(theirs: Any) -> dict[str, Any]:
    """Options of the sections `vision`, `connector` and `resolution`, but for those that the processor says.

    Raises:
        UsageError: it has no limit of crops, as `anyres_max_9` is one.
    """
    size, patch = theirs.vision_config.image_size, theirs.vision_config.patch_size
    limit = re.fullmatch(f"{ASPECT}([1-9][0-9]*)", theirs.vision_aspect_ratio)
    if limit is None:
        raise UsageError(
            f"vision_aspect_ratio of this {TITLE} is '{theirs.vision_aspect_ratio}'; set it to {ASPECT}9, or to "
            "another number of crops"
        )
    pins = [[width, height] for height, width in theirs.image_grid_pinpoints]
    return {
        "vision": {"layer": theirs.vision_feature_layer, "final_norm": False},
        "connector": {"hidden": theirs.text_config.hidden_size, "patch": patch},
        "resolution": {"size": size, "patch": patch, "pins": pins, "max_patches": int(limit[1])},
    }


def to_theirs(config: Config, tower: Any, llm: Any) -> Any:
    """Make the configuration of transformers of those of the towers and of ours.

    Raises:
        UsageError: the class has no place for an option.
    """
    vision, strategy = config.vision.options, _strategy(config)
    layer = vision.get("layer", -1)
    odd = {
        "vision.final_norm": vision.get("final_norm", True) and layer in (-1, tower.num_hidden_layers),
        "resolution.max_patches": strategy.max_patches is None,
        "resolution.newline": strategy.newline != "one_token",
        f"image encoder, a {tower.model_type},": tower.model_type != TOWER,
    }
    processors.require_place(odd, TITLE)
    return LlavaOnevisionConfig(
        vision_config=tower.to_dict(),
        text_config=llm.to_dict(),
        vision_feature_layer=layer,
        image_grid_pinpoints=_pins(strategy),
        vision_aspect_ratio=f"{ASPECT}{strategy.max_patches}",
        tie_word_embeddings=llm.tie_word_embeddings,
    )


def _pins(strategy: anyres.AnyRes) -> list[list[int]]:
    """Sizes of the canvases, (height, width)."""
    return [[height, width] for width, height in strategy.pins or anyres.grids(strategy.size, strategy.max_side)]


def _strategy(config: Config) -> anyres.AnyRes:
    """The strategy of a checkpoint of this system, without limits."""
    rule = chosen(config.resolution).rule
    assert isinstance(rule, anyres.AnyRes), "`require` has found the system by its name"
    return rule


def read_processor(folder: Path) -> dict[str, Any]:
    """Options of the section `resolution` by the processor of a folder.

    Raises:
        UsageError: there is none, it is damaged, or it changes pixels in another way than published.
    """
    images = processors.read(LlavaOnevisionImageProcessorPil, folder, TITLE)
    return {
        "size": processors.square(images, folder),
        "pins": [[width, height] for height, width in images.image_grid_pinpoints],
        "fill": [int(255 * share) for share in images.image_mean],
    }


def write_processor(opened: OpenCheckpoint, folder: Path) -> None:
    """Write the processor's files."""
    strategy, eye = _strategy(opened.config), opened.seen
    assert eye is not None, "a system of transformers sees with a tower of its own"
    size = {"height": strategy.size, "width": strategy.size}
    pixels: dict[str, Any] = {"size": size, "image_mean": list(eye.mean), "image_std": list(eye.std)}
    LlavaOnevisionImageProcessorPil(image_grid_pinpoints=_pins(strategy), **pixels).save_pretrained(folder)
    own = {
        "processor_class": "LlavaOnevisionProcessor",
        "image_token": "<image>",
        "video_token": "<video>",
        "num_image_tokens": (strategy.size // strategy.patch) ** 2,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": f"{ASPECT}{strategy.max_patches}",
    }
    processors.write(folder, own, {"video_processor_type": "LlavaOnevisionVideoProcessor", **pixels})
