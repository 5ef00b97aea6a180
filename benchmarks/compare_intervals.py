"""Simulated comparisons: how often the intervals of `qformer compare` hold the true difference, and what they see.

    python benchmarks/compare_intervals.py [--repeats 400] [-o intervals.json]

Two systems answer the questions of simulated images, one to five each. An image is harder or easier for both systems
and a little more so for one of them, a question likewise, each seed of a system is better or worse than others of its
own, and every answer is right by chance with the probability that comes of it. The true difference is known. Beside the
intervals stand those of drawing seeds and images with replacement (`drawn`), and of drawing the images alone.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from qformer.metrics.intervals import draw_means
from qformer.metrics.paired import paired_difference, share_interval

DRAWS = 1000
SHARE = 0.6  # of right answers of the second system


@dataclass(frozen=True)
class World:
    """What is simulated: seeds, images, spread of the seeds, number of comparisons that intervals are corrected for."""

    seeds: int
    images: int
    spread: float
    comparisons: int = 1

    def answers(self, rng: np.random.Generator, gap: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Answers of both systems, float[S, Q] each, and the image of each question, long[Q]."""
        clusters = np.repeat(np.arange(self.images), rng.integers(1, 6, self.images))
        shared = _uniform(rng, 0.15, self.images)[clusters] + _uniform(rng, 0.1, len(clusters))
        systems = []
        for share in (SHARE + gap, SHARE):
            own = _uniform(rng, 0.06, self.images)[clusters]
            seeds = _uniform(rng, self.spread, self.seeds)[:, None]
            chance = share + shared + own + seeds
            systems.append((rng.random(chance.shape) < chance).astype(float))
        return systems[0], systems[1], clusters


def _uniform(rng: np.random.Generator, deviation: float, count: int) -> np.ndarray:
    """Numbers around 0 of this standard deviation, of which none is so far off that a chance leaves 0..1."""
    return rng.uniform(-1, 1, count) * deviation * np.sqrt(3)


def drawn(ours: np.ndarray, theirs: np.ndarray, clusters: np.ndarray, level: float, rng: np.random.Generator) -> list:
    """The interval of drawing seeds and, for each draw, images with replacement: what it is without an estimate."""
    seeds, images = len(ours), int(clusters.max()) + 1
    sizes = np.bincount(clusters, minlength=images)
    sums = np.stack([np.bincount(clusters, row, images) for row in ours - theirs])  # (S, images)
    weights = rng.multinomial(seeds, [1 / seeds] * seeds, DRAWS) / seeds  # (draws, S)
    counts = rng.multinomial(images, [1 / images] * images, DRAWS)  # (draws, images)
    means = ((weights @ sums) * counts).sum(axis=1) / (counts @ sizes)
    return np.quantile(means, [(1 - level) / 2, (1 + level) / 2]).tolist()


def simulate(world: World, repeats: int, gap: float = 0.05) -> dict[str, float]:
    """Shares of the repeats in which each interval holds the true difference, mean widths, and the power."""
    rng, found = np.random.default_rng(0), Counter[str]()
    level = 1 - 0.05 / world.comparisons
    smallest = 0.0
    for repeat in range(repeats):
        ours, theirs, clusters = world.answers(rng, gap)
        ends = {}
        one = paired_difference(ours, theirs, clusters, world.comparisons, DRAWS, repeat)
        smallest += one.smallest / repeats
        ends["ours"] = [one.low, one.high]
        ends["drawn"] = drawn(ours, theirs, clusters, level, rng)
        images = draw_means((ours - theirs).mean(axis=0).tolist(), clusters.tolist(), rng, DRAWS)
        ends["images alone"] = np.quantile(images, [(1 - level) / 2, (1 + level) / 2]).tolist()
        for name, (low, high) in ends.items():
            found[name] += low <= gap <= high
            found[f"{name}, width"] += high - low
        share = share_interval(ours, clusters, DRAWS, repeat)
        found["share"] += share.low <= SHARE + gap <= share.high
    seen = 0
    for repeat in range(repeats):  # at the difference that is said to be seen with 80 %
        one = paired_difference(*world.answers(rng, smallest), world.comparisons, DRAWS, repeat)
        seen += one.low > 0
    return {name: value / repeats for name, value in found.items()} | {"smallest": smallest, "seen": seen / repeats}


WORLDS = (
    World(1, 60, 0.0),
    World(1, 300, 0.0),
    *(World(3, 300, spread) for spread in (0.0, 0.02, 0.05)),
    World(3, 60, 0.02),
    World(5, 300, 0.02),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=400)
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    head = (
        "seeds",
        "images",
        "spread of seeds",
        "comparisons",
        "ours",
        "width",
        "drawn",
        "width",
        "images alone",
        "share",
    )
    table, records = Table(*head, "smallest", "seen"), []
    for world in WORLDS:
        found = simulate(world, given.repeats)
        records.append(vars(world) | found)
        cells = [f"{found[name]:.1%}" for name in ("ours", "drawn", "images alone", "share", "seen")]
        widths = [f"{100 * found[f'{name}, width']:.1f}" for name in ("ours", "drawn")]
        row = [f"{world.seeds}", f"{world.images}", f"{100 * world.spread:g}", f"{world.comparisons}"]
        row += [
            cells[0],
            widths[0],
            cells[1],
            widths[1],
            cells[2],
            cells[3],
            f"{100 * found['smallest']:.1f}",
            cells[4],
        ]
        table.add_row(*row)
        print(json.dumps(records[-1]), flush=True)
    Console(width=150).print(table)
    if given.output is not None:
        given.output.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
