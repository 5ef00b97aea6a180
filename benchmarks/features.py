"""Training from stored image tokens compared with the direct path: steps per second, and differences of the losses.

    python benchmarks/features.py [--steps 5] [--batch 16] [--images 32] [--width 384] [--depth 12] [--init RUN]

Speed: stage one of the quickstart after a ViT-S/14 with random weights (65 tokens), which is large compared with the
bridge. Steps of both paths alternate in one process on the same images; each reads its batch, runs forward and
backward, and takes a step of AdamW. CPU seconds of one thread are counted, so that other processes do not matter.

Losses: the shipped towers, whole images, the same batches on both paths, no training; `--init` is a run of the
quickstart's stage one, whose bridge is trained. `--steps 0` skips speed.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from qformer import resolution
from qformer.checkpoints import folder as checkpoint
from qformer.checkpoints.weights import start_from
from qformer.config import load_config
from qformer.data import sources
from qformer.data.loader import Batches
from qformer.model.assembly import build_encoder, build_image_text
from qformer.model.image_text import ImageTextModel
from qformer.schema import Config
from qformer.stages import features
from qformer.stages.optim import adamw

if TYPE_CHECKING:
    from qformer.types import Batch

CONFIG = "configs/quickstart/stage1.yaml"
WAYS = ("direct", "fp16", "int8")


class Way:
    """A path of training: its batches, and its cost."""

    def __init__(self, config: Config, folder: Path, dtype: str | None) -> None:
        chosen = {} if dtype is None else {"features": {"path": str(folder / dtype), "dtype": dtype}}
        data = config.data.model_dump(exclude_unset=True) | chosen
        self.config = Config.model_validate(config.model_dump(exclude_unset=True) | {"data": data})
        source = sources.for_run(self.config.data.train, str(folder))
        strategy = resolution.chosen(self.config.resolution)
        torch.manual_seed(0)
        encoder, start = build_encoder(self.config), time.process_time()
        store = None if dtype is None else features.fill(self.config, source, strategy, encoder)
        self.filling = time.process_time() - start
        self.bytes = 0 if store is None else store.about["bytes_per_sample"]
        self.batches = Batches(source, strategy, self.config.data, 0, store)
        torch.manual_seed(0)
        self.model: ImageTextModel = build_image_text(self.config, encoder=encoder)[0].train()
        self.optimizer = adamw(self.model, self.config.train)
        self.seconds = 0.0

    def step(self, number: int) -> None:
        torch.manual_seed(number)
        start = time.process_time()
        self.model(self.batches[number].batch)["loss"].backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if number:  # the first one loads everything loaded at first use
            self.seconds += time.process_time() - start

    @torch.no_grad()
    def losses(self, number: int) -> dict[str, float]:
        torch.manual_seed(number)
        batch: Batch = self.batches[number].batch
        return {name: value.item() for name, value in self.model(batch).items()}


def speed(options: Any, folder: Path) -> Table:
    size = f"width: {options.width}, depth: {options.depth}, heads: 6, mlp_hidden: {4 * options.width}"
    tower = f"{{name: eva, image_size: 112, patch_size: 14, {size}, precision: fp32}}"
    config = settings(options, f"vision={tower}", "resolution.size=112")
    ways = {name: Way(config, folder, None if name == "direct" else name) for name in WAYS}
    for number in range(options.steps + 1):
        for way in ways.values():
            way.step(number)
    parameters = [
        sum(p.numel() for p in ways["direct"].model.parameters() if p.requires_grad == trained) / 1e6
        for trained in (False, True)
    ]
    title = f"{options.steps} steps of {options.batch}; tower {parameters[0]:.1f} M, bridge {parameters[1]:.1f} M"
    table = Table("", "steps per second of CPU", "times the direct path", "kB an image", "filling, s", title=title)
    for name, way in ways.items():
        row = [options.steps / way.seconds, ways["direct"].seconds / way.seconds, way.bytes / 1e3, way.filling]
        table.add_row(name, *(f"{value:.2f}" for value in row))
    return table


def differences(options: Any, folder: Path) -> Table:
    config = settings(options)
    ways = {name: Way(config, folder, None if name == "direct" else name) for name in WAYS}
    for way in ways.values():
        if options.init:
            start_from(way.model, checkpoint.read(options.init))
    count = options.images // options.batch
    expected = [ways["direct"].losses(number) for number in range(count)]
    title = f"losses of {count} batches of {options.batch}, shipped towers: largest difference, relative"
    table = Table("", *expected[0], title=title)
    for name in WAYS[1:]:
        found = [ways[name].losses(number) for number in range(count)]
        worst = [max(abs(a[key] / b[key] - 1) for a, b in zip(found, expected, strict=True)) for key in expected[0]]
        table.add_row(name, *(f"{value:.1e}" for value in worst))
    return table


def settings(options: Any, *changes: str) -> Config:
    sizes = [f"data.train.count={options.images}", f"data.batch={options.batch}", "data.validation=null"]
    return load_config(CONFIG, [*sizes, *changes])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"steps": 5, "batch": 16, "images": 32, "width": 384, "depth": 12}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--init")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        console = Console(width=120)
        console.print(differences(options, Path(folder) / "mini"))
        if options.steps:
            console.print(speed(options, Path(folder) / "large"))


if __name__ == "__main__":
    main()
