"""Stage two through a quantised language model: it learns, the language model stays, and the run resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import qformer
from qformer import stages
from qformer.checkpoints import folder as checkpoint
from qformer.llm.quantize import is_quantized
from qformer.model.assembly import build_vision_language
from qformer.stages import stage2
from qformer.types import UsageError
from tests.workspace import config, make_workspace

STEPS = 24


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_workspace(tmp_path_factory.mktemp("space"))
    stages.train(config(root, "stage1"))
    return root


def settings(space: Path, run: str, kind: str, quantize: str, **train: Any) -> Any:
    chosen = {"path": f"mini:{kind}", "quantize": quantize, "visual_scale": 4}
    learning = {"steps": STEPS, "lr": 3e-3, "save_every": STEPS // 2, "keep_last": 9, "validate_every": 8} | train
    return config(space, "stage2", run=str(space / run), llm=chosen, train=learning, data={"crop": [1, 1], "flip": 0})


def losses(run: Path) -> list[float]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if record["kind"] == "train"]


@pytest.mark.parametrize(("kind", "quantize"), [("opt", "nf4"), pytest.param("t5", "int8", marks=pytest.mark.slow)])
def test_the_bridge_learns_and_the_language_model_stays(
    space: Path, monkeypatch: pytest.MonkeyPatch, kind: str, quantize: str
) -> None:
    """Also behind validations, whose calls without gradients must leave its layers as they are."""
    kept: list[Any] = []
    before: dict[str, torch.Tensor] = {}

    def build(*args: Any, **options: Any) -> Any:
        model, chosen = build_vision_language(*args, **options)
        before.update({name: tensor.clone() for name, tensor in model.llm.named_parameters()})
        kept.append(model)
        return model, chosen

    monkeypatch.setattr(stage2, "build_vision_language", build)
    folder = stages.train(settings(space, f"{kind}-{quantize}", kind, quantize))
    curve = losses(space / f"{kind}-{quantize}")
    assert len(curve) == STEPS
    assert all(torch.isfinite(torch.tensor(curve)))
    assert sum(curve[-5:]) < 0.9 * sum(curve[:5])
    (model,) = kept
    assert sum(is_quantized(module) for module in model.llm.modules()) > 10
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.llm.named_parameters())
    saved = checkpoint.read(folder).tensors
    assert not [name for name in saved if name.startswith("llm.")]
    loaded: Any = qformer.load(folder, device="cpu")  # quantised as it was trained
    assert sum(is_quantized(module) for module in loaded.llm.modules()) > 10
    tiles = loaded.frontend.tiles([space / "images" / "0.png"])
    options: dict[str, Any] = {"num_beams": 1, "max_new_tokens": 8}
    assert loaded.generate(tiles, **options) == model.eval().generate(tiles, **options)


@pytest.mark.slow
def test_resumed_equals_uninterrupted(space: Path) -> None:
    few = {"steps": 4, "save_every": 2}
    folder = stages.train(settings(space, "whole", "opt", "nf4", **few))
    stages.train(settings(space, "parts", "opt", "nf4", **few))
    (space / "parts" / "checkpoints" / "step-0000004").rename(space / "late")  # as if killed in between
    again = stages.train(settings(space, "parts", "opt", "nf4", **few))
    mine, theirs = checkpoint.read(folder).tensors, checkpoint.read(again).tensors
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_it_is_not_spread(space: Path) -> None:
    with pytest.raises(UsageError, match="cannot shard a language model in int8"):
        stages.train(settings(space, "spread", "opt", "int8", fsdp=True))


@pytest.mark.slow
def test_layers_that_compute_again_give_the_same(space: Path) -> None:
    stages.train(settings(space, "plain", "opt", "nf4", steps=4))
    stages.train(settings(space, "again", "opt", "nf4", steps=4, gradient_checkpointing=True))
    assert losses(space / "again") == pytest.approx(losses(space / "plain"), abs=1e-4)
