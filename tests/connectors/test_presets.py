"""Lengths of the rows of every mini preset, at any size: planned, counted, produced and positioned alike."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qformer import resolution
from qformer.config import load_config
from qformer.llm import mrope
from qformer.model import connectors
from qformer.model.connectors import Connector
from qformer.model.frontend import FrontEnd
from qformer.types import UsageError
from qformer.videos import Clip
from qformer.vision.base import VisionEncoder

SYSTEMS = ["llava15", "llava_uhd", "internvl15", "anyres", "oryx", "qwen2vl"]  # blip2's plans know nothing of queries
PATCH, WIDTH, LLM_WIDTH = 20, 4, 8

SIDES = st.one_of(st.integers(1, 500), st.sampled_from([1, 119, 120, 121, 240, 360, 1500]))
SIZES = st.tuples(SIDES, SIDES)


class Means(VisionEncoder):
    """Each token is the mean color of its patch, and 1."""

    def __init__(self) -> None:
        super().__init__(width=WIDTH, patch_size=PATCH, image_size=120, extra=1, mean=(0,) * 3, std=(1,) * 3)

    def encode(self, pixels: Tensor) -> Tensor:
        colors = torch.nn.functional.avg_pool2d(pixels, PATCH).flatten(2).mT
        tokens = torch.cat([colors, torch.ones_like(colors[..., :1])], dim=2)
        return torch.cat([torch.zeros_like(tokens[:, :1]), tokens], dim=1)


@cache
def parts_of(name: str) -> tuple[FrontEnd, Connector]:
    config = load_config(f"configs/system_{name}.yaml")
    strategy = resolution.chosen(config.resolution, config.limits)
    return FrontEnd(Means().freeze(), strategy), connectors.chosen(config.connector, WIDTH, LLM_WIDTH)


def flat(width: int, height: int) -> Tensor:
    return torch.full((3, height, width), 100, dtype=torch.uint8)


@pytest.mark.parametrize("name", SYSTEMS)
def test_two_pictures_and_a_long_clip_of_usual_shapes_fit(name: str) -> None:
    """From a thumbnail to a phone's; with a text of 64 tokens into mini OPT's 512 positions (Oryx at 240 pixels)."""
    strategy = parts_of(name)[0].strategy
    if name == "oryx":
        strategy = replace(strategy, high=240)
    frames = len(strategy.sample(10_000, 25.0))
    for size in ((64, 48), (320, 240), (640, 640), (1280, 720), (1080, 1920), (538, 1344)):
        for plan in (strategy.plan_many([size, size]), strategy.plan_video(*size, frames)):
            assert plan.tokens + plan.markers + 64 <= 512


@pytest.mark.parametrize("name", SYSTEMS)
@settings(max_examples=10, deadline=None)
@given(
    pictures=st.lists(SIZES, min_size=1, max_size=4),
    frames=st.integers(2, 9),
    fps=st.sampled_from([0.5, 2.0, 29.97]),
    filmed=SIZES,
)
def test_planned_is_counted_produced_and_positioned(
    name: str, pictures: list[tuple[int, int]], frames: int, fps: float, filmed: tuple[int, int]
) -> None:
    """Check a picture, several, a clip, and pictures with a clip in one row."""
    frontend, connector = parts_of(name)
    clip = Clip(flat(*filmed)[None].expand(frames, -1, -1, -1), fps)
    several: list[Any] = [flat(*size) for size in pictures]
    for shown in (several[0], several, clip, [*several, clip]):
        try:
            tiles = frontend.tiles([shown])
        except UsageError:
            continue  # too thin for this strategy
        (plan,) = tiles.plans
        with torch.no_grad():
            prefix = connector(frontend(tiles), None, marker=lambda _: torch.zeros(LLM_WIDTH))
        assert prefix.mask.all()
        assert plan.tokens == connector.count_tokens(plan)
        assert plan.tokens + plan.markers == prefix.embeds.shape[1]
        positioned = mrope.places(mrope.parts(plan))
        assert len(positioned) == prefix.embeds.shape[1]
        if name == "qwen2vl":
            assert int((positioned >= 0).all(dim=1).sum()) == plan.tokens
            assert torch.equal(mrope.of_plans([plan], [len(positioned)], len(positioned))[0], positioned)


@pytest.mark.parametrize("name", SYSTEMS)
def test_presets_on_real_towers_are_made_for_patches_of_14(name: str) -> None:
    config = load_config(f"configs/real/system_{name}.yaml")
    connector = connectors.chosen(config.connector, WIDTH, LLM_WIDTH)
    assert connector.patch in (None, 14)
    plan = resolution.chosen(config.resolution, config.limits).plan(640, 480)
    assert connector.count_tokens(plan) == plan.tokens
