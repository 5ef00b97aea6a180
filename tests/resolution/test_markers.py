"""The texts that strategies put around tiles: all of them are known before a picture is seen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qformer.fields import Choice
from qformer.resolution import chosen
from qformer.schema import LimitsConfig
from qformer.types import Plan, UsageError
from tests.resolution.test_strategies import EVERY, made
from tests.slices import Slices

if TYPE_CHECKING:
    from qformer.resolution.base import ResolutionStrategy

NAMED = {"uhd": (",", "\n"), "internvl": ("<img>", "</img>"), "qwen2vl": ("<|vision_start|>", "<|vision_end|>")}


@pytest.mark.parametrize("name", EVERY)
def test_each_strategy_names_its_markers(name: str) -> None:
    assert made(name).markers() == NAMED.get(name, ())


def test_markers_depend_on_the_options_alone() -> None:
    assert made("uhd", schema=False).markers() == made("uhd", max_slices=1).markers() == ()
    huge = made("uhd", size=5600)  # pictures of common sizes are one tile without markers
    assert huge.markers() == (",", "\n")
    assert huge.plan(20_000, 20_000).markers == 6
    limited = chosen(Choice(name="uhd"), LimitsConfig(tokens=150))
    with pytest.raises(UsageError, match=r"limits\.tokens is 150"):
        limited.plan(640, 480)
    assert limited.markers() == (",", "\n")


def test_those_of_somebody_elses_strategy_are_looked_for() -> None:
    assert Slices().markers() == (",", "<end of row>")


@given(st.sampled_from(EVERY), st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 5))
def test_no_plan_shows_another(name: str, width: int, height: int, count: int) -> None:
    strategy: ResolutionStrategy = made(name)

    def plans() -> list[Plan]:
        size = (width, height)
        return [strategy.plan(*size), strategy.plan_many([size] * count), strategy.plan_video(*size, count)]

    try:
        found = plans()
    except UsageError:  # too thin for it
        return
    shown = {text for plan in found for tile in plan.tiles for text in (tile.before, tile.after) if text}
    assert shown <= set(strategy.markers())
