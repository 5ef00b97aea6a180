"""Low-rank adapters for a frozen language model (LoRA; Hu et al., arXiv 2106.09685), with the package peft.

Adapters are inserted into the model's own layers, so callers do not change. They are kept in fp32 whatever the dtype of
the layers, and they are the only part of the language model that is trained and saved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from qformer.types import UsageError

if TYPE_CHECKING:
    from torch import nn

    from qformer.config import LoraConfig
    from qformer.llm.base import LanguageModel


def add(llm: LanguageModel, config: LoraConfig) -> None:
    """Insert adapters into the layers of a language model; at first they do not change its output.

    Raises:
        UsageError: peft is not installed, or the model has none of the target layers.
    """
    peft = _peft()
    options = {"r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout}
    try:
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=config.targets, **options), llm.model)
    except (ValueError, TypeError) as error:
        known = sorted({name.rpartition(".")[2] for name, part in llm.model.named_modules() if _is_linear(part)})
        raise UsageError(
            f"llm.lora.targets {config.targets} are not layers of this {llm.model.config.model_type} model "
            f"({' '.join(str(error).split())[:200]}); give some of {', '.join(known)}"
        ) from error
    for layer in _adapted(llm.model):
        for part in (layer.lora_A, layer.lora_B):
            part.to(torch.float32)
        llm.adapters += [layer.lora_dropout]
    llm.train(llm.training)


def merge(llm: LanguageModel) -> None:
    """Merge the adapters into the weights and remove them, which leaves an ordinary model.

    Raises:
        UsageError: an adapted weight is shared with another layer, such as tied embeddings, which would change too.
    """
    for layer in _adapted(llm.model):
        if len(shared := _layers_of(llm.model, layer.get_base_layer().weight)) > 1:
            raise UsageError(
                f"the adapters of {' and '.join(shared)} cannot be merged, because these layers share one weight and "
                "would all change; use the checkpoint as it is"
            )
    for name, layer in [*llm.model.named_modules()]:
        if isinstance(layer, _peft().tuners.lora.LoraLayer):
            layer.merge(safe_merge=True)
            parent, _, own = name.rpartition(".")
            setattr(llm.model.get_submodule(parent), own, layer.get_base_layer())
    llm.adapters.clear()


def _adapted(model: nn.Module) -> list[Any]:
    return [part for part in model.modules() if isinstance(part, _peft().tuners.lora.LoraLayer)]


def _layers_of(model: nn.Module, weight: nn.Parameter) -> list[str]:
    """List the names of all layers that use this weight."""
    found = [name for name, other in model.named_parameters(remove_duplicate=False) if other is weight]
    return [name.removesuffix(".weight").removesuffix(".base_layer") for name in found]


def _is_linear(part: nn.Module) -> bool:
    return isinstance(part, torch.nn.Linear)


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise UsageError(
            "llm.lora needs the package peft, which is not installed; run: pip install 'peft>=0.20', or leave it out"
        ) from error
    return peft
