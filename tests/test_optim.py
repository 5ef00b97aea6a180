"""Which parameters decay, and the learning rate of every step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qformer.schema import TrainConfig
from qformer.stages.optim import adamw, learning_rate

CONFIG = TrainConfig(steps=100, warmup=10, lr=1e-3, min_lr=1e-5, warmup_lr=1e-6, weight_decay=0.07, betas=(0.8, 0.9))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.linear = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.temp = nn.Parameter(torch.tensor(0.07))
        self.queries = nn.Parameter(torch.zeros(1, 2, 4))


def test_only_matrices_decay_and_frozen_weights_are_left_out() -> None:
    model = Model()
    optimizer = adamw(model, CONFIG)
    assert isinstance(optimizer, torch.optim.AdamW)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    named = {name: decay.get(id(p)) for name, p in model.named_parameters()}
    assert named == {
        "frozen.weight": None,
        "frozen.bias": None,
        "linear.weight": 0.07,
        "queries": 0.07,
        "linear.bias": 0.0,
        "norm.weight": 0.0,
        "norm.bias": 0.0,
        "temp": 0.0,
    }
    assert all(group["betas"] == (0.8, 0.9) and group["lr"] == 1e-3 for group in optimizer.param_groups)


def test_learning_rate_at_the_corners() -> None:
    assert learning_rate(0, CONFIG) == 1e-6
    assert learning_rate(5, CONFIG) == pytest.approx((1e-6 + 1e-3) / 2)
    assert learning_rate(10, CONFIG) == pytest.approx(1e-3)
    assert learning_rate(99, CONFIG) == pytest.approx(1e-5)
    halfway = TrainConfig(steps=101, warmup=0, lr=1.0, min_lr=0.0)
    assert learning_rate(50, halfway) == pytest.approx(0.5)
    assert learning_rate(25, halfway) == pytest.approx(0.5 + 0.5 * 2**-0.5)  # a cosine, not a line


def test_learning_rate_rises_then_falls() -> None:
    rates = [learning_rate(step, CONFIG) for step in range(100)]
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert len(set(rates)) == 100
    assert max(rates) == rates[10]


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (2, 1), (2, 0)])
def test_learning_rate_of_the_shortest_runs(steps: int, warmup: int) -> None:
    config = TrainConfig(steps=steps, warmup=warmup, lr=1e-3)
    assert learning_rate(warmup, config) == pytest.approx(1e-3)
    assert all(config.warmup_lr <= learning_rate(step, config) <= 1e-3 for step in range(steps))


class Encoded(nn.Module):
    """Where blocks are named as in EVA, CLIP or transformers."""

    def __init__(self, path: str) -> None:
        super().__init__()
        *parents, last = path.split(".")
        blocks: nn.Module = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(3))
        for name in reversed([*parents, last]):
            blocks = nn.ModuleDict({name: blocks})
        self.frontend = nn.ModuleDict({"encoder": blocks, "norm": nn.LayerNorm(2)})
        self.frontend["encoder"].cls_token = nn.Parameter(torch.zeros(1, 1, 2))
        self.qformer = nn.Linear(2, 2)


@pytest.mark.parametrize("path", ["blocks", "transformer.resblocks", "tower.encoder.layers", "tower.encoder.layer"])
def test_blocks_of_a_trained_encoder_learn_slower_towards_the_front(path: str) -> None:
    model = Encoded(path)
    optimizer = adamw(model, CONFIG.model_copy(update={"layer_decay": 0.5}))
    scale = {id(p): group["scale"] for group in optimizer.param_groups for p in group["params"]}
    by_name = {name: scale[id(p)] for name, p in model.named_parameters()}
    assert by_name[f"frontend.encoder.{path}.2.1.weight"] == 0.5
    assert by_name[f"frontend.encoder.{path}.0.0.bias"] == 0.125
    assert by_name["frontend.encoder.cls_token"] == 0.0625
    assert by_name["frontend.norm.weight"] == by_name["qformer.weight"] == 1.0
    plain = adamw(model, CONFIG)
    assert {group["scale"] for group in plain.param_groups} == {1.0}
