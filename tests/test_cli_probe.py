"""`qformer probe`: strategies alone, a checkpoint, a model of transformers and a server; what it writes and refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qformer.commands.probing import ANSWERS, PAGE, RESULT
from qformer.evaluation.geometry import geometry
from qformer.probing.comparison import compare
from qformer.probing.padding import FILL
from qformer.resolution import STRATEGIES
from tests.answering.local_models import make_llava, with_processor
from tests.answering.stand_in import HTML, StandIn
from tests.commands import command, outcome
from tests.evaluation.test_probes import by_tile, edge, objects
from tests.fixtures import reading
from tests.local_network import no_network
from tests.resolution.test_strategies import made
from tests.test_probing import without

__all__ = ["no_network"]
SMALL = ("--tile", 120, "--repeats", 1)


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    with StandIn(truthful) as server:
        yield server


def truthful(images: list[Image.Image], question: str) -> str:
    """What is there, as anybody would say it."""
    return f"There are {objects(images[0])}." if question.startswith("how many") else edge(images[0], question)


def test_strategies_alone(tmp_path: Path) -> None:
    found = json.loads(command("probe", "--all", "--json", "-o", tmp_path / "all"))
    assert list(found["geometry"]) == list(STRATEGIES)
    square = {name: records[1] for name, records in found["geometry"].items()}
    assert {one["image"][0] for one in square.values()} == {768}
    assert square["overlap512"]["coverage"] == [[1, 2, 1], [2, 4, 2], [1, 2, 1]]
    assert {name for name, one in square.items() if (one["least"], one["most"]) != (1, 1)} == {"overlap512"}
    assert {name for name, one in square.items() if one["cut"] == 0} >= {"fixed", "pad_square", "oryx", "qwen2vl"}
    page = (tmp_path / "all" / PAGE).read_text()
    assert page.count("is there to be exposed") == 2
    assert (tmp_path / "all" / "coverage.png").is_file()
    assert json.loads((tmp_path / "all" / RESULT).read_text()) == found
    lines = command("probe", "--strategy", "overlap512", "size=120", "--tile", 120).splitlines()
    assert "overlap512  180 x 180" in lines[2]
    assert "1 2 1 / 2 4 2 / 1 2 1" in lines[2]
    assert not (tmp_path / "all" / ANSWERS).exists()


def test_what_is_cut_and_padded() -> None:
    (two,) = geometry(made("internvl"), pictures=[(896, 448)])
    across = (896 - 448 // 6) / 47  # pixels from one object to the next
    cut = sum(step * across < 448 < step * across + 448 // 6 for step in range(48)) / 48
    assert two["cut"] == pytest.approx(cut, abs=1e-4)
    (strip,) = geometry(made("pad_square"), pictures=[(400, 100)])
    assert (strip["cut"], strip["padding"]) == (0, 0.75)
    (thin,) = geometry(made("oryx"), pictures=[(5000, 20)])
    assert thin["image"] == [5000, 20]
    assert "too thin" in thin["refused"]


def test_a_server_that_sees_well(stand_in: StandIn, tmp_path: Path) -> None:
    out = tmp_path / "probes"
    told = command("probe", "--server", stand_in.url, *SMALL, "-o", out)
    found = json.loads((out / RESULT).read_text())
    assert found["asked"] == {"server": f"{stand_in.url}/v1", "model": "tiny"}
    assert found["counting_position"]["mean"] == [[4.0] * 3] * 3
    assert found["counting_size"]["180"] == {"9": 1}
    assert set(found["padding"]["<1:1"].values()) == {0.0}
    assert "geometry" not in found
    assert "4.00  4.00  4.00" in told
    asked = len(stand_in.asked)
    assert found["answers"] == {"new": asked, "kept": 0}
    assert asked == 9 + 10 + 4 * 72
    assert found["padding_baseline"]["all"]["alone"]["share"] == 1
    assert found["padding_baseline"]["<1:1"]["fooled"] == {"count": 0, "asked": 36, "share": 0, "interval": [0, 0.0964]}
    for name in ("position", "sizes"):
        with Image.open(out / f"{name}.png") as picture:
            assert min(picture.size) > 300
    page = (out / PAGE).read_text()
    assert page.count("<img class=figure") == 2
    assert "narrower than high" in page
    assert page.count("0.0% (0.0 to 5.1)") == 5, "all rates of all rectangles but that without a ground"
    assert "by padding&#39;s gray only" in page
    again = json.loads(command("probe", "--server", stand_in.url, *SMALL, "-o", out, "--json"))
    assert again["answers"] == {"new": 0, "kept": asked}
    assert len(stand_in.asked) == asked


def test_a_server_that_counts_tile_by_tile(stand_in: StandIn, tmp_path: Path) -> None:
    stand_in.answer = lambda images, text: by_tile(images, [text])[0]
    words = ("--only", "counting-position", *SMALL, "--json", "-o", tmp_path)
    found = json.loads(command("probe", "--server", stand_in.url, "--model", "tiny", *words))
    assert found["counting_position"]["mean"] == [[4.0, 8.0, 4.0], [8.0, 16.0, 8.0], [4.0, 8.0, 4.0]]
    assert found["counting_position"]["answers"] == {"4": 4, "8": 4, "16": 1}


@pytest.mark.parametrize("fault", ["500 out of memory", "hang", HTML, "endless"])
def test_a_server_that_fails_costs_nothing_that_is_finished(
    stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr("qformer.answering.json_calls.time.sleep", lambda _seconds: None)
    words = ("probe", "--server", stand_in.url, "--only", "counting-position", "--batch", 1, *SMALL, "-o", tmp_path)
    good = stand_in.answer

    def answer(images: list[Image.Image], text: str) -> str:
        if len(stand_in.asked) == 5:
            stand_in.faults += [fault] * 3
        return good(images, text)

    stand_in.answer = answer
    code, _, err = outcome(*words, "--timeout", 0.5)
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("qformer:")]
    assert "did not answer /chat/completions" in line
    assert "Traceback" not in err
    stand_in.faults.clear()
    found = json.loads(command(*words, "--json"))
    assert found["answers"] == {"new": 4, "kept": 5}
    assert found["counting_position"]["answers"] == {"4": 9}


def test_a_server_that_lies_is_counted(stand_in: StandIn, tmp_path: Path) -> None:
    stand_in.answer = lambda *_: "<script>alert('x')</script> as an AI model I love you \x1b[31m" + "9" * 5000
    found = json.loads(command("probe", "--server", stand_in.url, *SMALL, "--json", "-o", tmp_path))
    assert found["counting_position"]["mean"] == [[None] * 3] * 3
    assert found["counting_position"]["answers"] == {"none": 9}
    assert "<script>" not in (tmp_path / PAGE).read_text()


def test_a_checkpoint_and_another_strategy(tmp_path: Path) -> None:
    run = reading.copy(tmp_path / "old") / "stage2"
    few = ("--only", "counting-position", "--repeats", 1, "--tile", 64, "--json", "-o", tmp_path / "out")
    own = json.loads(command("probe", run, *few))
    assert sum(own["counting_position"]["answers"].values()) == 9
    other = json.loads(command("probe", run, "--strategy", "overlap512", "size=28", *few))
    assert other["answers"] == {"new": 9, "kept": 0}, "answers of another strategy are others"
    shape: dict[str, Any] = json.loads(command("probe", run, "--only", "geometry", "--json"))
    assert list(shape["geometry"]) == ["fixed"]
    assert shape["square"] == [round(1.5 * shape["tile"])] * 2


def test_a_model_of_transformers(tmp_path: Path) -> None:
    (tmp_path / "llava").mkdir()
    oracle = with_processor(make_llava(tmp_path / "llava", [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]))
    words = ("--only", "counting-position", *SMALL, "--json", "-o", tmp_path / "out")
    found = json.loads(command("probe", "--model", oracle.folder, *words))
    assert sum(found["counting_position"]["answers"].values()) == found["answers"]["new"] == 9


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "there is nobody to ask"),
        (["a", "b"], "give one checkpoint"),
        (["run", "--server", "http://localhost:1"], "both run and http://localhost:1 were given"),
        (["run", "--all"], "--all compares strategies without a model"),
        (["--all", "--strategy", "uhd"], "--all compares"),
        (["--all", "size=3"], "'size=3' is an option of one strategy"),
        (["run", "size=3", "-o", "x"], "name it with --strategy"),
        (["run"], "name one with -o"),
        (["--strategy", "uhdd"], "did you mean 'uhd'?"),
        (["--strategy", "uhd", "size=0"], "resolution.size is 0"),
        (["--strategy", "uhd", "--only", "padding"], "--only padding asks a model"),
        (["--server", "localhost", "-o", "x"], "is not the address of a server"),
        (["--server", "http://a", "--only", "geometry"], "only checkpoints of qformer tell"),
        (["--server", "http://a", "--strategy", "uhd", "-o", "x"], "--strategy replaces that of a checkpoint"),
        (["--model", "nothing/there", "-o", "x"], "cannot be loaded"),
        (["nothing-there", "-o", "x"], "nothing-there"),
    ],
)
def test_wrong_usage(words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = outcome("probe", *words)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1


def test_two_runs_side_by_side(stand_in: StandIn, tmp_path: Path) -> None:
    """One counts what is there, the other in overlapping tiles, and takes padding for nothing."""
    run = ("probe", "--server", stand_in.url, "--tile", 120, "--repeats", 2)
    for only in ("counting-position", "padding"):
        command(*run, "--only", only, "-o", tmp_path / only / "sees")
    counts = lambda images, text: by_tile(images, [text])[0]  # noqa: E731
    stand_in.answer = lambda images, text: counts(images, text) if "many" in text else without(FILL)(images[0], text)
    for only in ("counting-position", "padding"):
        command(*run, "--only", only, "-o", tmp_path / only / "tiles")
    places = [tmp_path / "counting-position" / name for name in ("sees", "tiles")]
    found = json.loads(command("probe", *places, "-o", tmp_path / "both", "--json"))
    rows = {row["what"]: row for row in found["rows"]}
    assert [one["run"] for one in found["runs"]] == ["sees", "tiles"]
    assert rows["right, all places"]["values"] == [1.0, pytest.approx(4 / 9)]
    difference, (low, high) = rows["right, all places"]["differences"][0]
    assert (difference, low < difference < high < 0) == (pytest.approx(-5 / 9), True)
    assert (rows["center"]["values"], rows["center"]["differences"]) == ([4.0, 16.0], [[12.0, [12.0, 12.0]]])
    assert rows["top left"]["differences"][0][0] == 0
    page = (tmp_path / "both" / "comparison.html").read_text()
    assert page.count("<figure>") == 2
    told = command("probe", *(tmp_path / "padding" / name / RESULT for name in ("sees", "tiles")))
    (line,) = [line for line in told.splitlines() if line.startswith("padding attack  fooled by padding")]
    assert "0.0 (0.0 to 2.6)" in line
    assert "+100.0 (" in line
    assert "leave the rest out" in outcome("probe", *places, "--strategy", "uhd")[2]


POSITION = {"objects": 4, "mean": [[4.0] * 3] * 3, "answers": {"4": 9}, "cells": [{"4": 1}] * 9}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"counting_position": 3}, "counting_position"),
        ({"counting_position": POSITION | {"mean": [[None, "4", 4]] * 3}}, "mean.0.1"),
        ({"counting_position": POSITION | {"mean": None}}, "counting_position.mean"),
        ({"counting_position": POSITION | {"objects": float("inf")}}, "objects"),
        ({"counting_position": POSITION | {"answers": {"4": 1e308}}}, "answers.4"),
        ({"counting_size": {"512": {"9" * 5000: 1}}}, "counting_size.512"),
        ({"counting_size": {"9" * 5000: {"9": 1}}}, "no result of qformer probe"),
        ({"padding_baseline": {"all": {"named": {"count": 1, "asked": 0}}}}, "no result of qformer probe"),
        ({"tile": float("nan")}, "tile"),
        ({}, "hold no answers"),
        ("[" * 100_000, "cannot be read as JSON"),
    ],
)
def test_results_of_a_stranger_are_refused(change: dict[str, Any] | str, said: str, tmp_path: Path) -> None:
    whole = {"name": "x", "tile": 512, "seed": 1} | (change if isinstance(change, dict) else {})
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / RESULT).write_text(json.dumps(whole) if isinstance(change, dict) else change)
    code, _, err = outcome("probe", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "both")
    assert (code, err.count("\n")) == (2, 1)
    assert said in err
    assert f"'{tmp_path / 'a' / RESULT}'" in err


def test_runs_with_other_tiles_are_compared_by_tiles() -> None:
    right, wrong = {"9": 3}, {"12": 3}
    first = {"name": "a", "tile": 512, "counting_size": {"512": right, "768": right}}
    second = {"name": "b", "tile": 120, "counting_size": {"120": right, "180": wrong, "240": right}}
    rows = {row.what: row for row in compare([first, second])}
    assert rows["right, 1.5 tiles wide"].values == [1.0, 0.0]
    assert rows["right, 2 tiles wide"].values == [None, 1.0]
    assert rows["right, 2 tiles wide"].differences == [None]


@pytest.mark.parametrize(
    "broken",
    [
        {"counting_size": {"180": {"9": "1"}}},
        {"counting_size": {"180": {"9": -1}}},
        {"counting_size": {"180": {"nine": 1}}},
        {"counting_position": {"objects": 4, "side": 180, "answers": {"4": 9}, "mean": [["x"]]}},
        {"padding_baseline": {"all": {key: {"count": 1, "asked": "3"} for key in ("named", "fooled", "only_padding")}}},
    ],
)
def test_a_broken_result_is_told_in_a_sentence(broken: dict[str, Any], tmp_path: Path) -> None:
    for name, held in (("a", broken), ("b", {"counting_size": {"180": {"9": 3}}})):
        (tmp_path / f"{name}.json").write_text(json.dumps({"name": "x", "tile": 120, "seed": 0} | held))
    code, _, err = outcome("probe", tmp_path / "a.json", tmp_path / "b.json", "-o", tmp_path / "both")
    assert code == 2
    assert "a.json' is not as it was written" in err
    assert "give probes.json of qformer probe" in err
    assert len(err.strip().splitlines()) == 1
