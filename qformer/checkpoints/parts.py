"""A checkpoint of any form, taken apart: its tensors by our names, its configuration, and what it leaves open.

Names are made from tables for the layers that a file has, one by one: whatever is left over, or missing, is an error
that lists it, so that a wrong file cannot go unnoticed. Tensors keep their dtype and their bits.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessorPil

from qformer import lookup, vision
from qformer.checkpoints.names import Stage
from qformer.checkpoints.weights import CAPTIONING
from qformer.config import LossConfig
from qformer.files import pretrained
from qformer.llm.loading import load_language_model
from qformer.model.bert import read_tokenizer
from qformer.schema import Config, QFormerConfig
from qformer.types import UsageError
from qformer.vision import hf
from qformer.vision.options import ClipConfig, EvaConfig, Qwen2VLConfig

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from qformer.vision.base import VisionEncoder


HEAD_WIDTHS = {"eva": 88, "clip": 64}  # of ViT-g and ViT-L
#: Where a checkpoint of ours keeps the towers that it holds itself.
VISION_FILE, VISION_FOLDER, LLM_FOLDER = "checkpoint:vision.safetensors", "checkpoint:vision", "checkpoint:llm"


@dataclass(frozen=True)
class LoadOptions:
    """Options of the caller for what a checkpoint leaves open; None means the usual.

    Attributes:
        heads: of the Q-Former; by default one for 64 numbers of its width, as in BERT.
        vision_heads: of the image encoder; by default one for 88 numbers (EVA) or 64 (CLIP) of its width.
        patch_size: of the image encoder, to be checked: its tensors tell.
        vision: file of the image encoder, or its name in the release, where the checkpoint leaves it out.
        llm: folder or hub id of the language model, where the checkpoint leaves it or its configuration out.
        tokenizer: folder or hub id, where the checkpoint has none: a BERT's in stage one.
    """

    heads: int | None = None
    vision_heads: int | None = None
    patch_size: int | None = None
    vision: str | None = None
    llm: str | None = None
    tokenizer: str | None = None


@dataclass
class Seen:
    """The configuration of an image encoder of transformers and its pixel statistics: all but its tensors."""

    config: Any
    mean: Sequence[float]
    std: Sequence[float]


@dataclass
class OpenCheckpoint:
    """A checkpoint of any form, taken apart.

    Attributes:
        config: what our own would say; towers that `parts` hold are named as files of a checkpoint.
        tokenizer: folder or hub id: of the texts in stage one, of the language model in stage two. That of a Q-Former
            that reads questions is in `folder`.
        llm: the language model's configuration in transformers; None where `parts` do not hold its tensors.
        merged: the language model to whose weights adapters were added, if any were.
        folder: of a checkpoint of ours; None for any other form.
        seen: of the image encoder `hf` whose tensors `parts` hold, whole and by their names in transformers.
    """

    source: str
    parts: Parts
    config: Config
    tokenizer: str
    llm: Any = None
    merged: str = ""
    folder: Path | None = None
    seen: Seen | None = None

    def hold_towers(self) -> None:
        """Fetch the towers that the checkpoint leaves out.

        Raises:
            UsageError: they cannot be had, or the encoder's weights were never in a file.
        """
        if not self.parts.vision:
            if self.config.vision.options.get("weights") is None:
                raise UsageError(
                    f"the image encoder of '{self.source}' was random and is lost; train on one that has vision.weights"
                )
            encoder = vision.options_of(self.config.vision).build()
            self.parts.vision = encoder.state_dict()
        self.hold_language_model()

    def hold_language_model(self) -> None:
        """Fetch the language model, if the checkpoint leaves it out.

        Raises:
            UsageError: it cannot be had.
        """
        if self.config.llm is not None and not self.parts.llm:
            # by transformers' own means: on the hub are files of older forms and names, too
            model = load_language_model(self.config.llm.path, dtype=None, tried=False).model
            self.llm, self.parts.llm = model.config, model.state_dict()


def check_words(opened: OpenCheckpoint, tokenizer: Any) -> None:
    """Refuse a tokenizer with more words than the model has rows for them.

    Raises:
        UsageError: it has.
    """
    llm = getattr(opened.llm, "text_config", opened.llm)
    known = opened.parts.sizes.vocab_size if opened.parts.stage == "stage1" else getattr(llm, "vocab_size", None)
    has_head = any(name.startswith(CAPTIONING) for name in opened.parts.bridge)
    needed = len(tokenizer) - (opened.parts.stage == "stage1" and not has_head)  # [DEC] is of the head alone
    if known is not None and needed > known:
        raise UsageError(
            f"the tokenizer '{opened.tokenizer}' has {needed} words, and the model in '{opened.source}' {known}; give "
            "the one that belongs to it with tokenizer"
        )


def build_tower(config: Config, tensors: Mapping[str, Tensor], source: str, seen: Seen | None = None) -> VisionEncoder:
    """The encoder that `config` describes, with these tensors.

    Raises:
        UsageError: they do not fit.
    """
    if seen is not None:
        layer, normed = config.vision.options.get("layer", -1), config.vision.options.get("final_norm", True)
        tower = hf.with_tensors(seen.config, tensors, source)
        return hf.HFVisionEncoder(tower, layer, seen.mean, seen.std, final_norm=normed)
    options = {key: value for key, value in config.vision.options.items() if key != "weights"}
    kind: Any = {"eva": EvaConfig, "clip": ClipConfig, "qwen2vl": Qwen2VLConfig}[config.vision.name]
    return kind(**options).build_from(tensors, source)


def save_tower(seen: Seen, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write an image encoder of transformers to a folder of its own, with its pixel statistics."""
    hf.with_tensors(seen.config, tensors, str(folder)).save_pretrained(folder)
    CLIPImageProcessorPil(image_mean=list(seen.mean), image_std=list(seen.std)).save_pretrained(folder)


def common_values(parts: Parts, source: str, tower: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {
        "stage": parts.stage,
        "run": source,
        "vision": tower,
        "resolution": {"name": "fixed", "size": tower.get("image_size", EvaConfig.image_size)},  # as it was trained
        "qformer": parts.sizes.model_dump(),
        "data": {"train": {"name": "none"}},  # it was trained elsewhere
        "train": {"steps": 1, "warmup": 0},
    }
    if parts.stage == "stage1":
        values["loss"] = LossConfig(embed_width=len(parts.bridge["vision_proj.weight"])).model_dump()
    return values


def tower_choice(parts: Parts, heads: int | None, patch_size: int | None) -> dict[str, Any]:
    """The `vision` section for the tower in these parts, sizes read from its tensors.

    Raises:
        UsageError: another patch size was given.
    """
    name, tensors = parts.tower or "eva", parts.vision
    patches, table, first = (tensors[key] for key in _SIZES_IN[name])
    width, patch = len(patches), patches.shape[-1]
    if patch_size not in (None, patch):
        raise UsageError(f"the patches of this image encoder are {patch} pixels wide, not {patch_size}; leave it out")
    precision = "fp16" if patches.dtype == torch.float16 else "fp32"
    if heads is None:
        heads = usual_heads(width, HEAD_WIDTHS[name], "vision_heads")
    if heads < 1 or width % heads:
        raise UsageError(f"the image encoder's width {width} does not divide into {heads} heads; give its own number")
    sizes = {
        "image_size": math.isqrt(table.shape[-2] - 1) * patch,
        "patch_size": patch,
        "width": width,
        "depth": sum(key.endswith(".weight") and f".{_SECOND_NORM[name]}." in key for key in tensors),
        "heads": heads,
        "mlp_hidden": len(first),
    }
    return {"name": name, **sizes, "precision": precision, "weights": VISION_FILE}


_SIZES_IN = {
    "eva": ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight"),
    "clip": ("conv1.weight", "positional_embedding", "transformer.resblocks.0.mlp.c_fc.weight"),
}
_SECOND_NORM = {"eva": "norm2", "clip": "ln_2"}


def load_tokenizer(opened: OpenCheckpoint) -> Any:
    if opened.parts.stage == "stage1":
        return read_tokenizer(opened.tokenizer)
    side = "right" if opened.llm is None or opened.llm.is_encoder_decoder else "left"  # new tokens follow the prompt
    tokenizer = pretrained.read(AutoTokenizer, opened.tokenizer, padding_side=side)
    if tokenizer.pad_token is None:  # as of Llama and GPT-2; their processor refuses to pad a batch without one
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


Form = Literal["lavis", "transformers"]
FAMILIES: tuple[Literal["opt", "t5"], ...] = ("opt", "t5")
HEAD_WIDTH = 64  # of BERT; the tensors do not tell how many heads they are for


@dataclass
class Parts:
    """A checkpoint taken apart.

    Attributes:
        bridge: what training changes, by the names of our checkpoints: LayerNorm, Q-Former, heads or projection.
        vision: the image encoder by the names of `EvaViT` or `ClipViT`; empty where the file does not hold one.
        llm: the language model by its names in transformers; empty where the file does not hold one.
        sizes: of the Q-Former.
        family: of the language model, `opt` or `t5`; None in stage one.
    """

    stage: Stage
    bridge: dict[str, Tensor]
    vision: dict[str, Tensor]
    llm: dict[str, Tensor]
    sizes: QFormerConfig
    family: Literal["opt", "t5"] | None = None

    @property
    def tower(self) -> Literal["eva", "clip"] | None:
        """Which kind of image encoder `vision` holds."""
        if not self.vision:
            return None
        return "eva" if "cls_token" in self.vision else "clip"


def bare(tensors: Mapping[str, Tensor], *first: str) -> dict[str, Tensor]:
    """The tensors without what stands in front of all names of a model that was part of another, such as `model.`.

    Args:
        first: tensors of which the model has one, whose own name tells where names begin.
    """
    if any(own in tensors for own in first):
        return dict(tensors)
    front = next((name[: -len(own)] for name in tensors for own in first if name.endswith(f".{own}")), "")
    return {name.removeprefix(front): tensor for name, tensor in tensors.items()}


def drop_numbers(left: dict[str, Tensor]) -> None:
    """Remove `position_ids`, buffers of older versions that number the positions from 0 on."""
    for name in [name for name in left if name.rpartition(".")[2] == "position_ids"]:
        if torch.equal(left[name].flatten(), torch.arange(left[name].numel(), dtype=left[name].dtype)):
            del left[name]


def read_sizes(tensors: Mapping[str, Tensor], form: Form, heads: int | None, positions: int | None) -> QFormerConfig:
    """Sizes of the Q-Former, read from its tensors.

    Raises:
        UsageError: there is none, or its width does not divide into the heads.
    """
    layer, cross, words = _WHERE[form]
    numbers = [found for name in tensors if (found := re.match(re.escape(layer) + r"(\d+)\.(.*)", name))]
    with_cross = sorted({int(found[1]) for found in numbers if found[2] == cross})
    if not with_cross or with_cross[0] != 0:
        raise UsageError("these tensors hold no Q-Former whose first layer has cross-attention; give a BLIP-2")
    layers = 1 + max(int(found[1]) for found in numbers)
    rows = tensors["query_tokens"]
    if rows.ndim != 3:
        raise UsageError(f"query_tokens has the shape {list(rows.shape)} instead of [1, queries, width]; give a BLIP-2")
    _, queries, hidden = rows.shape
    inner = tensors.get(f"{layer}0.intermediate_query.dense.weight")
    vocabulary, table = (tensors.get(f"{words}.{kind}_embeddings.weight") for kind in ("word", "position"))
    known: dict[str, Any] = {
        "hidden_size": hidden,
        "layers": layers,
        "heads": usual_heads(hidden, HEAD_WIDTH, "heads") if heads is None else heads,
        "intermediate_size": 4 * hidden if inner is None else len(inner),
        "queries": queries,
        "cross_attention_every": with_cross[1] if len(with_cross) > 1 else layers,
        "encoder_width": tensors[f"{layer}0.{cross}"].shape[1],
    }
    if vocabulary is not None:
        known["vocab_size"] = len(vocabulary)
    if table is not None or positions is not None:
        known["max_positions"] = positions if table is None else len(table)
    try:
        return QFormerConfig(**known)
    except ValidationError as error:
        raise UsageError(lookup.explain(error, known, "qformer")) from error


def usual_heads(width: int, each: int, key: str) -> int:
    """Number of heads of width `each` in a width; one if that is smaller.

    Raises:
        UsageError: it is no multiple; asks for `key`.
    """
    if width > each and width % each:
        raise UsageError(f"a width of {width} is no multiple of the usual {each} of a head; say how many with {key}")
    return max(1, width // each)


_WHERE = {
    "lavis": ("Qformer.bert.encoder.layer.", "crossattention.self.key.weight", "Qformer.bert.embeddings"),
    "transformers": ("qformer.encoder.layer.", "crossattention.attention.key.weight", "embeddings"),
}


def take(left: dict[str, Tensor], pairs: Sequence[tuple[str, str]]) -> tuple[dict[str, Tensor], list[str]]:
    """Move tensors out of `left` under new names; and the names that are missing."""
    missing = [theirs for theirs, _ in pairs if theirs not in left]
    return {ours: left.pop(theirs) for theirs, ours in pairs if theirs in left}, missing


def count(names: Sequence[str], pattern: str) -> int:
    return 1 + max((int(found[1]) for name in names if (found := re.match(pattern, name))), default=-1)
