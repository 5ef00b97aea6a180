"""Checkpoints of others, opened and made into models: files of LAVIS and folders of transformers' BLIP-2.

What a file leaves out (LAVIS its frozen towers) and what tensors cannot tell (heads) is given by the caller, or is what
the releases were made with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import hf_hub_download
from torch import Tensor

from qformer import checkpoint, convert, vision
from qformer.config import LossConfig, parse_config
from qformer.files import pretrained, releases
from qformer.files.pretrained import configuration
from qformer.files.tensors import read_tensors
from qformer.llm.loading import DTYPES, language_model, load_language_model, quantize_held, wrap_language_model
from qformer.model.fitting import refuse_unfit
from qformer.model.loading import CAPTIONING, build_image_text, build_vision_language, load_tensors, with_dtype
from qformer.schema import Config
from qformer.types import UsageError
from qformer.vision.options import ClipConfig, EvaConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qformer.convert import Parts
    from qformer.llm.base import LanguageModel
    from qformer.model.image_text import ImageTextModel
    from qformer.model.vision_language import VisionLanguageModel
    from qformer.vision.base import VisionEncoder

HEAD_WIDTH = {"eva": 88, "clip": 64}  # of ViT-g and ViT-L
BERT = "bert-base-uncased"
#: Language models by family and width, for files of LAVIS that leave theirs out.
USUAL = {
    ("opt", 2560): "facebook/opt-2.7b",
    ("opt", 4096): "facebook/opt-6.7b",
    ("t5", 2048): "google/flan-t5-xl",
    ("t5", 4096): "google/flan-t5-xxl",
}
TOWERS = {1408: {"name": "eva", "weights": "eva_vit_g"}, 1024: {"name": "clip", "weights": "clip_vit_L"}}  # by width
#: How BLIP-2 computes, of which no tensor tells; a folder of transformers may say otherwise.
COMPUTED = (("vision_config", "hidden_act", "gelu"), ("qformer_config", "hidden_act", "gelu"))
#: Where a checkpoint of ours keeps the towers that it holds itself.
VISION_FILE, LLM_FOLDER = "checkpoint:vision.safetensors", "checkpoint:llm"


@dataclass(frozen=True)
class Given:
    """What the caller says of a checkpoint; None is the usual.

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
class Opened:
    """A checkpoint of any form, taken apart.

    Attributes:
        config: what our own would say; towers that `parts` hold are named as files of a checkpoint.
        tokenizer: folder or hub id: of the texts in stage one, of the language model in stage two.
        llm: the language model's configuration in transformers; None where `parts` do not hold its tensors.
        merged: the language model to whose weights adapters were added, if any were.
    """

    source: str
    parts: Parts
    config: Config
    tokenizer: str
    llm: Any = None
    merged: str = ""

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
        if self.config.llm is not None and not self.parts.llm:
            # by transformers' own means: on the hub are files of older forms and names, too
            model = load_language_model(self.config.llm.path, dtype=None, tried=False).model
            self.llm, self.parts.llm = model.config, model.state_dict()


def open_foreign(path_or_id: str | Path, given: Given) -> Opened:
    """A file of LAVIS, the name of a release, or a folder or hub id of transformers' BLIP-2.

    Raises:
        UsageError: none of them, damaged, something else than a BLIP-2, or weights that are NaN or infinite.
    """
    if str(path_or_id) in releases.RELEASES:
        path_or_id = releases.fetch(str(path_or_id))
    is_file = Path(path_or_id).is_file()
    opened = open_lavis(Path(path_or_id), given) if is_file else open_transformers(str(path_or_id), given)
    refuse_unfit(opened.parts, opened.source)
    return opened


def pushed(path_or_id: str | Path) -> str | Path:
    """The folder that holds a checkpoint of ours which is on the hub; anything else as it is.

    Raises:
        UsageError: it cannot be downloaded.
    """
    if str(path_or_id) in releases.RELEASES or Path(path_or_id).exists():
        return path_or_id
    try:
        hf_hub_download(str(path_or_id), checkpoint.CONFIG)
    except (OSError, ValueError):  # there is none, or no such repository, or no network: transformers' folders lack it
        return path_or_id
    return pretrained.local_folder(str(path_or_id))


def load_foreign(
    path_or_id: str | Path, device: torch.device | str, dtype: str | None, given: Given, quantize: str | None = None
) -> ImageTextModel | VisionLanguageModel:
    """The model in such a checkpoint, in eval mode.

    Args:
        dtype: of the language model: `fp32`, `fp16`, `bf16`; None or `auto` is fp32 on a CPU, as stored elsewhere.
        quantize: the language model: `int8`, `nf4`; None is `none`.

    Raises:
        UsageError: see `open_foreign`; or a tower that it leaves out cannot be had.
    """
    opened = open_foreign(path_or_id, given)
    parts, config = opened.parts, with_dtype(opened.config, dtype, quantize)
    encoder = None
    if parts.vision:
        encoder = build_tower(config, parts.vision, opened.source).freeze()
    model: ImageTextModel | VisionLanguageModel
    if parts.stage == "stage1":
        model, _ = build_image_text(config, opened.tokenizer, encoder)
        check_words(opened, model.tokenizer)
    else:
        llm = _held_language_model(opened, config, device, dtype) if parts.llm else None
        if llm is not None:
            check_words(opened, llm.tokenizer)
        model, _ = build_vision_language(config, device, encoder, llm)
    load_tensors(model, parts.bridge, opened.source)
    return model.to(device).eval()


def _held_language_model(
    opened: Opened, config: Config, device: torch.device | str, dtype: str | None
) -> LanguageModel:
    assert config.llm is not None, "stage two has a language model"
    model: Any = language_model(opened.llm, opened.parts.llm, opened.source)
    usual = torch.float32 if torch.device(device).type == "cpu" else None
    kept = usual if dtype in (None, "auto") else DTYPES[dtype]
    if config.llm.quantize == "none":
        model = model.to(device=device, dtype=kept)
    else:
        stored = model.get_input_embeddings().weight.dtype
        model = quantize_held(model, device, kept or stored, config.llm.quantize, opened.source)
    return wrap_language_model(model, opened.tokenizer, erf_gelu=config.llm.erf_gelu)


def open_lavis(path: Path, given: Given) -> Opened:
    """A `.pth` file of LAVIS.

    Raises:
        UsageError: no BLIP-2 is in it, or what it leaves open is not known.
    """
    parts = convert.from_lavis(read_tensors(path), given.heads)
    source = str(path)
    if not parts.vision and given.vision is not None:
        parts.vision = convert.tower(read_tensors(releases.local(given.vision)))
    if parts.vision:
        choice = _tower_choice(parts, given.vision_heads, given.patch_size)
    elif (width := parts.sizes.encoder_width) in TOWERS:
        choice = TOWERS[width]
    else:
        raise UsageError(f"'{source}' comes without its image encoder; give the encoder's file with vision")
    values = _common(parts, source, choice)
    if parts.stage == "stage1":
        return Opened(source, parts, parse_config(values), given.tokenizer or BERT)
    release, width = releases.of_file(path), len(parts.bridge["connector.projection.weight"])
    llm = given.llm or (release.llm if release else None) or USUAL.get((parts.family or "", width))
    if llm is None:
        raise UsageError(f"'{source}' was made for a language model of width {width}; say which one with llm")
    values["llm"] = {"path": LLM_FOLDER if parts.llm else llm, "prompt": release.prompt if release else ""}
    opened = Opened(source, parts, parse_config(values), given.tokenizer or llm)
    if parts.llm:
        opened.llm = configuration(llm)
    return opened


def open_transformers(path_or_id: str, given: Given) -> Opened:
    """A folder that `Blip2ForConditionalGeneration` or `Blip2ForImageTextRetrieval` was saved to, or its hub id.

    Raises:
        UsageError: there is none, or it is another model.
    """
    theirs = configuration(path_or_id)
    if theirs.model_type != "blip-2":
        raise UsageError(f"'{path_or_id}' holds a {theirs.model_type} model; give a BLIP-2")
    for section, key, value in COMPUTED:
        if (found := getattr(getattr(theirs, section), key)) != value:
            raise UsageError(
                f"'{path_or_id}' is no BLIP-2: {section}.{key} is {found}, not {value}; set it if it is wrong"
            )
    folder, kind = pretrained.local_folder(path_or_id), theirs.text_config.model_type
    parts = convert.from_transformers(read_tensors(folder), kind, theirs.qformer_config.num_attention_heads)
    parts.sizes = parts.sizes.model_copy(update={"layer_norm_eps": theirs.qformer_config.layer_norm_eps})
    eps = theirs.vision_config.layer_norm_eps  # they have one for all norms of the encoder and for the one behind it
    choice = _tower_choice(parts, theirs.vision_config.num_attention_heads, given.patch_size) | {"norm_eps": eps}
    values = _common(parts, path_or_id, choice) | {"vision_norm_eps": eps}
    tokenizer = given.tokenizer or str(folder)
    if parts.stage == "stage1":
        return Opened(path_or_id, parts, parse_config(values), tokenizer)
    values["llm"] = {"path": LLM_FOLDER, "erf_gelu": False}
    parts.llm = language_model(theirs.text_config, parts.llm, path_or_id).state_dict()  # with the tied ones
    return Opened(path_or_id, parts, parse_config(values), tokenizer, theirs.text_config)


def check_words(opened: Opened, tokenizer: Any) -> None:
    """Refuse a tokenizer with more words than the model has rows for them.

    Raises:
        UsageError: it has.
    """
    known = opened.parts.sizes.vocab_size if opened.parts.stage == "stage1" else getattr(opened.llm, "vocab_size", None)
    has_head = any(name.startswith(CAPTIONING) for name in opened.parts.bridge)
    needed = len(tokenizer) - (opened.parts.stage == "stage1" and not has_head)  # [DEC] is of the head alone
    if known is not None and needed > known:
        raise UsageError(
            f"the tokenizer '{opened.tokenizer}' has {needed} words, and the model in '{opened.source}' {known}; give "
            "the one that belongs to it with tokenizer"
        )


def build_tower(config: Config, tensors: Mapping[str, Tensor], source: str) -> VisionEncoder:
    """The encoder that `config` describes, with these tensors.

    Raises:
        UsageError: they do not fit.
    """
    options = {key: value for key, value in config.vision.options.items() if key != "weights"}
    kind = EvaConfig if config.vision.name == "eva" else ClipConfig
    return kind(**options).build_from(tensors, source)


def _common(parts: Parts, source: str, tower: dict[str, Any]) -> dict[str, Any]:
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


def _tower_choice(parts: Parts, heads: int | None, patch_size: int | None) -> dict[str, Any]:
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
        heads = convert.usual_heads(width, HEAD_WIDTH[name], "vision_heads")
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
