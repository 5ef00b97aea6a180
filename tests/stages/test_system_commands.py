"""Every command takes every mini preset, or refuses it in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.clips import write_clip
from tests.commands import outcome
from tests.stages.test_systems import FEW, SYSTEMS, mini, picture

OFTEN = ("llava_uhd", "qwen2vl")  # the others weekly
SHORT = ("--max-new-tokens", "3", "--beams", "1")
#: What is refused, and a part of the sentence; {run} is a checkpoint of stage two.
REFUSED = {
    "stage one of another connector": ("train", "{config}", "stage=stage1"),
    "retrieval with stage two": (
        "eval",
        "{run}",
        "--bench",
        "retrieval",
        "--data",
        "name=jsonl",
        "--data",
        "path={data}",
    ),
    "a gallery of stage two": ("index", "{run}", "{folder}", "-o", "{folder}/gallery"),
    "LAVIS' form": ("convert", "{run}", "-o", "{folder}/lavis.pth", "--to", "lavis"),
    "transformers' form": ("convert", "{run}", "-o", "{folder}/theirs", "--to", "transformers"),
    "an only picture that is none": ("caption", "{run}", "{data}"),
    "an unknown option": ("tiles", "{folder}/a.png", "--strategy", "uhd", "max_slice=3"),
    "a limit": ("train", "{config}", "run={folder}/tight", "limits.tokens=1"),
}


def make_files(folder: Path) -> dict[str, str]:
    folder.mkdir()
    for name, size in (("a", (400, 300)), ("b", (120, 360))):
        Image.fromarray(picture(*size, seed=1).permute(1, 2, 0).numpy()).save(folder / f"{name}.png")
    write_clip(folder / "c.mp4", 24)
    told = [
        {"image": str(folder / f"{name}.png"), "captions": ["noise"], "question": "what is it?", "answers": ["noise"]}
        for name in "ab"
    ]
    data = folder / "told.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in told))
    return {"folder": str(folder), "data": str(data)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in OFTEN else pytest.mark.weekly) for name in SYSTEMS]
)
def test_every_command_takes_a_preset_or_refuses_it(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    known = make_files(tmp_path / "files")
    known |= {"run": str(mini(name, tmp_path / "run", 2)), "config": f"configs/system_{name}.yaml"}
    a, b, clip = (f"{known['folder']}/{file}" for file in ("a.png", "b.png", "c.mp4"))
    run, vqa = known["run"], ("--bench", "vqa", "--data", "name=jsonl", "--data", f"path={known['data']}")
    works = [
        ("config", known["config"], "--data"),
        ("plan", known["config"], "--gpu", "cpu", "data.batch=1", "llm.max_tokens=4"),
        ("features", known["config"], f"data.features={tmp_path / 'store'}", f"data.train={FEW[0]}"),
        ("caption", run, a, b, clip, *SHORT),
        ("caption", run, a, b, "--together", *SHORT),
        ("ask", run, a, clip, "what is it?", "--together", *SHORT),
        ("ask", run, b, "--self-ask", *SHORT),
        ("eval", run, *vqa, "--beams", "1"),
        ("convert", run, "-o", str(tmp_path / "converted")),
        ("caption", str(tmp_path / "converted"), a, *SHORT),
        ("push", run, "me/it", "--dry-run", "-o", str(tmp_path / "pushed")),
    ]
    for words in works:
        code, _, err = outcome(*words)
        assert code == 0, (words, err)
    for what, words in REFUSED.items():
        if (name, what) == ("blip2", "stage one of another connector"):
            continue
        code, _, err = outcome(*(word.format(**known) for word in words))
        assert code == 2, (what, err)
        assert err.startswith("qformer: "), what
        assert err.count("\n") == 1, (what, err)
