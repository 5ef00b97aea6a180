"""InternVL's row of `systems.py`: its configuration and the files of its processor, read and written.

Its processor cuts each picture of a row into as many tiles as one alone, and writes `Frame1: ` and so on in front of
the frames of a clip. That it cuts at all is fixed in its class, whatever its files say (`crop_to_patches`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer, GotOcr2ImageProcessorPil, InternVLConfig

from qformer.checkpoints import processors
from qformer.files import pretrained
from qformer.resolution import chosen
from qformer.resolution.internvl import AFTER, BEFORE, InternVL
from qformer.types import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from qformer.checkpoints.parts import OpenCheckpoint
    from qformer.schema import Config

TITLE = "InternVL"
TOWER = "internvl_vision"
IMAGE, VIDEO = "<IMG_CONTEXT>", "<video>"
FRAME = "Frame{}: "
#: Turns where a folder's tokenizer has no template.
TEMPLATE = "{bos}<|im_start|>user\n{image}\n{text}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
#: Words of the tokenizer, by what the processor of transformers calls them.
WORDS = {
    "start_image_token": BEFORE,
    "end_image_token": AFTER,
    "context_image_token": IMAGE,
    "video_token": VIDEO,
}


def values(theirs: Any) -> dict[str, Any]:
    """Options of the sections `vision`, `connector` and `resolution`, but for those that the processor says.

    Raises:
        UsageError: the image encoder does not read squares of an even number of square patches.
    """
    tower, layer = theirs.vision_config, theirs.vision_feature_layer
    size, patch = tower.image_size, tower.patch_size
    if len({*size}) > 1 or len({*patch}) > 1 or size[0] % (2 * patch[0]):
        raise UsageError(
            f"the image encoder of this {TITLE} reads pictures of {list(size)} pixels in patches of {list(patch)}; "
            "give one with squares of an even number of patches a side"
        )
    return {
        "vision": {"layer": layer, "final_norm": layer == -1},
        "connector": {"patch": patch[0]},
        "resolution": {"size": size[0], "patch": patch[0], "shared": False, "frame": FRAME},
    }


def to_theirs(config: Config, tower: Any, llm: Any) -> Any:
    """Make the configuration of transformers of those of the towers and of ours.

    Raises:
        UsageError: the class has no place for an option.
    """
    vision, strategy = config.vision.options, _strategy(config)
    odd = {
        "connector.version": config.connector.options.get("version", "v2") != "v2",
        "resolution.thumbnail": not strategy.thumbnail,
        f"image encoder, a {tower.model_type},": tower.model_type != TOWER,
    }
    processors.require_place(odd, TITLE)
    layer = vision.get("layer", -1)
    if layer == -1 and not vision.get("final_norm", True):
        layer = tower.num_hidden_layers  # counted so, it is read without the norm there
    return InternVLConfig(
        vision_config=tower.to_dict(),
        text_config=llm.to_dict(),
        image_seq_length=strategy.plan_video(1, 1, 1).tokens,
        vision_feature_layer=layer,
        tie_word_embeddings=llm.tie_word_embeddings,
    )


def _strategy(config: Config) -> InternVL:
    """The strategy of a checkpoint of this system, without limits."""
    rule = chosen(config.resolution).rule
    assert isinstance(rule, InternVL), "`require` has found the system by its name"
    return rule


def read_processor(folder: Path) -> dict[str, Any]:
    """Options of the section `resolution` by the processor of a folder.

    Raises:
        UsageError: there is none, it is damaged, or it changes pixels in another way than published.
    """
    images = processors.read(GotOcr2ImageProcessorPil, folder, TITLE)
    size = processors.square(images, folder)
    return {"size": size, "min_tiles": images.min_patches, "max_tiles": images.max_patches}


def write_processor(opened: OpenCheckpoint, folder: Path) -> None:
    """Write the processor's files beside the tokenizer's, which get the names of its words."""
    strategy, eye = _strategy(opened.config), opened.seen
    assert eye is not None, "a system of transformers sees with a tower of its own"
    size = {"height": strategy.size, "width": strategy.size}
    pixels: dict[str, Any] = {"image_mean": list(eye.mean), "image_std": list(eye.std)}
    tiles: dict[str, Any] = {
        "crop_to_patches": True,
        "min_patches": strategy.min_tiles,
        "max_patches": strategy.max_tiles,
    }
    GotOcr2ImageProcessorPil(size=size, **pixels, **tiles).save_pretrained(folder)
    own = {"processor_class": "InternVLProcessor", "image_seq_length": strategy.plan_video(1, 1, 1).tokens}
    processors.write(folder, own, {"video_processor_type": "InternVLVideoProcessor", "size": size, **pixels})
    pretrained.read(AutoTokenizer, folder, extra_special_tokens=WORDS).save_pretrained(folder)
