"""Training of towers from scratch: a ViT on captioned images; a BERT, an OPT or a T5 on text.

They serve users without access to the hub, and experiments with small towers. The result is a transformers folder,
`RUN/tower`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from qformer import lookup
from qformer.canvases.stories import CanvasStories
from qformer.checkpoints import folder as checkpoint
from qformer.data import sources
from qformer.data.base import indices
from qformer.data.held_out import HeldOut, held_out
from qformer.data.loader import Batches, BatchRecord
from qformer.data.texts import usable_captions
from qformer.evaluation.retrieval import count_equal, recalls, true_pairs
from qformer.files.records import ORIGINAL
from qformer.losses import same_image
from qformer.resolution.fixed import Fixed
from qformer.scenes.phrases import Phrases
from qformer.scenes.stories import Stories
from qformer.stages.loop import fit
from qformer.stages.towers.build import TextModel
from qformer.stages.towers.encoders import save_vit
from qformer.stages.towers.matching import ContrastiveViT, late_interaction
from qformer.stages.towers.phrases import PhraseBatches, PhraseTask, Probes
from qformer.stages.towers.stories import StoryBatches, StoryTask, StoryValidation
from qformer.stages.towers.views import TOWER, train_on_views
from qformer.types import BadSample, Batch, Tiles, UsageError

if TYPE_CHECKING:
    from qformer.config import BackboneConfig, Choice
    from qformer.data.base import Source
    from qformer.schema import Config

STORIES = {"stories": Stories, "canvas_stories": CanvasStories}


def train_vision(config: Config) -> Path:
    """Train an image encoder on captions, phrases or views and return its folder; a text tower is discarded.

    Raises:
        UsageError: the data or the text tower cannot be used.
    """
    backbone = cast("BackboneConfig", config.backbone)
    if config.data.train.name == "views":
        return train_on_views(config, backbone)
    if backbone.kind != "vit" or backbone.text is None:
        raise UsageError(
            f"data.train.name is '{config.data.train.name}', on which a ViT learns with a text tower; for other towers "
            "give the source views"
        )
    model = _fit_phrases(config, backbone) if config.data.train.name == "phrases" else _fit_captions(config, backbone)
    folder = Path(config.run) / TOWER
    save_vit(model.vit, backbone.image_size, folder)
    return folder


def _fit_captions(config: Config, backbone: BackboneConfig) -> ContrastiveViT:
    strategy = Fixed(backbone.image_size)
    source = sources.for_run(config.data.train, config.run)
    evaluate = None
    if config.data.validation is not None:
        validation = sources.for_run(config.data.validation, config.run)
        held = held_out(validation, strategy, config.data.validation_size, config.data.batch)
        evaluate = ContrastiveValidation(held)
    model = ContrastiveTask(ContrastiveViT(backbone))
    fit(model, Batches(source, strategy, config.data, config.seed), config, evaluate)
    return model.tower


def _fit_phrases(config: Config, backbone: BackboneConfig) -> ContrastiveViT:
    options = {"size": backbone.image_size, **config.data.train.options}
    phrases = cast("Phrases", lookup.build({"phrases": Phrases}, "phrases", options, "data"))
    evaluate = None
    if config.data.validation is not None:
        split = config.data.validation.options.get("split", "test")
        evaluate = Probes(split, backbone.image_size, config.data.validation_size)
    side = backbone.image_size // backbone.patch_size
    if side % 3:
        raise UsageError(
            f"a grid of {side} x {side} patches does not divide into the 3 x 3 cells of a scene; give a "
            "backbone.patch_size for which the number of patches per side is a multiple of 3"
        )
    model = PhraseTask(ContrastiveViT(backbone), side)
    fit(model, PhraseBatches(phrases, config.data.batch), config, evaluate)
    return model.tower


class ContrastiveTask(nn.Module):
    """A ViT and its text tower as a model for the training loop."""

    def __init__(self, tower: ContrastiveViT) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        device = self.tower.scale.device
        same = same_image(batch.image_id, len(batch)).to(device)
        loss = self.tower(_pixels(batch.tiles, device), cast("list[str]", batch.text), same.float())
        return {"loss": loss, "contrastive": loss}


class ContrastiveValidation:
    """Retrieval recalls of the two towers, over all captions of the held-out images."""

    def __init__(self, held: HeldOut) -> None:
        self.held = held

    def __call__(self, model: nn.Module, step: int) -> dict[str, float]:
        tower = cast("ContrastiveTask", model).tower
        images = torch.cat([tower.embed_images(_pixels(tiles, tower.scale.device)) for tiles in self.held.groups])
        texts = [tower.embed_texts(captions) for captions in self.held.captions]
        scores = torch.cat([late_interaction(images, *own) for own in texts], dim=1).cpu()  # (I, T)
        equal = count_equal(self.held.captions)
        measured: dict[str, float] = {"equal_captions": equal} if equal else {}
        for ending in ("", ORIGINAL) if equal else ("",):
            truth = true_pairs(self.held.captions, equal=not ending)
            for way, table, right in (("i2t", scores, truth), ("t2i", scores.T, truth.T)):
                measured |= {f"{way}_r{n}{ending}": share for n, share in recalls(table, right).items()}
        return measured


def _pixels(tiles: Tiles, device: torch.device) -> Tensor:
    """Stack tiles of one size: float[B, 3, h, w] in [0, 1]."""
    return torch.stack(tiles.pixels).to(device).float() / 255


def train_language(config: Config) -> Path:
    """Train a BERT, an OPT or a T5 and its tokenizer on captions or on stories; returns its folder.

    Raises:
        UsageError: the source has no captions.
    """
    backbone = cast("BackboneConfig", config.backbone)
    if config.data.train.name in STORIES:
        return _train_on_stories(config, backbone)
    texts = all_captions(sources.for_run(config.data.train, config.run))
    model = TextTask(TextModel(backbone, texts))
    evaluate = None
    if config.data.validation is not None:
        held = all_captions(sources.for_run(config.data.validation, config.run))
        evaluate = TextValidation(held[: config.data.validation_size], config.data.batch)
    fit(model, TextBatches(texts, config.data.batch, config.seed), config, evaluate)
    folder = Path(config.run) / TOWER
    model.tower.save(folder)
    return folder


def _train_on_stories(config: Config, backbone: BackboneConfig) -> Path:
    newest = checkpoint.newest(Path(config.run))
    kept = newest if newest is not None and (newest / "tokenizer.json").is_file() else None
    task = StoryTask(backbone, _stories(config.data.train), kept)
    evaluate = None
    if config.data.validation is not None:
        held = _stories(config.data.validation)
        some = [held[i] for i in range(min(config.data.validation_size, len(held)))]
        evaluate = StoryValidation(some, config.data.batch)
    batches = StoryBatches(_stories(config.data.train), config.data.batch)
    fit(task, batches, config, evaluate, extra=task.save_tokenizer)
    folder = Path(config.run) / TOWER
    task.save(folder)
    return folder


def _stories(choice: Choice) -> Stories | CanvasStories:
    return cast("Stories | CanvasStories", lookup.build(STORIES, choice.name, choice.options, "data"))


def all_captions(source: Source) -> list[str]:
    """Collect every cleaned caption of a source; records without one, or that cannot be read, are skipped."""
    texts = []
    for index in indices(source):
        try:
            texts += usable_captions(source[index])
        except BadSample:
            continue
    if not texts:
        raise UsageError("none of the records has a caption; check data.train")
    return texts


@dataclass
class TextBatches(Dataset[BatchRecord]):
    """Batches from the endless shuffled stream of texts; batch i is a function of the seed and i."""

    texts: list[str]
    batch: int
    seed: int

    def __post_init__(self) -> None:
        self.extent = len(self.texts)

    def __getitem__(self, number: int) -> BatchRecord:
        positions = range(number * self.batch, (number + 1) * self.batch)
        chosen = [self.texts[self._index(position)] for position in positions]
        return BatchRecord(Batch(Tiles([], []), chosen), [str(position) for position in positions], [])

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, len(self.texts))
        return int(np.random.default_rng([self.seed, epoch]).permutation(len(self.texts))[place])


class TextTask(nn.Module):
    """A text tower as a model for the training loop."""

    def __init__(self, tower: TextModel) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        loss = self.tower(cast("list[str]", batch.text))
        return {"loss": loss, "lm": loss}


class TextValidation:
    """The mean held-out loss."""

    def __init__(self, texts: list[str], batch: int) -> None:
        self.parts = [texts[start : start + batch] for start in range(0, len(texts), batch)]

    def __call__(self, model: nn.Module, step: int) -> dict[str, float]:
        tower = cast("TextTask", model).tower
        total = sum(tower(part).item() * len(part) for part in self.parts)
        return {"lm": total / sum(len(part) for part in self.parts)}
