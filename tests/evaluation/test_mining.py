"""Blind pairs against brute force: thresholds, ties, blocks, counts of a table, quantiles, rows without a cosine."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from qformer.evaluation import mining
from qformer.evaluation.mining import BlindPair, Part, Thresholds, blind_pairs, quantiles, search
from qformer.types import UsageError


def embeddings(count: int = 90, width: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Near and far rows, of which many resemble each other; some near ones are copies of others."""
    rng = np.random.default_rng(seed)
    near = (rng.normal(size=(4, width)) * 4)[rng.integers(0, 4, count)] + rng.normal(size=(count, width))
    near[count // 2 : count // 2 + 5] = near[:5]
    return near.astype(np.float32), rng.normal(size=(count, width + 3)).astype(np.float32)


def brute(near: np.ndarray, far: np.ndarray, above: float, below: float) -> list[BlindPair]:
    """All pairs at once."""
    cosines = []
    for rows in (near, far):
        unit = rows.astype(np.float64) / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
        cosines.append(unit @ unit.T)
    pairs = [
        BlindPair(i, j, float(cosines[0][i, j]), float(cosines[1][i, j]))
        for i, j in itertools.combinations(range(len(near)), 2)
        if cosines[0][i, j] > above and cosines[1][i, j] < below
    ]
    return sorted(pairs, key=lambda pair: (pair.far - pair.near, pair.first, pair.second))


def same(found: list[BlindPair], wanted: list[BlindPair]) -> None:
    assert [pair[:2] for pair in found] == [pair[:2] for pair in wanted]
    assert np.allclose([pair[2:] for pair in found], [pair[2:] for pair in wanted], atol=1e-12)


@pytest.mark.parametrize(("above", "below"), [(0.95, 0.6), (0.5, 0.2), (-1, 1), (0.999999, -0.5)])
def test_pairs_equal_those_of_brute_force(above: float, below: float) -> None:
    near, far = embeddings()
    same(blind_pairs(torch.from_numpy(near), torch.from_numpy(far), above, below), brute(near, far, above, below))


@pytest.mark.parametrize("sparse", [0, 0.002, 1], ids=["dense", "both", "sparse"])
@pytest.mark.parametrize("block", [1, 7, 64, 500])
def test_blocks_and_their_density_change_nothing(block: int, sparse: float, monkeypatch: pytest.MonkeyPatch) -> None:
    near, far = embeddings()
    thresholds = Thresholds.of(0.9, 0.3, *mining.GRID)
    whole = search(near, far, thresholds)
    monkeypatch.setattr(mining, "SPARSE", sparse)
    assert search(near, far, thresholds, block=block) == whole
    assert search(near, far, thresholds, most=9, block=block).pairs == whole.pairs[:9]
    assert len(whole.pairs) > 50


def test_thresholds_are_strict() -> None:
    near = np.array([[3.0, 4.0], [4.0, 3.0], [3.0, 4.0]])  # cosines 24/25 and 1
    far = np.array([[1.0, 0, 0, 0], [1.0, 1, 1, 1], [-1.0, 1, 1, 1]])  # 1/2, -1/2, and 1/2 of the last two
    assert blind_pairs(near, far, 0.96, 0.6) == [BlindPair(0, 2, 1.0, -0.5)]
    assert [pair[:2] for pair in blind_pairs(near, far, 0.959999, 0.6)] == [(0, 2), (0, 1), (1, 2)]
    assert blind_pairs(near, far, 0.959999, 0.5) == [BlindPair(0, 2, 1.0, -0.5)]


def test_equal_gaps_are_ordered_by_row() -> None:
    near, far = np.ones((70, 3)), np.tile(np.eye(2), (35, 1))
    pairs = [pair[:2] for pair in search(near, far, Thresholds.of(0.95, 0.6), block=16).pairs]
    assert pairs == sorted(pairs)
    assert len(pairs) == 35 * 35
    assert [pair[:2] for pair in search(near, far, Thresholds.of(0.95, 0.6), most=20, block=16).pairs] == pairs[:20]


def test_length_and_dtype_do_not_matter() -> None:
    near, far = embeddings()
    pairs = blind_pairs(near, far, 0.9, 0.3)
    lengths = np.geomspace(1e-200, 1e200, len(near))[:, None]
    same(blind_pairs(near.astype(np.float64) * lengths, far, 0.9, 0.3), pairs)
    half, halves = torch.from_numpy(near).bfloat16(), torch.from_numpy(far).half()
    same(blind_pairs(half, halves, 0.9, 0.3), brute(half.float().numpy(), halves.float().numpy(), 0.9, 0.3))


def test_counts_are_those_of_every_pair_of_thresholds() -> None:
    near, far = embeddings()
    thresholds = Thresholds.of(0.9002, 0.31, *mining.GRID)
    assert thresholds.nears == (0.9002, 0.95, 0.98)  # 0.9 is too close to tell apart in a table
    assert thresholds.fars == (0.31, 0.4, 0.5, 0.6, 0.7, 0.8)
    found = search(near, far, thresholds, block=20)
    assert found.counts == [[len(brute(near, far, a, b)) for b in thresholds.fars] for a in thresholds.nears]
    assert found.counts[0][0] == len(found.pairs)


def test_a_search_that_goes_on_equals_a_whole_one() -> None:
    near, far = embeddings()
    thresholds, parts = Thresholds.of(0.8, 0.3, *mining.GRID), list[Part]()
    whole = search(near, far, thresholds, 40, 16, report=parts.append)
    assert [part.stripe for part in parts] == list(range(6))
    for done in range(7):
        later: list[Part] = []
        assert search(near, far, thresholds, 40, 16, done=parts[:done], report=later.append) == whole
        assert [part.stripe for part in later] == list(range(done, 6))


def test_rows_on_disk_are_read_by_blocks(tmp_path: Path) -> None:
    near, far = (rows.astype(np.float16) for rows in embeddings())
    np.save(tmp_path / "near.npy", near)
    kept = np.load(tmp_path / "near.npy", mmap_mode="r")
    assert search(kept, far, Thresholds.of(0.9, 0.3), block=8).pairs == blind_pairs(near, far, 0.9, 0.3)


def test_quantiles_are_those_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    near, _ = embeddings()
    cosines = [pair.near for pair in brute(near, near, -1.1, 1.1)]
    assert np.allclose(quantiles(near, [0.999, 0.5, 0]), np.quantile(cosines, [0.999, 0.5, 0]), atol=1e-9)
    monkeypatch.setattr(mining, "SAMPLE", 60)
    drawn = quantiles(near, [0.5])
    assert drawn == quantiles(near, [0.5])
    assert drawn[0] == pytest.approx(float(np.quantile(cosines, 0.5)), abs=0.1)


def test_what_has_no_cosine_is_refused() -> None:
    near, far = (rows[:5] for rows in embeddings())
    for value, words in ((0.0, "zero"), (np.nan, "not finite"), (np.inf, "not finite")):
        bad = near.copy()
        bad[3] = value
        with pytest.raises(UsageError, match=f"row 3 of the near embeddings is {words}"):
            blind_pairs(bad, far)
        with pytest.raises(UsageError, match=f"row 3 of the far embeddings is {words}"):
            blind_pairs(near, bad)
    with pytest.raises(UsageError, match="5 near and 4 far"):
        blind_pairs(near, far[:4])
    with pytest.raises(UsageError, match=r"shape \[5\]"):
        blind_pairs(near[:, 0], far)
    with pytest.raises(UsageError, match="above is nan"):
        blind_pairs(near, far, above=float("nan"))
    with pytest.raises(UsageError, match="below is 6"):
        blind_pairs(near, far, below=6)
    assert blind_pairs(near[:1], far[:1]) == blind_pairs(near[:0], far[:0]) == []
    with pytest.raises(UsageError, match="no pair in 1 rows"):
        quantiles(near[:1], [0.5])
    with pytest.raises(UsageError, match="99 is no quantile"):
        quantiles(near, [99])
