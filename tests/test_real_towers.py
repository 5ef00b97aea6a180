"""`real:NAME` wherever a configuration names a tower: folders in a cache, digests in checkpoints, or one sentence."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from qformer.checkpoints import folder as checkpoint
from qformer.config import load_config
from qformer.files import real_towers
from qformer.files.digests import digest
from qformer.files.real_towers import CARD, REAL_TOWERS
from qformer.stages.plan.outline import outline_encoder, read_sizes
from qformer.types import UsageError
from tests.commands import command, outcome
from tests.workspace import make_workspace

NAMES = {"vit": "dinov2-small-focus", "bert": "minilm-l6", "opt": "smollm2-135m-q4"}
REAL = {kind: f"real:{name}" for kind, name in NAMES.items()}


def write_configs(root: Path) -> None:
    """`stage1.yaml` and `stage2.yaml` on the three real towers; stage two starts from BERT's sizes as it must."""
    data = {"batch": 4, "train": {"name": "jsonl", "path": f"{root}/captions.jsonl"}, "workers": 0}
    common = {
        "vision": {"name": "hf", "path": REAL["vit"]},
        "resolution": {"name": "fixed", "size": 28},
        "data": data,
        "train": {"steps": 2, "warmup": 1, "precision": "fp32"},
    }
    bridge = {"qformer": {"queries": 4}, "text": {"bert": REAL["bert"]}, "loss": {"embed_width": 8}}
    first = {"stage": "stage1", "run": f"{root}/stage1", **common, **bridge}
    second = {"stage": "stage2", "run": f"{root}/stage2", **common, "llm": {"path": REAL["opt"]}}
    for name, values in (("stage1", first), ("stage2", second)):
        (root / f"{name}.yaml").write_text(yaml.safe_dump(values))


@pytest.fixture
def space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tiny towers in an empty folder, and a cache that has none."""
    monkeypatch.setenv("QFORMER_CACHE", str(tmp_path / "cache"))
    make_workspace(tmp_path)
    write_configs(tmp_path)
    return tmp_path


def keep(root: Path) -> None:
    """Put the tiny towers into the cache, where fetched ones are kept."""
    for kind, name in NAMES.items():
        place = real_towers.folder(name)
        shutil.copytree(root / kind, place)
        files = {file.name: file.stat().st_size for file in place.iterdir()}
        (place / CARD).write_text(json.dumps({"files": files}))


def test_what_is_not_fetched_is_told_and_planned(space: Path) -> None:
    """Sizes are known without weights; whatever needs them says in one sentence how to get them."""
    shown = yaml.safe_load(command("config", space / "stage1.yaml"))
    assert (shown["qformer"]["encoder_width"], shown["qformer"]["layers"]) == (384, 6)
    assert "llama with embeddings of width 576" in command("config", space / "stage2.yaml")
    with torch.device("meta"):  # as `qformer plan`, which also runs it, for half a minute
        encoder = outline_encoder(load_config(space / "stage1.yaml"))
    assert sum(parameter.numel() for parameter in encoder.parameters()) == pytest.approx(22.06e6, rel=0.001)
    assert read_sizes(REAL["opt"], "llm.path").num_key_value_heads == 3
    for words in (("train", space / "stage1.yaml"), ("features", space / "stage1.yaml", f"data.features={space}/f")):
        code, _, error = outcome(*words)
        assert code == 2
        assert error.endswith("is not on this machine yet; run: qformer towers fetch real\n")
        assert error.count("\n") == 1
    with pytest.raises(UsageError, match=r"unknown tower 'real:minilm-l7': did you mean 'minilm-l6'\?"):
        real_towers.fetched("minilm-l7")


def test_the_names_work_in_every_command(space: Path) -> None:
    keep(space)
    data = f"data.features={space}/features"
    command("features", space / "stage1.yaml", data)
    command("train", space / "stage1.yaml", data)
    command("train", space / "stage2.yaml", f"init={space}/stage1")
    saved = checkpoint.read(space / "stage2")
    assert saved.config.vision.options["path"] == REAL["vit"]
    assert saved.config.llm is not None
    assert saved.config.llm.path == REAL["opt"]
    command("convert", space / "stage2", "-o", space / "again")
    for folder in (space / "stage2", space / "again"):
        meta = checkpoint.read_meta(checkpoint.find(folder))
        assert meta["towers"] == {REAL[kind]: REAL_TOWERS[name].digest for kind, name in NAMES.items()}
    command("index", space / "stage1", space / "images", "-o", space / "gallery")
    assert command("search", space / "stage1", space / "gallery", "a dog", "--json")
    assert command("caption", space / "again", space / "images" / "0.png")
    command("push", space / "stage1", "somebody/bridge", "--dry-run", "-o", space / "pushed")
    assert (space / "pushed" / "README.md").read_text().count(REAL["bert"]) > 1
    assert not list((space / "pushed").glob("vision*"))  # a name, and no weights of others


def test_a_checkpoint_refuses_towers_with_other_weights(space: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(space)
    command("train", space / "stage1.yaml")
    name, other = NAMES["bert"], "0" * 32
    monkeypatch.setitem(REAL_TOWERS, name, dataclasses.replace(REAL_TOWERS[name], digest=other))
    shutil.copytree(space / "bert", real_towers.folder(name))
    with pytest.raises(UsageError, match=rf"was trained on 'real:{name}' with other weights \(digest be2bae"):
        checkpoint.read(space / "stage1")
    assert checkpoint.read(space / "stage1", verify=False)


def test_digests_of_names() -> None:
    assert digest("mini:bert") != digest("mini:vit")
    assert digest("mini:bert") == digest("mini:bert")
    assert [digest(name) for name in ("mini:vat", "real:vat", "bert-base-uncased", "mini")] == [None] * 4


def test_the_cache_is_where_its_variable_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/where")
    monkeypatch.delenv("QFORMER_CACHE", raising=False)
    assert real_towers.cache() == Path("/some/where/qformer")
    monkeypatch.setenv("QFORMER_CACHE", "~/elsewhere")
    assert real_towers.cache() == Path.home() / "elsewhere"
