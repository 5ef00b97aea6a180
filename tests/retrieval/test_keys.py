"""Which of the queries decide."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from qformer.retrieval import keys


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_the_one_query_that_decides_is_found() -> None:
    rows = 0.1 * unit(500, 8, 16)
    rows[:, 5] = unit(500, 16, seed=1)
    assert keys.choose(rows, unit(30, 16, seed=2), 10) == [5]


def test_of_queries_that_say_the_same_one_is_enough() -> None:
    rows = unit(500, 1, 16).expand(-1, 8, -1)
    assert len(keys.choose(rows, unit(30, 16, seed=2), 10)) == 1


def test_queries_that_say_nothing_of_one_another_are_all_needed() -> None:
    """Each looks at two dimensions of its own, and of the texts each is about two of them."""
    rows = torch.zeros(2000, 8, 16)
    probes = torch.zeros(80, 16)
    for query in range(8):
        rows[:, query, 2 * query : 2 * query + 2] = unit(2000, 2, seed=query)
        probes[10 * query : 10 * query + 10, 2 * query : 2 * query + 2] = unit(10, 2, seed=100 + query)
    assert sorted(keys.choose(rows, probes, 10)) == list(range(8))


def test_of_fewer_images_than_are_wanted_any_query_finds_all() -> None:
    assert len(keys.choose(unit(5, 4, 16), unit(3, 16, seed=1), 10)) == 1
