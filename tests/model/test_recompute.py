"""Activations that are computed again: the same losses and gradients, dropout included, and fewer tensors kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qformer.model.assembly import build_image_text, build_vision_language
from qformer.stages.recompute import recompute_layers
from qformer.types import Batch, Tiles
from tests.workspace import config, make_workspace

KINDS: dict[str, dict[str, Any]] = {
    "stage one": {"stage": "stage1", "qformer": {"dropout": 0.1}},
    "a trained encoder": {"stage": "stage1", "freeze_vision": False},
    "opt": {"stage": "stage2"},
    "t5": {"stage": "stage2", "llm": "flan-t5"},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("space"))


def build(root: Path, kind: str) -> nn.Module:
    changes = dict(KINDS[kind])
    stage = changes.pop("stage")
    torch.manual_seed(0)
    if stage == "stage1":
        return build_image_text(config(root, stage, **changes))[0].train()
    sizes = {"hidden_size": 16, "layers": 2, "heads": 2, "intermediate_size": 24, "queries": 3}
    bridge = {"vision": config(root, "stage1").vision.model_dump(), "qformer": sizes}
    llm = {"path": str(root / changes.pop("llm", "opt"))}
    return build_vision_language(config(root, stage, llm=llm, **bridge, **changes))[0].train()


def step(model: nn.Module) -> tuple[Tensor, dict[str, Tensor], int]:
    """Loss, gradients, and bytes that were kept for the backward pass."""
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    torch.manual_seed(1)
    pixels = torch.randint(0, 256, (3, 3, 28, 28), dtype=torch.uint8)
    batch = Batch(Tiles.from_pixels(pixels), ["a red cat", "two dogs on a mat", "a dog"])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(batch)["loss"]
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, kept


@pytest.mark.parametrize("kind", list(KINDS))
def test_losses_and_gradients_stay(root: Path, kind: str) -> None:
    plain, twice = build(root, kind), build(root, kind)
    names = list(twice.state_dict())
    recompute_layers(twice)
    assert list(twice.state_dict()) == names
    (loss, gradients, kept), (again, same, fewer) = step(plain), step(twice)
    assert torch.equal(loss, again)
    assert gradients.keys() == same.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(same[name], gradient, atol=1e-6, rtol=1e-5)
    assert fewer < 0.7 * kept


def test_a_frozen_encoder_is_left_alone(root: Path) -> None:
    model = build(root, "stage one")
    recompute_layers(model)
    layers = [m for name, m in model.named_modules() if name.startswith("frontend") and isinstance(m, nn.ModuleList)]
    assert layers
    assert not any("forward" in vars(layer) for blocks in layers for layer in blocks)
    assert all("forward" in vars(layer) for layer in model.qformer.layers)
