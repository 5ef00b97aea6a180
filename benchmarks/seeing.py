"""Linear probes of objects of 24 to 40 pixels on canvases of 120 to 480, by image encoder and resolution strategy.

    python benchmarks/seeing.py [--tower mini:vit runs/mini/vit_rope/tower] [--canvases 600] [--unseen 300]

`fixed` squashes a canvas into 120 x 120 pixels, where its objects are 6 to 40 pixels large; the other strategies show
them at about their own size, in tiles or as one picture. For each object the tile is taken that shows most of it, and
of those the one that shows it largest; the probe reads the four tokens nearest to its center there. It is fitted on
canvases of the training split, and measured on those of the test split, which have combinations that training has not;
words are written on most of the objects that have room for one. `count` is the number of objects, from the mean of
all tokens.

A tower is a ViT (`vision: {name: hf}`) or, by its configuration, one of Qwen2-VL's form.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from qformer import resolution, vision
from qformer.canvases.drawing import draw_canvas
from qformer.canvases.source import Canvases
from qformer.files import pretrained
from qformer.resolution.base import cut_all
from qformer.stages.towers.canvas_views import properties, written
from qformer.stages.towers.phrases import linear_probe
from qformer.stages.towers.views import Collected, around

if TYPE_CHECKING:
    from collections.abc import Iterable

    from qformer.canvases.canvas import Canvas, CanvasObject
    from qformer.resolution.base import ResolutionStrategy
    from qformer.stages.towers.views import Features
    from qformer.types import Plan, Tile
    from qformer.vision.base import VisionEncoder

SIDE, PATCH = 120, 20  # pixels, of a square tile and of a patch
STRATEGIES: dict[str, dict[str, Any]] = {
    "fixed": {"size": SIDE},
    "pad_square": {"size": SIDE, "patch": PATCH},
    "internvl": {"size": SIDE, "patch": PATCH, "max_tiles": 9},
    "anyres": {"size": SIDE, "patch": PATCH, "max_patches": None},
    "uhd": {"size": SIDE, "patch": PATCH, "max_slices": 16},
    "qwen2vl": {"patch": PATCH},
    "oryx": {"patch": PATCH, "stride": PATCH, "low": SIDE, "high": 480},
}
SHOWN = ("word", "shape", "small shape", "colour", "direction", "state", "count")


def canvases(split: Any, count: int) -> list[Canvas]:
    """Compose canvases of a split, with more words on them than they have by themselves."""
    return [written(Canvases(split, seed=5).canvas(i), np.random.default_rng((5, i))) for i in range(count)]


def read_tower(path: str) -> VisionEncoder:
    """Read an image encoder, frozen; its kind and sizes are those of its configuration."""
    folder = Path(pretrained.tower(path))
    sizes = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if sizes["model_type"] != "qwen2_vl":
        return vision.build("hf", path=path).freeze()
    sizes = sizes["vision_config"]
    options = {
        "image_size": SIDE,
        "patch_size": sizes["patch_size"],
        "width": sizes["embed_dim"],
        "depth": sizes["depth"],
        "heads": sizes["num_heads"],
        "mlp_hidden": round(sizes["mlp_ratio"] * sizes["embed_dim"]),
    }
    return vision.build("qwen2vl", weights=path, **options).freeze()


def in_tile(tile: Tile, image: tuple[int, int], box: tuple[int, ...]) -> tuple[list[float], float]:
    """Where a tile shows a box (left, top, right, bottom) of a picture, and the share of the box that it shows."""
    scales = [content / side for content, side in zip(tile.content, image, strict=True)]
    last = [size / (tile.box[axis + 2] - tile.box[axis]) for axis, size in enumerate(tile.size)]
    place, share = [0.0] * 4, 1.0
    for axis in (0, 1):
        low, high = (box[end] * scales[axis] + tile.offset[axis] - tile.box[axis] for end in (axis, axis + 2))
        shown = min(high, tile.box[axis + 2] - tile.box[axis]) - max(low, 0)
        share *= max(shown, 0) / (high - low)
        place[axis], place[axis + 2] = low * last[axis], high * last[axis]
    return place, share


def best_tile(plan: Plan, box: tuple[int, ...]) -> tuple[int, list[float]]:
    """Number of the tile that shows most of a box, of those the one that shows it largest; and where."""
    shown = [in_tile(tile, plan.image, box) for tile in plan.tiles]

    def worth(number: int) -> tuple[float, float]:
        place, share = shown[number]
        return round(share, 2), (place[2] - place[0]) * (place[3] - place[1])

    best = max(range(len(shown)), key=worth)
    return best, shown[best][0]


@torch.no_grad()
def features(encoder: VisionEncoder, strategy: ResolutionStrategy, canvases: Iterable[Canvas]) -> Features:
    """Extract features and labels of all objects by property, see the top of this file."""
    collected = Collected()
    small = collected.rows["small shape"] = []
    labels = collected.labels["small shape"] = []
    for canvas in canvases:
        tiles = cut_all([torch.from_numpy(draw_canvas(canvas)).permute(2, 0, 1)], strategy)
        plan = tiles.plans[0]
        tokens = encoder.encode_all([pixels.float() / 255 for pixels in tiles.pixels])
        grids = [_grid(encoder, tile, own) for tile, own in zip(plan.tiles, tokens, strict=True)]
        collected.count(torch.cat([grid.flatten(0, 1) for grid in grids]).mean(dim=0), len(canvas.objects))
        for item in canvas.objects:
            row = _at(grids, plan, encoder.patch_size, item)
            collected.add(row, properties(canvas, item))
            if item.size == "small":
                small.append(row)
                labels.append(collected.labels["shape"][-1])
    return collected.stacked()


def _grid(encoder: VisionEncoder, tile: Tile, tokens: Tensor) -> Tensor:
    return tokens[encoder.extra :].unflatten(0, encoder.grid(*tile.size))


def _at(grids: list[Tensor], plan: Plan, patch: int, item: CanvasObject) -> Tensor:
    number, place = best_tile(plan, item.box)
    return around(grids[number], (place[0] + place[2]) / 2 / patch, (place[1] + place[3]) / 2 / patch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", nargs="+", default=["mini:vit"])
    parser.add_argument("--strategy", nargs="+", default=list(STRATEGIES), choices=list(STRATEGIES))
    parser.add_argument("--canvases", type=int, default=600, help="to fit the probes on")
    parser.add_argument("--unseen", type=int, default=300)
    options = parser.parse_args()
    table = Table("tower", "strategy", *SHOWN, "tokens", "seconds")
    for path in options.tower:
        encoder = read_tower(path)
        for name in options.strategy:
            start = time.process_time()
            strategy = resolution.build(name, **STRATEGIES[name])
            known, unseen = canvases("train", options.canvases), canvases("test", options.unseen)
            first, second = features(encoder, strategy, known), features(encoder, strategy, unseen)
            found = [f"{100 * linear_probe(*first[key], *second[key]):.1f}" for key in SHOWN]
            tiles = [tile.size for one in unseen for tile in strategy.plan(one.width, one.height).tiles]
            tokens = sum(width * height for width, height in tiles) / encoder.patch_size**2 / len(unseen)
            table.add_row(path, name, *found, f"{tokens:.0f}", f"{time.process_time() - start:.0f}")
            Console(width=140).print(path, name, *zip(SHOWN, found, strict=True), f"{tokens:.0f} tokens")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
