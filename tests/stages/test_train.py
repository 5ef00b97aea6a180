"""Both stages on tiny towers: they train, repeat to the last bit, resume, and leave frozen weights alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import qformer
from qformer import stages
from qformer.checkpoints import folder as checkpoint
from qformer.model.assembly import build_image_text, build_vision_language
from qformer.model.image_text import ImageTextModel
from qformer.model.vision_language import VisionLanguageModel
from qformer.stages import inherit, loop
from qformer.types import UsageError
from tests.workspace import config, make_workspace


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which stage one has run."""
    root = make_workspace(tmp_path_factory.mktemp("space"))
    stages.train(config(root, "stage1"))
    return root


def _losses(run: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record.pop("images_per_second", None)
    return records


def _weights(run: Path) -> dict[str, torch.Tensor]:
    return checkpoint.read(run).tensors


def _assert_same(a: Path, b: Path) -> None:
    assert _losses(a) == _losses(b)
    mine, theirs = _weights(a), _weights(b)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_same_seed_gives_the_same_bits(trained: Path) -> None:
    """Dropout, crops, mirrors, captions and hard negatives are all drawn, and all repeat; workers do not matter."""
    stages.train(config(trained, "stage1", run=str(trained / "again"), data={"workers": 2}))
    _assert_same(trained / "runs" / "stage1", trained / "again")
    stages.train(config(trained, "stage1", run=str(trained / "other"), seed=1))
    assert _losses(trained / "runs" / "stage1") != _losses(trained / "other")


def test_resumed_equals_uninterrupted(trained: Path) -> None:
    whole, cut = trained / "runs" / "stage1", trained / "cut"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "step-0000004")
    (cut / "checkpoints" / "step-0000004.partial").mkdir()  # a save that was interrupted
    stages.train(config(trained, "stage1", run=str(cut)))
    _assert_same(whole, cut)


def test_finished_run_is_left_alone(trained: Path) -> None:
    before = _losses(trained / "runs" / "stage1")
    last = stages.train(config(trained, "stage1"))
    assert last.name == "step-0000004"
    assert _losses(trained / "runs" / "stage1") == before


def test_other_configuration_is_refused(trained: Path) -> None:
    with pytest.raises(UsageError, match=r"seed was 0, is 3"):
        stages.train(config(trained, "stage1", seed=3))


def test_run_folder_holds_what_it_promises(trained: Path) -> None:
    run = trained / "runs" / "stage1"
    assert (run / "curves.png").stat().st_size > 1000
    assert list((run / "tensorboard").rglob("events*"))
    kinds = [record["kind"] for record in _losses(run)]
    assert kinds.count("train") == 4
    assert kinds.count("validation") == 1
    measured = _losses(run)[-1]
    assert {"itc", "itm", "itg", "itc_i2t_r1", "reranked_t2i_r10"} <= measured.keys()
    meta = json.loads((checkpoint.find(run) / "meta.json").read_text())
    assert meta["step"] == 4
    assert meta["torch"] == torch.__version__


def test_checkpoint_holds_what_was_trained_only(trained: Path) -> None:
    tensors = _weights(trained / "runs" / "stage1")
    assert not any(name.startswith("frontend.encoder") for name in tensors)
    assert "frontend.norm.weight" in tensors
    start, _ = build_image_text(config(trained, "stage1"))
    initial = {name: parameter for name, parameter in start.named_parameters() if parameter.requires_grad}
    assert tensors.keys() == initial.keys()
    moved = [name for name in tensors if not torch.equal(tensors[name], initial[name])]
    assert "qformer.layers.1.text_ffn.inner.weight" in moved


@pytest.mark.parametrize("llm", ["opt", "flan-t5"])
def test_stage_two_trains_the_bridge_alone(trained: Path, llm: str) -> None:
    run = trained / f"stage2-{llm}"
    settings = config(trained, "stage2", run=str(run), llm={"path": str(trained / llm)})
    stages.train(settings)
    model = qformer.load(run, device="cpu")
    assert isinstance(model, VisionLanguageModel)
    fresh, _ = build_vision_language(inherit.inherit(settings, checkpoint.read(trained / "runs" / "stage1").config))
    for frozen in ("frontend.encoder.", "llm."):
        mine = {n: p for n, p in model.named_parameters() if n.startswith(frozen)}
        theirs = dict(fresh.named_parameters())
        assert mine
        assert all(torch.equal(p, theirs[n]) for n, p in mine.items())
    assert not torch.equal(model.connector.projection.weight, fresh.connector.projection.weight)
    record = json.loads((run / "captions.jsonl").read_text().splitlines()[-1])
    assert record["step"] == 4
    assert record["truth"]
    assert (run / "captions.png").stat().st_size > 1000
    tiles = model.frontend.tiles([trained / "images" / "0.png", trained / "images" / "1.png"])
    asked = model.answer(tiles, [["what is it?", "how many?"], ["what colour?"]], context="it rains", max_new_tokens=3)
    assert [len(group) for group in asked] == [2, 1]
    flat = model.answer(tiles, ["what is it?", "what colour?"], context="it rains", max_new_tokens=3)
    assert flat == [asked[0][0], asked[1][0]]


def test_stage_two_starts_from_stage_one(trained: Path) -> None:
    run = trained / "start"
    stages.train(config(trained, "stage2", run=str(run), train={"lr": 1e-12, "warmup_lr": 0, "min_lr": 0}))
    before, after = _weights(trained / "runs" / "stage1"), _weights(run)
    assert torch.allclose(after["connector.qformer.queries"], before["qformer.queries"], atol=1e-7)
    name = "layers.0.cross_attention.key.weight"
    assert torch.allclose(after[f"connector.qformer.{name}"], before[f"qformer.{name}"], atol=1e-7)
    assert not any("text_ffn" in key or "words" in key or "lm_head" in key for key in after)


def test_stage_two_refuses_another_bridge(trained: Path) -> None:
    with pytest.raises(UsageError, match="section 'qformer' differs"):
        stages.train(config(trained, "stage2", qformer={"queries": 5}, run=str(trained / "refused")))
    with pytest.raises(UsageError, match="starts from a stage1 run"):
        stages.train(config(trained, "stage2", run=str(trained / "refused"), init=str(_vision_run(trained))))


def _vision_run(root: Path) -> Path:
    backbone = {
        "kind": "vit",
        "width": 16,
        "layers": 1,
        "heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "max_tokens": 40,
    }
    run = root / "tower-run"
    settings = config(
        root, "vision", run=str(run), backbone=backbone | {"text": str(root / "bert"), "freeze_text": True}
    )
    stages.train(settings)
    return run


def test_vision_tower_becomes_an_encoder(trained: Path) -> None:
    run = _vision_run(trained)
    settings = config(trained, "stage1", vision={"path": str(run / "tower")}, run=str(trained / "on-tower"))
    model, resolved = build_image_text(settings)
    assert resolved.qformer.encoder_width == 16
    assert model.frontend.encoder.mean.flatten().tolist() == [0.5] * 3


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_language_tower_becomes_an_llm(trained: Path, kind: str) -> None:
    backbone = {"kind": kind, "width": 16, "layers": 1, "heads": 2, "vocab_size": 320 if kind == "opt" else 40}
    run = trained / f"tower-{kind}"
    stages.train(config(trained, "language", run=str(run), backbone=backbone))
    stages.train(config(trained, "stage2", run=str(trained / f"on-{kind}"), llm={"path": str(run / "tower")}))
    assert qformer.load(trained / f"on-{kind}", device="cpu").generate


def test_load_gives_the_same_numbers(trained: Path) -> None:
    """A checkpoint needs its path alone, and comes back in eval mode with the strategy it was trained with."""
    run = trained / "runs" / "stage1"
    model = qformer.load(run, device="cpu")
    assert isinstance(model, ImageTextModel)
    assert not model.training
    again = qformer.load(checkpoint.find(run), device="cpu")
    tiles = model.frontend.tiles([trained / "images" / "0.png"])
    assert tiles.plans[0].tiles[0].size == (28, 28)
    assert torch.equal(model.embed_images(tiles)[0], again.embed_images(tiles)[0])


def test_checkpoint_of_another_model_is_refused(trained: Path) -> None:
    broken = trained / "broken"
    shutil.copytree(checkpoint.find(trained / "runs" / "stage1"), broken)
    text = (broken / "config.yaml").read_text().replace("queries: 3", "queries: 4")
    (broken / "config.yaml").write_text(text)
    with pytest.raises(
        UsageError, match=r"does not fit this model: qformer.queries \[1, 3, 16\] instead of \[1, 4, 16\]"
    ):
        qformer.load(broken, device="cpu")


class _Exploding(nn.Module):
    """Returns a NaN in one term at its third step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.calls = 0

    def forward(self, batch: Any) -> dict[str, torch.Tensor]:
        self.calls += 1
        fine = self.weight.sum()
        itm = fine * (torch.nan if self.calls == 3 else 1.0)
        return {"loss": fine + itm, "itc": fine, "itm": itm}


def test_non_finite_loss_names_step_and_term(trained: Path) -> None:
    from qformer import resolution
    from qformer.data import sources
    from qformer.data.loader import Batches

    settings = config(trained, "stage1", run=str(trained / "nan"), train={"log_every": 4, "save_every": 2})
    source = sources.build(settings.data.train.name, **settings.data.train.options)
    batches = Batches(source, resolution.build("fixed", size=28), settings.data, 0)
    with pytest.raises(loop.NonFiniteLoss, match=r"'itm' is nan at step 3"):
        loop.fit(_Exploding(), batches, settings)
    assert checkpoint.find(trained / "nan").name == "step-0000002"


def test_validation_does_not_change_training(trained: Path) -> None:
    often = trained / "often"
    stages.train(config(trained, "stage1", run=str(often), train={"validate_every": 1}))
    plain = trained / "runs" / "stage1"
    train = [r for r in _losses(often) if r["kind"] == "train"]
    assert train == [r for r in _losses(plain) if r["kind"] == "train"]
    assert sum(r["kind"] == "validation" for r in _losses(often)) == 4


def test_chunks_train_like_the_whole_batch(trained: Path) -> None:
    """One chunk that is the batch even draws the same dropout and negatives; two resume like any other run."""
    settings: dict[str, Any] = {"run": str(trained / "one-chunk"), "train": {"chunk": 4}}
    stages.train(config(trained, "stage1", **settings))
    whole = _losses(trained / "runs" / "stage1")
    for mine, theirs in zip(_losses(trained / "one-chunk"), whole, strict=True):
        assert mine == pytest.approx(theirs, abs=2e-3)
    same: dict[str, Any] = {"qformer": {"dropout": 0.0}}
    stages.train(config(trained, "stage1", run=str(trained / "plain"), **same))
    first = _losses(trained / "plain")[0]
    for name, precision, close in (("chunks", "fp32", 1e-5), ("bf16", "bf16", 0.03)):
        run = str(trained / name)
        stages.train(config(trained, "stage1", run=run, train={"chunk": 3, "precision": precision}, **same))
        assert _losses(trained / name)[0]["itc"] == pytest.approx(first["itc"], abs=close)
    cut = trained / "chunks-cut"
    shutil.copytree(trained / "chunks", cut)
    shutil.rmtree(cut / "checkpoints" / "step-0000004")
    stages.train(config(trained, "stage1", run=str(cut), train={"chunk": 3}, **same))
    _assert_same(trained / "chunks", cut)


def test_accumulation_weighs_tokens_alike(trained: Path) -> None:
    """The loss of two batches is that of all their tokens, not the mean of two means."""
    from qformer.types import Batch

    model, _ = build_image_text(config(trained, "stage1", qformer={"dropout": 0.0}))
    model.train()
    tiles = model.frontend.tiles([trained / "images" / f"{i}.png" for i in range(4)])
    texts = ["a cat", "a", "a man is holding a small umbrella in the rain", "the old train stands at the station"]
    whole = model(Batch(tiles, texts))["itg"]
    halves = [Batch(tiles[:2], texts[:2]), Batch(tiles[2:], texts[2:])]
    means = [model(half)["itg"] for half in halves]
    assert abs(sum(means) / 2 - whole) > 1e-3
    run: Any = SimpleNamespace(inner=model, accelerator=SimpleNamespace(device="cpu"))
    loop._share_targets(run, halves)
    assert sum(model(half)["itg"] for half in halves).item() / 2 == pytest.approx(whole.item(), abs=1e-5)


def test_accumulation_averages_batches(trained: Path) -> None:
    """Two batches of two per step see the same samples as one of four."""
    run = trained / "accumulated"
    stages.train(config(trained, "stage1", run=str(run), data={"batch": 2}, train={"accumulate": 2, "steps": 2}))
    assert [r["step"] for r in _losses(run) if r["kind"] == "train"] == [1, 2]
