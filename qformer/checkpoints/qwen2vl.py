"""Qwen2-VL's row of `systems.py`: its configuration and the files of its processor, read and written.

Its processor says how many pixels pictures and frames have, and which frames of a clip are taken. transformers writes
it as `preprocessor_config.json` and `video_preprocessor_config.json`, or since version 5 as `processor_config.json`
alone; published folders say nothing of clips.
"""

from __future__ import annotations

import json
from math import ceil
from typing import TYPE_CHECKING, Any

from transformers import Qwen2VLConfig as TheirConfig
from transformers import Qwen2VLImageProcessorPil

from qformer import vision
from qformer.files import pretrained
from qformer.resolution import chosen
from qformer.types import UsageError
from qformer.vision.base import CLIP_MEAN, CLIP_STD
from qformer.vision.options import Qwen2VLConfig

if TYPE_CHECKING:
    from pathlib import Path

    from qformer.checkpoints.parts import OpenCheckpoint
    from qformer.schema import Config

NO_PROCESSOR = (
    "{where} does not say how large the pictures of a Qwen2-VL are ({reason}); put its preprocessor_config.json there"
)
VIDEO, BOTH = "video_preprocessor_config.json", "processor_config.json"
SHARE = 0.9  # of `max_video_tokens` that the frames of a clip may have
#: What no tensor tells, by its place in the configuration of transformers.
COMPUTED = (
    ("vision_config.hidden_act", "quick_gelu"),
    ("vision_config.in_channels", 3),
    ("vision_config.spatial_merge_size", 2),
    ("vision_config.temporal_patch_size", 2),
)
#: What its image processor must do, as the encoder and the strategy here do it.
PROCESSED = (
    ("do_resize", True),
    ("do_rescale", True),
    ("do_normalize", True),
    ("image_mean", CLIP_MEAN),
    ("image_std", CLIP_STD),
    ("merge_size", 2),
)


def values(theirs: Any) -> dict[str, Any]:
    """Options of the sections `vision`, `connector` and `resolution`, but for those that the processor says."""
    tower = theirs.vision_config
    patch = tower.patch_size
    sizes = {
        "patch_size": patch,
        "image_size": Qwen2VLConfig.image_size // patch * patch,
        "width": tower.embed_dim,
        "depth": tower.depth,
        "heads": tower.num_heads,
        "mlp_hidden": int(tower.embed_dim * tower.mlp_ratio),
    }
    return {"vision": sizes, "connector": {"patch": patch}, "resolution": {"patch": patch}}


def to_theirs(config: Config, _tower: Any, llm: Any) -> Any:
    """Make the configuration of transformers of that of the language model, which has its class, and of ours.

    Raises:
        UsageError: the language model is another.
    """
    if llm.model_type != TheirConfig.model_type:
        raise UsageError(
            f"Qwen2-VL in transformers has a language model of its own, and this checkpoint a {llm.model_type}, for "
            "which it has no place; use the checkpoint as it is"
        )
    ours = vision.options_of(config.vision)
    given = llm.to_dict()
    tower = given["vision_config"] | {
        "depth": ours.depth,
        "embed_dim": ours.width,
        "num_heads": ours.heads,
        "mlp_ratio": ours.mlp_hidden // ours.width,
        "patch_size": ours.patch_size,
        "hidden_size": llm.get_text_config().hidden_size,
    }
    return TheirConfig.from_dict(given | {"vision_config": tower})


def read_processor(folder: Path) -> dict[str, Any]:
    """Options of the section `resolution` by the processor of a folder.

    Numbers of pixels that are not those of whole tokens are rounded to the next token inside.

    Raises:
        UsageError: there is none, it is damaged, or it changes pixels in another way than published.
    """
    images = pretrained.read(Qwen2VLImageProcessorPil, folder, NO_PROCESSOR)
    for key, expected in PROCESSED:
        if (found := getattr(images, key)) not in (expected, as_list := _listed(expected)):
            raise UsageError(
                f"the image processor in '{folder}' has {key} {_listed(found)}, and Qwen2-VL {as_list}; set it to that"
            )
    area = (images.patch_size * images.merge_size) ** 2
    least, most = _tokens(images.size, area)
    found = {"min_tokens": least, "max_tokens": most}
    videos = _video_processor(folder)
    found |= {key: videos[key] for key in ("fps", "min_frames", "max_frames") if videos.get(key) is not None}
    edges = dict(videos.get("size") or {})
    for edge, old in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")):
        edges |= {edge: videos[old]} if videos.get(old) is not None else {}
    if edges:
        found["frame_tokens"] = _tokens(edges, area)
    if videos.get("cap_pixels_per_frame") and videos.get("max_video_tokens"):
        found["video_tokens"] = int(videos["max_video_tokens"] * SHARE)
    return found


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _tokens(edges: Any, area: int) -> list[int]:
    """Smallest and largest number of tokens of `area` pixels."""
    return [max(-(-edges["shortest_edge"] // area), 1), edges["longest_edge"] // area]


def _video_processor(folder: Path) -> dict[str, Any]:
    """Contents of the processor of clips; empty where the folder has none, as those on the hub.

    Raises:
        UsageError: the file is no JSON object.
    """
    for name in (BOTH, VIDEO):
        file = folder / name
        if not file.is_file():
            continue
        try:
            values = json.loads(file.read_bytes())
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            raise UsageError(f"'{file}' is no JSON object; repair or remove it")
        found = values.get("video_processor") if name == BOTH else values
        if isinstance(found, dict):
            return found
    return {}


def write_processor(opened: OpenCheckpoint, folder: Path) -> None:
    """Write the processor's files of pictures and of clips by the section `resolution`."""
    strategy: Any = chosen(opened.config.resolution).rule
    area = (strategy.patch * strategy.merge) ** 2
    sizes = {"patch_size": strategy.patch, "merge_size": strategy.merge, "temporal_patch_size": 2}
    pictures = _edges((strategy.min_tokens, strategy.max_tokens), area)
    Qwen2VLImageProcessorPil(size=pictures, **sizes).save_pretrained(folder)
    clips = {
        "video_processor_type": "Qwen2VLVideoProcessor",
        "size": _edges(strategy.frame_tokens, area),
        **sizes,
        "do_sample_frames": True,
        "fps": strategy.fps,
        "min_frames": strategy.min_frames,
        "max_frames": strategy.max_frames or 768,
        "cap_pixels_per_frame": True,
        "max_video_tokens": ceil(strategy.video_tokens / SHARE),
    }
    (folder / VIDEO).write_text(json.dumps(clips, indent=2), encoding="utf-8")


def _edges(tokens: tuple[int, int], area: int) -> dict[str, int]:
    return {"shortest_edge": tokens[0] * area, "longest_edge": tokens[1] * area}
