"""Rows with more visual tokens than the language model has positions for are skipped, and never end a run."""

from __future__ import annotations

import json
import pickle
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest

from qformer import resolution, stages
from qformer.config import dump_config
from qformer.model.assembly import build_vision_language
from qformer.progress import console
from qformer.schema import Config
from qformer.types import UsageError
from tests.commands import outcome
from tests.data.making import jsonl
from tests.stages.test_systems import losses
from tests.workspace import config, make_workspace

LONG = "a man is holding a small umbrella in the rain " * 4  # cut at llm.max_tokens


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace whose tiny OPT has 128 positions: 96 in front of 32 tokens, for 32 pictures of 3 tokens."""
    root = make_workspace(tmp_path_factory.mktemp("space"))
    rows(root, "some", [1, 32, 33, 1, 40])
    rows(root, "none", [33, 50])
    return root


def rows(root: Path, name: str, counts: list[int]) -> None:
    """Write rows of so many pictures each."""
    records = [
        {"image": [f"images/{(number + place) % 12}.png" for place in range(count)], "caption": LONG}
        for number, count in enumerate(counts)
    ]
    jsonl(root / f"{name}.jsonl", records)


def of(root: Path, name: str = "some", **changes: Any) -> Config:
    """Stage two from nothing on the rows of a file, two steps of four rows."""
    source = {"name": "jsonl", "path": str(root / f"{name}.jsonl")}
    given: dict[str, Any] = {
        "init": None,
        "vision": {"name": "hf", "path": str(root / "vit")},
        "qformer": {
            "queries": 3,
            "encoder_width": 12,
            "hidden_size": 16,
            "layers": 2,
            "heads": 2,
            "intermediate_size": 24,
        },
    }
    data = {"train": source, "validation": None} | changes.pop("data", {})
    return config(root, "stage2", **given, data=data, train={"steps": 2}, **changes)


def skipped(run: Path) -> set[tuple[str, str]]:
    records = map(json.loads, (run / "skipped.jsonl").read_text().splitlines())
    return {(record["index"], record["kind"]) for record in records}


def test_rows_that_do_not_fit_are_skipped_and_recorded(root: Path, tmp_path: Path) -> None:
    """The largest that fits is read, whatever the length of its text; workers and stored tokens change nothing."""
    exact: dict[str, Any] = {"crop": [1, 1], "flip": 0}
    stages.train(of(root, run=str(tmp_path / "run"), data=exact))
    assert skipped(tmp_path / "run") == {("2", "refused"), ("4", "refused")}
    records = map(json.loads, (tmp_path / "run" / "skipped.jsonl").read_text().splitlines())
    told = {record["index"]: record["detail"] for record in records}
    assert told["2"].startswith(
        "a row of 33 pictures makes 99 visual tokens, but before a text of 32 this opt model has 96 positions for them;"
    )
    exact |= {"features": {"path": str(tmp_path / "store")}, "workers": 1}
    stages.train(of(root, run=str(tmp_path / "stored"), data=exact))
    assert losses(tmp_path / "stored") == pytest.approx(losses(tmp_path / "run"), rel=2e-3)
    both = [(tmp_path / name / "skipped.jsonl").read_text() for name in ("run", "stored")]
    assert both[0] == both[1]


def test_limits_of_the_user_hold_as_well(root: Path, tmp_path: Path) -> None:
    stages.train(of(root, run=str(tmp_path / "run"), limits={"tiles": 31}))
    assert skipped(tmp_path / "run") == {("1", "refused"), ("2", "refused"), ("4", "refused")}
    details = (tmp_path / "run" / "skipped.jsonl").read_text()
    assert "a row of 32 pictures makes 32 tiles, but limits.tiles is 31" in details


def test_a_run_whose_every_row_is_refused_ends_with_one_sentence(root: Path, tmp_path: Path) -> None:
    written = tmp_path / "run.yaml"
    written.write_text(dump_config(of(root, "none", run=str(tmp_path / "run"))))
    code, _, err = outcome("train", str(written))
    assert code == 2
    assert "visual tokens, but before a text of 32 this opt model has 96 positions" in err
    assert len(err.strip().splitlines()) == 1
    source = {"name": "jsonl", "path": str(root / "none.jsonl")}
    with pytest.raises(UsageError, match="none of the 2 validation samples fits the language model: a row of 33"):
        stages.train(of(root, run=str(tmp_path / "held"), data={"validation": source}))


@pytest.mark.parametrize("stored", [False, True])
def test_held_out_rows_leave_room_for_prompt_and_caption(root: Path, tmp_path: Path, stored: bool) -> None:
    """A caption of 30 tokens behind a prompt needs more room than a text of training: 32 pictures leave too little."""
    data: dict[str, Any] = {"validation": {"name": "jsonl", "path": str(root / "some.jsonl")}}
    if stored:
        data["features"] = {"path": str(tmp_path / "store")}
    llm = {"prompt": "a photo of a cat on the beach"}
    with console.capture() as heard:
        stages.train(of(root, run=str(tmp_path / "run"), data=data, llm=llm))
    assert "3 of 5 validation samples are left out" in " ".join(heard.get().split())
    shown = [json.loads(line) for line in (tmp_path / "run" / "captions.jsonl").read_text().splitlines()]
    assert len(shown) == 2
    assert all(line["caption"] for line in shown)


def test_data_workers_that_are_started_anew_count_as_the_model_does(root: Path) -> None:
    """No weights are among what they are sent."""
    model, _ = build_vision_language(of(root))
    row = resolution.build("uhd", queries=4).plan_many([(640, 480), (300, 300)])
    sent = ForkingPickler.dumps(model.room(32))
    room = pickle.loads(sent)
    assert room.count(row) == model.count_tokens(row) == 3 * 6 + row.markers
    assert room.most == 96
    assert len(sent) < 200_000
    assert all(weight.is_meta for weight in room.connector.parameters())
    assert not any(weight.is_meta for weight in model.connector.parameters())
