"""Overlapping tiles: where they lie, and that lists say what they are there for."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from qformer.resolution import STRATEGIES
from tests.commands import command
from tests.resolution.test_strategies import made


@pytest.mark.parametrize(
    ("size", "columns", "rows"),
    [
        ((768, 768), [0, 256], [0, 256]),
        ((512, 100), [0], [0]),
        ((513, 1024), [0, 1], [0, 512]),
        ((1200, 512), [0, 344, 688], [0]),
    ],
)
def test_tiles_are_spread_evenly(size: tuple[int, int], columns: list[int], rows: list[int]) -> None:
    plan = made("overlap512").plan(*size)
    assert [tile.box[:2] for tile in plan.tiles] == [(x, y) for y in rows for x in columns]
    assert {tile.size for tile in plan.tiles} == {(512, 512)}
    assert plan.grid == (len(columns), len(rows))
    assert plan.overview == (0 if len(plan.tiles) == 1 else None)
    assert {tile.content for tile in plan.tiles} == {size}
    assert made("overlap512", size=120).plan(180, 180).tiles[-1].box == (60, 60, 180, 180)


def test_tiles_can_be_put_beside_each_other() -> None:
    """As many of them, at the same scale: a picture of 180 x 100 fills one and a half in a row, the rest is black."""
    apart, over = made("overlap512", size=120, overlap=False), made("overlap512", size=120)
    plan = apart.plan(180, 100)
    assert [tile.box for tile in plan.tiles] == [(0, 0, 120, 120), (120, 0, 240, 120)]
    assert {(tile.content, tile.canvas) for tile in plan.tiles} == {((180, 100), (240, 120))}
    for size in ((160, 160), (320, 170), (120, 60), (240, 360)):
        assert (apart.plan(*size).grid, apart.plan(*size).tokens) == (over.plan(*size).grid, over.plan(*size).tokens)
    assert apart.plan(240, 360).tiles == over.plan(240, 360).tiles, "nothing overlaps where tiles are filled"


def test_lists_say_what_is_there_to_be_exposed(tmp_path: Path) -> None:
    assert [name for name in STRATEGIES if made(name).exposed] == ["pad_square", "overlap512"]
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    lines = command("tiles", tmp_path / "a.png", "--all").splitlines()
    marked = {line.split()[0]: "there to be exposed: its" in line for line in lines[1:]}
    assert [name for name, mark in marked.items() if mark] == ["pad_square", "overlap512"]
    assert "remark" not in command("tiles", tmp_path / "a.png", "--strategy", "uhd")
