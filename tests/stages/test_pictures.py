"""The curves draw what a model that knows nothing costs, and published losses where they can be compared."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from matplotlib import pyplot as plt

from qformer.config import load_config
from qformer.figures import curves as pictures
from qformer.figures import published
from qformer.schema import Config


def paper(name: str, *overrides: str) -> Config:
    return load_config(Path("configs") / f"{name}.yaml", [*overrides])


def test_chance() -> None:
    settings = paper("stage1_vitg", "data.batch=1024")
    assert pictures.chance("itc", settings) == pytest.approx(6.93, abs=0.01)
    assert pictures.chance("itm", settings) == pytest.approx(0.6365, abs=1e-4)
    assert pictures.chance("itg", settings) == pytest.approx(10.33, abs=0.01)
    assert pictures.chance("loss", settings) == pytest.approx(published.STAGE1_STEPS[0], abs=0.15)
    assert pictures.chance("lm", paper("stage2_opt2.7b")) is None


def test_published_losses_stand_where_as_many_pairs_were_seen() -> None:
    points = published.losses(paper("stage1_vitg", "data.batch=1024"))["loss"]
    assert points[:5] == [(0, 17.76), (100, 15.09), (500, 9.73), (1000, 8.35), (4_600_000 / 1024 / 2, 7.93)]
    halves = dict(published.losses(paper("stage1_vitg", "data.batch=1024", "train.accumulate=2")))["loss"]
    assert halves[1] == (50, 15.09)
    second = published.losses(paper("stage2_opt2.7b"))["lm"]
    assert second[0] == (4_600_000 / 120 / 2, 2.84)
    assert second[-1] == (1.5 * 4_600_000 / 120, 2.48)  # the run ends before the third epoch does
    assert len(published.losses(paper("stage2_opt2.7b", "train.steps=1000000"))["lm"]) == 10


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("stage1_vitg", []),  # another batch: ITC has another scale
        ("stage1_vitl", ["data.batch=1024"]),
        ("stage1_vitg", ["data.batch=1024", "qformer.layers=6"]),
        ("stage1_vitg", ["data.batch=1024", "vision.depth=20"]),
        ("stage2_opt6.7b", []),
        ("stage2_opt2.7b", ["llm.prompt=a photo of"]),
        ("stage1_small", []),
    ],
)
def test_other_runs_are_not_compared(name: str, overrides: list[str]) -> None:
    assert published.losses(paper(name, *overrides)) == {}


def drawn(folder: Path, settings: Config, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The axes of `curves.png` of a made-up run."""
    terms = {"itc": 6.0, "itm": 0.6, "itg": 9.0} if settings.stage == "stage1" else {"lm": 4.0}
    records = [
        {"kind": kind, "step": step, **{name: value / (1 + step / 5000) for name, value in terms.items()}}
        for step in range(0, 30_001, 1000)
        for kind in ("train", "validation")
    ]
    for record in records:
        record["loss"] = sum(float(str(record[name])) for name in terms)
        if record["kind"] == "validation" and settings.stage == "stage1":
            record["itc_i2t_r10"] = 0.1
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    axes: list[Any] = []
    monkeypatch.setattr(pictures.plt, "close", lambda figure: axes.extend(figure.axes))
    pictures.curves(folder, settings)
    assert (folder / "curves.png").stat().st_size > 1000
    monkeypatch.undo()
    plt.close("all")
    return axes


def lines(axis: Any) -> dict[str, list[float]]:
    return {line.get_label(): list(line.get_ydata()) for line in axis.get_lines()}


def test_a_panel_for_each_loss_and_one_for_retrieval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    axes = drawn(tmp_path, paper("stage1_vitg"), monkeypatch)
    assert [axis.get_title()[:3] for axis in axes] == ["ITC", "ITM", "ITG", "hel"]
    assert f"chance {math.log(105):.2f}" in lines(axes[0])
    assert "chance 0.64" in lines(axes[1])
    assert not any("published" in label for axis in axes for label in lines(axis))


def test_published_losses_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    axes = drawn(tmp_path, paper("stage1_vitg", "data.batch=1024"), monkeypatch)
    assert [axis.get_title()[:3] for axis in axes] == ["ITC", "ITM", "ITG", "sum", "hel"]
    assert lines(axes[3])["published, 4.6 M pairs"][:2] == [17.76, 15.09]
    assert lines(drawn(tmp_path, paper("stage2_opt2.7b"), monkeypatch)[0])["published, 4.6 M pairs"] == [2.84, 2.48]
