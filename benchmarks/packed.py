"""Tokens a second of an image encoder on pictures of unequal size: packed into one sequence, or padded.

    python benchmarks/packed.py [--rounds 3] [--width 384] [--depth 4]

The encoder is Oryx-ViT (patches of 16) with random weights and the widths of a ViT-S. A batch holds eight pictures of
eight sizes, 48 x 48 to 512 x 128 pixels. Ways:

* packed: `encode_all`, one sequence of all tokens in which each picture attends to itself;
* one by one: `forward` for each picture;
* padded tokens: rows of tokens, filled up to the longest one (without a mask, which would only cost more);
* padded pictures: every picture on a canvas of the largest height and width, as image processors batch them.

Only the tokens of the pictures count. Rounds alternate the ways in one process; the CPU seconds of one thread are
summed, so that other processes matter little.
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import pad

from qformer import vision
from qformer.ragged import Padding, pack
from qformer.vision.packed import Tower

if TYPE_CHECKING:
    from collections.abc import Callable

SIZES = ((320, 240), (160, 128), (112, 112), (240, 320), (512, 128), (48, 48), (256, 192), (80, 160))  # width, height


def padded_tokens(encoder: Tower, pictures: list[Tensor]) -> None:
    """Embed each picture and run the blocks over float[N, longest, D]."""
    embedded = [encoder.embed(encoder.normalized(picture[None]))[0] for picture in pictures]
    rows = Padding([len(row) for row in embedded], embedded[0].device).pad(pack(embedded))
    encoder.run(rows)


def padded_pictures(encoder: Tower, pictures: list[Tensor]) -> None:
    """Encode float[N, 3, greatest height, greatest width]."""
    width, height = (max(size[axis] for size in SIZES) for axis in (0, 1))
    encoder(torch.stack([pad(p, (0, width - p.shape[2], 0, height - p.shape[1])) for p in pictures]))


def one_by_one(encoder: Tower, pictures: list[Tensor]) -> None:
    for picture in pictures:
        encoder(picture[None])


@torch.no_grad()
def measure(encoder: Tower, rounds: int) -> tuple[int, dict[str, float]]:
    """Tokens of a batch, and CPU seconds of `rounds` batches for each way."""
    pictures = [torch.rand(3, height, width) for width, height in SIZES]
    ways: dict[str, Callable[[], object]] = {
        "packed": lambda: encoder.encode_all(pictures),
        "one by one": lambda: one_by_one(encoder, pictures),
        "padded tokens": lambda: padded_tokens(encoder, pictures),
        "padded pictures": lambda: padded_pictures(encoder, pictures),
    }
    tokens = sum(map(len, encoder.encode_all(pictures)))  # also warms up
    seconds = dict.fromkeys(ways, 0.0)
    for _ in range(rounds):
        for name, run in ways.items():
            start = time.process_time()
            run()
            seconds[name] += time.process_time() - start
    return tokens, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=4)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"width": given.width, "depth": given.depth, "mlp_hidden": 4 * given.width, "heads": given.width // 64}
    encoder = vision.build("oryx", image_size=512, **sizes).freeze()
    assert isinstance(encoder, Tower)
    tokens, seconds = measure(encoder, given.rounds)
    table = Table("way", "tokens a second", "packed is faster by", title=f"{len(SIZES)} pictures, {tokens:,} tokens")
    for name, spent in seconds.items():
        table.add_row(name, f"{tokens * given.rounds / spent:,.0f}", f"{spent / seconds['packed']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
