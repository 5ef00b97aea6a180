"""Presets of published systems: the mini ones train, write and count; the full ones have the published sizes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

import qformer
from qformer import stages
from qformer.checkpoints import folder as checkpoint
from qformer.config import load_config
from qformer.model.vision_language import VisionLanguageModel
from qformer.stages import loop
from qformer.stages.plan import beside
from qformer.stages.plan.forecast import plan
from qformer.stages.plan.outline import outline, outline_language_model, read_sizes
from qformer.types import Batch, Plan, UsageError
from qformer.videos import Clip
from tests.commands import command, outcome

SYSTEMS = ["blip2", "llava15", "llava_uhd", "internvl15", "anyres", "oryx", "qwen2vl"]
FEW = [f"{{name: scenes, size: {size}, captions: 1, count: 2}}" for size in (240, "[360, 160]", "[180, 300]")]
SHORT = [
    f"data.train={{name: mix, sources: [{', '.join(FEW)}]}}",
    "data.batch=6",
    "train.log_every=1",
    "train.warmup=1",
    "train.save_every=0",
]


def mini(name: str, run: Path, steps: int, *overrides: str) -> Path:
    given = [f"run={run}", f"train.steps={steps}", *SHORT, *overrides]
    stages.train(load_config(f"configs/system_{name}.yaml", given))
    return run


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def picture(width: int, height: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed)).byte()


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_mini_preset_learns_and_reads_pictures_of_any_size(tmp_path: Path, name: str) -> None:
    found = losses(mini(name, tmp_path / "run", 16))
    assert all(map(math.isfinite, found))
    assert sum(found[-3:]) < 0.95 * sum(found[:3])
    model = qformer.load(tmp_path / "run", device="cpu")
    assert isinstance(model, VisionLanguageModel)
    clip = Clip(torch.stack([picture(130, 100, seed) for seed in range(4)]), 2.0)
    sizes = [(640, 480), (100, 400), (333, 777), (120, 120), (50, 31), (900, 130)]
    pictures = [picture(*size, seed) for seed, size in enumerate(sizes)]
    shown: list[Any] = [*pictures, [picture(200, 300, 3), picture(50, 60, 4)], clip]
    tiles, new = model.frontend.tiles(shown), {"num_beams": 1, "min_new_tokens": 4, "max_new_tokens": 4}
    told = ["a red ball", "two", "a blue cube on a ball", "a"] * 2
    asked = ["what is this?", "how many balls are red?"] * 4
    captions, answers = model.generate(tiles, **new), model.answer(tiles, asked, **new)
    losses_alone = []
    with torch.no_grad():
        together = model.prefix(tiles)
        for row, (plan_of, one) in enumerate(zip(tiles.plans, shown, strict=True)):
            counted = model.count_tokens(plan_of)
            assert int(together.mask[row].sum()) == counted
            if name != "blip2":  # whose plans know nothing of the Q-Former
                assert counted == tokens_and_markers(plan_of)
            by_itself = model.frontend.tiles([one])
            alone = model.prefix(by_itself)
            torch.testing.assert_close(alone.embeds[0], together.embeds[row, :counted], rtol=1e-4, atol=1e-4)
            assert model.generate(by_itself, **new) == captions[row : row + 1]
            assert model.answer(by_itself, asked[row : row + 1], **new) == answers[row : row + 1]
            batch = Batch(by_itself, told[row : row + 1])
            losses_alone.append(float(model(batch)["lm"]) * model.count_targets(batch))
        batch = Batch(tiles, told)
        mean = sum(losses_alone) / model.count_targets(batch)
        assert float(model(batch)["lm"]) == pytest.approx(mean, rel=1e-5)
    assert len({*captions, *answers}) > 1  # they do not say the same whatever they see


def tokens_and_markers(plan_of: Plan) -> int:
    return plan_of.tokens + plan_of.markers


class Killed(Exception):
    pass


@pytest.mark.parametrize("name", ["anyres", "qwen2vl"])
def test_a_killed_run_of_a_preset_ends_with_the_same_bits(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    mini(name, whole, 5, "train.save_every=2")
    real, calls = loop._train_step, iter(range(99))

    def dies(*arguments: Any, **options: Any) -> Any:
        if next(calls) == 3:
            raise Killed
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_train_step", dies)
        with pytest.raises(Killed):
            mini(name, cut, 5, "train.save_every=2")
    mini(name, cut, 5, "train.save_every=2")
    mine, theirs = (checkpoint.read(run / "checkpoints" / "step-0000005").tensors for run in (cut, whole))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert losses(cut) == losses(whole)


@pytest.mark.parametrize("name", ["internvl15", "oryx"])
def test_stored_tokens_train_as_pictures_do(tmp_path: Path, name: str) -> None:
    direct = losses(mini(name, tmp_path / "direct", 4))
    stored = losses(mini(name, tmp_path / "stored", 4, f"data.features={tmp_path / 'store'}"))
    assert stored == pytest.approx(direct, rel=2e-3)


def test_stage_one_is_for_the_q_former(tmp_path: Path) -> None:
    for name in SYSTEMS[1:]:
        code, _, err = outcome("train", f"configs/system_{name}.yaml", "stage=stage1")
        assert code == 2
        assert "'stage1' trains a Q-Former" in err
        assert "Traceback" not in err
    few = ["stage=stage1", "data.batch=4", "train.precision=fp32"]
    first = losses(mini("blip2", tmp_path / "first", 2, *few))
    assert all(map(math.isfinite, first))
    assert losses(mini("blip2", tmp_path / "second", 2, f"init={tmp_path / 'first'}"))


@pytest.mark.parametrize("name", [*SYSTEMS, *(f"{name}_full" for name in SYSTEMS)])
def test_configurations_are_complete(name: str) -> None:
    shown = command("config", f"configs/system_{name}.yaml")
    assert f"run: runs/systems/{name}" in shown


#: As published; see the headers of the presets.
LANGUAGE = {
    "llava15": 13.0e9,
    "llava_uhd": 13.0e9,
    "internvl15": 19.86e9,
    "anyres": 7.6e9,
    "oryx": 7.6e9,
    "qwen2vl": 7.6e9,
    "blip2": 6.66e9,
}
TOWERS = {
    "openai/clip-vit-large-patch14-336": 304.29e6,
    "OpenGVLab/InternViT-6B-448px-V1-5": 5540e6,
    "google/siglip-so400m-patch14-384": 428e6,
}


@pytest.mark.parametrize("name", ["llava15", "internvl15", "anyres", "qwen2vl", "blip2"])
def test_language_models_have_the_published_sizes(name: str) -> None:
    with torch.device("meta"):
        llm = outline_language_model(load_config(f"configs/system_{name}_full.yaml"), "cuda")
    assert sum(p.numel() for p in llm.parameters()) == pytest.approx(LANGUAGE[name], rel=0.01)


@pytest.mark.parametrize("path", TOWERS)
def test_towers_of_transformers_have_the_published_sizes(path: str) -> None:
    with torch.device("meta"):
        tower = AutoModel.from_config(read_sizes(path, "vision.path"))
    assert tower.num_parameters() == pytest.approx(TOWERS[path], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", SYSTEMS)
def test_full_presets_are_outlined(name: str) -> None:
    """Towers of our own, and language models, as published; the tower of Qwen2-VL is counted with its merger."""
    model, _ = outline(load_config(f"configs/system_{name}_full.yaml"), "cuda")
    assert isinstance(model, VisionLanguageModel)
    sizes = {part: sum(p.numel() for p in module.parameters()) for part, module in model.named_children()}
    assert sizes["llm"] == pytest.approx(LANGUAGE[name], rel=0.01)
    published = {
        "blip2": (sizes["frontend"], 1011e6 * 39 / 40),
        "oryx": (sizes["frontend"], 428e6),
        "qwen2vl": (sizes["frontend"] + sizes["connector"], 675e6),
        "internvl15": (sizes["frontend"], 5540e6),
    }
    if name in published:
        own, theirs = published[name]
        assert own == pytest.approx(theirs, rel=0.01)


@pytest.mark.slow
def test_llava_uhd_costs_less_than_llava_15_as_published() -> None:
    """At 672 x 1008, without text (arXiv 2403.11703v1, table 2: 14.63 and 15.50 TFLOP)."""
    words = (
        *("plan", "configs/system_llava_uhd_full.yaml", "--json", "llm.max_tokens=2", "data.batch=1"),
        *("--picture", "672x1008", "--beside", "configs/system_llava15_full.yaml"),
    )
    costs = json.loads(command(*words))["beside"]
    own, other, ratio = costs["forward"]
    assert own == pytest.approx(14.6, rel=0.05)
    assert other == pytest.approx(15.5, rel=0.05)
    assert 0.93 < ratio < 0.98
    said = "\n".join(beside.lines(costs))
    assert f"a ratio of {costs['training'][2]:.3f}" in said
    assert "training 23 h : 26 h, a ratio of 0.885" in said


@pytest.mark.slow
def test_a_forecast_of_pictures_of_another_size() -> None:
    settings = load_config("configs/system_oryx.yaml", ["data.batch=1", "resolution.high=320"])
    small, large = (plan(settings, picture=beside.parse_picture(size)) for size in ("200x120", "400x240"))
    # 240 patches and 36 or so of the low view, beside 60
    assert large.store["fp16"] > 2 * small.store["fp16"]
    costs = beside.compare(large.flops, small.flops)
    assert costs["training"][2] > 1.5
    assert "published" not in costs
    for wrong in ("672", "672x", "0x5", "axb", "5x-1", "99999x1"):
        with pytest.raises(UsageError, match=f"'{wrong}' is no size of a picture"):
            beside.parse_picture(wrong)
