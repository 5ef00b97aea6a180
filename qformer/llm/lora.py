"""Low-rank adapters of a frozen language model (LoRA; Hu et al., arXiv 2106.09685), through the package peft.

Adapters stand inside the model's own layers, so that everything else calls it as before. They are kept in fp32,
whatever the layers are stored in, and are all of the language model that is trained and saved.
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
    """Put adapters into the layers of a language model; they start as no change at all.

    Raises:
        UsageError: peft is not installed, or the model has none of the layers that are asked for.
    """
    peft = _peft()
    options = {"r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout}
    try:
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=config.targets, **options), llm.model)
    except (ValueError, TypeError) as error:
        known = sorted({name.rpartition(".")[2] for name, part in llm.model.named_modules() if _is_linear(part)})
        raise UsageError(
            f"llm.lora.targets {config.targets} are no layers of this {llm.model.config.model_type} model "
            f"({' '.join(str(error).split())[:200]}); give some of {', '.join(known)}"
        ) from error
    for layer in _adapted(llm.model):
        for part in (layer.lora_A, layer.lora_B):
            part.to(torch.float32)
        llm.adapters += [layer.lora_dropout]
    llm.train(llm.training)


def merge(llm: LanguageModel) -> None:
    """Add the adapters' products to the weights and remove them: the model is an ordinary one again.

    Raises:
        UsageError: an adapted weight is also that of another layer, such as an output embedding that is tied to the
            input's, which would change with it.
    """
    for layer in _adapted(llm.model):
        if len(shared := _layers_of(llm.model, layer.get_base_layer().weight)) > 1:
            raise UsageError(
                f"the adapters of {' and '.join(shared)} cannot be added to their weights, which are the same ones: "
                "both layers would change; use the checkpoint as it is"
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
    """Names of all layers that compute with this weight."""
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
