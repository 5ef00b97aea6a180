"""docs/resolution.md: its table, its Python and its configurations."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from qformer.config import parse_config
from qformer.resolution import STRATEGIES
from tests.resolution.test_strategies import made
from tests.test_config import values

PAGE = (Path(__file__).parent.parent.parent / "docs" / "resolution.md").read_text(encoding="utf-8")


def test_the_table_is_what_strategies_plan() -> None:
    head, _, *rows = [line.strip("| ").split(" | ") for line in re.findall(r"^\|.*\|$", PAGE, flags=re.MULTILINE)][:9]
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
