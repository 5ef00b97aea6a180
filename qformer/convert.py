"""Checkpoints of others: the names of every tensor in LAVIS's files, in transformers' folders and here.

One table per part of the model says where a tensor stands in each. Names are made from it for the layers that a file
has, one by one: whatever is left over, or missing, is an error that lists it, so that a wrong file cannot go unnoticed.
`Parts` is a checkpoint taken apart; tensors keep their dtype and their bits.

LAVIS writes one state dict (BLIP-2, arXiv 2301.12597, and its release 1.0.2); transformers has
`Blip2ForConditionalGeneration` and `Blip2ForImageTextRetrieval`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from qformer import lookup
from qformer.files.tensors import refuse
from qformer.names import (
    CLIP_RELEASED_DEPTH,
    EVA_RELEASED_DEPTH,
    POSITION_IDS,
    REPEATED,
    SPARE,
    Stage,
    bridge_rows,
    clip_names,
    clip_unused,
    eva_rows,
    eva_unused,
)
from qformer.schema import QFormerConfig
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

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


def from_lavis(tensors: Mapping[str, Tensor], heads: int | None = None) -> Parts:
    """The parts of a state dict of LAVIS: `Blip2Qformer`, `Blip2OPT` or `Blip2T5`, with its towers or without.

    Args:
        tensors: as under `model` in a `.pth` file.
        heads: of the Q-Former; by default one for 64 numbers of its width, as in BERT.

    Raises:
        UsageError: it is none of them, or tensors are missing, left over or of unequal sizes.
    """
    tensors = bare(tensors, "query_tokens")
    family = next((known for known in FAMILIES if f"{known}_proj.weight" in tensors), None)
    if "query_tokens" not in tensors or (family is None and "itm_head.weight" not in tensors):
        raise UsageError("these tensors are no BLIP-2 of LAVIS: no query_tokens, or neither itm_head nor a projection")
    left = dict(tensors)
    positions = _drop_repeated(left)
    _drop_numbers(left)
    sizes = _sizes(left, "lavis", heads, positions)
    stage: Stage = "stage2" if family else "stage1"
    bridge, missing = _take(left, [(lavis, ours) for ours, lavis, _ in bridge_rows(sizes, stage, family) if lavis])
    vision, lacking = _vision_from_lavis(left)
    prefix = f"{family}_model."
    llm = {name.removeprefix(prefix): left.pop(name) for name in list(left) if family and name.startswith(prefix)}
    if all(name.endswith(SPARE) for name in llm):
        llm = {}
    refuse(missing + lacking, list(left), "the LAVIS checkpoint")
    return Parts(stage, bridge, vision, llm, sizes, family)


def bare(tensors: Mapping[str, Tensor], *first: str) -> dict[str, Tensor]:
    """The tensors without what stands in front of all names of a model that was part of another, such as `model.`.

    Args:
        first: tensors of which the model has one, whose own name tells where names begin.
    """
    if any(own in tensors for own in first):
        return dict(tensors)
    front = next((name[: -len(own)] for name in tensors for own in first if name.endswith(f".{own}")), "")
    return {name.removeprefix(front): tensor for name, tensor in tensors.items()}


def _drop_numbers(left: dict[str, Tensor]) -> None:
    """Remove `position_ids`, buffers of older versions that number the positions from 0 on."""
    for name in [name for name in left if name.rpartition(".")[2] == "position_ids"]:
        if torch.equal(left[name].flatten(), torch.arange(left[name].numel(), dtype=left[name].dtype)):
            del left[name]


def _drop_repeated(left: dict[str, Tensor]) -> int | None:
    """Remove what a LAVIS file says twice; the number of positions if it says so.

    Raises:
        UsageError: it does not say the same both times.
    """
    for name, first in REPEATED.items():
        if name in left and first in left and not torch.equal(left.pop(name), left[first]):
            raise UsageError(f"'{name}' differs from '{first}', to which it is tied in BLIP-2; this is another model")
    numbers = left.pop(POSITION_IDS, None)
    return None if numbers is None else numbers.shape[-1]


def _sizes(tensors: Mapping[str, Tensor], form: Form, heads: int | None, positions: int | None) -> QFormerConfig:
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
    """How many heads `each` numbers wide there are in a width; one in a smaller one.

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


def _take(left: dict[str, Tensor], pairs: Sequence[tuple[str, str]]) -> tuple[dict[str, Tensor], list[str]]:
    """Move tensors out of `left` under new names; and the names that are missing."""
    missing = [theirs for theirs, _ in pairs if theirs not in left]
    return {ours: left.pop(theirs) for theirs, ours in pairs if theirs in left}, missing


def _vision_from_lavis(left: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The image encoder of a LAVIS file by our names, and names that are missing; nothing where there is none."""
    start = "visual_encoder."
    names = [name.removeprefix(start) for name in left if name.startswith(start)]
    if "class_embedding" in names:
        depth = _count(names, r"transformer\.resblocks\.(\d+)\.")
        return _take(left, [(start + name, name) for name in clip_names(depth)])
    if not names:
        return {}, []
    depth = min(_count(names, r"blocks\.(\d+)\."), EVA_RELEASED_DEPTH - 1)
    for name in eva_unused(depth):
        left.pop(start + name, None)
    return _take(left, [(start + name, name) for name, _ in eva_rows(depth)])


def tower(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an image encoder's own file that BLIP-2 uses, to stand as `Parts.vision`.

    Raises:
        UsageError: they are no EVA and no CLIP.
    """
    tensors = bare(tensors, "cls_token", "class_embedding")
    left = {f"visual_encoder.{name}": tensor for name, tensor in tensors.items()}
    if "visual_encoder.class_embedding" in left:
        depth = min(_count(list(tensors), r"transformer\.resblocks\.(\d+)\."), CLIP_RELEASED_DEPTH - 1)
        for name in clip_unused(depth):
            left.pop(f"visual_encoder.{name}", None)
    taken, missing = _vision_from_lavis(left)
    refuse(missing, list(left), "the image encoder")
    return taken


def _count(names: Sequence[str], pattern: str) -> int:
    return 1 + max((int(found[1]) for name in names if (found := re.match(pattern, name))), default=-1)


def to_lavis(parts: Parts) -> dict[str, Tensor]:
    """The state dict of LAVIS, with what it repeats; the inverse of `from_lavis`.

    Raises:
        UsageError: the parts come from a form that lacks tensors which LAVIS has.
    """
    left = dict(parts.bridge)
    rows = bridge_rows(parts.sizes, parts.stage, parts.family)
    made, missing = _take(left, [(ours, lavis) for ours, lavis, _ in rows if lavis])
    refuse(missing, list(left), "the bridge")
    made |= {name: made[first] for name, first in REPEATED.items() if first in made}
    made[POSITION_IDS] = torch.arange(parts.sizes.max_positions)[None]
    made |= {f"visual_encoder.{name}": tensor for name, tensor in parts.vision.items()}
    return made | {f"{parts.family}_model.{name}": tensor for name, tensor in parts.llm.items()}


def from_transformers(tensors: Mapping[str, Tensor], family: str | None = None, heads: int | None = None) -> Parts:
    """The parts of `Blip2ForConditionalGeneration` (stage two) or `Blip2ForImageTextRetrieval` (stage one).

    Args:
        tensors: its state dict.
        family: of the language model, as its configuration says: `opt` or `t5`.
        heads: of the Q-Former; by default one for 64 numbers of its width, as in BERT.

    Returns:
        Parts. Those of stage one lack the ITG head and the temperature, which transformers has no place for.

    Raises:
        UsageError: tensors are missing or left over.
    """
    tensors = bare(tensors, "query_tokens")
    if "query_tokens" not in tensors or "vision_model.post_layernorm.weight" not in tensors:
        raise UsageError("these tensors are no BLIP-2 of transformers: no query_tokens, or no vision_model")
    left = dict(tensors)
    _drop_numbers(left)
    stage: Stage = "stage2" if "language_projection.weight" in left else "stage1"
    start = "language_model."
    llm = {name.removeprefix(start): left.pop(name) for name in list(left) if name.startswith(start)}
    sizes = _sizes(left, "transformers", heads, None)
    rows = bridge_rows(sizes, stage, family)
    bridge, missing = _take(left, [(theirs, ours) for ours, _, theirs in rows if theirs])
    names = [name for name in left if name.startswith("vision_model.")]
    depth = _count(names, r"vision_model\.encoder\.layers\.(\d+)\.")
    vision, lacking = _take(left, [(f"vision_model.{theirs}", ours) for ours, theirs in eva_rows(depth) if theirs])
    for block in range(depth):
        bias = left.pop(f"vision_model.encoder.layers.{block}.self_attn.qkv.bias", None)
        if bias is None:
            lacking.append(f"vision_model.encoder.layers.{block}.self_attn.qkv.bias")
            continue
        # EVA has no bias of keys: a trained one adds the same to all scores of a query, which the softmax drops.
        query, _, value = bias.chunk(3)
        vision |= {f"blocks.{block}.attn.q_bias": query, f"blocks.{block}.attn.v_bias": value}
    refuse(missing + lacking, list(left), "the transformers checkpoint")
    known = next((kind for kind in FAMILIES if kind == family), None)
    return Parts(stage, bridge, vision, llm, sizes, known if stage == "stage2" else None)


def to_transformers(parts: Parts) -> dict[str, Tensor]:
    """The state dict of transformers' BLIP-2; of stage one without the ITG head and the temperature.

    Raises:
        UsageError: parts that it needs are not there: an EVA and, in stage two, a language model.
    """
    if parts.tower != "eva":
        raise UsageError(
            "BLIP-2 in transformers holds an EVA image encoder, and this checkpoint "
            + (
                "has a CLIP, for which it has no place"
                if parts.tower
                else "comes without its encoder; give --vision too"
            )
        )
    if parts.stage == "stage2" and not parts.llm:
        raise UsageError("BLIP-2 in transformers holds the language model, which this checkpoint lacks; give --llm too")
    left = dict(parts.bridge)
    rows = bridge_rows(parts.sizes, parts.stage, parts.family)
    made, missing = _take(left, [(ours, theirs) for ours, _, theirs in rows if theirs])
    homeless = {ours for ours, _, theirs in rows if theirs is None}
    refuse(missing, [name for name in left if name not in homeless], "the bridge")
    vision = dict(parts.vision)
    depth = _count(list(vision), r"blocks\.(\d+)\.")
    for block in range(depth):
        query, value = (vision.pop(f"blocks.{block}.attn.{letter}_bias") for letter in "qv")
        joined = torch.cat([query, torch.zeros_like(query), value])
        made[f"vision_model.encoder.layers.{block}.self_attn.qkv.bias"] = joined
    taken, missing = _take(vision, [(ours, f"vision_model.{theirs}") for ours, theirs in eva_rows(depth) if theirs])
    refuse(missing, list(vision), "the image encoder")
    return made | taken | {f"language_model.{name}": tensor for name, tensor in parts.llm.items()}
