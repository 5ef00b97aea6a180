"""Both stages on a mixture of two encoders, through the commands' own code: training, store, loading, planning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import ViTConfig, ViTModel

import qformer
from qformer import stages, vision
from qformer.checkpoints import folder as checkpoint
from qformer.config import load_config, parse_config
from qformer.fields import Choice
from qformer.model.assembly import build_image_text
from qformer.schema import Config
from qformer.stages.optim import layer_scales
from qformer.stages.plan.outline import outline
from qformer.stages.sizes import with_sizes
from qformer.trust import Untrusted
from qformer.types import UsageError
from tests.workspace import SIZE, config, make_workspace

STILL = {"crop": [1, 1], "flip": 0}


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a second, wider ViT."""
    root = make_workspace(tmp_path_factory.mktemp("space"))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
        vit = ViTModel(
            ViTConfig(image_size=SIZE, patch_size=7, initializer_range=0.3, **sizes), add_pooling_layer=False
        )
    vit.save_pretrained(root / "fine")
    return root


def mixed(root: Path) -> dict[str, Any]:
    """The section `vision` of a run on both encoders."""
    return {
        "name": "mof",
        "first": {"name": "hf", "path": str(root / "vit")},
        "second": {"name": "hf", "path": str(root / "fine")},
    }


def run_of(root: Path, name: str, stage: str, **changes: Any) -> Config:
    made = config(root, stage, run=str(root / "runs" / name), data=STILL, **changes)
    return parse_config(made.model_dump(exclude_unset=True) | {"vision": mixed(root)})


def last(run: str) -> dict[str, Any]:
    return json.loads((Path(run) / "metrics.jsonl").read_text().splitlines()[-1])


def test_stage_one_has_a_norm_for_each_encoder_and_moves_neither(space: Path) -> None:
    settings = run_of(space, "first", "stage1")
    found = checkpoint.find(stages.train(settings))
    tensors = load_file(found / checkpoint.WEIGHTS)
    assert tensors["frontend.norm.weight"].shape == tensors["frontend.norm_second.weight"].shape == (16,)
    assert not torch.equal(tensors["frontend.norm.bias"], tensors["frontend.norm_second.bias"])  # both learned
    assert not any(name.startswith("frontend.encoder") for name in tensors)
    model = qformer.load(found)
    assert model.frontend.encoder.first.frozen
    # Two tokens for each of the 2 x 2 patches of the first encoder.
    visual = model.frontend(model.frontend.tiles([space / "images" / "0.png"]))
    assert [tuple(row.shape) for row in visual.rows] == [(8, 16)]


def test_a_store_gives_the_same_losses(space: Path) -> None:
    plain, stored = (run_of(space, name, "stage1", qformer={"dropout": 0.0}) for name in ("pixels", "tokens"))
    data = stored.data.model_dump(exclude_unset=True) | {"features": str(space / "store")}
    stages.train(plain)
    stages.train(parse_config(stored.model_dump(exclude_unset=True) | {"data": data}))
    assert last(stored.run)["loss"] == pytest.approx(last(plain.run)["loss"], rel=2e-3)
    kept = json.loads((space / "store" / "store.json").read_text())["made"]["vision"]
    assert (kept["first"]["layer"], kept["mode"]) == (-1, "interleaved")
    assert "path" not in kept["second"]


@pytest.mark.parametrize("mode", ["interleaved", "additive"])
def test_stage_two_speaks_by_mlps(space: Path, mode: str) -> None:
    """An MLP for each encoder where tokens alternate, one where they are added; encoders of equal width here."""
    vision = mixed(space) | {"mode": mode}
    if mode == "additive":
        vision["second"] = {"name": "hf", "path": str(space / "vit"), "layer": 1}
    settings = run_of(space, mode, "stage2", init=None)
    values = settings.model_dump(exclude_unset=True, exclude={"init"})
    adapters = 2 if mode == "interleaved" else 1
    values |= {"vision": vision, "connector": {"name": "mlp", "adapters": adapters, "patch": 14}}
    settings = parse_config(values)
    found = checkpoint.find(stages.train(settings))
    names = {name.split(".")[1] for name in load_file(found / checkpoint.WEIGHTS) if name.startswith("connector.")}
    assert names == {"mlp", "second", "image_newline"} - ({"second"} if adapters == 1 else set())
    model = qformer.load(found)
    shown = model.frontend.tiles([space / "images" / "1.png"])
    prefix, mask = model.prefix(shown)
    assert prefix.shape[1] == mask.sum() == 4 * adapters
    assert len(model.generate(shown)) == 1


def test_the_wrong_number_of_adapters_is_told(space: Path) -> None:
    settings = run_of(space, "refused", "stage2", init=None)
    values = settings.model_dump(exclude_unset=True, exclude={"init"}) | {"connector": {"name": "mlp", "patch": 14}}
    with pytest.raises(UsageError, match="makes 2; use the connector 'mlp' with adapters 2"):
        stages.train(parse_config(values))


def test_sizes_come_from_both_folders(space: Path) -> None:
    settings, _ = with_sizes(run_of(space, "sizes", "stage1"))
    assert settings.qformer.encoder_width == 16


def test_paths_of_a_checkpoint_are_found_from_anywhere(space: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(space)
    local = {
        "name": "mof",
        "first": {"name": "hf", "path": "vit"},
        "second": {"name": "hf", "path": "fine"},
    }
    values = run_of(space, "local", "stage1").model_dump(exclude_unset=True) | {"vision": local}
    found = stages.train(parse_config(values))
    monkeypatch.chdir(space.parent)
    assert qformer.load(found).frontend.encoder.width == 16


def test_a_strangers_class_is_not_imported_as_a_part(space: Path) -> None:
    own = Choice(**(mixed(space) | {"second": {"name": "tests.tiny_stage1:Tower"}}))
    assert type(vision.options_of(own).parts[1]).__name__ == "Tower"
    with pytest.raises(Untrusted, match=r"tests\.tiny_stage1:Tower"):
        vision.options_of(own.read_from("the gallery 'g'"))


def test_layers_of_each_encoder_decay_by_themselves(space: Path) -> None:
    settings = run_of(space, "decay", "stage1", freeze_vision=False)
    model, _ = build_image_text(settings)
    scales = layer_scales(model, 0.5)
    of = {
        part: {s for name, s in scales.items() if name.startswith(f"frontend.encoder.{part}.")}
        for part in ("first", "second")
    }
    assert of == {"first": {0.5, 0.25, 0.125}, "second": {0.5, 0.25}}  # two layers and one, and what is outside them


@pytest.mark.parametrize(("words", "tokens"), [([], 1152), (["vision.mode=additive", "connector.adapters=1"], 576)])
def test_the_published_sizes_are_outlined(words: list[str], tokens: int) -> None:
    model, _ = outline(load_config("configs/mof_full.yaml", words), "cuda")
    encoder = model.frontend.encoder
    millions = [sum(weight.numel() for weight in part.parameters()) / 1e6 for part in encoder.children()]
    assert millions == pytest.approx([304 * 23 / 24, 304], rel=0.01)  # of CLIP one of 24 blocks is not read
    assert model.count_tokens(model.frontend.strategy.plan(640, 480)) == tokens
