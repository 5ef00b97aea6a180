"""CLIP-blind pairs: pictures that one encoder takes for the same and another tells apart.

Tong et al. 2024, "Eyes Wide Shut?", arXiv:2401.06209, section 2: the cosine of CLIP's image embeddings is above 0.95,
and that of DINOv2's below 0.6. No code for mining was released. Here all pairs are compared block by block, so that
memory depends on the size of a block and not on the number of pictures.

Products of a block are computed in float32. Every cosine within `SLACK` of a threshold, and that of every pair that is
returned, is computed again in float64 from that pair alone: so neither pairs nor counts depend on the size of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qformer.types import UsageError

ABOVE, BELOW = 0.95, 0.6  # of the paper
BLOCK = 2048  # rows of a block, whose products are 16 MiB in float32
SLACK = 1e-5  # far above the error of a float32 product of unit vectors
APART = 1e-3  # thresholds that are closer to another are left out of a table
SPARSE = 0.002  # share of a block's pairs up to which far cosines are computed pair by pair
GATHERED = 1 << 14  # pairs whose vectors are gathered at once
SAMPLE = 4096  # pictures whose pairs give quantiles
GRID = ((0.9, 0.95, 0.98), (0.4, 0.5, 0.6, 0.7, 0.8))  # thresholds of a table, near and far
GRID_OF_QUANTILES = ((0.99, 0.999, 0.9999), (0.5, 0.2, 0.1, 0.05))

Rows = Tensor | np.ndarray


class BlindPair(NamedTuple):
    """Two pictures by their row numbers, `first < second`, and their cosines by the near and by the far encoder."""

    first: int
    second: int
    near: float
    far: float


class Thresholds(NamedTuple):
    """Cosines between which a pair is blind, and those of a table of counts.

    Attributes:
        above: near cosines are above it. below: far cosines are below it.
        nears, fars: ascending, each with `above` or `below` among them.
    """

    above: float
    below: float
    nears: tuple[float, ...]
    fars: tuple[float, ...]

    @classmethod
    def of(cls, above: float, below: float, nears: Iterable[float] = (), fars: Iterable[float] = ()) -> Thresholds:
        """Put thresholds together; those of the table that nearly equal another are left out.

        Raises:
            UsageError: one outside -1 to 1.
        """
        for name, value in (("above", above), ("below", below)):
            if not -1 <= value <= 1:  # NaN is neither
                raise UsageError(f"{name} is {value}; a threshold is a cosine from -1 to 1, such as {ABOVE}")
        return cls(above, below, _apart(above, nears), _apart(below, fars))


class Part(NamedTuple):
    """Pairs of a stripe of blocks, and their counts.

    Attributes:
        stripe: its number.
        counts: pairs with a near cosine above `nears[a]` and a far cosine below `fars[b]`, at [a][b].
        pairs: the blind ones that may be among the best, in their order.
    """

    stripe: int
    counts: list[list[int]]
    pairs: list[BlindPair]


class Found(NamedTuple):
    """Pairs in their order, and the counts of all stripes together, as in `Part`."""

    pairs: list[BlindPair]
    counts: list[list[int]]


def blind_pairs(near: Rows, far: Rows, above: float = ABOVE, below: float = BELOW) -> list[BlindPair]:
    """Find all pairs of pictures with a near cosine above one threshold and a far cosine below another, both strictly.

    Args:
        near: float[N, D], embeddings by the encoder that takes them for the same; of any length above zero.
        far: float[N, D'], embeddings by the encoder that tells them apart.
        above, below: cosines.

    Returns:
        The pair with the widest gap between its cosines first, and of equal gaps the one with the lower row numbers.

    Raises:
        UsageError: other shapes, a vector that is zero or not finite, or a threshold outside -1 to 1.
    """
    return search(near, far, Thresholds.of(above, below)).pairs


def search(
    near: Rows,
    far: Rows,
    thresholds: Thresholds,
    most: int | None = None,
    block: int = BLOCK,
    device: torch.device | str = "cpu",
    done: Iterable[Part] = (),
    report: Callable[[Part], None] = lambda _: None,
) -> Found:
    """Find blind pairs and count those of all thresholds, one stripe of blocks after the other.

    Args:
        near, far: as for `blind_pairs`; arrays on disk (`np.memmap`) are read a block at a time.
        most: keep so many pairs, those with the widest gaps; None keeps all.
        done: parts of an earlier search of the same rows with the same arguments, the first stripes in order.
        report: called with each further part.

    Raises:
        UsageError: see `blind_pairs`.
    """
    scan = _Scan(Table(near, "near"), Table(far, "far"), thresholds, most, block, torch.device(device))
    counts = scan.empty()
    earlier = list(done)
    for stripe in range(count_stripes(len(near), block)):
        if stripe < len(earlier):
            part = earlier[stripe]
            scan.keep(part.pairs)
        else:
            part = scan.run(stripe)
            report(part)
        counts += np.array(part.counts, np.int64)
    return Found(_sorted(scan.kept)[:most], counts.tolist())


def count_stripes(rows: int, block: int = BLOCK) -> int:
    """Count the stripes of a search of so many rows."""
    return -(-rows // block)


def quantiles(rows: Rows, shares: Sequence[float], seed: int = 0) -> list[float]:
    """Compute quantiles of the cosines of all pairs of rows, float[N, D]; of N > `SAMPLE`, of that many drawn rows.

    Raises:
        UsageError: fewer than two rows, a share outside 0 to 1, or a vector that is zero or not finite.
    """
    if len(rows) < 2:
        raise UsageError(f"there is no pair in {len(rows)} rows of embeddings, and so no quantile; give two or more")
    for share in shares:
        if not 0 <= share <= 1:
            raise UsageError(f"{share} is no quantile; give one from 0 to 1, such as 0.999")
    table, chosen = Table(rows, "drawn"), np.arange(len(rows))
    if len(rows) > SAMPLE:
        chosen = np.sort(np.random.default_rng(seed).choice(len(rows), SAMPLE, replace=False))
    unit = F.normalize(torch.from_numpy(table.gather(chosen)), dim=1)
    cosines = []
    for start in range(0, len(unit), 512):
        block = unit[start : start + 512] @ unit[start:].T  # float64[512, SAMPLE]
        cosines.append(block[torch.ones_like(block, dtype=torch.bool).triu(1)].numpy())
    return [float(value) for value in np.quantile(np.concatenate(cosines).clip(-1, 1), shares)]


@dataclass
class Table:
    """Embeddings of one encoder, float[N, D], in memory or on disk; `name` is for messages."""

    rows: Rows
    name: str

    def __post_init__(self) -> None:
        if self.rows.ndim != 2:
            raise UsageError(f"the {self.name} embeddings have the shape {list(self.rows.shape)}; give float[N, D]")
        self._extreme = False  # lengths that float32 cannot square
        for start in range(0, len(self.rows), BLOCK):
            block = torch.from_numpy(self._taken(slice(start, start + BLOCK)).astype(np.float64))
            largest = block.abs().amax(dim=1) if block.shape[1] else torch.zeros(len(block))
            bad = ~(largest > 0) | ~largest.isfinite()  # NaN is neither
            if bad.any():
                row = int(bad.nonzero()[0])
                fault = "is zero" if largest[row] == 0 else "is not finite"
                raise UsageError(
                    f"row {start + row} of the {self.name} embeddings {fault}, so it has no cosine; leave that picture "
                    "out, or use another encoder"
                )
            self._extreme |= bool((largest > 1e6).any() or (largest < 1e-6).any())

    def read(self, start: int, stop: int) -> Tensor:
        """Rows of a block at unit length, float32."""
        block = torch.from_numpy(self._taken(slice(start, stop)).astype(np.float64 if self._extreme else np.float32))
        if self._extreme:
            block = block / block.abs().amax(dim=1, keepdim=True)
        return F.normalize(block.float(), dim=1)

    def gather(self, numbers: np.ndarray) -> np.ndarray:
        """Rows by number, float64[n, D]; of unusual lengths, scaled to a length that can be squared."""
        rows = self._taken(numbers).astype(np.float64)
        return rows / np.abs(rows).max(axis=1, keepdims=True) if self._extreme else rows

    def _taken(self, which: slice | np.ndarray) -> np.ndarray:
        if isinstance(self.rows, np.ndarray):
            return self.rows[which]
        rows = self.rows[which if isinstance(which, slice) else torch.from_numpy(which)].detach()
        return (rows.float() if rows.dtype == torch.bfloat16 else rows).cpu().numpy()

    def cosines(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Cosines of pairs of rows, float64[n], each computed from its own two rows alone."""
        found = np.empty(len(first))
        for start in range(0, len(first), GATHERED):
            one, other = (self.gather(numbers[start : start + GATHERED]) for numbers in (first, second))
            lengths = np.sqrt((one * one).sum(axis=1)) * np.sqrt((other * other).sum(axis=1))
            found[start : start + GATHERED] = (one * other).sum(axis=1) / lengths
        return found.clip(-1, 1)


@dataclass
class _Scan:
    """A search in progress."""

    near: Table
    far: Table
    thresholds: Thresholds
    most: int | None
    block: int
    device: torch.device

    def __post_init__(self) -> None:
        if len(self.near.rows) != len(self.far.rows):
            raise UsageError(
                f"there are {len(self.near.rows)} near and {len(self.far.rows)} far embeddings; give one of each for "
                "every picture, in the same order"
            )
        self.cutoff = -np.inf  # gap that a further pair needs to be among the best
        self.kept: list[BlindPair] = []

    @cached_property
    def edges(self) -> tuple[Tensor, Tensor]:
        """Thresholds with `SLACK` on both sides; in between a float32 cosine is uncertain."""
        both = (self.thresholds.nears, self.thresholds.fars)
        near, far = (torch.tensor([t + side for t in own for side in (-SLACK, SLACK)]) for own in both)
        return near.to(self.device), far.to(self.device)

    def run(self, stripe: int) -> Part:
        """Compare a block of rows with itself and with all that follow."""
        start, counts, pairs = stripe * self.block, self.empty(), list[BlindPair]()
        left = [self._unit(table, start) for table in (self.near, self.far)]
        for other in range(start, len(self.near.rows), self.block):
            more, found = self._compare(left, start, other)
            counts += more
            pairs += found
            self.keep(found)
        return Part(stripe, counts.tolist(), [pair for pair in pairs if pair.near - pair.far >= self.cutoff])

    def keep(self, pairs: Sequence[BlindPair]) -> None:
        """Take pairs among the best, and leave out what is no longer among them."""
        self.kept += pairs
        if self.most is not None and len(self.kept) >= 2 * self.most:
            self.kept = _sorted(self.kept)[: self.most]
            self.cutoff = self.kept[-1].near - self.kept[-1].far

    def _unit(self, table: Table, start: int) -> Tensor:
        return table.read(start, start + self.block).to(self.device)

    def _compare(self, left: Sequence[Tensor], start: int, other: int) -> tuple[np.ndarray, list[BlindPair]]:
        """Counts and blind pairs of a block of rows, given at unit length, with the block that starts at `other`."""
        near = left[0] @ self._unit(self.near, other).T  # (rows, columns)
        if start == other:
            near.masked_fill_(torch.ones_like(near, dtype=torch.bool).tril(), -2)
        edges, far_edges = self.edges
        hopeful = near > edges[0]
        share = int(hopeful.sum()) / near.numel()
        if not share:
            return self.empty(), []
        if share <= SPARSE:
            return self._settle(*_places(hopeful, start, other))
        far = left[1] @ self._unit(self.far, other).T
        columns = len(far_edges) + 1
        by_near = torch.bucketize(near, edges, out_int32=True)  # even: certain
        by_far = torch.bucketize(far, far_edges, out_int32=True)
        unsure = hopeful & (by_far < columns - 1) & ((by_near | by_far) & 1).bool()
        bins = (by_near * columns + by_far).masked_fill_(~hopeful | unsure, 0)
        histogram = torch.bincount(bins.flatten(), minlength=(len(edges) + 1) * columns)
        counts = _cumulate(histogram.view(-1, columns)[::2, ::2].cpu().numpy())
        above, below = self.thresholds.above, self.thresholds.below
        chosen = self._promising(~unsure & (near > above) & (far < below), near - far)
        (more, pairs), (_, certain) = (self._settle(*_places(one, start, other)) for one in (unsure, chosen))
        return counts + more, pairs + certain

    def _promising(self, chosen: Tensor, gaps: Tensor) -> Tensor:
        """Those of the chosen pairs whose gap may be among the widest."""
        if self.most is None:
            return chosen
        low = self.cutoff
        if int(chosen.sum()) > self.most:
            low = max(low, float(gaps[chosen].topk(self.most).values[-1]))
        return chosen & (gaps >= low - 4 * SLACK)

    def _settle(self, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, list[BlindPair]]:
        """Counts and blind pairs of these pairs of rows, by their cosines in float64."""
        if not len(first):
            return self.empty(), []
        near, far = self.near.cosines(first, second), self.far.cosines(first, second)
        nears, fars = np.array(self.thresholds.nears), np.array(self.thresholds.fars)
        histogram = np.zeros((len(nears) + 1, len(fars) + 1), np.int64)
        np.add.at(histogram, (np.searchsorted(nears, near, "left"), np.searchsorted(fars, far, "right")), 1)
        blind = (near > self.thresholds.above) & (far < self.thresholds.below) & (near - far >= self.cutoff)
        rows = zip(
            first[blind].tolist(), second[blind].tolist(), near[blind].tolist(), far[blind].tolist(), strict=True
        )
        return _cumulate(histogram), [BlindPair(*row) for row in rows]

    def empty(self) -> np.ndarray:
        """Counts of no pair."""
        return np.zeros((len(self.thresholds.nears), len(self.thresholds.fars)), np.int64)


def _apart(chosen: float, others: Iterable[float]) -> tuple[float, ...]:
    """Distinct thresholds in ascending order, always with the chosen one."""
    taken = [chosen]
    for value in others:
        if all(abs(value - one) >= APART for one in taken):
            taken.append(value)
    return tuple(sorted(taken))


def _places(chosen: Tensor, start: int, other: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of the chosen pairs of a block of rows and another, which begin there."""
    first, second = (numbers.cpu().numpy() for numbers in chosen.nonzero(as_tuple=True))
    return first + start, second + other


def _cumulate(histogram: np.ndarray) -> np.ndarray:
    """Counts above each near and below each far threshold, from counts between them, int64[A + 1, B + 1]."""
    above = histogram[::-1].cumsum(axis=0)[::-1][1:]  # (A, B + 1)
    return above.cumsum(axis=1)[:, :-1]


def _sorted(pairs: Iterable[BlindPair]) -> list[BlindPair]:
    return sorted(pairs, key=lambda pair: (pair.far - pair.near, pair.first, pair.second))
