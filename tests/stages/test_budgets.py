"""Equal budgets: tokens that the real models produce, options that define a system untouched, equal operations."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.equal_tokens import changed_options
from qformer.config import load_config
from qformer.data import sources
from qformer.model.assembly import build_vision_language
from qformer.schema import Config
from qformer.stages.compare import comparison
from qformer.stages.compare.budgets import OF_CONNECTOR, equal_flops, equal_tokens, mean_tokens
from qformer.stages.compare.costs import Cost
from qformer.stages.compare.systems import Refused, System
from qformer.stages.plan.planned import Rows
from qformer.types import Sample, UsageError

SOURCE = sources.build("canvases", split="val", count=6)


def system(name: str, *words: str) -> Config:
    return load_config(f"configs/system_{name}.yaml", list(words))


def nearest(config: Config, tokens: float) -> tuple[Config, dict[str, object]]:
    """The configuration with so many tokens, and what it changes."""
    found = equal_tokens({"one": config}, SOURCE, tokens)["one"]
    assert isinstance(found, Config), found
    return found, changed_options(config, found)


@pytest.mark.parametrize(
    ("name", "tokens", "key"),
    [
        ("blip2", 37, "qformer.queries"),
        ("llava15", 64, "resolution.size"),
        ("internvl15", 36, "resolution.max_tiles"),
        ("qwen2vl", 20, "resolution.max_tokens"),
        ("qwen2vl", 90, "resolution.min_tokens"),
    ],
)
def test_a_system_gets_as_many_tokens_by_its_own_option(name: str, tokens: float, key: str) -> None:
    config = system(name)
    found, changes = nearest(config, tokens)
    assert key in changes
    assert set(changes) <= {key, "resolution.max_tokens", "resolution.min_tokens"}, "all else defines the system"
    assert mean_tokens(found, SOURCE) == pytest.approx(tokens, rel=0.15)
    assert abs(mean_tokens(found, SOURCE) - tokens) < abs(mean_tokens(config, SOURCE) - tokens)


def test_tokens_are_those_that_the_real_model_makes() -> None:
    """Markers included, which planned `tokens` of a strategy are not."""
    found, _ = nearest(system("internvl15"), 40)
    model, _ = build_vision_language(found)
    tiles = model.frontend.tiles([SOURCE[place].image for place in range(len(SOURCE))])
    assert model.prefix(tiles).mask.sum() / len(SOURCE) == mean_tokens(found, SOURCE)


def test_queries_are_squares_where_they_have_to_be_and_go_to_the_strategy() -> None:
    found, changes = nearest(system("llava_uhd"), 60)
    queries = found.connector.options["queries"]
    if "connector.queries" in changes:
        assert found.resolution.options["queries"] == queries
    assert int(queries**0.5) ** 2 == queries


def test_every_connector_with_queries_has_an_option() -> None:
    from qformer.connectors.table import CONNECTORS

    assert set(OF_CONNECTOR) == set(CONNECTORS) - {"mlp", "pixel_shuffle_mlp", "merger", "compressor"}


def test_the_option_of_the_connector_comes_before_that_of_the_strategy() -> None:
    config = system("llava15", "connector={name: avg_pool, queries: 16}")
    assert nearest(config, 36)[1] == {"connector.queries": 36}
    packer = system("llava15", "connector={name: token_packer, scale: 2}")
    assert nearest(packer, 36)[1] == {"connector.scale": 1}
    assert nearest(packer, 16)[1] == {"resolution.size": 160}, "no scale gives 16 tokens of 36 patches"


def test_what_is_near_stays_as_it_is() -> None:
    config = system("llava15")
    assert equal_tokens({"one": config}, SOURCE, 35)["one"] is config


def test_what_cannot_come_near_is_refused_with_its_nearest_number() -> None:
    found = equal_tokens({"oryx": system("oryx"), "anyres": system("anyres")}, SOURCE, 8)
    for one in found.values():
        assert isinstance(one, Refused)
        assert one.reason.startswith("the nearest to 8 visual tokens that it can have is ")
    assert "with resolution.high=" in found["oryx"].reason  # type: ignore[union-attr]
    queries = system("blip2", "init=runs/stage1", "resolution={name: fixed, size: 120}")
    assert isinstance(equal_tokens({"blip2": queries}, SOURCE, 64)["blip2"], Refused), "they are those of init"


def test_a_system_that_cannot_be_built_is_refused_and_others_are_not(tmp_path: Path) -> None:
    configs = {"bad": system("llava15", f"llm.path={tmp_path}"), "good": system("llava15")}
    found = equal_tokens(configs, SOURCE, 36)
    assert isinstance(found["bad"], Refused)
    assert found["good"] is configs["good"]
    with pytest.raises(UsageError, match="positive"):
        equal_tokens(configs, SOURCE, 0)


def cost(step: float, stored: float = 0.0, before: float = 0.0) -> Cost:
    return Cost(36, 1, 1, 1, 1, step, stored, before, 1, 1, 1)


class Growing:
    """Sixteen small pictures, then 32 large ones."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> Sample:
        side = 120 if index < 16 else 480
        return Sample(np.zeros((side, side, 3), np.uint8), str(index))


def test_the_reference_keeps_its_own_tokens() -> None:
    """What is measured is all that is asked about, not the small pictures at the beginning, with a third as many."""
    systems: comparison.Systems = {"reference": System(system("internvl15")), "other": System(system("blip2"))}
    source = Growing()
    exam = SimpleNamespace(open=lambda view: source)
    data: Any = SimpleNamespace(exam=exam, sizes=Rows.of(source))
    found = comparison._with_tokens(systems, comparison.Settings(()), data, "reference")
    assert found["reference"] == systems["reference"]
    other = found["other"]
    assert isinstance(other, System)
    assert other.config.qformer.queries == round(mean_tokens(system("internvl15"), source)) == 35


def test_steps_take_the_operations_of_the_reference() -> None:
    config = system("llava15")  # 300 steps, 15 of them to warm up
    configs = dict.fromkeys(("reference", "twice", "stored", "begun", "unknown", "late", "coarse"), config)
    costs = {
        "reference": cost(10),
        "twice": cost(20),
        "stored": cost(5, stored=1000),
        "begun": cost(10, before=1500),
        "late": cost(10, before=3001),
        "coarse": cost(2000),
    }
    found = equal_flops(configs, costs, "reference")
    trains = {name: one.train for name, one in found.items() if isinstance(one, Config)}
    assert found["reference"] is config
    assert {name: (one.steps, one.warmup) for name, one in trains.items()} == {
        "reference": (300, 15),
        "twice": (150, 7),
        "stored": (400, 20),
        "begun": (150, 7),
    }
    for name, train in trains.items():
        assert costs[name].training_flops(train.steps) == 3000
    assert "100% of the budget goes before its first step" in found["late"].reason  # type: ignore[union-attr]
    assert isinstance(found["coarse"], Refused)
    assert found["unknown"] == Refused("its costs are not known")
    with pytest.raises(UsageError, match="no costs to be equal to"):
        equal_flops(configs, costs, "unknown")
