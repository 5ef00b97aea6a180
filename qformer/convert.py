"""Checkpoints of others: the names of every tensor in LAVIS's files, in transformers' folders and here.

One table per part of the model says where a tensor stands in each. Names are made from it for the layers that a file
has, one by one: whatever is left over, or missing, is an error that lists it, so that a wrong file cannot go unnoticed.
`Parts` is a checkpoint taken apart; tensors keep their dtype and their bits.

LAVIS writes one state dict (BLIP-2, arXiv 2301.12597, and its release 1.0.2); transformers has
`Blip2ForConditionalGeneration` and `Blip2ForImageTextRetrieval`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from qformer.config import QFormerConfig
from qformer.names import POSITION_IDS, REPEATED, Stage, bridge_rows, clip_rows, eva_rows
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
        vision: the image encoder by the names of `EvaViT`, or of CLIP's vision tower in transformers; empty where the
            file does not hold one.
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


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file, or of a folder in the form of transformers, by name; nothing in it is executed.

    Args:
        path: a `.safetensors` file; any other file, read as a torch checkpoint whose state dict may stand under
            `model`, as LAVIS writes it; a folder with `model.safetensors`, or an index and its shards.

    Raises:
        UsageError: nothing is there, it is damaged, wants to run code, or holds something else.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise UsageError(f"there is no file or folder '{path}'; give the checkpoint's path")
    return _read_file(path)


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        held: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # any bytes are a pickle of sorts, so reading them can fail in any way
        raise UsageError(
            f"'{path}' is no checkpoint, is damaged, or holds code (which is not run); download it again"
        ) from error
    held = held.get("model", held) if isinstance(held, dict) else held
    if not isinstance(held, dict) or not held or not all(isinstance(value, Tensor) for value in held.values()):
        raise UsageError(f"'{path}' holds something else than tensors by name; give a checkpoint of LAVIS")
    return {str(name): tensor for name, tensor in held.items()}


def _read_folder(path: Path) -> dict[str, Tensor]:
    whole, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if whole.is_file():
        return _read_file(whole)
    if not index.is_file():
        raise UsageError(f"'{path}' holds neither {whole.name} nor {index.name}; give a folder of save_pretrained")
    try:
        places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"'{index}' is damaged ({error}); download it again") from error
    shards = sorted(set(places.values()))
    if gone := [shard for shard in shards if not (path / shard).is_file()]:
        raise UsageError(f"'{path}' lacks {listed(gone)}, which its index names; download it again")
    held = {name: tensor for shard in shards for name, tensor in _read_file(path / shard).items()}
    if gone := sorted(places.keys() ^ held.keys()):
        raise UsageError(f"the shards in '{path}' are not those of its index: {listed(gone)}; download it again")
    return held


def from_lavis(tensors: Mapping[str, Tensor], heads: int | None = None) -> Parts:
    """The parts of a state dict of LAVIS: `Blip2Qformer`, `Blip2OPT` or `Blip2T5`, with its towers or without.

    Args:
        tensors: as under `model` in a `.pth` file.
        heads: of the Q-Former; by default one for 64 numbers of its width, as in BERT.

    Raises:
        UsageError: it is none of them, or tensors are missing, left over or of unequal sizes.
    """
    family = next((known for known in FAMILIES if f"{known}_proj.weight" in tensors), None)
    if "query_tokens" not in tensors or (family is None and "itm_head.weight" not in tensors):
        raise UsageError("these tensors are no BLIP-2 of LAVIS: no query_tokens, or neither itm_head nor a projection")
    left = dict(tensors)
    positions = _drop_repeated(left)
    sizes = _sizes(left, "lavis", heads, positions)
    stage: Stage = "stage2" if family else "stage1"
    bridge, missing = _take(left, [(lavis, ours) for ours, lavis, _ in bridge_rows(sizes, stage, family) if lavis])
    vision, lacking = _vision_from_lavis(left)
    prefix = f"{family}_model."
    llm = {name.removeprefix(prefix): left.pop(name) for name in list(left) if family and name.startswith(prefix)}
    refuse(missing + lacking, list(left), "the LAVIS checkpoint")
    return Parts(stage, bridge, vision, llm, sizes, family)


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
    """Sizes of the Q-Former, read from its tensors."""
    layer, cross, words = _WHERE[form]
    numbers = [found for name in tensors if (found := re.match(re.escape(layer) + r"(\d+)\.(.*)", name))]
    with_cross = sorted({int(found[1]) for found in numbers if found[2] == cross})
    if not with_cross or with_cross[0] != 0:
        raise UsageError("these tensors hold no Q-Former whose first layer has cross-attention; give a BLIP-2")
    layers = 1 + max(int(found[1]) for found in numbers)
    _, queries, hidden = tensors["query_tokens"].shape
    inner = tensors.get(f"{layer}0.intermediate_query.dense.weight")
    vocabulary, table = (tensors.get(f"{words}.{kind}_embeddings.weight") for kind in ("word", "position"))
    known: dict[str, Any] = {
        "hidden_size": hidden,
        "layers": layers,
        "heads": heads or max(1, hidden // HEAD_WIDTH),
        "intermediate_size": 4 * hidden if inner is None else len(inner),
        "queries": queries,
        "cross_attention_every": with_cross[1] if len(with_cross) > 1 else layers,
        "encoder_width": tensors[f"{layer}0.{cross}"].shape[1],
    }
    if vocabulary is not None:
        known["vocab_size"] = len(vocabulary)
    if table is not None or positions is not None:
        known["max_positions"] = positions if table is None else len(table)
    return QFormerConfig(**known)


_WHERE = {
    "lavis": ("Qformer.bert.encoder.layer.", "crossattention.self.key.weight", "Qformer.bert.embeddings"),
    "transformers": ("qformer.encoder.layer.", "crossattention.attention.key.weight", "embeddings"),
}


def _take(left: dict[str, Tensor], pairs: Sequence[tuple[str, str]]) -> tuple[dict[str, Tensor], list[str]]:
    """Move tensors out of `left` under new names; and the names that are missing."""
    missing = [theirs for theirs, _ in pairs if theirs not in left]
    return {ours: left.pop(theirs) for theirs, ours in pairs if theirs in left}, missing


def refuse(missing: Sequence[str], left_over: Sequence[str], what: str) -> None:
    """Raise a UsageError that lists what is missing and left over, if anything is."""
    if missing or left_over:
        raise UsageError(
            f"{what} does not fit BLIP-2: missing {listed(missing)}; left over {listed(left_over)}; "
            "give one of its files as it was released or saved"
        )


def listed(names: Sequence[str], limit: int = 20) -> str:
    """Names for a message, cut to be readable."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(sorted(names)[:limit]) + more) or "nothing"


def _vision_from_lavis(left: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The image encoder of a LAVIS file by our names, and names that are missing; nothing where there is none."""
    start = "visual_encoder."
    names = [name.removeprefix(start) for name in left if name.startswith(start)]
    if "class_embedding" in names:
        depth = _count(names, r"transformer\.resblocks\.(\d+)\.")
        return _split_clip(*_take(left, [(f"{start}{lavis}", ours) for lavis, ours in clip_rows(depth)]))
    if not names:
        return {}, []
    return _take(left, [(start + name, name) for name, _ in eva_rows(_count(names, r"blocks\.(\d+)\."))])


def _count(names: Sequence[str], pattern: str) -> int:
    return 1 + max((int(found[1]) for name in names if (found := re.match(pattern, name))), default=-1)


def _split_clip(taken: dict[str, Tensor], missing: list[str]) -> tuple[dict[str, Tensor], list[str]]:
    """LAVIS's joined queries, keys and values as the three that transformers has."""
    for name in [name for name in taken if ".in_proj." in name]:
        parts = taken.pop(name).chunk(3)  # (D, D) or (D) each
        for letter, part in zip("qkv", parts, strict=True):
            taken[name.replace("in_proj", f"{letter}_proj")] = part
    return taken, missing


def _join_clip(tower: Mapping[str, Tensor]) -> dict[str, Tensor]:
    joined = dict(tower)
    for name in [name for name in tower if ".q_proj." in name]:
        parts = [joined.pop(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
        joined[name.replace("q_proj", "in_proj")] = torch.cat(parts)
    return joined


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
    vision = dict(parts.vision)
    if parts.tower == "clip":
        vision = _join_clip(vision)
        depth = _count(list(vision), r"encoder\.layers\.(\d+)\.")
        vision, missing = _take(vision, [(ours, lavis) for lavis, ours in clip_rows(depth)])
        refuse(missing, [], "the image encoder")
    made |= {f"visual_encoder.{name}": tensor for name, tensor in vision.items()}
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
    if "query_tokens" not in tensors or "vision_model.post_layernorm.weight" not in tensors:
        raise UsageError("these tensors are no BLIP-2 of transformers: no query_tokens, or no vision_model")
    left = dict(tensors)
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
        query, key, value = bias.chunk(3)
        if key.any():
            raise UsageError(f"block {block} of this image encoder has a key bias, which EVA has not; give a BLIP-2")
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
