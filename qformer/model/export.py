"""`qformer convert`: checkpoints written as a file of LAVIS, a folder of transformers or one of ours."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import save_file
from transformers import (
    AutoTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    BlipImageProcessor,
)

from qformer import checkpoint, convert
from qformer.config import Choice, dump_config
from qformer.convert import FAMILIES, Parts
from qformer.files import pretrained
from qformer.files.pretrained import configuration
from qformer.files.tensors import listed, read_tensors
from qformer.llm import lora
from qformer.llm.loading import language_model, load_language_model, put_in, wrap_language_model
from qformer.model.foreign import LLM_FOLDER, VISION_FILE, Given, Opened, check_words, open_foreign, pushed
from qformer.model.loading import ENCODER, LLM, load_trained, read_tokenizer
from qformer.resolution.fixed import Fixed
from qformer.schema import LLMConfig
from qformer.types import UsageError
from qformer.vision.base import CLIP_MEAN, CLIP_STD, resize_positions
from qformer.vision.options import EvaConfig

if TYPE_CHECKING:
    from torch import Tensor

Form = Literal["qformer", "lavis", "transformers"]
EXTRA = 1  # CLS stands in front of the patches


def convert_checkpoint(source: str, target: Path, form: Form, given: Given, trust: bool = False) -> Path:
    """Write the checkpoint at `source`, of whatever form, to `target` in the given form; tensors keep their bits.

    Towers that a checkpoint leaves out stay out, except in the form of transformers, which needs them. `trust` is as
    of `qformer.load`.

    Raises:
        UsageError: the source is no checkpoint, has no home in that form, or the target exists.
    """
    if target.exists():
        raise UsageError(f"'{target}' exists; give another path with -o, or remove it")
    found = str(pushed(source)) if checkpoint.is_foreign(source) else source
    opened = open_foreign(found, given) if checkpoint.is_foreign(found) else open_ours(found, trust)
    partial = target.with_name(f"{target.name}.partial")
    _remove(partial)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with pretrained.quiet():
            {"qformer": write_ours, "lavis": write_lavis, "transformers": write_transformers}[form](opened, partial)
        partial.rename(target)
    finally:
        _remove(partial)
    return target


def _remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)


def open_ours(path: str | Path, trust: bool = False) -> Opened:
    """A checkpoint of ours taken apart, with the towers that it holds itself.

    Raises:
        UsageError: none is there, or its towers or its text path have no place in other forms.
    """
    saved = checkpoint.read(path, trust)
    config = saved.config
    if config.stage not in ("stage1", "stage2"):
        raise UsageError(f"'{path}' is a run of stage '{config.stage}'; give one of stage1 or stage2")
    if config.question is not None:
        raise UsageError(
            f"the Q-Former of '{path}' reads questions, for which stage two of BLIP-2 has no place in LAVIS or in "
            "transformers; use the checkpoint as it is"
        )
    trained = {n.removeprefix(ENCODER): tensor for n, tensor in saved.tensors.items() if n.startswith(ENCODER)}
    bridge = {name: tensor for name, tensor in saved.tensors.items() if not name.startswith((ENCODER, LLM))}
    llm, family = None, None
    parts = Parts(config.stage, bridge, trained, {}, config.qformer)
    inside = str(saved.path)
    if not trained and str(config.vision.options.get("weights", "")).startswith(inside):
        parts.vision = read_tensors(config.vision.options["weights"])
    merged = ""
    if config.llm is not None:
        llm = configuration(config.llm.path)
        family = next((known for known in FAMILIES if known == llm.model_type), None)
        if config.llm.path.startswith(inside):
            tensors = read_tensors(config.llm.path)
            parts.llm = language_model(llm, tensors, config.llm.path).state_dict()
        if config.llm.lora is not None:
            parts.llm, merged = _merged(config.llm, saved), config.llm.path
            config = config.model_copy(update={"llm": config.llm.model_copy(update={"lora": None})})
    parts.family = family
    tokenizer = str(saved.path) if config.llm is None else config.llm.path
    return Opened(str(path), parts, config, tokenizer, llm, merged)


def _merged(config: LLMConfig, saved: checkpoint.Checkpoint) -> dict[str, Tensor]:
    """The tensors of the language model with a checkpoint's adapters added to its weights."""
    assert config.lora is not None
    llm = load_language_model(config.path, dtype=None, tried=False)
    lora.add(llm, config.lora)
    adapters = {n.removeprefix(LLM): tensor for n, tensor in saved.tensors.items() if n.startswith(LLM)}
    load_trained(llm, adapters, saved.path)
    lora.merge(llm)
    return llm.model.state_dict()


def write_lavis(opened: Opened, path: Path) -> None:
    """A `.pth` file of LAVIS.

    Raises:
        UsageError: LAVIS has no place for this language model or image encoder.
    """
    config, parts = opened.config, opened.parts
    if parts.stage == "stage2" and parts.family is None:
        raise UsageError("BLIP-2 in LAVIS has an OPT or a T5, and this checkpoint another language model")
    if config.vision.name not in ("eva", "clip"):
        raise UsageError(f"BLIP-2 in LAVIS sees with EVA or CLIP, and this checkpoint with '{config.vision.name}'")
    torch.save({"model": convert.to_lavis(parts)}, path)


def write_transformers(opened: Opened, folder: Path) -> None:
    """A folder for `Blip2ForConditionalGeneration`, or `Blip2ForImageTextRetrieval`, and its processor.

    Raises:
        UsageError: a tower that it needs cannot be had, or is no EVA.
    """
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
    tokenizer = _tokenizer(opened)
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


def _fit_positions(opened: Opened) -> None:
    """Make the encoder's table of positions that of the resolution it is used at, which transformers takes as it is."""
    chosen, vision = opened.config.resolution, opened.parts.vision
    patch, table = vision["patch_embed.proj.weight"].shape[-1], vision["pos_embed"]
    side = int(chosen.options.get("size", Fixed.size)) // patch
    if chosen.name == "fixed" and side * side != table.shape[1] - EXTRA:
        resized = resize_positions(table.float(), EXTRA, (side, side)).to(table.dtype)
        opened.parts.vision = vision | {"pos_embed": resized}


def _their_model(opened: Opened) -> Any:
    """BLIP-2 of transformers with the tensors of the parts."""
    parts, is_retrieval = opened.parts, opened.parts.stage == "stage1"
    config = _their_config(opened)
    kind = "" if opened.llm is None else opened.llm.model_type
    with torch.device("meta"):
        model: Any = (Blip2ForImageTextRetrieval if is_retrieval else Blip2ForConditionalGeneration)(config)
    tensors = convert.to_transformers(parts)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if odd := [name for name in tensors if name in shapes and shapes[name] != tensors[name].shape]:
        raise UsageError(f"BLIP-2 in transformers has no place for a model of these sizes: {listed(odd)}")
    put_in(model, tensors, opened.source if is_retrieval else f"'{opened.source}' with its {kind} in transformers")
    return model


def _their_config(opened: Opened) -> Blip2Config:
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


def _their_llm(opened: Opened) -> Any:
    """The configuration of the language model; a T5's gated GELU is then computed with erf there too."""
    if opened.llm is None:
        return None
    values = opened.llm.to_dict()
    if opened.config.llm is not None and opened.config.llm.erf_gelu and values.get("dense_act_fn") == "gelu_new":
        values["dense_act_fn"] = "gelu"
    return type(opened.llm).from_dict(values)


def write_ours(opened: Opened, folder: Path) -> None:
    """A checkpoint folder; towers that the parts hold are kept in it."""
    parts, config = opened.parts, opened.config
    folder.mkdir()
    _save(parts.bridge, folder / checkpoint.WEIGHTS)
    if parts.vision:
        _save(parts.vision, folder / VISION_FILE.removeprefix(checkpoint.INSIDE))
        options = {**config.vision.options, "weights": VISION_FILE}
        kept = {"vision": Choice(name=config.vision.name, **options), "freeze_vision": True}  # beside what is trained
        config = config.model_copy(update=kept)
    if parts.llm:
        inside = folder / LLM_FOLDER.removeprefix(checkpoint.INSIDE)
        tokenizer = pretrained.read(AutoTokenizer, pretrained.tower(opened.tokenizer))
        check_words(opened, tokenizer)
        language_model(opened.llm, parts.llm, opened.source).save_pretrained(inside)
        tokenizer.save_pretrained(inside)
        llm = (config.llm or LLMConfig(path=LLM_FOLDER)).model_copy(update={"path": LLM_FOLDER})
        config = config.model_copy(update={"llm": llm})
    if parts.stage == "stage1":
        tokenizer = _tokenizer(opened)
        check_words(opened, tokenizer)
        tokenizer.save_pretrained(folder)
    (folder / checkpoint.CONFIG).write_text(dump_config(config), encoding="utf-8")
    meta = {"step": 0, **checkpoint.provenance(), "converted_from": opened.source}
    checkpoint.write_meta(folder, meta | ({checkpoint.MERGED: opened.merged} if opened.merged else {}))


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)


def _tokenizer(opened: Opened) -> Any:
    if opened.parts.stage == "stage1":
        return read_tokenizer(opened.tokenizer)
    side = "right" if opened.llm is None or opened.llm.is_encoder_decoder else "left"  # new tokens follow the prompt
    tokenizer = pretrained.read(AutoTokenizer, pretrained.tower(opened.tokenizer), padding_side=side)
    if tokenizer.pad_token is None:  # as of Llama and GPT-2; their processor refuses to pad a batch without one
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
