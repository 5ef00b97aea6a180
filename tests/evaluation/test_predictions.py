"""Predictions on disk: what a kill leaves, what belongs to another run, what several processes wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qformer.evaluation.predictions import Predictions
from qformer.types import UsageError

MADE_BY = {"weights": "ab", "prompt": None}


def said(id_: str, text: str = "yes") -> dict[str, str]:
    return {"id": id_, "said": text}


def test_what_was_said_is_there_again(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    with Predictions(file, MADE_BY) as store:
        store.add([said("1"), said("2")])
        assert Predictions(file, MADE_BY).known.keys() == {"1", "2"}  # before anything is closed


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_half_line_is_dropped_and_the_next_is_whole(tmp_path: Path, cut: int) -> None:
    file = tmp_path / "p.jsonl"
    with Predictions(file, MADE_BY) as store:
        store.add([said("1"), said("2")])
    file.write_bytes(file.read_bytes()[:-cut])
    store = Predictions(file, MADE_BY)
    assert store.known.keys() <= {"1", "2"}
    assert "1" in store.known
    with store:
        store.add([said("2"), said("3")])
    assert Predictions(file, MADE_BY).known == {key: said(key) for key in "123"}


def test_what_nobody_can_have_said_is_asked_again(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    odd = [{"said": 3}, {"said": "\ud800"}, {"losses": []}, {"losses": ["x"]}, {"of": "ab"}]
    records = [{"made_by": MADE_BY}, said("1"), *({"id": str(n), **one} for n, one in enumerate(odd, start=2))]
    file.write_text("".join(json.dumps(record) + "\n" for record in records) + "[" * 100_000 + "\n")
    assert Predictions(file, MADE_BY).known == {"1": said("1")}


def test_a_kill_before_the_head_was_written(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"made_b')
    with Predictions(file, MADE_BY) as store:
        store.add([said("1")])
    assert Predictions(file, MADE_BY).known.keys() == {"1"}


def test_another_run_is_refused_by_what_differs(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    with Predictions(file, MADE_BY) as store:
        store.add([said("1")])
    with pytest.raises(UsageError, match="weights was 'ab', is 'cd'"):
        Predictions(file, MADE_BY | {"weights": "cd"})
    file.write_text(json.dumps(said("1")) + "\n")
    with pytest.raises(UsageError, match="not a file of predictions"):
        Predictions(file, MADE_BY)


def test_parts_of_several_processes_become_one_file(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    stores = [Predictions(file, MADE_BY, rank) for rank in range(3)]
    for rank, store in enumerate(stores):
        with store:
            store.add([said(str(rank))])
    alone = Predictions(file, MADE_BY)
    assert alone.known.keys() == {"0", "1", "2"}
    alone.finish(["2", "0"])  # number 1 was asked for in another run, with a larger --limit
    assert [json.loads(line).get("id") for line in file.read_text().splitlines()] == [None, "2", "0", "1"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.jsonl"]


def test_without_a_file_they_are_kept_in_memory() -> None:
    with Predictions(None, MADE_BY) as store:
        store.add([said("1")])
        store.finish(["1"])
    assert store.known == {"1": said("1")}
