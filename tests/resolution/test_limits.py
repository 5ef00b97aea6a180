"""Limits on tiles and tokens: what is refused, in which words, and what commands and data sets make of it."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch

from qformer import resolution
from qformer.config import dump_config, parse_config
from qformer.data.held_out import held_out
from qformer.data.loader import Batches
from qformer.data.sources import build
from qformer.fields import Choice
from qformer.resolution import chosen, guard
from qformer.resolution.base import Refused, cut_all, plannable
from qformer.resolution.fixed import Fixed
from qformer.schema import DataConfig, LimitsConfig
from qformer.stages.inherit import inherit
from qformer.types import BadSample, Sample, UsageError
from tests.resolution.test_strategies import made
from tests.test_config import refused, values


def test_a_plan_within_its_limits_passes() -> None:
    plan = made("internvl").plan(640, 480)
    guard([plan, plan])
    guard([plan], tiles=13, tokens=3328)
    guard([], tiles=1)


@pytest.mark.parametrize(
    ("tiles", "tokens", "message"),
    [
        (
            12,
            None,
            "a picture of 640 x 480 pixels makes 13 tiles, but limits.tiles is 12; lower .*max_tiles.*limits.tiles",
        ),
        (None, 3327, "makes 3,328 tokens, but limits.tokens is 3,327; lower .* raise limits.tokens"),
        (20, 300, "3,328 tokens, but limits.tokens is 300"),
    ],
)
def test_a_plan_beyond_a_limit_is_refused(tiles: int | None, tokens: int | None, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        guard([made("internvl").plan(100, 100), made("internvl").plan(640, 480)], tiles=tiles, tokens=tokens)
    assert "\n" not in str(caught.value)


def test_limits_hold_for_each_picture_of_a_row_and_for_all_together() -> None:
    row = made("uhd").plan_many([(640, 480), (300, 300)])  # 5 tiles and 1
    guard([row], tiles=6)
    with pytest.raises(UsageError, match=r"a row of 2 pictures makes 6 tiles, but limits.tiles is 5"):
        guard([row], tiles=5)
    with pytest.raises(UsageError, match=r"a picture of 640 x 480 pixels makes 5 tiles, but limits.tiles is 4"):
        guard([row], tiles=4)
    with pytest.raises(UsageError, match="a clip of 9 frames of 64 x 64 pixels makes 9 tiles"):
        guard([made("anyres").plan_video(64, 64, 9)], tiles=8)


def test_a_configuration_sets_limits_and_a_default_one_is_written_as_before() -> None:
    plain = parse_config(values())
    assert plain.limits == LimitsConfig()
    assert "limits" not in dump_config(plain)
    assert "limits:\n  tokens: 300\n" in dump_config(parse_config(values(limits={"tokens": 300})))
    assert "limits.tiles: " in refused(values(limits={"tiles": 0}))
    assert "limits.tiles: " in refused(values(limits={"tiles": True}))
    assert "'limits.tile': did you mean 'tiles'?" in refused(values(limits={"tile": 3}))


def limited(**limits: int) -> resolution.base.ResolutionStrategy:
    return chosen(Choice(name="uhd"), LimitsConfig(**limits))


def test_a_strategy_within_limits_refuses_by_the_name_of_its_own_option() -> None:
    strategy = limited(tiles=4, tokens=1000)
    assert strategy.rule == made("uhd")
    assert strategy.plan(300, 300) == made("uhd").plan(300, 300)
    assert strategy.plan_many([(300, 300)] * 2) == made("uhd").plan_many([(300, 300)] * 2)
    assert strategy.plan_video(300, 300, 4) == made("uhd").plan_video(300, 300, 4)
    assert strategy.sample(100, 25.0) == [0, 25, 50, 75]
    assert cut_all([torch.zeros(3, 30, 50, dtype=torch.uint8)], strategy).pixels[0].shape == (3, 252, 420)
    for plan in (
        lambda: strategy.plan(640, 480),
        lambda: strategy.plan_many([(300, 300)] * 5),
        lambda: strategy.plan_video(300, 300, 5),
    ):
        lower = "lower max_slices or queries, or for clips max_frames, of resolution"
        with pytest.raises(UsageError, match=f"5 tiles, but limits.tiles is 4; {lower}"):
            plan()
    assert isinstance(chosen(Choice(name="fixed"), LimitsConfig()), Fixed)


def test_stage_two_takes_the_limits_of_its_init_with_its_resolution() -> None:
    start = parse_config(values(stage="stage1", resolution={"name": "uhd"}, limits={"tiles": 4}))
    bare = {"stage": "stage2", "llm": {"path": "mini:opt"}, "init": "one"}
    for more, tiles in (
        ({}, 4),
        ({"resolution": {"name": "uhd"}}, 4),
        ({"limits": {"tiles": 9}}, 9),
        ({"resolution": {"name": "internvl"}}, None),  # of which 4 tiles say nothing
    ):
        assert inherit(parse_config(values(**bare, **more)), start).limits.tiles == tiles


def test_a_refusal_is_a_bad_sample_that_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(Refused("too thin")))
    assert isinstance(error, UsageError)
    assert isinstance(error, BadSample)
    assert (error.kind, error.detail, str(error)) == ("refused", "too thin", "too thin")
    image = torch.zeros(3, 4, 5, dtype=torch.uint8)
    assert plannable(image, made("oryx")) is image
    with pytest.raises(BadSample):
        plannable(torch.zeros(3, 1, 900, dtype=torch.uint8), made("oryx"))


class Strips:
    """Pictures of 10 x 10 pixels; every third is a strip that Qwen2-VL does not take."""

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> Sample:
        pixels = np.zeros((10, 3000 if index % 3 == 2 else 10, 3), np.uint8)
        return Sample(pixels, str(index), f"picture {index}", captions=["a picture"])


def test_pictures_that_are_refused_are_skipped_and_recorded() -> None:
    strategy = made("qwen2vl")
    held = held_out(Strips(), strategy, None, 4)
    assert len(held) == 6
    assert [record["kind"] for record in held.skipped] == ["refused"] * 3
    assert "beyond 200 : 1" in held.skipped[0]["detail"]
    data = DataConfig(train=Choice(name="jsonl"), batch=9, crop=(1.0, 1.0), flip=0.0)
    record = Batches(Strips(), strategy, data, seed=0)[0]
    assert len(record.batch) == 9
    assert {skip["kind"] for skip in record.skipped} == {"refused"}
    assert all(plan.image == (10, 10) for plan in record.batch.tiles.plans)


@pytest.mark.parametrize("crop", [(1.0, 1.0), (0.3, 0.9)])
@pytest.mark.parametrize("name", ["pad_square", "uhd", "internvl", "anyres", "oryx", "qwen2vl"])
def test_training_cuts_random_crops_by_every_strategy(name: str, crop: tuple[float, float]) -> None:
    source: Any = build("scenes", split="test", count=4)
    data = DataConfig(train=Choice(name="scenes"), batch=4, crop=crop)
    batch = Batches(source, made(name), data, seed=0)[0].batch
    assert len(batch.tiles) == 4
    for plan, place in zip(batch.tiles.plans, np.cumsum([0, *batch.tiles.counts]), strict=False):
        for tile, pixels in zip(plan.tiles, batch.tiles.pixels[place:], strict=False):
            assert tuple(pixels.shape) == (3, tile.size[1], tile.size[0])
    again = Batches(source, made(name), data, seed=0)[0].batch
    assert all(map(torch.equal, batch.tiles.pixels, again.tiles.pixels))
