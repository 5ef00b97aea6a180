"""`qformer backbones`: all towers in a few steps, read back by everything that reads a tower."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest
import torch
from transformers import AutoProcessor, CLIPModel

from qformer import vision
from qformer.config import by_prefix
from qformer.files import pretrained
from qformer.llm.loading import load_language_model
from qformer.model.bert import read_bert
from qformer.stages.towers import ship as towers
from qformer.types import UsageError
from tests.commands import command

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LANGUAGE = ["data.validation.count=6", "data.train.count=60", "backbone.layers=1"]
FEW = ["train.steps=2", "train.warmup=1", "train.precision=fp32", "data.batch=4", "backbone.width=32"]
SMALL = {
    "bert": ["data.train.count=40", "data.validation.count=4"],
    **{
        eyes: ["data.validation_size=30", "backbone.heads=2", "backbone.layers=1"]
        for eyes in ("vit", "vit_tiles", "vit_native", "vit_rope", "ssl", "clip")
    },
    "opt": LANGUAGE,
    "t5": [*LANGUAGE, "backbone.decoder_layers=1"],
    "opt_canvases": LANGUAGE,
    "t5_canvases": [*LANGUAGE, "backbone.decoder_layers=1"],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("towers")
    overrides = [f"{kind}.{change}" for kind, own in SMALL.items() for change in (*FEW, *own)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qformer.stages.towers.views.FITTED", 60)
        patch.setattr("qformer.stages.towers.views.TEXTS", 60)
        assert command("backbones", "-o", folder, *overrides).endswith(f"{folder / 'towers'}\n")
        yield folder / "towers"


@pytest.mark.canary
def test_every_tower_is_read_by_what_reads_towers(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "TOWERS", made)
    for name in ("vit", "ssl", "clip"):
        assert vision.build("hf", path=f"mini:{name}")(torch.rand(1, 3, 120, 120)).shape == (1, 37, 32)
    assert vision.build("hf", path="mini:vit_native")(torch.rand(1, 3, 240, 160)).shape == (1, 97, 32)
    sizes = {"patch_size": 20, "image_size": 120, "width": 32, "heads": 2, "depth": 1, "mlp_hidden": 128}
    encoder = vision.build("qwen2vl", weights="mini:vit_rope", **sizes)
    assert encoder(torch.rand(1, 3, 240, 160)).shape == (1, 96, 32)
    clip = pretrained.read(CLIPModel, "mini:clip")
    inputs = pretrained.read(AutoProcessor, "mini:clip")(
        text=["a red star", "a hollow blue circle"], images=torch.rand(3, 150, 150), return_tensors="pt", padding=True
    )
    assert clip(**inputs).logits_per_image.shape == (1, 2)
    bert, state = read_bert("mini:bert")
    assert bert.hidden_size == 32
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    for kind, family in (("opt", "causal"), ("t5", "seq2seq"), ("opt_canvases", "causal"), ("t5_canvases", "seq2seq")):
        model = load_language_model(f"mini:{kind}")
        assert model.family == family
        assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_weights_are_stored_in_half_precision(made: Path) -> None:
    assert {folder.name for folder in made.iterdir() if folder.is_dir()} == set(towers.KINDS) - set(towers.KEPT)
    for kind in set(towers.KINDS) - set(towers.KEPT):
        assert json.loads((made / kind / "config.json").read_text())["dtype"] == "float16"


def test_the_card_tells_how_each_was_made(made: Path) -> None:
    told = json.loads((made / "card.json").read_text())
    assert told["command"].startswith("qformer backbones ")
    assert set(told["towers"]) == set(towers.KINDS)
    assert 0 <= told["towers"]["vit_tiles"]["measured"]["probe_shape"] <= 1
    assert told["towers"]["opt"]["bytes"] == sum(f.stat().st_size for f in (made / "opt").iterdir())
    text = (made / "README.md").read_text()
    assert "| vit_native | probe_colour |" in text
    assert "| 2 x 4 | 0 | views |" in text
    assert told["towers"]["ssl"]["seconds"] >= 0
    assert "| 2 x 4 | 0 | canvas_stories |" in text
    kinds = [key for key in told["towers"]["opt_canvases"]["measured"] if key.startswith("right_")]
    assert kinds
    assert all(re.search(rf"\| opt_canvases \| {kind} \| [01]\.\d+ \| 0\.95 \|", text) for kind in (*kinds, "late"))


def test_the_same_command_does_not_train_again(made: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in made.parent.glob("*/checkpoints/*/*.safetensors")}
    overrides = [f"{kind}.{change}" for kind, own in SMALL.items() for change in (*FEW, *own)]
    assert towers.make(made.parent, overrides) == made
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert len(before) == len(towers.KINDS)


def test_towers_that_weigh_too_much(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(towers, "LIMIT", 1000)
    overrides = [f"{kind}.{change}" for kind, own in SMALL.items() for change in (*FEW, *own)]
    with pytest.raises(UsageError, match="more than 1,000"):
        towers.make(made.parent, overrides)


@pytest.mark.parametrize("wrong", ["train.steps=3", "gpt.train.steps=3", "opt"])
def test_an_override_of_no_tower(wrong: str) -> None:
    with pytest.raises(UsageError, match="names none of the configurations"):
        by_prefix([wrong], towers.KINDS)
