"""Language models in 8 or 4 bits with bitsandbytes: requirements, settings, and the layers that are quantized.

`int8` is LLM.int8() (arXiv:2208.07339): rows of weights in 8 bits with a scale each; features above 6 stay in 16 bits.
`nf4` is the 4-bit normal float of QLoRA (arXiv:2305.14314): blocks of 64 weights with a scale each, computed in the
dtype of the model. transformers chooses the layers to quantize: all linear layers except the output embedding, tied
weights, the last layer, and those that a family keeps in fp32 (T5's `wo`, which overflows in fp16).
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from qformer import compat, lookup
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

Quantization = Literal["none", "int8", "nf4"]
NOISE = "inputs will be cast"  # logged by every call of every int8 layer if the model is not in fp16


def check(quantize: str) -> None:
    """Check that this machine can quantize a model in this way.

    Raises:
        UsageError: an unknown kind, or bitsandbytes is missing, too old, or does not run on this machine.
    """
    if quantize not in get_args(Quantization):
        raise UsageError(f"quantize is '{quantize}'; {lookup.nearest(quantize, get_args(Quantization))}")
    if quantize == "none":
        return
    if find_spec("bitsandbytes") is None:
        raise UsageError(f"{quantize} needs bitsandbytes, which is not installed; run: pip install bitsandbytes")
    try:
        import bitsandbytes
        from transformers.integrations.bitsandbytes import validate_bnb_backend_availability
        from transformers.utils import BITSANDBYTES_MIN_VERSION, is_bitsandbytes_available

        if not is_bitsandbytes_available():
            raise UsageError(
                f"{quantize} needs bitsandbytes {BITSANDBYTES_MIN_VERSION} or newer, but {bitsandbytes.__version__} is "
                "installed; run: pip install -U bitsandbytes"
            )
        validate_bnb_backend_availability(raise_exception=True)
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise UsageError(
            f"{quantize} needs bitsandbytes, which does not run on this machine ({reason}); "
            "run: pip install -U bitsandbytes, or leave quantize out"
        ) from error


def settings(quantize: str, compute: torch.dtype) -> BitsAndBytesConfig:
    """Make the `quantization_config` for `from_pretrained` of transformers.

    Args:
        quantize: `int8` or `nf4`.
        compute: dtype in which 4-bit layers multiply.

    Raises:
        UsageError: see `check`.
    """
    check(quantize)
    import bitsandbytes

    logging.getLogger(bitsandbytes.matmul.__module__).addFilter(_is_no_noise)
    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def _is_no_noise(record: logging.LogRecord) -> bool:
    return NOISE not in record.getMessage()


def keep_trainable(model: nn.Module) -> None:
    """Keep quantized layers in their original layout, and let them return copies instead of views.

    On a CPU with AVX512-BF16, the first call of a 4-bit layer without gradients (such as in the first validation of a
    run) would repack it permanently into a layout without gradients and without support of output widths that are not
    multiples of 32. And some families (Gemma 3n, LED) modify the output of a layer in place, which autograd forbids for
    the views that bitsandbytes returns.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010
        if type(module).__module__.partition(".")[0] == "bitsandbytes":
            module.register_forward_hook(lambda _module, _given, out: out.clone() if out.requires_grad else out)


def targets(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers of an unquantized transformers model that would be quantized."""
    kept = HfQuantizer.get_modules_to_not_convert(model, None, compat.kept_in_single(model))
    for name, module in model.named_modules():
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, kept):
            yield name, module


def is_quantized(module: nn.Module) -> bool:
    """Return True for a layer with weights in 8 or 4 bits."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dtype in (torch.int8, torch.uint8)


def nbytes(model: nn.Module) -> int:
    """Count the bytes of all weights and buffers of a model, including quantization scales; shared ones count once."""
    seen: dict[int, int] = {}
    for module in model.modules():
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if is_quantized(module):
            weight: Any = module.weight
            state = getattr(weight, "quant_state", None) or module.state
            scales = (getattr(place, name, None) for place in (state, weight) for name in ("absmax", "code", "SCB"))
            tensors += [tensor for tensor in scales if tensor is not None]
        seen.update({tensor.data_ptr() or id(tensor): tensor.nbytes for tensor in tensors})
    return sum(seen.values())
