"""Costs of a system: operations are those of the real modules, tokens as planned, the model as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from qformer.config import FeaturesConfig, load_config
from qformer.data import sources
from qformer.llm.prompts import vqa_prompt
from qformer.model.assembly import build_vision_language
from qformer.model.vision_language import VisionLanguageModel
from qformer.schema import Config
from qformer.stages.compare import costs
from qformer.stages.compare.costs import Cost, measure_cost, measure_steps
from qformer.types import Sample, UsageError

Built = tuple[VisionLanguageModel, Config]
DATA = "data.train={name: canvases, questions: true, count: 8, sides: [120, 240]}"


def built(*words: str) -> Built:
    return build_vision_language(load_config("configs/system_llava15.yaml", [DATA, "data.batch=2", *words]))


@pytest.fixture(scope="module")
def llava() -> Built:
    return built()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "BATCHES", 1)
    monkeypatch.setattr(costs, "TIMED", {"batches": 1, "rows": 1})


def rows(count: int = 2) -> list[Sample]:
    source = sources.build("canvases", questions=True, count=count, sides=[120, 240])
    return [source[place] for place in range(count)]


def counted(run: Callable[[], Any]) -> int:
    """Operations as PyTorch counts them; its attention for CPUs has no formula, so that of single products runs."""
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        run()
    return counter.get_total_flops()


def test_operations_of_a_row_are_those_of_the_real_modules(llava: Built) -> None:
    model, config = llava
    (row,) = rows(1)
    found = measure_cost(config, model, [row])
    tiles = model.frontend.tiles([row.image])
    prompt = vqa_prompt((row.question or "").lower(), "paper", model.llm.wording)
    with torch.no_grad():
        visual = model.frontend(tiles)
        seen = model.prefix_of(visual)
        assert found.encoder_flops == counted(lambda: model.frontend(tiles))
        assert found.connector_flops == counted(lambda: model.prefix_of(visual))
        assert found.prefill_flops == counted(lambda: model.llm.predict(*seen, [""], [prompt], 500))
        shorter = counted(lambda: model.llm.predict(*seen, [""], [""], 500))
    assert shorter < found.prefill_flops, "the prompt is read as well"
    assert found.tokens == seen.mask.sum() == 36
    assert found.trained == sum(one.numel() for one in model.connector.parameters())


def test_operations_of_a_step_are_those_of_the_real_modules(llava: Built) -> None:
    """Backward through the frozen language model included; a frozen encoder has no backward pass."""
    from qformer.data.loader import Batches

    model, config = llava
    source = sources.for_run(config.data.train)
    batch = Batches(source, model.frontend.strategy, config.data, config.seed)[0].batch
    model.train()
    with sdpa_kernel(SDPBackend.MATH):
        found = measure_steps(config, model)
    assert found.step_flops == counted(lambda: model(batch)["loss"].backward())
    model.zero_grad()


def test_stored_tokens_are_encoded_once(llava: Built, tmp_path: Path) -> None:
    model, config = llava
    plain = measure_steps(config, model)
    features = load_config("configs/system_llava15.yaml", [f"data.features={{path: {tmp_path}}}"]).data.features
    stored = measure_steps(
        config.model_copy(update={"data": config.data.model_copy(update={"features": features})}), model
    )
    each = stored.stored_flops / 8  # samples of the source
    assert stored.step_flops + 2 * each == pytest.approx(plain.step_flops)
    assert plain.stored_flops == 0
    assert not any(tmp_path.iterdir()), "nothing is written"


def test_the_model_stays_as_it_was(llava: Built) -> None:
    model, config = llava
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    config = config.model_copy(update={"train": config.train.model_copy(update={"gradient_checkpointing": True})})
    found = measure_cost(config, model, rows())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not model.training
    assert all(one.grad is None for one in model.parameters())
    assert not any("forward" in vars(module) for module in model.modules())
    assert found.first_token_seconds > 0
    assert found.images_per_second > 0
    assert found.peak_bytes > sum(one.nbytes for one in model.parameters())


def test_stage_one_counts(llava: Built) -> None:
    model, config = llava
    words = [DATA, "data.batch=2", "stage=stage1", "qformer.layers=1", "train.steps=30", "train.warmup=3"]
    first = load_config("configs/system_blip2.yaml", words)
    found, without = measure_cost(config, model, rows(1), first), measure_cost(config, model, rows(1))
    assert without.before_flops == 0
    longer = first.model_copy(update={"train": first.train.model_copy(update={"steps": 60})})
    assert costs.before_flops(longer) == pytest.approx(2 * found.before_flops)
    assert found.training_flops(10) == found.before_flops + 10 * found.step_flops


def test_a_store_that_two_stages_read_is_filled_once(llava: Built) -> None:
    model, config = llava
    words = [DATA, "data.batch=2", "stage=stage1", "qformer.layers=1", "train.steps=30", "train.warmup=3"]
    first = load_config("configs/system_blip2.yaml", [*words, "data.features=one"])
    whole, half, alone = (costs.before_flops(first, {"one": count}) for count in (0, 4, 8))
    assert 0 < alone < whole
    assert half == pytest.approx((whole + alone) / 2)
    short = first.model_copy(update={"train": first.train.model_copy(update={"steps": 2})})  # 4 of the 8 pictures
    assert costs.before_flops(short) - costs.before_flops(short, {"one": 4}) == pytest.approx((whole - alone) / 2)
    features = {name: config.data.model_copy(update={"features": FeaturesConfig(path=name)}) for name in ("one", "two")}
    found = {name: config.model_copy(update={"data": data}) for name, data in features.items()}
    before = {name: measure_cost(one, model, rows(1), first).before_flops for name, one in found.items()}
    assert before == {"one": pytest.approx(alone), "two": pytest.approx(whole)}


def test_rows_that_cannot_be_used(llava: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = llava
    bad = Sample(b"no picture", "bad", question="what", answers=["red"])
    one, both = measure_cost(config, model, rows(1)), measure_cost(config, model, [*rows(1), bad])
    assert counts(one) == counts(both)
    with pytest.raises(UsageError, match="none of the 1 rows"):
        measure_cost(config, model, [bad])
    monkeypatch.setattr(model.connector, "count_part", lambda plan: 35)
    with pytest.raises(UsageError, match="plans 35 tokens of a row and makes 36"):
        measure_cost(config, model, rows(1))


def counts(cost: Cost) -> Cost:
    """What does not depend on the machine."""
    return replace(cost, first_token_seconds=0, images_per_second=0)
