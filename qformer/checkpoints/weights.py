"""Tensors that training changes: which they are, and how those of a checkpoint are put into a model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from qformer.checkpoints import folder as checkpoint
from qformer.model.image_text import ImageTextModel
from qformer.model.vision_language import VisionLanguageModel
from qformer.types import UsageError

CAPTIONING = "qformer.lm_head."
TEXT_EMBEDDINGS = ("qformer.embeddings.words.", "qformer.embeddings.positions.")
#: What stage one trains and stage two has no use for; of the text path only where its Q-Former reads no questions.
STAGE_ONE_ONLY = ("temp", "vision_proj.", "text_proj.", "itm_head.", "qformer.lm_head.", *TEXT_EMBEDDINGS)
ENCODER, LLM = "frontend.encoder.", "llm."  # begin names of what may be trained in one run and frozen in the next
MARKERS = "markers."  # begins names of what depends on the resolution, which may differ from one run to the next
PLACES = "qformer.place_"  # of links between slices, which may come in later


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Tensors that a checkpoint holds: every parameter that is not frozen, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def load_trained(model: nn.Module, tensors: dict[str, Tensor], source: str | Path) -> None:
    """Put a checkpoint's tensors in; names and shapes must be exactly those that the model trains.

    Raises:
        UsageError: listing what is missing, left over or of another shape.
    """
    _put(trained_tensors(model), tensors, source)


def load_tensors(model: ImageTextModel | VisionLanguageModel, tensors: dict[str, Tensor], source: str | Path) -> None:
    """`load_trained`, whoever trained the tensors: those of stage one may lack the captioning head (transformers' do).

    Raises:
        UsageError: listing what is missing, left over or of another shape.
    """
    mine = trained_tensors(model)
    lacks = not any(name.startswith(CAPTIONING) for name in tensors)
    if isinstance(model, ImageTextModel) and model.qformer.lm_head is not None and lacks:
        model.qformer.lm_head = None
        mine = {name: tensor for name, tensor in mine.items() if name not in captioning_tensors(mine)}
    _put(mine, tensors, source)


def captioning_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that stage one trains and transformers has no place for: captioning head and temperature of ITC."""
    return {name: tensor for name, tensor in tensors.items() if name.startswith(CAPTIONING) or name == "temp"}


def start_from(model: ImageTextModel | VisionLanguageModel, source: checkpoint.Checkpoint) -> None:
    """Start training from a checkpoint of the same stage, which may lack what was not trained there.

    That is the captioning head, which transformers has no place for, an image encoder that was frozen, a text path
    that stage two had not, adapters of a language model, markers of another resolution and the places of links: those
    stay as they are.

    Raises:
        UsageError: listing what else is missing, left over or of another shape.
    """
    mine = trained_tensors(model)
    kept = (ENCODER, LLM, MARKERS, PLACES, f"connector.{PLACES}")
    own = captioning_tensors(mine) | {n: tensor for n, tensor in mine.items() if n.startswith(kept)}
    if isinstance(model, VisionLanguageModel):
        own |= {name: tensor for name, tensor in mine.items() if _in_text_path(name)}
    given = source.tensors
    if isinstance(model, ImageTextModel) and model.qformer.lm_head is None:
        given = {name: tensor for name, tensor in given.items() if not name.startswith(CAPTIONING)}
    given = {name: tensor for name, tensor in given.items() if name in mine or not name.startswith(MARKERS)}
    load_trained(model, own | given, source.path)


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
    fresh = ("connector.projection.", f"connector.{PLACES}", ENCODER, LLM, MARKERS)
    load_trained(model, {name: tensor for name, tensor in mine.items() if name.startswith(fresh)} | taken, source.path)


def load_text_path(model: VisionLanguageModel, source: checkpoint.Checkpoint) -> None:
    """Take the part of the Q-Former that reads questions from a checkpoint of stage one.

    Raises:
        UsageError: its tensors do not fit.
    """
    mine = {name: tensor for name, tensor in trained_tensors(model).items() if _in_text_path(name)}
    theirs = {f"connector.{name}": tensor for name, tensor in source.tensors.items()}
    _put(mine, {name: tensor for name, tensor in theirs.items() if name in mine}, source.path)
