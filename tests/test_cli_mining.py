"""`qformer mine-pairs` as people meet it: what it writes, kills, questions that are filled in, servers, wrong usage."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from qformer.commands import mining as command
from qformer.commands import pair_files
from qformer.commands.encoders import load_encoder
from qformer.commands.tagging import parse_pattern, question
from qformer.evaluation import mining
from qformer.evaluation.mining import blind_pairs
from qformer.images import read_image
from qformer.retrieval.embedders import ClipEmbedder
from qformer.types import UsageError
from tests.retrieval.photos import folder
from tests.test_cli import one_sentence
from tests.tiny_clip import save_tiny_clip, save_tiny_siglip
from tests.workspace import make_workspace

if TYPE_CHECKING:
    from collections.abc import Callable

    Run = Callable[..., tuple[int, str, str]]

ROOT = Path(__file__).parent.parent
COUNT = 14
CPU = torch.device("cpu")
WIDE = ("--above", "-0.5", "--below", "0.3")  # thresholds between which towers of random weights have pairs


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`clip` and `siglip` of transformers, and a plain `vit`."""
    root = make_workspace(tmp_path_factory.mktemp("towers") / "all")
    save_tiny_clip(root / "clip")
    save_tiny_siglip(root / "siglip")
    return root


@pytest.fixture
def words(towers: Path, tmp_path: Path) -> list[str]:
    """A command about photos of which one is broken and one a copy."""
    folder(tmp_path / "photos", COUNT)
    (tmp_path / "photos" / "11b.png").write_bytes(b"no picture")
    shutil.copy(tmp_path / "photos" / "3.png", tmp_path / "photos" / "z.png")
    return ["mine-pairs", "photos", "--near", str(towers / "clip"), "--far", str(towers / "vit"), "--batch", "4"]


def pairs(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(out, "pairs.jsonl").read_text().splitlines()]


def vectors(out: str) -> list[np.ndarray]:
    return [np.load(Path(out, "work", f"{name}.npy")) for name in ("near", "far")]


def table(out: str) -> list[list[str]]:
    with Path(out, "Questions.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_what_is_written(run: Run, words: list[str], towers: Path) -> None:
    code, out, err = run(*words, "-o", "out", *WIDE, "--pairs", "5")
    assert code == 0, err
    near, far = vectors("out")
    assert near.shape == (COUNT, 8)
    assert far.shape == (COUNT, 12)
    found, wanted = pairs("out"), blind_pairs(near, far, -0.5, 0.3)
    assert [(one["first"], one["second"], one["near"], one["far"]) for one in found] == wanted
    assert len(found) > 5
    assert f"{len(found)} pairs of {COUNT} pictures" in out
    files = sorted(Path("photos").resolve().glob("*.png"))
    names = [str(file) for file in files if file.name not in ("11b.png", "z.png")]
    assert found[0]["images"] == [names[found[0]["first"]], names[found[0]["second"]]]
    embedded, _ = ClipEmbedder(str(towers / "clip"), CPU).embed_images([read_image(name) for name in names])
    assert np.allclose(embedded[:, 0].numpy(), near, atol=2e-3)
    assert [row[0] for row in table("out")] == ["Index", *map(str, range(1, 11))]
    assert sorted(file.name for file in Path("out/MMVP Images").iterdir()) == sorted(f"{n}.jpg" for n in range(1, 11))
    assert read_image(Path("out/MMVP Images/2.jpg")).shape == read_image(found[0]["images"][1]).shape
    assert "pictures skipped: 1; see out/skipped.jsonl" in err
    assert json.loads(Path("out/skipped.jsonl").read_text())["path"] == str(files[0].parent / "11b.png")
    record = json.loads(Path("out/mined.json").read_text())
    counts = record["counts"]
    place = counts["near_above"].index(-0.5), counts["far_below"].index(0.3)
    assert counts["pairs"][place[0]][place[1]] == record["pairs"] == len(found)
    page = Path("out/sheet.html").read_text()
    assert page.count("<figure>") == 10
    assert f"[{len(found)}]" in page
    assert "11b.png" not in page


def test_no_picture_is_shown_twice(run: Run, words: list[str]) -> None:
    assert run(*words, "-o", "out", *WIDE, "--once", "--json")[0] == 0
    shown = [id_ for key in json.loads(Path("out/mined.json").read_text())["shown"] for id_ in key.split()]
    assert len(shown) == len(set(shown)) > 2
    assert len(pairs("out")) > len(shown) // 2


def test_quantiles(run: Run, words: list[str]) -> None:
    code, out, err = run(*words, "-o", "out", "--quantiles", "0.7,0.4", "--json")
    assert code == 0, err
    near, far = vectors("out")
    cosines = []
    for rows in (near, far):
        unit = rows.astype(np.float64) / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
        cosines.append((unit @ unit.T)[np.triu_indices(COUNT, 1)])
    above, below = np.quantile(cosines[0], 0.7), np.quantile(cosines[1], 0.4)
    assert len(pairs("out")) == int(((cosines[0] > above) & (cosines[1] < below)).sum())
    assert json.loads(out)["near"]["above"] == pytest.approx(above)
    assert "quantile 0.7" in Path("out/sheet.html").read_text()


def test_a_changed_file_of_the_search_is_not_read(tmp_path: Path) -> None:
    """Rows that there are not, cosines that are no numbers, tables of another size: everything is searched again."""
    whole = {"stripe": 0, "counts": [[1, 2]], "pairs": [[0, 2, 0.9, 0.1]]}

    def read(**change: Any) -> int:
        lines = [{"key": "k"}, whole | change]
        (tmp_path / "scan.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return len(command._done(tmp_path / "scan.jsonl", "k", (1, 2), 3))

    assert read() == 1
    for odd in ([[0, 3, 0.9, 0.1]], [[-1, 2, 0.9, 0.1]], [["0", 2, 0.9, 0.1]], [[0, 2, float("nan"), 0.1]], [[0, 2]]):
        assert read(pairs=odd) == 0
    for odd_table in ([], "x", [[1], [2]], [[1, 2.5]], [[1, 10**30]]):
        assert read(counts=odd_table) == 0


def contents(out: str) -> dict[str, bytes]:
    return {file.relative_to(out).as_posix(): file.read_bytes() for file in Path(out).rglob("*") if file.is_file()}


def written(out: str) -> dict[str, bytes]:
    """Everything that is written for people, and the vectors."""
    kept = ("work/near.npy", "work/far.npy")
    return {
        name: data for name, data in contents(out).items() if not name.startswith(("work/", ".lock")) or name in kept
    }


KILLED = """
import os, signal, sys
from qformer import cli
from qformer.retrieval.lance import LanceStore
commit, calls = LanceStore.commit, []
def third(*given):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return commit(*given)
LanceStore.commit = third
sys.argv = ["qformer", *sys.argv[1:]]
cli.main()
"""


def test_a_killed_run_goes_on_and_writes_the_same(
    run: Run, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while it embeds, and interrupted between stripes of the search."""
    assert run(*words, "-o", "whole", *WIDE)[0] == 0
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    given = [sys.executable, "-c", KILLED, *words, "-o", "out", *WIDE]
    assert subprocess.run(given, capture_output=True, env=env, check=False, cwd=tmp_path).returncode == -signal.SIGKILL
    assert not Path("out/pairs.jsonl").exists()
    assert Path("out/work/gallery.json").exists()
    monkeypatch.setattr(mining, "BLOCK", 4)
    append, stripes = command.append_record, []

    def interrupted(file: Path, record: dict[str, Any]) -> None:
        append(file, record)
        stripes.append(record["stripe"])
        if len(stripes) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(command, "append_record", interrupted)
    assert run(*words, "-o", "out", *WIDE)[0] == 130
    with Path("out/work/scan.jsonl").open("a") as file:
        file.write('{"stripe": 2, "cou')  # cut off
    code, out, err = run(*words, "-o", "out", *WIDE)
    assert code == 0, err
    assert stripes == [0, 1, 2, 3]
    assert "0 embedded" not in out
    same = written("whole")
    assert written("out") == same
    before = contents("out")
    assert run(*words, "-o", "out", *WIDE)[0] == 0
    assert stripes == [0, 1, 2, 3]
    assert written("out") == {name: before[name] for name in same}


def fill(out: str) -> list[list[str]]:
    head, *rows = table(out)
    filled = [head] + [
        [row[0], "Is it 'big' & <b>red</b>?", "(a) Yes (b) No", "(a)" if index % 2 else "(b)", "Texts"]
        for index, row in enumerate(rows)
    ]
    with Path(out, "Questions.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(filled)
    return filled


def test_questions_that_are_filled_in_are_kept(run: Run, words: list[str]) -> None:
    given = [*words, "-o", "out", *WIDE]
    assert run(*given, "--pairs", "3")[0] == 0
    filled = fill("out")
    assert run(*given, "--pairs", "3")[0] == 0
    assert table("out") == filled
    page = Path("out/sheet.html").read_text()
    assert "Is it &#39;big&#39; &amp; &lt;b&gt;red&lt;/b&gt;?" in page
    assert page.count("value='Yes'") == 3
    before = written("out")
    code, _, err = run(*given, "--pairs", "4")
    assert code == 2
    assert "filled in, but not for the pairs that were found now" in one_sentence(err)
    assert written("out") == before
    Path("out/Questions.csv").write_text("nothing\n")
    code, _, err = run(*given, "--pairs", "3")
    assert code == 2
    assert "is not the table that was written" in one_sentence(err)


def test_patterns_of_a_person_are_kept_and_those_of_a_model_are_not(
    run: Run, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model names the first pair's pattern; then a person writes one into one row alone."""
    monkeypatch.setattr(pair_files, "asker", lambda *_: Model("8", "none", "none"))
    given = [*words, "-o", "out", *WIDE, "--pairs"]
    assert run(*given, "3")[0] == 0
    assert [row[4] for row in table("out")[1:]] == ["Texts", "Texts", "", "", "", ""]
    monkeypatch.setattr(pair_files, "asker", lambda *_: None)
    assert run(*given, "2")[0] == 0  # what a model named is nobody's work
    assert [row[4] for row in table("out")[1:]] == ["Texts", "Texts", "", ""]
    rows = table("out")
    rows[4][4] = "Quantity and Count"
    with Path("out", "Questions.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    assert run(*given, "2")[0] == 0
    assert table("out") == rows
    code, _, err = run(*given, "3")
    assert (code, "filled in, but not for the pairs" in one_sentence(err)) == (2, True)
    assert table("out") == rows


def test_options_are_split_however_they_are_typed() -> None:
    typed = {
        "(A) Open (B) Closed": ("Open", "Closed"),
        " (a)Open(b)Closed": ("Open", "Closed"),
        "(a) Open": ("Open", ""),
    }
    assert {options: pair_files.halves_of(options) for options in typed} == typed


def test_the_scorer_reads_the_questions(run: Run, words: list[str]) -> None:
    mmvp = pytest.importorskip("qformer.evaluation.mmvp")
    assert run(*words, "-o", "out", *WIDE, "--pairs", "2")[0] == 0
    fill("out")
    questions = mmvp.read_mmvp("out")
    assert [(one.number, one.options, one.answer) for one in questions] == [
        (1, "(a) Yes (b) No", "b"),
        (2, "(a) Yes (b) No", "a"),
        (3, "(a) Yes (b) No", "b"),
        (4, "(a) Yes (b) No", "a"),
    ]
    assert mmvp.PATTERNS == pair_files.PATTERNS


class Model:
    """A model behind a server: replies in turn, of which a `UsageError` is raised."""

    def __init__(self, *replies: str | UsageError) -> None:
        self.replies, self.asked = list(replies), 0
        self.identity = {"server": "http://here/v1", "model": "m"}

    def __call__(self, images: list[Any], questions: list[str]) -> list[str]:
        assert len(images) == len(questions) == 1
        assert images[0].width > images[0].height > 20
        self.asked += 1
        reply = self.replies.pop(0)
        if isinstance(reply, UsageError):
            raise reply
        return [reply]


def test_a_model_names_the_patterns(run: Run, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    down = UsageError("the server at 'http://here/v1' did not answer (state 500)")
    model = Model("8", "it is hard to say", down, "I think Quantity and Count.", down, down)
    monkeypatch.setattr(pair_files, "asker", lambda *_: model)
    given = [*words, "-o", "out", *WIDE, "--pairs", "6"]
    code, _, err = run(*given)
    assert code == 2
    assert "pairs are written, 2 of 6 with a pattern" in one_sentence(err.partition("\n")[2])
    tagged = [one["pattern"] for one in pairs("out")[:6]]
    assert tagged == ["Texts", None, None, "Quantity and Count", None, None]
    assert [row[4] for row in table("out")[1:9:2]] == ["Texts", "", "", "Quantity and Count"]
    assert "<option selected>Quantity and Count</option>" in Path("out/sheet.html").read_text()
    kept = [json.loads(line) for line in Path("out/untagged.jsonl").read_text().splitlines()]
    assert [one["kind"] for one in kept] == ["no pattern", "no reply", "no reply", "no reply"]
    assert kept[0]["detail"] == "it is hard to say"
    model.replies = ["1.", "Color and Appearance", "3"]
    code, _, err = run(*given)
    assert code == 0
    assert model.asked == 9, "replies that are there are not asked for again"
    assert "1 of 6 pairs got no pattern" in err
    monkeypatch.setattr(pair_files, "asker", lambda *_: None)
    assert run(*given)[0] == 0
    assert [one["pattern"] for one in pairs("out")[2:6]] == [
        "Orientation and Direction",
        "Quantity and Count",
        "Color and Appearance",
        "State and Condition",
    ]


def test_patterns_of_replies() -> None:
    names = pair_files.PATTERNS
    assert len(names) == 9
    assert "9. Viewpoint and Perspective" in question(names)
    for reply, number in {
        "4": 4,
        " 8.\n": 8,
        "Answer: 2": 2,
        "6, I think": 6,
        "(9)": 9,
        "texts": 8,
        "**Texts**, clearly": 8,
    }.items():
        assert parse_pattern(reply, names) == names[number - 1], reply
    several = ("1 or 2", "1.5", "Texts or State and Condition", "<script>alert(1)</script> all of them")
    for reply in ("", "0", "10", *several, "contexts", "9" * 5000, "no"):
        assert parse_pattern(reply, names) is None, reply


def test_a_gallery_and_other_encoders(run: Run, words: list[str], towers: Path) -> None:
    assert run(*words, "-o", "out", *WIDE)[0] == 0
    Path("vit.yaml").write_text(f"vision: {{name: hf, path: {towers / 'vit'}}}\n")
    given = ["mine-pairs", "out/work", "--near", str(towers / "siglip"), "--far", "vit.yaml", "-o", "two", *WIDE]
    code, _, err = run(*given, "--far-pooling", "mean")
    assert code == 0, err
    near, far = vectors("two")
    assert near.shape == (COUNT, 16)
    assert not np.allclose(far, vectors("out")[1], atol=0.05)
    assert len(pairs("two")) == len(blind_pairs(near, far, -0.5, 0.3))
    code, _, err = run(*given)
    assert code == 2
    assert "'two' holds pairs of other encoders" in one_sentence(err)
    folder(Path("others"), 3)
    code, _, err = run(*["others" if word == "photos" else word for word in words], "-o", "out", *WIDE)
    assert code == 2
    assert "'out' holds pairs of other pictures" in one_sentence(err)


def test_poolings(towers: Path) -> None:
    pictures = [torch.randint(0, 256, (3, 40, 30), dtype=torch.uint8) for _ in range(2)]
    means, firsts = (load_encoder(str(towers / "vit"), pooling, CPU).embed(pictures) for pooling in ("mean", "cls"))
    assert means.shape == firsts.shape == (2, 12)
    assert not torch.allclose(means, firsts, atol=0.05)
    assert torch.equal(load_encoder(str(towers / "vit"), None, CPU).embed(pictures), firsts)
    with pytest.raises(UsageError, match="has an embedding of its own; leave its pooling, cls, out"):
        load_encoder(str(towers / "clip"), "cls", CPU)
    with pytest.raises(UsageError, match="is no vision transformer"):
        load_encoder(str(towers / "bert"), None, CPU)


@pytest.mark.parametrize(
    ("change", "words_of_message"),
    [
        ({"photos": "empty"}, "no image below"),
        ({"photos": "nowhere"}, "nowhere"),
        ({"photos": "broken"}, "0 pictures could be read, which makes no pair; see"),
        ({"clip": "nothing/clip"}, "nothing/clip"),
        ({"clip": "mini:clap"}, "unknown shipped tower 'clap'"),
        ({"clip": "bad.yaml"}, "'bad.yaml' has no section vision"),
        ({"--quantiles": "99,1"}, "--quantiles is '99,1'"),
        ({"--above": "95"}, "above is 95"),
        ({"--quantiles": "0.9,0.2", "--below": "0.5"}, "--quantiles takes the place of --above and --below"),
        ({"--model": "gpt"}, "give --server URL as well"),
        ({"--server": "localhost"}, "'localhost' is not the address of a server"),
        ({"-o": "taken"}, "'taken' holds something else than mined pairs"),
        ({"-o": "photos/out"}, "'photos/out' lies among the pictures"),
    ],
)
def test_wrong_usage(run: Run, words: list[str], change: dict[str, str], words_of_message: str) -> None:
    for name in ("empty", "taken", "broken"):
        Path(name).mkdir()
    Path("taken/thesis.txt").write_text("mine")
    Path("broken/1.png").write_bytes(b"")
    Path("bad.yaml").write_text("visoin: {name: hf}\n")
    given = [*words, "-o", "out"]
    for name, value in change.items():
        if name.startswith("-") and name not in given:
            given += [name, value]
        else:
            place = next(n for n, word in enumerate(given) if word == name or Path(word).name == name)
            given[place + name.startswith("-")] = value
    code, out, err = run(*given)
    assert code == 2, out + err
    assert words_of_message in one_sentence(err)
    assert not Path("out/pairs.jsonl").exists()


def test_both_encoders_are_needed(run: Run, words: list[str]) -> None:
    code, _, err = run(*words[:4], "-o", "out")
    assert code == 2
    assert "--far" in err
