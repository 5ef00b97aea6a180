"""Both stages on slices of unequal size, direct and from a store, within limits; what comes out captions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import qformer
from qformer import stages
from qformer.config import load_config
from qformer.model.vision_language import VisionLanguageModel
from qformer.types import UsageError
from tests.workspace import config, make_workspace

SLICES = {"name": "uhd", "size": 28, "patch": 14, "max_slices": 3}
WHOLE = {"crop": (1.0, 1.0), "flip": 0.0}


def losses(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if key in ("loss", "itc", "itm", "itg", "lm")} for line in lines]


@pytest.mark.slow
def test_both_stages_learn_from_slices(tmp_path: Path) -> None:
    space = make_workspace(tmp_path)
    common: dict[str, Any] = {"resolution": SLICES, "limits": {"tiles": 4}}
    first, stored = tmp_path / "runs" / "stage1", tmp_path / "runs" / "stored"
    stages.train(config(space, "stage1", data=WHOLE, **common))
    stages.train(config(space, "stage1", data=WHOLE | {"features": str(tmp_path / "f")}, run=str(stored), **common))
    for mine, theirs in zip(losses(stored), losses(first), strict=True):
        assert mine == pytest.approx(theirs, rel=2e-3)
    about = json.loads((tmp_path / "f" / "store.json").read_text())["made"]["resolution"]
    assert (about["name"], about["max_slices"]) == ("uhd", 3)
    assert "tiles" not in about  # tokens do not depend on limits
    run = stages.train(config(space, "stage2", **common))
    model = qformer.load(run, device="cpu")
    assert isinstance(model, VisionLanguageModel)
    assert load_config(run / "config.yaml").limits.tiles == 4
    images = [torch.zeros(3, *size, dtype=torch.uint8) for size in [(40, 60), (20, 20)]]
    tiles = model.frontend.tiles(images)
    assert tiles.counts == [3, 1]
    together = model.generate(tiles, max_new_tokens=4)
    assert together == [model.generate(model.frontend.tiles([image]), max_new_tokens=4)[0] for image in images]
    tight = config(space, "stage2", resolution=SLICES, limits={"tiles": 2}, run=str(tmp_path / "tight"))
    with pytest.raises(UsageError, match=r"limits.tiles is 2"):
        stages.train(tight)
