"""Models from the checkpoints of others: LAVIS's files and transformers' BLIP-2.

What a file does not hold (LAVIS leaves frozen towers out) and what tensors cannot tell (heads) is asked for, or taken
from what the release was made with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qformer import convert
from qformer.config import Choice, Config, LLMConfig, LossConfig, TextConfig, parse_config
from qformer.model.loading import build_image_text, build_vision_language, load_trained
from qformer.types import UsageError
from qformer.vision.eva import EvaConfig, EvaViT
from qformer.vision.hf import clip_encoder

if TYPE_CHECKING:
    from qformer.convert import Parts
    from qformer.model.image_text import ImageTextModel
    from qformer.model.llm import LanguageModel
    from qformer.model.vision_language import VisionLanguageModel
    from qformer.vision.base import VisionEncoder

EVA_HEAD = 88  # numbers per head in ViT-g
#: Language models of the releases, by family and width, for files that leave theirs out.
LANGUAGE_MODELS = {
    ("opt", 2560): "facebook/opt-2.7b",
    ("opt", 4096): "facebook/opt-6.7b",
    ("t5", 2048): "google/flan-t5-xl",
    ("t5", 4096): "google/flan-t5-xxl",
}


@dataclass(frozen=True)
class Missing:
    """What a checkpoint may leave open; None is the usual.

    Attributes:
        heads: of the Q-Former; by default one for 64 numbers of its width.
        vision_heads: of the image encoder; by default one for 88 numbers (EVA) or 64 (CLIP) of its width.
        vision: file with the EVA encoder, where the checkpoint leaves it out.
        llm: folder or hub id of the language model, where the checkpoint leaves it out.
        bert: folder or hub id of the tokeniser of stage one.
    """

    heads: int | None = None
    vision_heads: int | None = None
    vision: str | None = None
    llm: str | None = None
    bert: str = "bert-base-uncased"


def load_lavis(path: str | Path, device: torch.device | str, given: Missing) -> ImageTextModel | VisionLanguageModel:
    """The model in a file of LAVIS.

    Raises:
        UsageError: no BLIP-2 is in it, or what it leaves open is not known.
    """
    parts = convert.from_lavis(convert.read_tensors(path), given.heads)
    config = configuration(parts, given, str(path))
    encoder: VisionEncoder | None = None
    if parts.tower == "eva":
        encoder = build_eva(parts, given, str(path))
    elif parts.tower == "clip":
        encoder = clip_encoder(parts.vision, given.vision_heads)
    if encoder is not None:
        encoder.freeze()
    model: ImageTextModel | VisionLanguageModel
    if parts.stage == "stage1":
        model, _ = build_image_text(config, given.bert, encoder)
    else:
        model, _ = build_vision_language(config, device, encoder)
        put_language_model(model.llm, parts, str(path))
    load_trained(model, parts.bridge, Path(path))
    return model.to(device).eval()


def put_language_model(llm: LanguageModel, parts: Parts, source: str) -> None:
    """The language model's own tensors of a checkpoint that holds them, in place of those that were loaded.

    Raises:
        UsageError: they are of another model.
    """
    if not parts.llm:
        return
    mine = llm.model.state_dict()
    missing, left = mine.keys() - parts.llm.keys(), parts.llm.keys() - mine.keys()
    convert.refuse(sorted(missing), sorted(left), f"the language model in '{source}'")
    llm.model.load_state_dict(parts.llm)


def eva_config(parts: Parts, given: Missing) -> EvaConfig:
    """Sizes of the EVA in these parts, read from its tensors.

    Raises:
        UsageError: the width does not divide into the heads.
    """
    vision = parts.vision
    patches, patch = vision["patch_embed.proj.weight"], vision["patch_embed.proj.weight"].shape[-1]
    width = len(patches)
    return EvaConfig(
        image_size=math.isqrt(vision["pos_embed"].shape[1] - 1) * patch,
        patch_size=patch,
        width=width,
        depth=sum(name.endswith(".attn.qkv.weight") for name in vision),
        heads=given.vision_heads or max(1, width // EVA_HEAD),
        mlp_hidden=len(vision["blocks.0.mlp.fc1.weight"]),
        precision="fp16" if vision["blocks.0.attn.qkv.weight"].dtype == torch.float16 else "fp32",
    )


def build_eva(parts: Parts, given: Missing, source: str) -> EvaViT:
    """The encoder of these parts, without drawing random weights first."""
    with torch.device("meta"):
        encoder = EvaViT(eva_config(parts, given))
    encoder.assign(parts.vision, source)
    return encoder


def configuration(parts: Parts, given: Missing, source: str) -> Config:
    """The configuration that these parts would have been trained by, as far as they tell.

    Raises:
        UsageError: a tower is neither in the parts nor given.
    """
    values: dict[str, Any] = {
        "stage": parts.stage,
        "run": source,
        "vision": _vision(parts, given, source),
        "resolution": {"name": "fixed"},
        "qformer": parts.sizes.model_dump(),
        "text": TextConfig(bert=given.bert).model_dump(),
        "data": {"train": {"name": "none"}},  # it was trained elsewhere
        "train": {"steps": 1, "warmup": 0},
    }
    if parts.stage == "stage1":
        values["loss"] = LossConfig(embed_width=len(parts.bridge["vision_proj.weight"])).model_dump()
    else:
        width = len(parts.bridge["connector.projection.weight"])
        known = given.llm or LANGUAGE_MODELS.get((parts.family or "", width))
        if known is None:
            raise UsageError(f"'{source}' was made for a language model of width {width}; say which one with llm=")
        values["llm"] = LLMConfig(path=known).model_dump()
    return parse_config(values)


def _vision(parts: Parts, given: Missing, source: str) -> dict[str, Any]:
    if parts.tower == "eva":
        return {"name": "eva", **vars(eva_config(parts, given))}
    if parts.tower == "clip":
        return {"name": "hf"}
    if given.vision is None:
        raise UsageError(f"'{source}' comes without its image encoder; give the file of the encoder with vision=")
    return Choice(name="eva", weights=given.vision, heads=given.vision_heads or 16).model_dump()  # type: ignore[call-arg]
