"""Language models from folders, from the hub or from tensors: which kind it is, in which dtype, quantised or not."""

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
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
)

from qformer.devices import DTYPES as NAMED
from qformer.files import pretrained
from qformer.files.tensors import refuse
from qformer.llm import quantize as quantizing
from qformer.llm.abilities import examine
from qformer.llm.base import CausalLM, Seq2SeqLM
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedConfig, PreTrainedModel

    from qformer.llm.base import LanguageModel

    Dtype = torch.dtype | Literal["auto"] | None

HINT = "give a folder or hub id of a causal or encoder-decoder language model, such as facebook/opt-2.7b"
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
    """The language model in a folder or under a hub id, with its tokenizer; its configuration tells which kind it is.

    Args:
        dtype: None: as stored. "auto": float32 on the CPU, where 16 bits are slow; elsewhere as stored if that is 16
            bits, else bfloat16. So OPT (stored in float16) and Flan-T5 (stored in float32) run as in the paper, and no
            model runs in a float16 that it was not trained in. Of a quantised model: what is not quantised.
        dropout: leave dropout active in training, as LAVIS does.
        erf_gelu: compute T5's gated GELU with erf, as LAVIS does and as released BLIP-2 weights were trained, though
            T5 itself was trained with the tanh form (`gelu_new`).
        quantize: `int8`, `nf4` or `none`; see `qformer.llm.quantize`. It stays on `device` for good.
        tried: see `wrap_language_model`.

    Raises:
        UsageError: there is no such folder or id, or what is there is not a language model that can write after image
            tokens, or it cannot be quantised here.
    """
    quantizing.check(quantize)
    config = pretrained.read(AutoConfig, path, NO_MODEL)
    is_seq2seq = getattr(config, "is_encoder_decoder", False)
    # transformers gives encoders such as BERT a causal head without complaint.
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not (is_seq2seq or getattr(config, "is_decoder", False)):
        raise UsageError(f"'{path}' is a {config.model_type} model, an encoder that cannot generate text; {HINT}")
    auto = AutoModelForSeq2SeqLM if is_seq2seq else AutoModelForCausalLM
    options = _options(config, device, dtype, quantize, str(path))
    model, report = pretrained.read(auto, path, NO_MODEL, output_loading_info=True, **options)
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UsageError(f"the weights in '{path}' lack {len(missing)} tensors ({missing[0]}, ...); {HINT}")
    return wrap_language_model(_placed(model, options, device), path, dropout, erf_gelu, tried)


def quantize_held(model: Any, device: torch.device | str, dtype: torch.dtype, quantize: str, source: str) -> Any:
    """A transformers model that is already here, quantised; the given one is of no use afterwards.

    Raises:
        UsageError: it cannot be quantised here.
    """
    options = _options(model.config, device, dtype, quantize, source)
    kind, tensors = type(model), model.state_dict()
    with pretrained.quiet():
        model = kind.from_pretrained(None, config=model.config, state_dict=tensors, trust_remote_code=False, **options)
    return _placed(model, options, device)


def _options(config: Any, device: torch.device | str, dtype: Dtype, quantize: str, source: str) -> dict[str, Any]:
    """What `from_pretrained` is told of dtype, device and quantisation."""
    kept = choose_dtype(config, device, dtype)
    has_own = getattr(config, "quantization_config", None) is not None
    if quantize == "none":
        return {"dtype": kept} | ({"device_map": {"": torch.device(device)}} if has_own else {})
    if has_own:
        raise UsageError(f"the language model in '{source}' is quantised already; leave quantize out")
    compute = kept if isinstance(kept, torch.dtype) else config.dtype or torch.float32
    placed = {"": torch.device(device)}  # at once: weights are quantised as they arrive
    return {"dtype": kept, "device_map": placed, "quantization_config": quantizing.settings(quantize, compute)}


def _placed(model: Any, options: dict[str, Any], device: torch.device | str) -> Any:
    if "device_map" not in options:
        return model.to(device)
    quantizing.keep_trainable(model)
    return model


def wrap_language_model(
    model: Any, tokenizer_of: str | Path, dropout: bool = False, erf_gelu: bool = True, tried: bool = True
) -> LanguageModel:
    """A causal or encoder-decoder model of transformers and the tokenizer of a folder or hub id.

    Args:
        dropout, erf_gelu: see `load_language_model`.
        tried: find out by a few short rows what it can do (`qformer.llm.abilities`); weights alone need no trial.

    Raises:
        UsageError: there is no tokenizer, or the model cannot write after image tokens.
    """
    tokenizer = pretrained.as_words(pretrained.read(AutoTokenizer, tokenizer_of, NO_MODEL))
    letter = tokenizer("a", add_special_tokens=False)["input_ids"]
    if not letter or tokenizer.unk_token_id in letter:  # transformers makes up a tokenizer where it finds no files
        raise UsageError(f"'{tokenizer_of}' holds a language model but no tokenizer; save its tokenizer beside it")
    llm: LanguageModel
    if model.config.is_encoder_decoder:
        llm = Seq2SeqLM(model, tokenizer, dropout=dropout, erf_gelu=erf_gelu)
    else:
        llm = CausalLM(model, tokenizer, dropout=dropout)
    if tried:
        llm.abilities = examine(llm, str(tokenizer_of))
    return llm


def choose_dtype(config: PreTrainedConfig, device: torch.device | str, dtype: Dtype) -> torch.dtype | str:
    """How the weights are stored; see `load_language_model`."""
    if dtype is None:
        return "auto"  # transformers' word for "as stored"
    if dtype != "auto":
        return dtype
    if torch.device(device).type == "cpu":
        return torch.float32
    return config.dtype if config.dtype in (torch.float16, torch.bfloat16) else torch.bfloat16


DTYPES: dict[str, Any] = {"auto": "auto", **NAMED}


def language_model(config: Any, tensors: Mapping[str, Tensor], source: str) -> PreTrainedModel:
    """The language model of a transformers configuration with these tensors; tied ones may be missing.

    Raises:
        UsageError: others are missing or left over.
    """
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with init_empty_weights(include_buffers=False):  # buffers are in no file: rotary frequencies
        try:
            model = auto.from_config(config, trust_remote_code=False)
        except ValueError as error:  # heads that do not divide, say
            raise UsageError(f"the configuration of the language model in '{source}' cannot be ({error})") from error
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if tensors.keys() - shapes.keys():
        tensors = _by_names_in_memory(type(model), config, tensors, source)
    if odd := [name for name in tensors if name in shapes and shapes[name] != tensors[name].shape]:
        raise UsageError(f"the language model in '{source}' is of another size: {odd[0]}; give its own configuration")
    put_in(model, tensors, f"the language model in '{source}'")
    return model.eval()


def _by_names_in_memory(kind: Any, config: Any, tensors: Mapping[str, Tensor], source: str) -> Mapping[str, Tensor]:
    """Tensors by the names that a model has in memory: of some families (GPT-NeoX, Mixtral) files have others.

    Those that transformers cannot place stay as they are, for a refusal to name.
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
    if report["missing_keys"] or report["unexpected_keys"]:
        return tensors
    return model.state_dict()


def put_in(model: Any, tensors: Mapping[str, Tensor], what: str) -> None:
    """Tensors in the place of those of a model on the meta device; tied ones may be missing.

    Raises:
        UsageError: others are missing or left over.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}  # made
    wrong = model.load_state_dict(tensors, strict=False, assign=True)
    with pretrained.quiet():  # it calls a T5 whose two tables differ, which stays untied, corrupted
        model.tie_weights(missing_keys=set(wrong.missing_keys))
    missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    refuse(missing, wrong.unexpected_keys, what)
