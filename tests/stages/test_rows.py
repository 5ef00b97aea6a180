"""Training, evaluation and stored tokens of samples that show one picture, two, or a clip, on the mini presets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

import qformer
from qformer.checkpoints import folder as checkpoint
from qformer.data import sources
from qformer.model.vision_language import VisionLanguageModel
from qformer.stages import loop
from qformer.types import Batch, UsageError
from tests.clips import write_clip
from tests.commands import command
from tests.data.making import jsonl
from tests.stages.test_systems import Killed, losses, mini

COLORS = ["red", "green", "blue", "black"]
QUESTION = "which of the two is {}?"


def rows(folder: Path) -> Path:
    """Scenes of one color each, pairs of them, and two clips; every record asks."""
    folder.mkdir(exist_ok=True)
    for number, color in enumerate(COLORS):
        scene = Image.new("RGB", (120 + 40 * number, 100), "white")
        ImageDraw.Draw(scene).rectangle((20, 20, 90, 80), fill=color)
        scene.save(folder / f"{color}.png")
    write_clip(folder / "short.mp4", frames=8)
    write_clip(folder / "long.mp4", frames=24)
    records: list[dict[str, Any]] = []
    for number, color in enumerate(COLORS):
        other = COLORS[number - 1]
        records.append({"image": f"{color}.png", "question": "which color is it?", "answer": color})
        records.append({"image": [f"{color}.png", f"{other}.png"], "question": QUESTION.format(color), "answer": "1"})
        records.append({"image": [f"{other}.png", f"{color}.png"], "question": QUESTION.format(color), "answer": "2"})
    records += [{"video": f"{kind}.mp4", "question": "how long is it?", "answer": kind} for kind in ("short", "long")]
    for number, record in enumerate(records):
        record["question_id"] = number
    jsonl(folder / "rows.jsonl", records)
    return folder / "rows.jsonl"


def asked(model: VisionLanguageModel, shown: list[Any], questions: list[str], answers: list[str]) -> float:
    """Sum of the losses of the words of these answers."""
    batch = Batch(model.frontend.tiles(shown), answers, question=questions, answer=answers, targets=torch.tensor(1.0))
    with torch.no_grad():
        return float(model(batch)["loss"])


@pytest.mark.parametrize("name", ["anyres", "qwen2vl"])
def test_a_preset_learns_from_rows_of_every_kind(tmp_path: Path, name: str) -> None:
    path = rows(tmp_path / "data")
    data = f"data.train={{name: jsonl, path: {path}}}"
    run = mini(name, tmp_path / "run", 16, data, "data.batch=7")
    found = losses(run)
    assert sum(found[-3:]) < 0.8 * sum(found[:3])
    assert not (run / "skipped.jsonl").exists()
    model = qformer.load(run, device="cpu")
    assert isinstance(model, VisionLanguageModel)
    model.eval()
    samples = [sources.build("jsonl", path=str(path))[number] for number in (0, 1, 2, 12, 13)]
    questions, answers = [one.question or "" for one in samples], [one.answers[0] for one in samples]
    shown = [one.image for one in samples]
    together = asked(model, shown, questions, answers)
    alone = [asked(model, [shown[n]], [questions[n]], [answers[n]]) for n in range(len(samples))]
    assert together == pytest.approx(sum(alone), rel=1e-4)
    # The second picture counts, and so do which is the first and the end of a clip.
    first, second, third = (path.parent / f"{color}.png" for color in ("red", "black", "green"))
    question = [QUESTION.format("red")]
    pairs = [[first, second], [second, first], [first, third], [first]]
    told = [asked(model, [pair], question, ["1"]) for pair in pairs]
    assert all(abs(one - told[0]) > 1e-3 for one in told[1:])
    assert abs(asked(model, [shown[3]], question, ["1"]) - asked(model, [shown[4]], question, ["1"])) > 1e-3


def test_a_killed_run_on_rows_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = rows(tmp_path / "data")
    given = [f"data.train={{name: jsonl, path: {path}}}", "data.batch=4", "train.save_every=1", "data.crop=[0.5, 1]"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    mini("qwen2vl", whole, 3, *given)
    real, calls = loop._train_step, iter(range(99))

    def dies(*arguments: Any, **options: Any) -> Any:
        if next(calls) == 2:
            raise Killed
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_train_step", dies)
        with pytest.raises(Killed):
            mini("qwen2vl", cut, 3, *given)
    mini("qwen2vl", cut, 3, *given, "data.workers=1")
    mine, theirs = (checkpoint.read(run / "checkpoints" / "step-0000003").tensors for run in (cut, whole))
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    assert losses(cut) == losses(whole)


def test_both_stages_of_blip2_and_the_evaluation_take_rows(tmp_path: Path) -> None:
    path = rows(tmp_path / "data")
    source = f"{{name: jsonl, path: {path}}}"
    held = [f"data.train={source}", f"data.validation={source}", "train.validate_every=2", "data.batch=7"]
    first = mini("blip2", tmp_path / "first", 2, *held, "stage=stage1", "train.precision=fp32")
    second = mini("blip2", tmp_path / "second", 2, *held, f"init={first}")
    shown = [json.loads(line) for line in (second / "captions.jsonl").read_text().splitlines()]
    assert [one["truth"] for one in shown] == ["red", "1", "2", "green", "1"]
    results = tmp_path / "results.json"
    page, data = tmp_path / "page.html", f"path={path}"
    command("eval", str(second), "--bench", "vqa", "--data", data, "-o", str(results), "--html", str(page))
    told = json.loads(results.read_text())
    assert (told["asked"], told["scored"], told["skipped"]) == (14, 14, [])
    assert page.read_text().count("<img") >= 12


def test_stored_tokens_of_rows_train_as_pictures_do(tmp_path: Path) -> None:
    path = rows(tmp_path / "data")
    given = [f"data.train={{name: jsonl, path: {path}}}", "data.batch=7"]
    direct = losses(mini("anyres", tmp_path / "direct", 4, *given))
    given.append(f"data.features={tmp_path / 'store'}")
    assert losses(mini("anyres", tmp_path / "stored", 4, *given)) == pytest.approx(direct, rel=2e-3)
    write_clip(path.parent / "long.mp4", frames=20)
    with pytest.raises(UsageError, match=r"long\.mp4' has changed since its tokens were stored"):
        mini("anyres", tmp_path / "again", 4, *given)
