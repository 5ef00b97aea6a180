"""Training of image encoders on views of canvases (`canvas_views`), and linear probes of what they see."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from qformer import lookup
from qformer.data.loader import BatchRecord
from qformer.resolution.base import whole
from qformer.stages.loop import fit
from qformer.stages.towers.canvas_views import VALUES, View, Views
from qformer.stages.towers.global_clip import GlobalClip
from qformer.stages.towers.labels import LabeledTower
from qformer.stages.towers.masked import MaskedViT
from qformer.stages.towers.phrases import linear_probe
from qformer.types import Batch, Plan, Tiles, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qformer.config import BackboneConfig
    from qformer.schema import Config

TOWER = "tower"
FITTED = 3000  # views for fitting a probe
GROUP = 100  # views that pass through the encoder at a time
TEXTS = 5000  # captions on which a tokenizer is trained
SEED = 5  # of the views of probes


class Eyes(Protocol):
    """An image encoder in training."""

    def patches(self, pictures: Sequence[Tensor]) -> list[Tensor]:
        """Encode pictures uint8[3, h, w]; the tokens of each, float[rows * columns, width], row by row."""

    def save(self, folder: Path) -> None:
        """Write the encoder as the folder that later is read."""


def train_on_views(config: Config, backbone: BackboneConfig) -> Path:
    """Train an image encoder on views and return its folder.

    Raises:
        UsageError: the sizes of the views and of the encoder do not fit.
    """
    options = {"patch": backbone.patch_size, **config.data.train.options}
    views = cast("Views", lookup.build({"views": Views}, "views", options, "data"))
    if views.patch % backbone.patch_size or (views.size or 0) % backbone.patch_size:
        raise UsageError(
            f"data.train.size {views.size} and patch {views.patch} do not divide into patches of "
            f"{backbone.patch_size}; give multiples of backbone.patch_size"
        )
    any_size = backbone.kind != "clip" and backbone.mask is None
    if not any_size and views.size != backbone.image_size:
        raise UsageError(
            f"data.train.size is {views.size}, and this tower is trained on views of backbone.image_size "
            f"{backbone.image_size}; give this size"
        )
    if backbone.text is not None:
        raise UsageError("the source views needs no text tower; leave backbone.text out")
    evaluate = None
    if config.data.validation is not None:
        split = config.data.validation.options.get("split", "test")
        evaluate = ViewProbes(split, backbone.image_size, config.data.validation_size)
    task = build_task(backbone, views)
    fit(task, ViewBatches(views, config.data.batch), config, evaluate)
    folder = Path(config.run) / TOWER
    task.tower.save(folder)
    return folder


def build_task(backbone: BackboneConfig, views: Views) -> ViewTask:
    """Build the tower of a configuration, with what trains it."""
    if backbone.kind == "clip":
        return CaptionTask(GlobalClip(backbone, (views[i].caption for i in range(min(TEXTS, len(views))))))
    if backbone.mask is not None:
        return MaskedTask(MaskedViT(backbone))
    return LabeledTask(LabeledTower(backbone))


class ViewTask(nn.Module):
    """A tower and its objective, as a model for the training loop; the `text` of a batch is its views."""

    tower: Any  # Eyes

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower


class LabeledTask(ViewTask):
    """Properties and numbers of objects are told."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        views = cast("list[View]", batch.text)
        boxes = [torch.from_numpy(view.boxes).float() for view in views]
        losses = self.tower(batch.tiles.pixels, boxes, [view.objects for view in views])
        total = torch.stack([*losses.values()]).sum()
        return {"loss": total, "labels": total, **losses}


class MaskedTask(ViewTask):
    """Hidden patches are filled in."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        loss = self.tower(batch.tiles.pixels)
        return {"loss": loss, "masked": loss}


class CaptionTask(ViewTask):
    """Captions are matched with pictures."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        loss = self.tower(batch.tiles.pixels, [view.caption for view in cast("list[View]", batch.text)])
        return {"loss": loss, "contrastive": loss}


@dataclass
class ViewBatches(Dataset[BatchRecord]):
    """Batches of views, in order, since they are endless and already random."""

    views: Views
    batch: int

    def __getitem__(self, number: int) -> BatchRecord:
        places = [i % len(self.views) for i in range(number * self.batch, (number + 1) * self.batch)]
        views = [self.views[place] for place in places]
        tiles = Tiles(images(views), [_as_it_is(view) for view in views])
        return BatchRecord(Batch(tiles, cast("Any", views)), [str(place) for place in places], [])


def _as_it_is(view: View) -> Plan:
    height, width = view.pixels.shape[:2]
    return Plan((width, height), (whole(width, height),), (1, 1), None, 1)


def images(views: Sequence[View]) -> list[Tensor]:
    """Pictures uint8[3, h, w] of views."""
    return [torch.from_numpy(view.pixels).permute(2, 0, 1) for view in views]


class ViewProbes:
    """Accuracy of linear probes on pieces of canvases at their own size, of a split that they were not fitted on."""

    def __init__(self, split: Any, size: int, count: int) -> None:
        self.split, self.size, self.number = split, size, count

    def __call__(self, model: nn.Module, step: int) -> dict[str, float]:
        tower = cast("Eyes", cast("ViewTask", model).tower)
        known, unseen = pieces("train", self.size, FITTED), pieces(self.split, self.size, self.number)
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            return measure(features(tower, known), features(tower, unseen))


@lru_cache(maxsize=2)
def pieces(split: Any, size: int, count: int) -> list[View]:
    """Pieces of canvases for probes, which stay the same for every tower."""
    source = Views(split, size, mixed=False, seed=SEED, count=count)
    return [source[i] for i in range(count)]


Features = dict[str, tuple[Tensor, Tensor]]  # by property: float[N, F] and its values long[N]


def measure(known: Features, unseen: Features) -> dict[str, float]:
    """Compute the accuracy of a linear probe for each property, fitted on the first and measured on the second."""
    return {
        f"probe_{key}": linear_probe(*known[key], *unseen[key])
        for key in known
        if len(known[key][1]) and len(unseen[key][1])
    }


@torch.no_grad()
def features(tower: Eyes, views: Sequence[View]) -> Features:
    """Extract features and labels for each property, from the objects that have it.

    Returns:
        By property, the four tokens nearest to the center of each object, float[N, 4 * H]; and `count`, the mean of all
        tokens of a view, float[N, H], with the number of its objects minus one.
    """
    collected = Collected()
    for start in range(0, len(views), GROUP):
        group = views[start : start + GROUP]
        for view, tokens in zip(group, tower.patches(images(group)), strict=True):
            height, width = view.pixels.shape[:2]
            rows = round((len(tokens) * height / width) ** 0.5)
            grid = tokens.float().cpu().unflatten(0, (rows, -1))
            side = height / rows
            collected.count(tokens.float().mean(dim=0).cpu(), len(view.objects))
            for box, known in zip(view.boxes, view.objects, strict=True):
                x, y = (box[0] + box[2]) / 2 / side, (box[1] + box[3]) / 2 / side
                collected.add(around(grid, x, y), known)
    return collected.stacked()


class Collected:
    """Features and labels, by property."""

    def __init__(self) -> None:
        self.rows: dict[str, list[Tensor]] = {key: [] for key in (*VALUES, "count")}
        self.labels: dict[str, list[int]] = {key: [] for key in (*VALUES, "count")}

    def add(self, row: Tensor, known: dict[str, str]) -> None:
        """Add an object with these properties."""
        for key, value in known.items():
            self.rows[key].append(row)
            self.labels[key].append(VALUES[key].index(value))

    def count(self, row: Tensor, number: int) -> None:
        """Add a picture with so many objects."""
        self.rows["count"].append(row)
        self.labels["count"].append(number - 1)

    def stacked(self) -> Features:
        return {key: (torch.stack(rows), torch.tensor(self.labels[key])) for key, rows in self.rows.items() if rows}


def around(grid: Tensor, x: float, y: float) -> Tensor:
    """The four tokens of a grid [rows, columns, H] nearest to a place in units of patches: [4 * H]."""
    row, column = (min(max(round(place), 1), count - 1) for place, count in zip((y, x), grid.shape[:2], strict=True))
    return grid[row - 1 : row + 1, column - 1 : column + 1].flatten()
