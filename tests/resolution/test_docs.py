"""docs/resolution.md: its table, its Python and its configurations."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from qformer.config import parse_config
from qformer.resolution import STRATEGIES
from tests.commands import command, outcome
from tests.resolution.test_strategies import made
from tests.test_config import values

DOCS = Path(__file__).parent.parent.parent / "docs"
PAGE = (DOCS / "resolution.md").read_text(encoding="utf-8")


def test_the_table_is_what_strategies_plan() -> None:
    head, _, *rows = [line.strip("| ").split(" | ") for line in re.findall(r"^\|.*\|$", PAGE, flags=re.MULTILINE)][:10]
    sizes = [tuple(map(int, cell.strip("| ").split(" x "))) for cell in head if " x " in cell]
    assert len(sizes) == 6
    assert [row[0].strip("`") for row in rows] == list(STRATEGIES)
    for name, *cells in rows:
        if name == "`fixed`":
            continue
        plans = [made(name.strip("`")).plan(*size) for size in sizes]
        assert cells == [f"{len(plan.tiles)}, {plan.tokens:,}" for plan in plans]


def test_python_and_configurations_hold() -> None:
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(block, {})
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)]
    assert len(blocks) == 2
    config = parse_config(values(**blocks[0], **blocks[1]))
    assert made(config.resolution.name, **config.resolution.options).plan(3000, 1000).grid == (5, 1)
    assert (config.limits.tiles, config.limits.tokens) == (13, 4000)
    pins = re.search(r"`size: 336, pins: (.*?), max_patches: null`", PAGE)
    assert pins is not None
    next_336 = made("anyres", size=336, pins=tuple(map(tuple, yaml.safe_load(pins[1]))), max_patches=None)
    assert next_336.plan(5000, 50).fine == (0, 72)


@pytest.mark.parametrize("name", STRATEGIES)
def test_each_strategy_has_a_picture(name: str) -> None:
    """One that `qformer tiles` could draw: the picture of today's plan has the same height."""
    file = DOCS / f"tiles_{name}.png"
    assert f"]({file.name})" in PAGE
    assert file.stat().st_size <= 120_000
    with Image.open(file) as drawn, Image.open(DOCS / "report.png") as report:
        plan = made(name).plan(*report.size)
        canvases = {(tile.content, tile.canvas, tile.offset) for tile in plan.tiles}
        assert drawn.width == 672
        assert drawn.height > 500 + 320 * len(canvases)


def shown(folder: Path, size: tuple[int, int], strategy: str, *words: str) -> dict[str, Any]:
    Image.new("1", size).save(folder / "blank.png")
    (one,) = json.loads(command("tiles", folder / "blank.png", "--strategy", strategy, "--json", *words))
    return one


def test_limits_are_what_the_command_says(tmp_path: Path) -> None:
    wide = shown(tmp_path, (567, 233), "internvl")
    assert (wide["grid"], wide["tiles"]) == ([5, 2], 11)
    assert round(10 * 448 * 448 / (567 * 233)) == 15
    strips = shown(tmp_path, (3000, 1000), "uhd")
    assert strips["grid"] == [6, 1]
    assert strips["sizes"][0] == [224, 462]
    pins = "pins=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]"
    lost = shown(tmp_path, (5000, 50), "anyres", "size=336", pins, "max_patches=null")
    assert (lost["tiles"], lost["tokens"]) == (4, 24 * 24)  # crops are encoded, and none of their rows is read
    assert shown(tmp_path, (5000, 50), "anyres")["tokens"] > 27 * 27
    assert shown(tmp_path, (400, 100), "pad_square")["useful"] == 0.25
    code, _, err = outcome("tiles", tmp_path / "blank.png", "--strategy", "oryx")
    assert code == 0, "4 : 1 is not too thin"
    Image.new("1", (5000, 50)).save(tmp_path / "blank.png")
    code, _, err = outcome("tiles", tmp_path / "blank.png", "--strategy", "oryx")
    assert code == 2
    assert "too thin for Oryx" in err
