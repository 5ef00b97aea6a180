"""Image encoders stored in half: frozen they stay as they are through both stages, trained they become fp32."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn

import qformer
from qformer import stages, vision
from qformer.checkpoints import folder as checkpoint
from qformer.schema import Config
from qformer.vision.options import ClipConfig, EvaConfig
from tests.workspace import config, make_workspace

SIZES = {"image_size": 28, "width": 12, "depth": 2, "heads": 2, "mlp_hidden": 24}
TOWERS = {"eva": EvaConfig(**SIZES), "clip": ClipConfig(**SIZES)}


@pytest.fixture(scope="module", params=TOWERS)
def space(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    """A workspace, and the section for an encoder whose file holds fp16 by the rule."""
    root = make_workspace(tmp_path_factory.mktemp(request.param))
    torch.manual_seed(3)
    encoder = TOWERS[request.param].build()
    torch.save(encoder.state_dict(), root / "tower.pth")
    return root, {"name": request.param, **asdict(TOWERS[request.param]), "weights": str(root / "tower.pth")}


def _stage(space: tuple[Path, dict[str, object]], stage: str, **changes: object) -> Config:
    root, tower = space
    plain = config(root, stage, train={"precision": "bf16"}, **changes)
    if stage == "stage1":
        plain = plain.model_copy(update={"vision": type(plain.vision)(**tower)})
    return plain


def _dtypes(encoder: nn.Module) -> dict[str, torch.dtype]:
    return {name: parameter.dtype for name, parameter in encoder.named_parameters()}


def test_frozen_in_half_through_both_stages(space: tuple[Path, dict[str, object]]) -> None:
    """Under autocast, as on a GPU, and without; what the file holds is what is there afterwards."""
    root, tower = space
    stages.train(_stage(space, "stage1"))
    stages.train(_stage(space, "stage2"))
    fresh = vision.build(**tower)
    linear = {f"{name}.weight" for name, module in fresh.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    for run in ("stage1", "stage2"):
        model = qformer.load(root / "runs" / run, device="cpu")
        kept = model.frontend.encoder
        assert _dtypes(kept) == _dtypes(fresh)
        assert {n for n, d in _dtypes(kept).items() if d == torch.float16 and n.endswith("weight")} == linear
        assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), fresh.parameters(), strict=True))
        tiles = model.frontend.tiles([root / "images" / "0.png"])
        with torch.autocast("cpu", torch.bfloat16):
            half = model.frontend(tiles).padded()[0]
        full = model.frontend(tiles).padded()[0]
        assert half.dtype == full.dtype == torch.float32
        assert torch.allclose(half, full, atol=0.1)
        assert not torch.equal(half, full)


def test_trained_becomes_single_and_is_saved(space: tuple[Path, dict[str, object]]) -> None:
    root, tower = space
    run = root / "tuned"
    stages.train(_stage(space, "stage1", run=str(run), freeze_vision=False))
    saved = checkpoint.read(run).tensors
    start = vision.build(**tower)
    names = {f"frontend.encoder.{name}" for name, _ in start.named_parameters()}
    assert names <= saved.keys()
    assert all(saved[name].dtype == torch.float32 for name in names)
    moved = {n for n, p in start.named_parameters() if not torch.equal(p.float(), saved[f"frontend.encoder.{n}"])}
    assert {name for name in moved if name.endswith(("weight", "cls_token", "class_embedding"))}
    step = saved["frontend.encoder." + next(n for n in moved if n.endswith("weight"))]
    assert not torch.equal(step, step.half().float())  # a step of 1e-3 of fp16 master weights would be rounded away
    model = qformer.load(run, device="cpu")
    assert set(_dtypes(model.frontend.encoder).values()) == {torch.float32}
    assert torch.equal(dict(model.named_parameters())[next(iter(names))], saved[next(iter(names))])
