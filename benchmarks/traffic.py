"""Bytes that one process of stage one receives per step for its losses, compared with gathering everything.

    python benchmarks/traffic.py [--batch 105] [--image-size 224]

Sizes are the paper's (ViT-g, 32 queries, P = 256); 105 pairs per process are its batch of 1,680 on 16 GPUs. For two
processes over gloo the bytes are counted in the collectives of `qformer.model.exchange`, on random tensors of the real
shapes and uniformly drawn negatives; for more processes they are computed. *Everything* is the original's way: the
tokens of all images go to all processes, and their gradients back, though the encoder is frozen. Gradients of the
weights, averaged in both cases, are not counted: 747 MB of fp32, about twice that on the wire.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table

QUERIES, WIDTH, EMBED, TEXT = 32, 1408, 256, 32
HALF, LONG = 2, 8  # bytes: embeddings under autocast and features are fp16, ids int64


def computed(world: int, batch: int, tokens: int) -> dict[str, float]:
    """Compute the bytes that one process receives, averaged over uniformly drawn negatives."""
    others = (world - 1) * batch
    image = tokens * WIDTH * HALF
    drawn = others * (1 - (1 - 1 / (world * batch - 1)) ** batch)  # distinct images of other processes in B draws
    return {
        "embeddings": others * (QUERIES + 1) * EMBED * HALF,
        "ids": others * (TEXT * (LONG + 1) + LONG + 2 * LONG),  # text and its mask, image id; draws and tile lengths
        "images": drawn * image,
        "everything": 2 * others * image + others * (QUERIES + 1) * EMBED * HALF + others * TEXT * (LONG + 1),
    }


def counted(batch: int, tokens: int, world: int = 2) -> dict[str, float]:
    """Count the same by running `world` processes; returns the mean over them."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_run, (world, batch, tokens, folder), world, start_method="spawn")
        parts = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(world)]
    found = {key: sum(part[key] for part in parts) / world for key in parts[0]}
    return found | {"everything": computed(world, batch, tokens)["everything"]}


def _run(rank: int, world: int, batch: int, tokens: int, folder: str) -> None:
    from qformer.model.exchange import fetch_images, gather_batch
    from qformer.types import Tiles, Tokens, VisualTokens

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.manual_seed(rank)
    received = {"all_gather": 0, "exchange": 0}
    all_gather, all_to_all = dist.all_gather, dist.all_to_all_single

    def gather(found: list[torch.Tensor], own: torch.Tensor, **options: Any) -> Any:
        received["all_gather"] += sum(part.nbytes for part in found) - own.nbytes
        return all_gather(found, own, **options)

    def exchange(found: torch.Tensor, own: torch.Tensor, receive: list[int], send: list[int], **options: Any) -> Any:
        received["exchange"] += found[0].nbytes * (sum(receive) - receive[rank]) if len(found) else 0
        return all_to_all(found, own, receive, send, **options)

    dist.all_gather, dist.all_to_all_single = gather, exchange
    image = torch.randn(batch, QUERIES, EMBED, dtype=torch.float16)
    text = torch.randn(batch, EMBED, dtype=torch.float16)
    ids = [f"image {rank * batch + i}" for i in range(batch)]
    words = Tokens(torch.ones(batch, TEXT, dtype=torch.long), torch.ones(batch, TEXT, dtype=torch.bool))
    gather_batch(image, text, None, words, ids, grad=False)
    embeddings = (world - 1) * (image.nbytes + text.nbytes)
    plans = Tiles.from_pixels(torch.zeros(batch, 3, 1, 1)).plans
    rows = list(torch.zeros(batch, tokens, WIDTH, dtype=torch.float16))
    encoded = VisualTokens(rows, [(1, tokens - 1)] * batch, 1, plans)
    own = torch.arange(rank * batch, (rank + 1) * batch)
    fetch_images(encoded, (own + 1 + torch.randint(world * batch - 1, (batch,))) % (world * batch))
    part = {
        "embeddings": embeddings,
        "ids": received["all_gather"] - embeddings,
        "images": received["exchange"],
    }
    torch.save(part, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=105, help="pairs per process")
    parser.add_argument("--image-size", type=int, default=224, help="pixels per side")
    options = parser.parse_args()
    tokens = (options.image_size // 14) ** 2 + 1
    columns = ("embeddings", "ids", "images", "in all", "everything", "share")
    table = Table("W", "", *columns, title=f"MB received per process and step, B = {options.batch}")
    rows = [(2, "counted", counted(options.batch, tokens))]
    rows += [(world, "computed", computed(world, options.batch, tokens)) for world in (2, 16, 128)]
    for world, how, found in rows:
        ours = found["embeddings"] + found["ids"] + found["images"]
        values = [found["embeddings"], found["ids"], found["images"], ours, found["everything"]]
        shown = [f"{value / 1e6:,.2f}" for value in values]
        table.add_row(str(world), how, *shown, f"{100 * ours / found['everything']:.1f} %")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
