"""`qformer tiles`: the numbers of each strategy, the drawing, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qformer.figures.cost import usual
from qformer.figures.tiles import TILE, gflops, side_by_side
from qformer.resolution import STRATEGIES
from qformer.resolution.measures import useful
from tests.commands import command, outcome
from tests.resolution.test_strategies import made


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    file = tmp_path / "photo.png"
    Image.new("RGB", (640, 480), (200, 30, 30)).save(file)
    return file


@pytest.fixture
def thin(tmp_path: Path) -> Path:
    file = tmp_path / "thin.png"
    Image.new("RGB", (5000, 20)).save(file)
    return file


def test_numbers_of_every_strategy(photo: Path) -> None:
    found = {one.pop("strategy"): one for one in json.loads(command("tiles", photo, "--all", "--json"))}
    assert list(found) == list(STRATEGIES)
    for name, one in found.items():
        plan = made(name).plan(640, 480)
        cost = usual(plan)
        assert one.pop("estimated") == cost.machine
        assert one == {
            "exposed": made(name).exposed,
            "image": [640, 480],
            "grid": list(plan.grid),
            "tiles": len(plan.tiles),
            "sizes": [list(tile.size) for tile in plan.tiles],
            "tokens": plan.tokens,
            "markers": plan.markers,
            "useful": pytest.approx(useful(plan), abs=1e-4),
            "gflops": pytest.approx(gflops(plan), abs=0.1),
            "connector_gflops": pytest.approx(cost.connector, abs=0.1),
            "prefill_gflops": pytest.approx(cost.prefill, abs=0.1),
            "first_token_seconds": pytest.approx(cost.seconds, rel=0.01),
        }
    assert {name: one["useful"] for name, one in found.items() if one["useful"] < 1} == {
        "pad_square": 0.75,
        "anyres": 0.75,
        "overlap512": 0.9375,
    }


def test_options_reach_the_strategies_that_have_them(photo: Path) -> None:
    (one,) = json.loads(command("tiles", photo, "--strategy", "internvl", "--json", "max_tiles=6"))
    assert (one["strategy"], one["grid"], one["tiles"], one["tokens"]) == ("internvl", [3, 2], 7, 1792)
    lines = command("tiles", photo, "max_tiles=1", "size=448").splitlines()
    assert lines[0].split()[:3] == ["strategy", "grid", "tiles"]
    shown = {line.split()[0]: line for line in lines[1:]}
    assert list(shown) == list(STRATEGIES)
    assert "1 x 1  1      448 x 448" in shown["internvl"]
    assert "1 x 1  1      448 x 448" in shown["fixed"]


def test_the_drawing_shows_strategies_side_by_side(photo: Path, tmp_path: Path) -> None:
    command("tiles", photo, "--strategy", "uhd", "-o", tmp_path / "one.png")
    command("tiles", photo, "-o", tmp_path / "all.png")
    one, every = (Image.open(tmp_path / name) for name in ("one.png", "all.png"))
    assert every.width == 4 * one.width
    assert (np.asarray(one) == TILE).all(axis=2).sum() > 4 * 640  # outlines of 2 x 2 slices
    sheet = side_by_side([Image.new("RGB", (2, height), "white") for height in (3, 5, 4, 1, 2)])
    assert sheet.size == (8, 7)


def test_strips_are_drawn_and_strategies_that_refuse_them_are_named(thin: Path, tmp_path: Path) -> None:
    code, out, err = outcome("tiles", thin, "-o", tmp_path / "thin.png")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:]] == [
        "fixed",
        "pad_square",
        "uhd",
        "internvl",
        "anyres",
        "overlap512",
    ]
    assert [line.split(":")[1].strip() for line in err.splitlines()] == ["oryx", "qwen2vl"]
    assert Image.open(tmp_path / "thin.png").height > 1000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--strategy", "oryx"], "oryx: a picture of 5000 x 20 pixels is too thin for Oryx"),
        (["--strategy", "internvll"], "did you mean 'internvl'?"),
        (["--strategy", "uhd", "max_tiles=3"], "resolution.max_tiles is not an option of 'uhd'"),
        (["max_tile=3"], "is not an option of any strategy: did you mean 'max_tiles'?"),
        (["6"], "'6' is not an option of a strategy; write key=value, such as max_tiles=6"),
        (["--all", "--strategy", "uhd"], "exclude each other"),
        (["-o", "tiles.jpg"], "'tiles.jpg' does not end in .png"),
        (["size=0"], "resolution.size is 0"),
        (["--strategy", "uhd", "-o", "/dev/null/tiles.png"], "'/dev/null/tiles.png' cannot be written"),
    ],
)
def test_wrong_usage(thin: Path, words: list[str], message: str) -> None:
    code, _, err = outcome("tiles", thin, *words)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_a_file_that_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    for name in ("notes.txt", "missing.png"):
        code, _, err = outcome("tiles", tmp_path / name)
        assert code == 2
        assert f"{name}' cannot be read as an image" in err


def test_the_useful_share_is_that_without_padding() -> None:
    assert useful(made("pad_square").plan(336, 84)) == 0.25
    assert useful(made("pad_square").plan(4, 9)) == pytest.approx(4 / 9)
    assert useful(made("anyres").plan(640, 480)) == 0.75  # 768 x 576 of 768 x 768; the overview does not count
    assert [useful(made(name).plan(640, 480)) for name in ("fixed", "uhd", "internvl", "oryx", "qwen2vl")] == [1.0] * 5
    assert gflops(made("anyres").plan_video(64, 64, 3)) == pytest.approx(3 * gflops(made("fixed", size=384).plan(1, 1)))
