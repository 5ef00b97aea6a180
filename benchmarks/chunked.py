"""Peak memory and time of one step of stage one on the mini towers: a plain batch, and a large one in chunks.

    python benchmarks/chunked.py [--batches 64 1680] [--chunk 64] [--plain 64]

Each line is measured in its own process: peak resident memory minus that after loading the model and the pixels of the
batch. The table also shows what a batch must keep: input pixels (uint8), encoder tokens, embeddings. glibc is set to
return freed memory (MALLOC_MMAP_THRESHOLD_); otherwise it keeps fragments, about 70 % more.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from qformer.config import load_config
from qformer.data import sources
from qformer.model.assembly import build_image_text
from qformer.model.chunked import chunked_step
from qformer.types import Batch, Tiles

CONFIG = "configs/quickstart/stage1.yaml"


def resident() -> int:
    """Resident memory of this process now, in bytes; `ru_maxrss` is the peak, in KiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measure(count: int, chunk: int) -> dict[str, float]:
    """Measure one step with dropout, after a batch of two that loads everything loaded at first use."""
    config = load_config(CONFIG, ["qformer.dropout=0.1"])
    model, config = build_image_text(config)
    model.train()
    source = sources.build(config.data.train.name, **config.data.train.options)
    side = int(config.resolution.options["size"])
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
    texts = [source[i % 64].captions[0] for i in range(count)]  # equal texts, since the longest one decides

    def step(count: int, chunk: int) -> None:
        batch = Batch(Tiles.from_pixels(pixels[:count]), texts[:count])
        if chunk:
            chunked_step(model, batch, chunk)
        else:
            model(batch)["loss"].backward()

    step(2, 1 if chunk else 0)
    before, start = resident(), time.perf_counter()
    step(count, chunk)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    seconds = time.perf_counter() - start
    with torch.no_grad():
        one = model.frontend.encode_tiles(Tiles.from_pixels(pixels[:1])).packed
        image, _ = model.embed_images(Tiles.from_pixels(pixels[:1]))
    return {
        "grown": grown,
        "seconds": seconds,
        "pixels": pixels.nbytes,
        "tokens": one.nbytes * count,
        "embeddings": (image.nbytes + 4 * image.shape[-1]) * count,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 1680], help="sizes to run in chunks")
    parser.add_argument("--plain", type=int, nargs="*", default=[64], help="sizes to run without")
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*map(int, options.measure.split(",")))))
        return
    columns = ("batch", "chunk", "peak growth", "pixels", "encoder tokens", "embeddings", "the rest", "seconds")
    table = Table(*columns, title="one step of stage one, mini towers, MB")
    for count, chunk in [(b, 0) for b in options.plain] + [(b, options.chunk) for b in options.batches]:
        command = [sys.executable, __file__, "--measure", f"{count},{chunk}"]
        env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
        said = subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout
        found = json.loads(said.strip().splitlines()[-1])
        rest = found["grown"] - found["tokens"] - found["embeddings"]
        values = [found["grown"], found["pixels"], found["tokens"], found["embeddings"], rest]
        shown = [f"{value / 1e6:,.1f}" for value in values]
        table.add_row(str(count), str(chunk or "-"), *shown, f"{found['seconds']:.1f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
