"""Folders of transformers: `Blip2ForConditionalGeneration` and `Blip2ForImageTextRetrieval`, read and written."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    BlipImageProcessor,
)

from qformer.checkpoints.names import Stage, bridge_rows
from qformer.checkpoints.parts import (
    FAMILIES,
    LLM_FOLDER,
    LoadOptions,
    OpenCheckpoint,
    Parts,
    bare,
    check_words,
    common_values,
    count,
    drop_numbers,
    load_tokenizer,
    read_sizes,
    take,
    tower_choice,
)
from qformer.checkpoints.systems import SYSTEMS
from qformer.checkpoints.whole import open_system, write_system
from qformer.config import parse_config
from qformer.files import pretrained
from qformer.files.pretrained import configuration
from qformer.files.tensors import listed, read_tensors, refuse
from qformer.llm.loading import language_model, put_in, wrap_language_model
from qformer.resolution.fixed import Fixed
from qformer.types import UsageError
from qformer.vision.base import CLIP_MEAN, CLIP_STD, resize_positions
from qformer.vision.eva import eva_rows
from qformer.vision.options import EvaConfig

if TYPE_CHECKING:
    from collections.abc import Mapping


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
    drop_numbers(left)
    stage: Stage = "stage2" if "language_projection.weight" in left else "stage1"
    start = "language_model."
    llm = {name.removeprefix(start): left.pop(name) for name in list(left) if name.startswith(start)}
    sizes = read_sizes(left, "transformers", heads, None)
    rows = bridge_rows(sizes, stage, family)
    bridge, missing = take(left, [(theirs, ours) for ours, _, theirs in rows if theirs])
    names = [name for name in left if name.startswith("vision_model.")]
    depth = count(names, r"vision_model\.encoder\.layers\.(\d+)\.")
    vision, lacking = take(left, [(f"vision_model.{theirs}", ours) for ours, theirs in eva_rows(depth) if theirs])
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
    made, missing = take(left, [(ours, theirs) for ours, _, theirs in rows if theirs])
    homeless = {ours for ours, _, theirs in rows if theirs is None}
    refuse(missing, [name for name in left if name not in homeless], "the bridge")
    vision = dict(parts.vision)
    depth = count(list(vision), r"blocks\.(\d+)\.")
    for block in range(depth):
        query, value = (vision.pop(f"blocks.{block}.attn.{letter}_bias") for letter in "qv")
        joined = torch.cat([query, torch.zeros_like(query), value])
        made[f"vision_model.encoder.layers.{block}.self_attn.qkv.bias"] = joined
    taken, missing = take(vision, [(ours, f"vision_model.{theirs}") for ours, theirs in eva_rows(depth) if theirs])
    refuse(missing, list(vision), "the image encoder")
    return made | taken | {f"language_model.{name}": tensor for name, tensor in parts.llm.items()}


#: How BLIP-2 computes, of which no tensor tells; a folder of transformers may say otherwise.
COMPUTED = (("vision_config", "hidden_act", "gelu"), ("qformer_config", "hidden_act", "gelu"))


def open_transformers(path_or_id: str, given: LoadOptions) -> OpenCheckpoint:
    """A folder that a BLIP-2 of transformers, or a system of the table in `systems.py`, was saved to, or its hub id.

    Raises:
        UsageError: there is none, or it is another model.
    """
    theirs = configuration(path_or_id)
    if theirs.model_type in SYSTEMS:
        return open_system(path_or_id, theirs, given)
    if theirs.model_type != "blip-2":
        others = ", ".join(system.title for system in SYSTEMS.values())
        raise UsageError(f"'{path_or_id}' holds a {theirs.model_type} model; give a BLIP-2, or one of {others}")
    for section, key, value in COMPUTED:
        if (found := getattr(getattr(theirs, section), key)) != value:
            raise UsageError(
                f"'{path_or_id}' is no BLIP-2: {section}.{key} is {found}, not {value}; set it if it is wrong"
            )
    folder, kind = pretrained.local_folder(path_or_id), theirs.text_config.model_type
    parts = from_transformers(read_tensors(folder), kind, theirs.qformer_config.num_attention_heads)
    parts.sizes = parts.sizes.model_copy(update={"layer_norm_eps": theirs.qformer_config.layer_norm_eps})
    eps = theirs.vision_config.layer_norm_eps  # they have one for all norms of the encoder and for the one behind it
    choice = tower_choice(parts, theirs.vision_config.num_attention_heads, given.patch_size) | {"norm_eps": eps}
    values = common_values(parts, path_or_id, choice) | {"vision_norm_eps": eps}
    tokenizer = given.tokenizer or str(folder)
    if parts.stage == "stage1":
        return OpenCheckpoint(path_or_id, parts, parse_config(values), tokenizer)
    values["llm"] = {"path": LLM_FOLDER, "erf_gelu": False}
    parts.llm = language_model(theirs.text_config, parts.llm, path_or_id).state_dict()  # with the tied ones
    return OpenCheckpoint(path_or_id, parts, parse_config(values), tokenizer, theirs.text_config)


EXTRA = 1  # CLS stands in front of the patches


def write_transformers(opened: OpenCheckpoint, folder: Path) -> None:
    """A folder for `Blip2ForConditionalGeneration`, `Blip2ForImageTextRetrieval` or a system, and its processor.

    Raises:
        UsageError: a tower that it needs cannot be had, or is no EVA; or transformers has no such system.
    """
    if not opened.config.has_qformer:
        write_system(opened, folder)
        return
    if opened.config.vision.name != "eva":
        raise UsageError(
            f"BLIP-2 in transformers sees with EVA, and this checkpoint with '{opened.config.vision.name}', "
            "for which it has no place"
        )
    if opened.llm is not None:
        check_family(opened.llm)
    opened.hold_towers()
    _fit_positions(opened)
    model = _their_model(opened)
    side = model.config.vision_config.image_size
    size = {"height": side, "width": side}
    images = BlipImageProcessor(size=size, image_mean=list(CLIP_MEAN), image_std=list(CLIP_STD))
    tokenizer = load_tokenizer(opened)
    check_words(opened, tokenizer)
    processor = Blip2Processor(images, tokenizer, opened.parts.sizes.queries)
    tokenizer = processor.tokenizer  # which has the word that stands for a visual token by now
    tokenizer.split_special_tokens = False  # their processor writes that word into texts
    model.config.image_token_index = tokenizer.convert_tokens_to_ids(processor.image_token.content)
    if opened.llm is not None:
        rows = model.get_input_embeddings().num_embeddings
        if rows < len(tokenizer):  # the word is only a place: the mean of all words is never the likeliest
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            for table in (model.get_input_embeddings(), model.get_output_embeddings()):
                table.weight.data[rows:] = table.weight.data[:rows].float().mean(dim=0)
        wrapped = wrap_language_model(model.language_model, opened.tokenizer, tried=False)
        model.generation_config = wrapped.model.generation_config
        model.config.text_config.eos_token_id = wrapped.end  # its generate reads this alone
        if wrapped.start and tokenizer("a")["input_ids"][:1] != wrapped.start:
            tokenizer.add_bos_token = True  # some of an OPT forget it
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def check_family(llm: Any) -> None:
    """Refuse a language model that transformers' BLIP-2 does not take whole.

    Raises:
        UsageError: saying why.
    """
    kind = llm.model_type
    if not hasattr(llm, "hidden_size"):  # T5Gemma has two, of its halves
        raise UsageError(
            f"BLIP-2 in transformers asks a language model for its hidden_size, which the configuration of a {kind} "
            "lacks, so this checkpoint has no place there; use it as it is"
        )
    if llm.is_encoder_decoder and Blip2Config(text_config=llm).use_decoder_only_language_model:
        raise UsageError(
            f"BLIP-2 in transformers takes every {kind} for a model that only decodes, and leaves its encoder out, so "
            "this checkpoint has no place there; use it as it is, or train with a T5"
        )


def _fit_positions(opened: OpenCheckpoint) -> None:
    """Make the encoder's table of positions that of the resolution it is used at, which transformers takes as it is."""
    chosen, vision = opened.config.resolution, opened.parts.vision
    patch, table = vision["patch_embed.proj.weight"].shape[-1], vision["pos_embed"]
    side = int(chosen.options.get("size", Fixed.size)) // patch
    if chosen.name == "fixed" and side * side != table.shape[1] - EXTRA:
        resized = resize_positions(table.float(), EXTRA, (side, side)).to(table.dtype)
        opened.parts.vision = vision | {"pos_embed": resized}


def _their_model(opened: OpenCheckpoint) -> Any:
    """BLIP-2 of transformers with the tensors of the parts."""
    parts, is_retrieval = opened.parts, opened.parts.stage == "stage1"
    config = _their_config(opened)
    kind = "" if opened.llm is None else opened.llm.model_type
    with torch.device("meta"):
        model: Any = (Blip2ForImageTextRetrieval if is_retrieval else Blip2ForConditionalGeneration)(config)
    tensors = to_transformers(parts)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if odd := [name for name in tensors if name in shapes and shapes[name] != tensors[name].shape]:
        raise UsageError(f"BLIP-2 in transformers has no place for a model of these sizes: {listed(odd)}")
    put_in(model, tensors, opened.source if is_retrieval else f"'{opened.source}' with its {kind} in transformers")
    return model


def _their_config(opened: OpenCheckpoint) -> Blip2Config:
    sizes, eva = opened.parts.sizes, opened.config.vision.options
    table, inner = opened.parts.vision["pos_embed"], opened.parts.vision["blocks.0.mlp.fc1.weight"]
    patch = opened.parts.vision["patch_embed.proj.weight"].shape[-1]
    vision_config = {
        "hidden_size": inner.shape[1],
        "intermediate_size": inner.shape[0],
        "num_hidden_layers": sum(name.endswith("norm1.weight") for name in opened.parts.vision),
        "num_attention_heads": eva.get("heads", EvaConfig.heads),
        "image_size": math.isqrt(table.shape[1] - 1) * patch,
        "patch_size": patch,
        "layer_norm_eps": eva.get("norm_eps", EvaConfig.norm_eps),
        "qkv_bias": True,
        "hidden_act": "gelu",
    }
    qformer_config = {
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.hidden_size,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "intermediate_size": sizes.intermediate_size,
        "hidden_dropout_prob": sizes.dropout,
        "attention_probs_dropout_prob": sizes.dropout,
        "max_position_embeddings": sizes.max_positions,
        "layer_norm_eps": sizes.layer_norm_eps,
        "cross_attention_frequency": sizes.cross_attention_every,
        "use_qformer_text_input": opened.llm is None,
    }
    return Blip2Config(
        vision_config=vision_config,
        qformer_config=qformer_config,
        text_config=_their_llm(opened),
        num_query_tokens=sizes.queries,
        image_text_hidden_size=opened.config.loss.embed_width,
        dtype="float32",
    )


def _their_llm(opened: OpenCheckpoint) -> Any:
    """The configuration of the language model; a T5's gated GELU is then computed with erf there too."""
    if opened.llm is None:
        return None
    values = opened.llm.to_dict()
    if opened.config.llm is not None and opened.config.llm.erf_gelu and values.get("dense_act_fn") == "gelu_new":
        values["dense_act_fn"] = "gelu"
    return type(opened.llm).from_dict(values)
