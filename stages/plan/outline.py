"""Models without weights: the real modules in their real sizes, whose tensors have a shape and a dtype but no numbers.

Nothing is downloaded or read but configurations. A forward and a backward pass run and give no values; what they
would compute and keep can be counted (`stages/plan/ledger.py`).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.pytorch_utils import Conv1D

from qformer import compat, vision
from qformer.checkpoints.folder import CONFIG
from qformer.files import pretrained
from qformer.llm.base import CausalLM, Seq2SeqLM
from qformer.llm.loading import DTYPES, auto_class, choose_dtype, without_tower
from qformer.llm.quantize import targets
from qformer.model.assembly import assemble
from qformer.model.bert import bert_sizes
from qformer.stages.plan.sizes import KNOWN
from qformer.types import UsageError
from qformer.vision.base import CLIP_MEAN, CLIP_STD
from qformer.vision.hf import HFVisionEncoder
from qformer.vision.mof import MofConfig, MofEncoder
from qformer.vision.options import HFVisionConfig

if TYPE_CHECKING:
    from pathlib import Path

    from qformer.llm.base import LanguageModel
    from qformer.model.assembly import Bridge
    from qformer.schema import Config
    from qformer.vision.base import VisionEncoder

WORD = "word"


def configuration_file(path: Path) -> Path:
    """Find the configuration of a run or a checkpoint of ours in its folder; other paths stay as they are.

    Raises:
        UsageError: the folder is one of transformers, whose sizes stand beside its tensors.
    """
    if not path.is_dir():
        return path
    if (path / CONFIG).is_file():
        return path / CONFIG
    if (path / "config.json").is_file():
        raise UsageError(
            f"'{path}' is a folder of transformers, and a plan is made of a configuration; run qformer convert {path} "
            "-o FOLDER and plan that FOLDER"
        )
    raise UsageError(f"'{path}' is a folder without a {CONFIG}; give a configuration, a run or a checkpoint")


def outline(config: Config, device: str) -> tuple[Bridge, Any]:
    """The model of stage one or two (`qformer.model.assembly.assemble`), in training mode.

    Args:
        device: `cpu` or `cuda`, for which the dtype of a language model may differ. Its tensors are on no device.

    Returns:
        The model, and the mode (`compat.fake_mode`) in which further tensors without numbers are made. Tensors with
        numbers may be mixed with those of the model.

    Raises:
        UsageError: another stage, or a tower whose configuration is neither here nor known.
    """
    if config.stage not in ("stage1", "stage2"):
        raise UsageError(f"a run of stage '{config.stage}' is small and is not planned; give stage1 or stage2")
    with torch.device("meta"):
        encoder = outline_encoder(config)
        llm = outline_language_model(config, device) if config.stage == "stage2" else None
        model, _ = assemble(_with_text_sizes(config), device, encoder, llm, Words())
    mode = compat.fake_mode()
    _pretend(model, mode)
    return model.train(), mode


def _with_text_sizes(config: Config) -> Config:
    """The configuration with the sizes of BERT, from which a Q-Former that reads texts starts."""
    if config.stage == "stage2" and config.question is None:  # or another connector than the Q-Former's
        return config
    theirs = read_sizes(config.text.bert, "text.bert")
    if theirs.model_type != "bert":
        raise UsageError(f"text.bert '{config.text.bert}' is a {theirs.model_type} model; give a BERT")
    return config.model_copy(update={"qformer": bert_sizes(theirs, theirs.vocab_size + 1, config.qformer)})


def _pretend(model: nn.Module, mode: Any) -> None:
    """Parameters and buffers that claim to be on the CPU, where autocast works; shared ones stay shared."""
    known: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in known:
            with mode:
                made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            trains = tensor.requires_grad
            known[id(tensor)] = nn.Parameter(made, trains) if isinstance(tensor, nn.Parameter) else made
        return known[id(tensor)]

    for module in model.modules():
        parameters = module.named_parameters(recurse=False, remove_duplicate=False)
        buffers = module.named_buffers(recurse=False, remove_duplicate=False)
        for name, tensor in [*parameters, *buffers]:
            setattr(module, name, fake(tensor))


def outline_encoder(config: Config) -> VisionEncoder:
    """The image encoder of a configuration without its weights, frozen or not as the configuration says.

    Raises:
        UsageError: options that do not fit, or sizes that are not to be had.
    """
    encoder = _outline_part(vision.options_of(config.vision))
    return encoder.freeze() if config.freeze_vision else encoder.float()


def _outline_part(options: Any) -> VisionEncoder:
    """Build an image encoder, or both of a mixture, without weights."""
    if isinstance(options, MofConfig):
        first, second = map(_outline_part, options.parts)
        return MofEncoder(first, second, options.mode, options.alpha)
    encoder: VisionEncoder
    if isinstance(options, HFVisionConfig):
        model = AutoModel.from_config(
            read_sizes(options.path, "vision.path"), dtype=DTYPES[options.precision], trust_remote_code=False
        )
        read = (options.layer, CLIP_MEAN, CLIP_STD, options.layers, options.final_norm)
        encoder = HFVisionEncoder(model, *read)
    elif getattr(options, "weights", None) is not None:
        encoder = dataclasses.replace(options, weights=None).build()
    else:
        encoder = options.build()
    return encoder


def outline_language_model(config: Config, device: str) -> LanguageModel:
    """The language model of stage two without its weights; each word of a text is one token.

    Raises:
        UsageError: sizes that are not to be had.
    """
    assert config.llm is not None
    theirs = read_sizes(config.llm.path, "llm.path")
    dtype = choose_dtype(theirs, device, DTYPES[config.llm.dtype])
    quantize = config.llm.quantize
    is_seq2seq = getattr(theirs, "is_encoder_decoder", False)
    try:
        model = without_tower(auto_class(theirs).from_config(theirs, dtype=dtype, trust_remote_code=False))
    except ValueError as error:
        raise UsageError(
            f"llm.path '{config.llm.path}' is a {theirs.model_type} model, which generates no text"
        ) from error
    if quantize != "none":
        outline_quantized(model, quantize)
    if is_seq2seq:
        if getattr(theirs, "scale_decoder_outputs", True) is False:  # T5 1.1: its files hold an output table of its own
            model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
        return Seq2SeqLM(model, Words(), dropout=config.llm.dropout, erf_gelu=config.llm.erf_gelu)  # type: ignore[arg-type]
    return CausalLM(model, Words(), dropout=config.llm.dropout)  # type: ignore[arg-type]


def read_sizes(path: str, key: str) -> Any:
    """The configuration of a tower: of a folder, of the local cache of the hub, or of `sizes.KNOWN`.

    Raises:
        UsageError: it is in none of them.
    """
    unknown = (
        f"the sizes of {key} '{{path}}' are not known here; give a folder with its config.json, "
        f"or one of {', '.join(sorted(KNOWN))}"
    )
    try:
        return pretrained.read(AutoConfig, path, unknown, local_files_only=True)
    except UsageError:
        if path not in KNOWN:
            raise
    options = dict(KNOWN[path])
    return AutoConfig.for_model(options.pop("model_type"), **options)


class Words:
    """Stand-in for a tokenizer, with one token per word, so that a text has a chosen number of tokens."""

    bos_token_id, pad_token_id, eos_token_id, unk_token_id = 0, 1, 2, 3
    all_special_ids: tuple[int, ...] = ()  # none stands in a text
    all_special_tokens: tuple[str, ...] = ()
    chat_template = None  # the template `auto` is none, then
    added_tokens_decoder: ClassVar[dict[int, Any]] = {}

    def convert_tokens_to_ids(self, _token: str) -> int:
        return 4

    def __call__(self, texts: str | list[str], **_options: Any) -> dict[str, Any]:
        if isinstance(texts, str):
            return {"input_ids": [4] * max(len(texts.split()), 1)}
        return {"input_ids": [[4] * len(text.split()) for text in texts]}


def words(count: int) -> str:
    """A text of so many tokens."""
    return " ".join([WORD] * count)


BLOCK = 64  # weights that share a scale in nf4
SCALE = 4  # bytes: fp32, of a row in int8 or of a block in nf4


class OutlinedLinear(nn.Module):
    """A quantised layer without numbers, for plans: as many bytes as bitsandbytes keeps, and what it makes on the way.

    Attributes:
        count: numbers that the bytes of `weight` stand for.
    """

    def __init__(self, layer: nn.Module, quantize: str) -> None:
        super().__init__()
        shape: Any = layer.weight.shape
        self.outputs, self.inputs = tuple(shape)[:: -1 if isinstance(layer, Conv1D) else 1]
        self.count = self.outputs * self.inputs
        scales = self.outputs if quantize == "int8" else -(-self.count // BLOCK)
        values = self.count if quantize == "int8" else -(-self.count // 2)
        kept = torch.empty(values + SCALE * scales, dtype=torch.int8 if quantize == "int8" else torch.uint8)
        self.weight = nn.Parameter(kept, requires_grad=False)
        self.bias: Any = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """float[..., inputs] -> float[..., outputs]."""
        y = _Dequantized.apply(x, self.outputs)
        return y if self.bias is None else y + self.bias


class _Dequantized(torch.autograd.Function):
    """A product with weights that are made on the way, forward and backward, and not kept in between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, outputs: int) -> Tensor:
        ctx.inputs = x.shape[-1]
        return F.linear(x, x.new_empty(outputs, ctx.inputs))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ grad.new_empty(grad.shape[-1], ctx.inputs), None


def outline_quantized(model: nn.Module, quantize: str) -> None:
    """Put layers without numbers in the place of those that would be quantised."""
    for name, layer in list(targets(model)):
        model.set_submodule(name, OutlinedLinear(layer, quantize))
