"""Loading of language models from folders, from the hub or from tensors, with a choice of dtype and quantization."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
)

from qformer.devices import DTYPES as NAMED
from qformer.files import pretrained
from qformer.files.tensors import refuse
from qformer.llm import chat, mrope
from qformer.llm import quantize as quantizing
from qformer.llm.abilities import examine
from qformer.llm.base import CausalLM, Seq2SeqLM
from qformer.template import NONE
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedConfig, PreTrainedModel

    from qformer.language_schema import LLMConfig
    from qformer.llm.base import LanguageModel

    Dtype = torch.dtype | Literal["auto"] | None

HINT = "give a folder or hub id of a causal or encoder-decoder language model, such as facebook/opt-2.7b"
TOWER = "model.visual."  # begins the names of an image encoder beside a language model
NO_MODEL = f"no language model can be loaded from {{where}} ({{reason}}); {HINT}"


def load_language_model(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: Dtype = "auto",
    dropout: bool = False,
    erf_gelu: bool = True,
    quantize: str = "none",
    tried: bool = True,
) -> LanguageModel:
    """Load a causal or encoder-decoder language model and its tokenizer from a folder or hub id.

    Of a Qwen2-VL the language model alone is kept; it numbers pictures by time, row and column (`qformer.llm.mrope`).

    Args:
        dtype: None keeps the stored dtype. "auto" is float32 on the CPU, where 16 bits are slow; elsewhere it is the
            stored dtype if that has 16 bits, else bfloat16. So OPT (stored in float16) and Flan-T5 (stored in float32)
            run as in the paper, and no model runs in a float16 that it was not trained in. For a quantized model, this
            is the dtype of the layers that are not quantized.
        dropout: keep dropout active in training, as LAVIS does.
        erf_gelu: compute T5's gated GELU with erf, as LAVIS does and as released BLIP-2 weights were trained, although
            T5 itself was trained with the tanh form (`gelu_new`).
        quantize: `int8`, `nf4` or `none`; see `qformer.llm.quantize`. A quantized model cannot leave `device`.
        tried: see `wrap_language_model`.

    Raises:
        UsageError: the folder or id does not exist, its model cannot write after image tokens, or this machine cannot
            quantize it.
    """
    quantizing.check(quantize)
    config = pretrained.read(AutoConfig, path, NO_MODEL)
    is_seq2seq = getattr(config, "is_encoder_decoder", False)
    # transformers gives encoders such as BERT a causal head without complaint.
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not (is_seq2seq or getattr(config, "is_decoder", False)):
        raise UsageError(f"'{path}' is a {config.model_type} model, an encoder that cannot generate text; {HINT}")
    options = _options(config, device, dtype, quantize, str(path))
    model, report = pretrained.read(auto_class(config), path, NO_MODEL, output_loading_info=True, **options)
    if missing := _lacking(report):
        raise UsageError(f"the weights in '{path}' lack {len(missing)} tensors ({missing[0]}, ...); {HINT}")
    return wrap_language_model(_placed(without_tower(model), options, device), path, dropout, erf_gelu, tried)


def auto_class(config: Any) -> Any:
    """The class of transformers that makes the language model of a configuration."""
    if getattr(config, "is_encoder_decoder", False):
        return AutoModelForSeq2SeqLM
    return AutoModelForImageTextToText if config.model_type in mrope.FAMILIES else AutoModelForCausalLM


def without_tower(model: Any) -> Any:
    """Take the image encoder out of a model of transformers that has one, in place; `qformer.vision` has its own."""
    if model.config.model_type in mrope.FAMILIES:
        model.model.visual = None
        model.config.vision_config.depth = 0  # a folder that it is saved to is read without making one up
    return model


def _lacking(report: Mapping[str, Any]) -> list[str]:
    """Names of tensors that transformers has not found, but for those of an image encoder, which is not needed."""
    return sorted(name for name in report["missing_keys"] if not name.startswith(TOWER))


def quantize_held(model: Any, device: torch.device | str, dtype: torch.dtype, quantize: str, source: str) -> Any:
    """Quantize a transformers model that is already in memory; the given model must not be used afterward.

    Raises:
        UsageError: this machine cannot quantize it.
    """
    options = _options(model.config, device, dtype, quantize, source)
    kind, tensors = type(model), model.state_dict()
    with pretrained.quiet():
        model = kind.from_pretrained(None, config=model.config, state_dict=tensors, trust_remote_code=False, **options)
    return _placed(without_tower(model), options, device)


def _options(config: Any, device: torch.device | str, dtype: Dtype, quantize: str, source: str) -> dict[str, Any]:
    """Make the options of `from_pretrained` for dtype, device and quantization."""
    kept = choose_dtype(config, device, dtype)
    has_own = getattr(config, "quantization_config", None) is not None
    if quantize == "none":
        return {"dtype": kept} | ({"device_map": {"": torch.device(device)}} if has_own else {})
    if has_own:
        raise UsageError(f"the language model in '{source}' is already quantized; leave quantize out")
    compute = kept if isinstance(kept, torch.dtype) else config.dtype or torch.float32
    placed = {"": torch.device(device)}  # directly, as weights are quantized while they load
    return {"dtype": kept, "device_map": placed, "quantization_config": quantizing.settings(quantize, compute)}


def _placed(model: Any, options: dict[str, Any], device: torch.device | str) -> Any:
    if "device_map" not in options:
        return model.to(device)
    quantizing.keep_trainable(model)
    return model


def wrap_language_model(
    model: Any, tokenizer_of: str | Path, dropout: bool = False, erf_gelu: bool = True, tried: bool = True
) -> LanguageModel:
    """Wrap a causal or encoder-decoder transformers model with the tokenizer of a folder or hub id.

    Args:
        dropout, erf_gelu: see `load_language_model`.
        tried: test the abilities of the model with a few short rows (`qformer.llm.abilities`); code that only needs the
            weights can skip this.

    Raises:
        UsageError: there is no tokenizer, or the model cannot write after image tokens.
    """
    tokenizer = pretrained.as_words(pretrained.read(AutoTokenizer, tokenizer_of, NO_MODEL))
    letter = tokenizer("a", add_special_tokens=False)["input_ids"]
    if not letter or tokenizer.unk_token_id in letter:  # transformers makes up a tokenizer if there are no files
        raise UsageError(f"'{tokenizer_of}' holds a language model but no tokenizer; save its tokenizer there too")
    llm: LanguageModel
    if model.config.is_encoder_decoder:
        llm = Seq2SeqLM(model, tokenizer, dropout=dropout, erf_gelu=erf_gelu)
    else:
        llm = CausalLM(model, tokenizer, dropout=dropout)
    if tried:
        llm.abilities = examine(llm, str(tokenizer_of))
    return llm


def equip(llm: LanguageModel, config: LLMConfig) -> LLMConfig:
    """Let a language model use the template of a configuration; returns the configuration with the template's text.

    Raises:
        UsageError: see `chat.resolve`; or the prompt holds special tokens, which the template is there to write; or
            `clip_ids` are asked of a model that does not number pictures by time, row and column.
    """
    template = chat.resolve(config.template, llm.tokenizer, config.path)
    for token in llm.tokenizer.all_special_tokens if template != NONE else ():
        if token in config.prompt:
            raise UsageError(
                f"llm.prompt holds the special token {token}, but llm.template is there to write such tokens; give a "
                "prompt of words alone"
            )
    llm.use_template(template)
    if config.clip_ids != "paper" and not llm.has_places:
        raise UsageError(
            f"llm.clip_ids is '{config.clip_ids}', but a {llm.model.config.model_type} model has no ids of time, row "
            "and column; leave it out"
        )
    llm.clip_ids = config.clip_ids
    return config.model_copy(update={"template": template})


def choose_dtype(config: PreTrainedConfig, device: torch.device | str, dtype: Dtype) -> torch.dtype | str:
    """Choose the dtype of the weights; see `load_language_model`."""
    if dtype is None:
        return "auto"  # in transformers this means "as stored"
    if dtype != "auto":
        return dtype
    if torch.device(device).type == "cpu":
        return torch.float32
    return config.dtype if config.dtype in (torch.float16, torch.bfloat16) else torch.bfloat16


DTYPES: dict[str, Any] = {"auto": "auto", **NAMED}


def language_model(config: Any, tensors: Mapping[str, Tensor], source: str) -> PreTrainedModel:
    """Build the language model of a transformers configuration with these tensors; tied ones can be missing.

    Raises:
        UsageError: other tensors are missing or left over.
    """
    with init_empty_weights(include_buffers=False):  # files have no buffers, such as rotary frequencies
        try:
            model = without_tower(auto_class(config).from_config(config, trust_remote_code=False))
        except ValueError as error:  # such as a width that the heads do not divide
            raise UsageError(f"the configuration of the language model in '{source}' is not valid ({error})") from error
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if tensors.keys() - shapes.keys():
        tensors = _by_names_in_memory(type(model), config, tensors, source)
    if odd := [name for name in tensors if name in shapes and shapes[name] != tensors[name].shape]:
        raise UsageError(f"the language model in '{source}' has another size: {odd[0]}; give its own configuration")
    put_in(model, tensors, f"the language model in '{source}'")
    return model.eval()


def _by_names_in_memory(kind: Any, config: Any, tensors: Mapping[str, Tensor], source: str) -> Mapping[str, Tensor]:
    """Rename tensors to the names in memory, which for some families (GPT-NeoX, Mixtral) differ from those in files.

    If transformers cannot place all of them, the tensors are returned unchanged, for the error message to name.
    """
    with pretrained.quiet():
        try:
            model, report = kind.from_pretrained(
                None, config=config, state_dict=dict(tensors), output_loading_info=True, trust_remote_code=False
            )
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0].rstrip(".")
            raise UsageError(
                f"the tensors of the language model in '{source}' cannot be placed ({reason}); give it as it was saved"
            ) from error
    if _lacking(report) or report["unexpected_keys"]:
        return tensors
    return without_tower(model).state_dict()


def put_in(model: Any, tensors: Mapping[str, Tensor], what: str) -> None:
    """Put tensors in place of those of a model on the meta device; tied ones can be missing.

    Raises:
        UsageError: other tensors are missing or left over.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    wrong = model.load_state_dict(tensors, strict=False, assign=True)
    with pretrained.quiet():  # it warns that a T5 with two different tables, which stays untied, is corrupted
        model.tie_weights(missing_keys=set(wrong.missing_keys))
    missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    refuse(missing, wrong.unexpected_keys, what)
