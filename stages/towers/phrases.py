"""Training of a ViT from scratch on phrases about drawn scenes, and linear probes on its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from qformer.data.loader import BatchRecord
from qformer.resolution.base import cut_all
from qformer.resolution.fixed import Fixed
from qformer.scenes.phrases import VALUES, Phrases, Properties, matches, phrase
from qformer.scenes.scenes import Scenes, draw
from qformer.types import Batch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qformer.scenes.text import Scene
    from qformer.stages.towers.matching import ContrastiveViT

FITTED = 3000  # scenes for fitting a probe
GROUP = 100  # images that pass through the ViT at a time

Picture = tuple["Scene", list[Properties]]


class PhraseTask(nn.Module):
    """A ViT and its text tower, trained on phrases that say what each image shows at each place."""

    def __init__(self, tower: ContrastiveViT, side: int) -> None:
        """Store the tower, and the `side` of its grid of patches."""
        super().__init__()
        self.tower = tower
        self.side = side

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        pictures = cast("list[Picture]", batch.text)
        device = self.tower.scale.device
        pixels = torch.stack(batch.tiles.pixels).to(device).float() / 255
        regions = cells([scene for scene, _ in pictures], self.side).to(device)
        wanted = [one for _, phrases in pictures for one in phrases]
        true = torch.from_numpy(matches([item for scene, _ in pictures for item in scene.objects], wanted)).to(device)
        loss = self.tower.grounded(pixels, regions, [phrase(one) for one in wanted], true.float())
        return {"loss": loss, "contrastive": loss}


def cells(scenes: Sequence[Scene], side: int) -> Tensor:
    """Mark the patches in the cell of each object in its 3 x 3 grid: bool[R, B, side * side]; 3 must divide side."""
    found = torch.zeros(sum(len(scene.objects) for scene in scenes), len(scenes), side, side, dtype=torch.bool)
    step, number = side // 3, 0
    for image, scene in enumerate(scenes):
        for item in scene.objects:
            row, column = (step * place for place in item.cell)
            found[number, image, row : row + step, column : column + step] = True
            number += 1
    return found.flatten(2)


@dataclass
class PhraseBatches(Dataset[BatchRecord]):
    """Batches of drawn scenes, in order, since they are endless and already random; `text` holds scenes and phrases."""

    phrases: Phrases
    batch: int

    def __getitem__(self, number: int) -> BatchRecord:
        places = [i % len(self.phrases) for i in range(number * self.batch, (number + 1) * self.batch)]
        pictures = [self.phrases[place] for place in places]
        size = self.phrases.size
        images = [torch.from_numpy(draw(scene, size, size)).permute(2, 0, 1) for scene, _ in pictures]
        return BatchRecord(
            Batch(cut_all(images, Fixed(size)), cast("Any", pictures)), [str(place) for place in places], []
        )


class Probes:
    """Accuracy of linear probes on a ViT's tokens, on scenes of a split that the probes were not fitted on."""

    def __init__(self, split: Any, size: int, count: int) -> None:
        self.fitted = Scenes("train", size=size, seed=5, count=FITTED)
        self.unseen = Scenes(split, size=size, seed=5, count=count)

    def __call__(self, model: nn.Module, step: int) -> dict[str, float]:
        tower = cast("PhraseTask", model).tower
        with torch.autocast(tower.scale.device.type, enabled=False):
            known, unseen = probe_features(tower, self.fitted), probe_features(tower, self.unseen)
        return {f"probe_{key}": linear_probe(*known[key], *unseen[key]) for key in VALUES}


def probe_features(tower: ContrastiveViT, source: Scenes) -> dict[str, tuple[Tensor, Tensor]]:
    """Extract features and labels for each property, from the objects that have it.

    Returns:
        By property: float[N, 4 * H], the four tokens nearest to the center of each object; and long[N], its value.
    """
    rows: dict[str, list[Tensor]] = {key: [] for key in VALUES}
    labels: dict[str, list[int]] = {key: [] for key in VALUES}
    for start in range(0, len(source), GROUP):
        scenes = [source.scene(i) for i in range(start, min(start + GROUP, len(source)))]
        pixels = np.stack([draw(scene, *source.pixels) for scene in scenes])
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(tower.scale.device).float() / 255
        tokens = tower.tokens(images)[:, 1:].cpu()  # without CLS
        side = round(tokens.shape[1] ** 0.5)
        for scene, grid in zip(scenes, tokens.unflatten(1, (side, side)), strict=True):
            for item in scene.objects:
                row, column = (min(max(round(c * side), 1), side - 1) for c in (item.y, item.x))
                around = grid[row - 1 : row + 1, column - 1 : column + 1].flatten()  # (4 * H)
                for key, values in VALUES.items():
                    if (value := getattr(item, key)) is not None:
                        rows[key].append(around)
                        labels[key].append(values.index(value))
    return {key: (torch.stack(rows[key]), torch.tensor(labels[key])) for key in VALUES}


def linear_probe(known: Tensor, labels: Tensor, unseen: Tensor, truth: Tensor) -> float:
    """Fit a logistic regression to `known`, float[N, H], and return its accuracy on `unseen`, float[M, H]."""
    mean, deviation = known.mean(dim=0), known.std(dim=0) + 1e-6
    known, unseen = (known - mean) / deviation, (unseen - mean) / deviation
    with torch.enable_grad():
        weight = torch.zeros(known.shape[1], int(labels.max()) + 1, requires_grad=True)
        bias = torch.zeros(weight.shape[1], requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=60)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(known @ weight + bias, labels) + 3e-4 * weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
    return (unseen @ weight + bias).argmax(dim=1).eq(truth).float().mean().item()
