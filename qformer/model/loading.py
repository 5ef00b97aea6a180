"""Assembling models: from a configuration, from a checkpoint, and `load`, which needs a path alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, BertForMaskedLM

from qformer import checkpoint, devices, lookup, resolution, vision
from qformer.files import pretrained
from qformer.llm import lora
from qformer.llm.loading import DTYPES, load_language_model
from qformer.llm.quantize import check
from qformer.model.connectors import QFormerConnector, QuestionConnector
from qformer.model.image_text import ImageTextModel
from qformer.model.qformer import QFormer
from qformer.model.sizes import BERT_SIZES
from qformer.model.vision_language import VisionLanguageModel
from qformer.schema import Config, QFormerConfig
from qformer.types import UsageError

if TYPE_CHECKING:
    from qformer.llm.base import LanguageModel
    from qformer.vision.base import VisionEncoder

    Bridge = ImageTextModel | VisionLanguageModel

DECODE = "[DEC]"
CAPTIONING = "qformer.lm_head."
TEXT_EMBEDDINGS = ("qformer.embeddings.words.", "qformer.embeddings.positions.")
#: What stage one trains and stage two has no use for; of the text path only where its Q-Former reads no questions.
STAGE_ONE_ONLY = ("temp", "vision_proj.", "text_proj.", "itm_head.", "qformer.lm_head.", *TEXT_EMBEDDINGS)
ENCODER, LLM = "frontend.encoder.", "llm."  # begin names of what may be trained in one run and frozen in the next


def read_bert(path: str, config: QFormerConfig | None = None) -> tuple[QFormerConfig, dict[str, Tensor]]:
    """Sizes and tensors of a BERT in a folder or under a hub id.

    Args:
        config: sizes that were asked for; those not set in it are BERT's. One word, `[DEC]`, is added.

    Raises:
        UsageError: there is no BERT.
    """
    theirs = _fetch(AutoConfig, path)
    if theirs.model_type != "bert":
        raise UsageError(f"'{path}' is a {theirs.model_type} model; text.bert needs a BERT, such as bert-base-uncased")
    words = max(theirs.vocab_size, len(read_tokenizer(path)))
    model, report = _fetch(BertForMaskedLM, path, output_loading_info=True, dtype=torch.float32)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in report["missing_keys"]}
    return bert_sizes(theirs, words, config), state


def bert_sizes(theirs: Any, words: int, config: QFormerConfig | None = None) -> QFormerConfig:
    """Sizes of a Q-Former with so many words that starts from a BERT of this configuration; those asked for stay."""
    sizes = {ours: getattr(theirs, name) for ours, name in BERT_SIZES.items()} | {"vocab_size": words}
    given = {name: getattr(config, name) for name in config.model_fields_set} if config is not None else {}
    return QFormerConfig(**(sizes | given))


def read_tokenizer(path: str | Path) -> Any:
    """A BERT tokeniser whose bos is `[DEC]`, the token that tells the Q-Former to generate.

    Special tokens in the texts that it is given are words (`pretrained.as_words`).
    """
    tokenizer = pretrained.as_words(_fetch(AutoTokenizer, str(path)))
    if tokenizer.bos_token is None:
        tokenizer.add_special_tokens({"bos_token": DECODE})
    return tokenizer


def _fetch(auto: Any, path: str, **options: Any) -> Any:
    path = pretrained.tower(path)
    try:
        return pretrained.read(auto, path, **options)
    except UsageError:
        raise
    except Exception as error:  # damaged files make transformers raise nearly anything
        where = f"the folder '{path}'" if Path(path).is_dir() else f"'{path}', which is no folder here, or from the hub"
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise UsageError(f"no BERT can be loaded from {where} ({reason}); give text.bert a folder or hub id") from error


def build_encoder(config: Config) -> VisionEncoder:
    """The image encoder of a configuration, frozen unless it is to be trained: then every weight is kept in fp32.

    Raises:
        UsageError: options that do not fit, or a missing folder.
    """
    encoder = vision.options_of(config.vision).build()
    return encoder.freeze() if config.freeze_vision else encoder.float()


def build_image_text(
    config: Config, tokenizer_of: Path | str | None = None, encoder: VisionEncoder | None = None
) -> tuple[ImageTextModel, Config]:
    """Stage one's model and the configuration with every size filled in.

    Args:
        tokenizer_of: where the tokenizer is, for a model whose tensors will be put in: BERT's weights are not needed.
        encoder: in place of the one that the configuration names.
    """
    strategy = resolution.chosen(config.resolution)  # refused before anything is read
    encoder = encoder or build_encoder(config)
    sizes = with_encoder_width(config.qformer, encoder.width)
    if tokenizer_of is None:
        tokenizer = read_tokenizer(config.text.bert)
        qformer = QFormer.from_bert(config.text.bert, sizes, config.text.fold_token_types)
    else:
        tokenizer, qformer = read_tokenizer(tokenizer_of), QFormer(sizes)
    model = ImageTextModel(encoder, qformer, tokenizer, config.loss, config.text.max_tokens)
    model.frontend.strategy = strategy
    model.frontend.norm.eps = config.vision_norm_eps
    return model, config.model_copy(update={"qformer": qformer.config})


def build_vision_language(
    config: Config,
    device: torch.device | str = "cpu",
    encoder: VisionEncoder | None = None,
    llm: LanguageModel | None = None,
    tokenizer_of: Path | str | None = None,
) -> tuple[VisionLanguageModel, Config]:
    """Stage two's model and the configuration with every size filled in.

    Args:
        encoder, llm: in place of those that the configuration names.
        tokenizer_of: of a Q-Former that reads questions: where their tokenizer is, for a model whose text path will be
            put in. By default both are BERT's.
    """
    assert config.llm is not None, "the schema asks for an LLM in stage two"
    strategy = resolution.chosen(config.resolution)
    if encoder is None:
        vision.options_of(config.vision)  # refused before gigabytes are read
    llm = llm or load_language_model(
        config.llm.path,
        device=device,
        dtype=DTYPES[config.llm.dtype],
        dropout=config.llm.dropout,
        erf_gelu=config.llm.erf_gelu,
        quantize=config.llm.quantize,
    )
    if config.llm.lora is not None:
        lora.add(llm, config.llm.lora)
    encoder = encoder or build_encoder(config)
    connector = _build_connector(config, encoder.width, llm.width, tokenizer_of)
    model = VisionLanguageModel(encoder, connector, llm, config.llm.prompt, config.llm.max_tokens)
    model.frontend.strategy = strategy
    model.frontend.norm.eps = config.vision_norm_eps
    return model, config.model_copy(update={"qformer": connector.qformer.config})


def _build_connector(config: Config, width: int, llm_width: int, tokenizer_of: Path | str | None) -> QFormerConnector:
    """The Q-Former of stage two and its projection; one that reads questions starts from BERT unless it will be put in.

    Args:
        width: of the image tokens. llm_width: of the language model.
    """
    assert config.llm is not None
    sizes, scale = with_encoder_width(config.qformer, width), config.llm.visual_scale
    if config.question is None:
        return QFormerConnector(QFormer(sizes).drop_text(), llm_width, scale)
    if tokenizer_of is None:
        given = sizes.model_dump(include=sizes.model_fields_set - {"vocab_size", "max_positions"})  # which are BERT's
        tokenizer = read_tokenizer(config.text.bert)
        qformer = QFormer.from_bert(config.text.bert, QFormerConfig(**given), config.text.fold_token_types)
    else:
        tokenizer, qformer = read_tokenizer(tokenizer_of), QFormer(sizes)
    return QuestionConnector(qformer.drop_captioning(), llm_width, tokenizer, config.question.max_tokens, scale)


def with_dtype(config: Config, dtype: str | None, quantize: str | None = None) -> Config:
    """The configuration with the language model in this dtype and quantised like this, as far as that is given.

    Raises:
        UsageError: an unknown dtype or quantisation, one that is not possible here, or no language model to quantise.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype is '{dtype}'; {lookup.nearest(dtype, DTYPES)}")
    if quantize is not None:
        check(quantize)
    if config.llm is None:
        if quantize in (None, "none"):
            return config
        raise UsageError(f"this checkpoint has no language model to quantise to {quantize}; leave quantize out")
    given = {"dtype": dtype, "quantize": quantize}
    llm = config.llm.model_copy(update={key: value for key, value in given.items() if value is not None})
    return config.model_copy(update={"llm": llm})


def with_encoder_width(sizes: QFormerConfig, width: int) -> QFormerConfig:
    """The sizes with image tokens of this width.

    Raises:
        UsageError: another width was asked for.
    """
    if "encoder_width" in sizes.model_fields_set and sizes.encoder_width != width:
        raise UsageError(
            f"qformer.encoder_width is {sizes.encoder_width}, but the tokens of this image encoder are {width} wide; "
            "leave the key out"
        )
    return QFormerConfig(**(sizes.model_dump(include=sizes.model_fields_set) | {"encoder_width": width}))


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds: every parameter that is not frozen, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def load_trained(model: nn.Module, tensors: dict[str, Tensor], source: str | Path) -> None:
    """Put a checkpoint's tensors in; names and shapes must be exactly those that the model trains.

    Raises:
        UsageError: listing what is missing, left over or of another shape.
    """
    _put(trained_tensors(model), tensors, source)


def load_tensors(model: Bridge, tensors: dict[str, Tensor], source: str | Path) -> None:
    """`load_trained`, whoever trained the tensors: those of stage one may lack the captioning head (transformers' do).

    Raises:
        UsageError: listing what is missing, left over or of another shape.
    """
    mine = trained_tensors(model)
    if isinstance(model, ImageTextModel) and not any(name.startswith(CAPTIONING) for name in tensors):
        model.qformer.lm_head = None
        mine = {name: tensor for name, tensor in mine.items() if name not in captioning_tensors(mine)}
    _put(mine, tensors, source)


def captioning_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What stage one trains and transformers has no place for: the captioning head and the temperature of ITC."""
    return {name: tensor for name, tensor in tensors.items() if name.startswith(CAPTIONING) or name == "temp"}


def start_from(model: Bridge, source: checkpoint.Checkpoint) -> None:
    """Start training from a checkpoint of the same stage, which may lack what was not trained there.

    That is the captioning head, which transformers has no place for, an image encoder that was frozen, a text path
    that stage two had not, and adapters of a language model: those stay as they are.

    Raises:
        UsageError: listing what else is missing, left over or of another shape.
    """
    mine = trained_tensors(model)
    own = captioning_tensors(mine) | {n: tensor for n, tensor in mine.items() if n.startswith((ENCODER, LLM))}
    if isinstance(model, VisionLanguageModel):
        own |= {name: tensor for name, tensor in mine.items() if _in_text_path(name)}
    load_trained(model, own | source.tensors, source.path)


def _in_text_path(name: str) -> bool:
    return name.removeprefix("connector.").startswith(TEXT_EMBEDDINGS) or ".text_ffn." in name


@torch.no_grad()
def _put(mine: dict[str, Tensor], tensors: dict[str, Tensor], source: str | Path) -> None:
    faults = [f"missing {name}" for name in mine if name not in tensors]
    faults += [f"left over {name}" for name in tensors if name not in mine]
    faults += [
        f"{name} {list(tensors[name].shape)} instead of {list(mine[name].shape)}"
        for name in mine
        if name in tensors and tensors[name].shape != mine[name].shape
    ]
    if faults:
        shown = "; ".join(faults[:10]) + (f"; and {len(faults) - 10} more" if len(faults) > 10 else "")
        raise UsageError(f"'{source}' does not fit this model: {shown}")
    for name, parameter in mine.items():
        parameter.copy_(tensors[name])


def load_stage_one(model: VisionLanguageModel, source: checkpoint.Checkpoint) -> None:
    """Start stage two from stage one: the query path of its Q-Former and the LayerNorm of its front end.

    A Q-Former that reads questions takes the text path along.

    Raises:
        UsageError: its tensors do not fit.
    """
    mine, taken = trained_tensors(model), {}
    for name, tensor in source.tensors.items():
        ours = f"connector.{name}" if name.startswith("qformer.") else name
        if ours in mine or not (name.startswith(STAGE_ONE_ONLY) or _in_text_path(name)):
            taken[ours] = tensor
    fresh = ("connector.projection.", ENCODER, LLM)
    load_trained(model, {name: tensor for name, tensor in mine.items() if name.startswith(fresh)} | taken, source.path)


def load_text_path(model: VisionLanguageModel, source: checkpoint.Checkpoint) -> None:
    """Take the part of the Q-Former that reads questions from a checkpoint of stage one.

    Raises:
        UsageError: its tensors do not fit.
    """
    mine = {name: tensor for name, tensor in trained_tensors(model).items() if _in_text_path(name)}
    theirs = {f"connector.{name}": tensor for name, tensor in source.tensors.items()}
    _put(mine, {name: tensor for name, tensor in theirs.items() if name in mine}, source.path)


def load(
    path_or_id: str | Path,
    device: str | torch.device | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    trust: bool = False,
    verify: bool = True,
    **sizes: Any,
) -> ImageTextModel | VisionLanguageModel:
    """A trained model, in eval mode.

    Args:
        path_or_id: a run (its newest checkpoint) or a checkpoint; a `.pth` file of LAVIS or the name of a release; a
            folder or hub id of BLIP-2 in transformers; the hub id of what `qformer push` put there.
        device: where to; None is the GPU where there is one.
        dtype: of the language model: `fp32`, `fp16`, `bf16`; None is as its configuration says.
        quantize: the language model: `int8`, `nf4` or `none`; None is as its configuration says (docs/quantization.md).
        trust: import and run the `module:Class` that the checkpoint names, if it names any. Whoever made it can then
            do on this machine what you can.
        verify: compare the files of a checkpoint of ours with their checksums, and refuse weights that are not finite.
        sizes: what others' checkpoints leave open, see `qformer.model.foreign.Given`.

    Raises:
        UsageError: no checkpoint there, one that does not fit, a tower that it names is gone, or what was asked for
            is not possible here; or (`Untrusted`) it names code without `trust`.
    """
    device = devices.choose(device)
    if checkpoint.is_foreign(path_or_id):
        from qformer.model import foreign  # which builds on this file

        path_or_id = foreign.pushed(path_or_id)
        if checkpoint.is_foreign(path_or_id):
            given = lookup.build({"sizes": foreign.Given}, "sizes", sizes, "load")
            return foreign.load_foreign(path_or_id, device, dtype, given, quantize)
    if sizes:
        raise UsageError(f"'{path_or_id}' is a checkpoint of qformer, which knows its sizes; leave {min(sizes)} out")
    saved = checkpoint.read(path_or_id, trust, verify)
    config = saved.config
    if config.stage not in ("stage1", "stage2"):
        raise UsageError(f"'{path_or_id}' is a run of stage '{config.stage}'; give one of stage1 or stage2")
    model: Bridge
    if config.stage == "stage1":
        model, _ = build_image_text(with_dtype(config, dtype, quantize), saved.path)
    else:
        model, _ = build_vision_language(with_dtype(config, dtype, quantize), device, tokenizer_of=saved.path)
    load_tensors(model, saved.tensors, saved.path)
    return model.to(device).eval()


def load_vision_language(
    path: str | Path, device: str | torch.device | None = None, quantize: str | None = None, trust: bool = False
) -> VisionLanguageModel:
    """`load` for what needs a language model: a checkpoint of stage one is a UsageError."""
    model = load(path, device, quantize=quantize, trust=trust)
    if not isinstance(model, VisionLanguageModel):
        raise UsageError(f"'{path}' is a checkpoint of stage one, which has no language model; give one of stage two")
    return model
