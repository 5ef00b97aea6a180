"""CapFilt: what is kept, that training draws it, and that kills, shards and several processes change no byte of it."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shlex
import tarfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer.core
import typer.main
from filelock import FileLock
from PIL import Image

from qformer import cli, stages
from qformer.config import Choice
from qformer.data import sources
from qformer.data.arguments import open_data
from qformer.data.loader import Batches
from qformer.data.texts import cleaned
from qformer.files import records
from qformer.resolution.fixed import Fixed
from qformer.schema import DataConfig
from qformer.stages.capfilt import run as module
from qformer.stages.capfilt.run import Settings, capfilt, draw
from qformer.types import UsageError
from tests.data.making import encoded, jsonl, photo, shard
from tests.tiny_clip import save_tiny_blip, save_tiny_clip
from tests.workspace import config, make_workspace

Run = Callable[..., tuple[int, str, str]]
WORDS = ("cat", "dog", "bus", "train", "rain")


class Models:
    """A captioner and a ranker that read the colour of the picture; the captioner can be made to die."""

    calls = 0
    dies_at: int | None = None

    def caption(self, images: Sequence[torch.Tensor], draws: list[list[float]]) -> list[str]:
        self.calls += 1
        if self.calls == self.dies_at:
            raise KeyboardInterrupt
        each = len(draws) // max(len(images), 1)
        names = [f"{int(image.float().mean() * 100)}" for image in images for _ in range(each)]
        return [f"A {WORDS[int(5 * row[0])]}, {name}!" for row, name in zip(draws, names, strict=True)]

    def rank(self, images: Sequence[torch.Tensor], texts: Sequence[list[str]]) -> list[list[float]]:
        return [
            [float(np.cos(sum(text.encode()) * image.float().mean().item())) for text in own]
            for image, own in zip(images, texts, strict=True)
        ]


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> Models:
    made = Models()
    rank = lambda *given: made.rank(*given)  # noqa: E731
    rank.too_long = lambda texts: sum("train" in text for text in texts)  # type: ignore[attr-defined]
    monkeypatch.setattr(module, "load_captioner", lambda *_: made.caption)
    monkeypatch.setattr(module, "load_embedder", lambda *_: rank)
    monkeypatch.setattr(module.checkpoint, "is_foreign", lambda _: True)
    return made


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """23 pictures of one colour each; two of them cannot be used, one has no caption, one several."""
    (tmp_path / "photos").mkdir()
    records: list[Any] = []
    for number in range(23):
        (tmp_path / "photos" / f"{number}.png").write_bytes(encoded(photo(number)))
        records.append({"image": f"photos/{number}.png", "caption": f"Picture {number}."})
    records[3] = {"image": "photos/none.png", "caption": "a dog"}
    (tmp_path / "photos" / "7.png").write_bytes(b"no picture")
    records[5] = {"image": "photos/5.png", "captions": []}
    records[6] = {"image": "photos/6.png", "captions": ["One: cat", "one cat", "...", "two"]}
    return Path(jsonl(tmp_path / "web.jsonl", records))


def settings(data: Path | str, **changes: Any) -> Settings:
    return Settings([str(data)], "captioner", "ranker", **{"captions": 6, "batch": 4, "part": 10, **changes})


def results(output: Path) -> dict[str, bytes]:
    """Every file that a run leaves for good."""
    found = {file.name: file.read_bytes() for file in sorted(output.glob("captions-*"))}
    return found | {name: (output / name).read_bytes() for name in ("skipped.jsonl", "summary.json")}


def lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in sorted(output.glob("captions-*.jsonl")) for line in file.open()]


def test_the_best_are_kept_and_all_else_is_accounted_for(models: Models, photos: Path, tmp_path: Path) -> None:
    capfilt(settings(photos), tmp_path / "out")
    found = lines(tmp_path / "out")
    assert [record["image"] for record in found] == [f"../photos/{n}.png" for n in range(23) if n not in (3, 7)]
    for record in found:
        image = torch.from_numpy(np.array(Image.open(tmp_path / "out" / record["image"]))).permute(2, 0, 1)
        number = record["image"].split("/")[-1].removesuffix(".png")
        both = [*zip(*(record[name] for name in ("captions", "scores", "origins")), strict=True)]
        both += zip(*(record["dropped"][name] for name in ("captions", "scores", "origins")), strict=True)
        assert len(record["captions"]) == 2
        assert [score for _, score, _ in both] == sorted((score for _, score, _ in both), reverse=True)
        assert [score for _, score, _ in both] == pytest.approx(
            models.rank([image], [[t for t, _, _ in both]])[0], abs=1e-5
        )
        original = {"5": set(), "6": {"one cat", "two"}}.get(number, {f"picture {number}"})
        assert {text for text, _, origin in both if origin == "original"} == original
        own = {text for text, _, origin in both if origin == "own"}
        assert 1 <= len(own) <= 5  # six were written, of five words
        assert own <= {f"a {word}, {int(image.float().mean() * 100)}" for word in WORDS}
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").open()]
    assert [(record["index"], record["kind"]) for record in skipped] == [("3", "missing"), ("7", "undecodable")]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    kept = [row for record in found for row in zip(record["origins"], record["scores"], strict=True)]
    for origin, told in summary["kept"].items():
        scores = [score for name, score in kept if name == origin]
        assert told == {"captions": len(scores), "mean score": pytest.approx(np.mean(scores), abs=1e-4)}
        assert scores
    everything = [text for record in found for text in record["captions"] + record["dropped"]["captions"]]
    assert summary["captions cut by the ranker"] == sum("train" in text for text in everything) > 0
    assert Image.open(tmp_path / "out" / "sheet.png").width > 1000
    before = results(tmp_path / "out")
    models.calls = 0
    capfilt(settings(photos), tmp_path / "out")
    assert results(tmp_path / "out") == before
    assert models.calls == 0


@pytest.mark.parametrize("form", ["jsonl", "webdataset"])
def test_training_draws_one_of_those_that_are_kept(models: Models, photos: Path, tmp_path: Path, form: str) -> None:
    capfilt(settings(photos, form="jsonl"), tmp_path / "out")
    expected = {}
    for record in lines(tmp_path / "out"):
        name = record["image"].removeprefix("../")
        expected[(tmp_path / name).read_bytes()] = set(record["captions"])
    ending = ".jsonl"
    if form == "webdataset":
        capfilt(settings(photos, form=form), tmp_path / "tars")
        ending = ".tar"
    output = tmp_path / ("out" if form == "jsonl" else "tars")
    source = sources.build(form, path=f"{output}/captions-*{ending}")
    data = DataConfig(train=Choice(name=form), batch=7, crop=(1.0, 1.0), flip=0)
    batches = Batches(source, Fixed(16), data, seed=0)
    colours = {Image.open(io.BytesIO(image)).getpixel((3, 3)): texts for image, texts in expected.items()}
    drawn: dict[Any, set[str]] = {colour: set() for colour in colours}
    for number in range(60):  # 20 epochs
        loaded = batches[number]
        assert not loaded.skipped
        for pixels, text in zip(loaded.batch.tiles.pixels, loaded.batch.text, strict=True):
            drawn[tuple(pixels[:, 8, 8].tolist())].add(text)
    assert drawn == colours
    samples = [source[index] for index in sources.indices(source)]
    if form == "webdataset":
        assert {sample.image: set(sample.captions) for sample in samples} == expected  # the bytes as they were


@pytest.mark.parametrize("form", ["jsonl", "webdataset"])
def test_kills_and_shards_change_nothing(models: Models, photos: Path, tmp_path: Path, form: str) -> None:
    capfilt(settings(photos, form=form), tmp_path / "whole")
    whole = results(tmp_path / "whole")

    broken = tmp_path / "broken"
    for dies_at in (2, 1, 4):
        models.calls, models.dies_at = 0, dies_at
        with pytest.raises(KeyboardInterrupt):
            capfilt(settings(photos, form=form), broken)
        assert not (broken / "summary.json").exists()
    journals = list((broken / "work").glob("*.jsonl"))
    assert journals
    with journals[0].open("a") as file:
        file.write('{"records": [{"pla')  # a kill in the middle of a line
    models.dies_at = None
    capfilt(settings(photos, form=form), broken)
    assert results(broken) == whole

    for number in (2, 0, 1):
        capfilt(settings(photos, form=form), tmp_path / "shards", shard=f"{number}/3")
        assert (tmp_path / "shards" / "summary.json").exists() == (number == 1)
    assert results(tmp_path / "shards") == whole


def test_captions_do_not_depend_on_the_batch_but_on_the_seed(models: Models, photos: Path, tmp_path: Path) -> None:
    found = {}
    for name, changes in (("usual", {}), ("other", {"batch": 3}), ("seeded", {"seed": 1})):
        capfilt(settings(photos, **changes), tmp_path / name)
        found[name] = lines(tmp_path / name)
    assert found["usual"] == found["other"]
    assert found["usual"] != found["seeded"]
    for places in (
        range(5),
        [(0, 0), (0, 1), (1, 0), (1, 1), (10, 1)],
        [(0, 1), (1, (0, 1)), (1, (1, 0)), (1, 0), (0, 0)],
    ):
        assert len({draw(0, index, 3)[0][0] for index in places}) == 5
    assert draw(0, 1, 3) == draw(0, 1, 6)[:3]


def test_processes_of_torchrun_share_the_work(
    models: Models, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    capfilt(settings(photos), tmp_path / "whole")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, made in (("1", {1}), ("0", {0, 1, 2})):
        monkeypatch.setenv("RANK", rank)
        capfilt(settings(photos), tmp_path / "out")
        assert {int(file.stem[-5:]) for file in (tmp_path / "out").glob("captions-*")} == made
    assert results(tmp_path / "out") == results(tmp_path / "whole")


def test_two_processes_never_make_the_same_part(models: Models, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "work").mkdir(parents=True)
    with FileLock(tmp_path / "out" / "work" / "captions-00001.lock"):
        capfilt(settings(photos), tmp_path / "out")
        assert sorted(file.name for file in (tmp_path / "out").glob("captions-*")) == [
            "captions-00000.jsonl",
            "captions-00002.jsonl",
        ]
    capfilt(settings(photos), tmp_path / "out")
    assert (tmp_path / "out" / "summary.json").exists()


@pytest.mark.parametrize(
    ("form", "change"),
    [
        ("jsonl", "removed"),
        ("webdataset", "inserted"),
        ("jsonl", "inserted"),
        ("jsonl", "mixed up"),
        ("jsonl", "shorter"),
    ],
)
def test_what_was_made_stays_with_its_record(
    models: Models, photos: Path, tmp_path: Path, form: str, change: str
) -> None:
    """The data change after a kill, and after the end: only new records are captioned, none has others' captions."""
    text, out = photos.read_text().splitlines(), tmp_path / "out"
    new = json.dumps({"image": "photos/9.png", "caption": "It is new."})
    changed = {
        "removed": [text[0], *text[2:]],
        "inserted": [new, *text],
        "mixed up": text[::-1],
        "shorter": text[:9],
    }[change]
    models.dies_at = 5
    with pytest.raises(KeyboardInterrupt):
        capfilt(settings(photos, form=form), out)
    models.dies_at = None
    for number, lines_now in enumerate((changed, text, changed)):
        photos.write_text("\n".join(lines_now))
        models.calls, before = 0, number == 2
        capfilt(settings(photos, form=form), out)
        assert not (before and models.calls)
        source = sources.build(form, path=f"{out}/captions-*{'.tar' if form == 'webdataset' else '.jsonl'}")
        found = [source[index] for index in sources.indices(source)]
        usable = [json.loads(line) for line in lines_now if not any(f"/{n}.png" in line for n in ("none", "7"))]
        assert len(found) == len(usable) == json.loads((out / "summary.json").read_text())["images"]
        for sample, record in zip(found, usable, strict=True):
            image = sample.image if isinstance(sample.image, bytes) else sample.image.read_bytes()
            assert image == (photos.parent / record["image"]).read_bytes()
            rows = sample.facts["captions"] + sample.facts["dropped"]["captions"]
            origins = sample.facts["origins"] + sample.facts["dropped"]["origins"]
            own = {row for row, origin in zip(rows, origins, strict=True) if origin == "original"}
            assert own == {*cleaned(record.get("captions") or [record.get("caption", "")])}
        skipped = [json.loads(line)["index"] for line in (out / "skipped.jsonl").open()]
        assert len(skipped) == len(lines_now) - len(usable)


def test_a_tar_that_is_taken_out_takes_its_captions_along(models: Models, tmp_path: Path) -> None:
    for number in range(3):
        shard(tmp_path / f"in/{number}.tar", range(10 * number, 10 * number + 4))
    capfilt(settings(f"{tmp_path}/in"), tmp_path / "out")
    (tmp_path / "in/0.tar").unlink()
    models.calls = 0
    capfilt(settings(f"{tmp_path}/in"), tmp_path / "out")
    assert models.calls == 0
    source = sources.build("webdataset", path=f"{tmp_path}/out/captions-*.tar")
    assert [source[i].image for i in range(len(source))] == [
        encoded(photo(10 * n + i)) for n in (1, 2) for i in range(4)
    ]


def test_a_picture_that_was_replaced_is_a_new_record(models: Models, photos: Path, tmp_path: Path) -> None:
    """Under its name stands another one: it gets captions of its own, and no other is captioned again."""
    capfilt(settings(photos), tmp_path / "out")
    (photos.parent / "photos" / "4.png").write_bytes(encoded(photo(40)))
    models.calls = 0
    capfilt(settings(photos), tmp_path / "out")
    assert models.calls == 1
    capfilt(settings(photos), tmp_path / "anew")
    for kind in ("captions", "dropped", "scores"):
        assert [line[kind] for line in lines(tmp_path / "out")] == [line[kind] for line in lines(tmp_path / "anew")]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("capfilt.json", "{", "cannot be read as JSON .*give another one with -o"),
        ("capfilt.json", "[1]", "it is not an object with keys"),
        (
            "work/captions-00001.jsonl",
            '{"records": [{"mark": "a"}]}\n',
            "line 1 of .*00001.jsonl' is not as it",
        ),
        ("work/captions-00001.json", "[]", ""),
        ("work/captions-00001.json", '{"samples": "x"}', ""),
    ],
)
def test_damage_is_one_sentence(
    models: Models, photos: Path, tmp_path: Path, name: str, text: str, expected: str
) -> None:
    """Counts are made again from the journal; whatever else is damaged is named."""
    capfilt(settings(photos), tmp_path / "out")
    before = results(tmp_path / "out")
    (tmp_path / "out" / name).write_text(text)
    if name.endswith("jsonl"):
        (tmp_path / "out" / name).with_suffix(".json").unlink()
    models.calls = 0
    with pytest.raises(UsageError, match=expected) if expected else nullcontext():
        capfilt(settings(photos), tmp_path / "out")
    assert models.calls == 0
    assert results(tmp_path / "out") == before


def test_a_full_disk_is_one_sentence_and_costs_nothing(
    models: Models, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    capfilt(settings(photos), tmp_path / "whole")

    def full(path: Path) -> None:
        if path.name == "captions-00001.jsonl.partial":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(records, "flush", full)
        with pytest.raises(UsageError, match=r"cannot be written \(No space left on device\); what is done is kept"):
            capfilt(settings(photos), tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").glob("captions-*.jsonl")] == ["captions-00000.jsonl"]
    models.calls = 0
    capfilt(settings(photos), tmp_path / "out")
    assert models.calls == 1  # the third part; of the second all blocks were in the journal
    assert results(tmp_path / "out") == results(tmp_path / "whole")


def test_a_picture_that_goes_away_is_skipped_at_the_end_too(models: Models, photos: Path, tmp_path: Path) -> None:
    models.dies_at = 3
    with pytest.raises(KeyboardInterrupt):
        capfilt(settings(photos, form="webdataset"), tmp_path / "out")
    (tmp_path / "photos" / "1.png").unlink()
    models.dies_at = None
    capfilt(settings(photos, form="webdataset"), tmp_path / "out")
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").open()]
    assert sorted((r["index"], r["kind"]) for r in skipped) == [
        ("1", "missing"),
        ("3", "missing"),
        ("7", "undecodable"),
    ]
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["images"] == 20


def test_tars_stay_as_they_are(models: Models, tmp_path: Path) -> None:
    for number, count in enumerate((5, 3)):
        shard(tmp_path / f"in/{number}.tar", range(10 * number, 10 * number + count))
    for number in (1, 0):
        capfilt(settings(f"{tmp_path}/in/{{0..1}}.tar"), tmp_path / "out", shard=f"{number}/2")
    names = []
    for number in (0, 1):
        with tarfile.open(tmp_path / f"out/captions-0000{number}.tar") as tar:
            names.append(tar.getnames())
    assert len(names[0]) == 15
    assert names[1][:3] == ["00001-00000.png", "00001-00000.json", "00001-00000.txt"]
    source = sources.build("webdataset", path=f"{tmp_path}/out/captions-*.tar")
    assert [source[i].image for i in (4, 5)] == [encoded(photo(4)), encoded(photo(10))]

    capfilt(settings(f"{tmp_path}/in", form="jsonl"), tmp_path / "lines")  # the images become files
    source = sources.build("jsonl", path=f"{tmp_path}/lines/captions-*.jsonl")
    assert [Path(source[i].image).read_bytes() for i in (4, 5)] == [encoded(photo(4)), encoded(photo(10))]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["web.jsonl"], (23, "web.jsonl:1")),
        (["photos"], (23, "photos/0.png")),
        (["path=web.jsonl", "where={caption: Picture 4.}"], (1, "web.jsonl:5")),
        (["name=scenes", "count=4"], (4, "scenes/train/")),
        (["run.yaml"], (2, "photos/0.png")),
        (["pipe:cat some=0.tar"], (3, "pipe:cat some=0.tar/00000")),
        (["some=0.tar"], (3, "some=0.tar/00000")),
    ],
)
def test_data_are_given_as_elsewhere(
    photos: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], expected: tuple[int, str]
) -> None:
    monkeypatch.chdir(photos.parent)
    listed = {"images": [{"id": i, "file_name": f"{i}.png"} for i in range(2)], "annotations": []}
    Path("coco.json").write_text(json.dumps(listed))
    Path("run.yaml").write_text(
        "stage: stage1\nrun: r\nvision: {name: hf, path: x}\ntrain: {steps: 2, warmup: 0}\n"
        "data: {train: {name: coco, path: coco.json, images: photos}}\n"
    )
    shard(Path("some=0.tar"), range(3))
    source = open_data(words, Path("out"))
    assert len(source) == expected[0]
    assert source[0].key.startswith(expected[1])


def test_the_document_has_every_option_and_its_commands_are_accepted() -> None:
    document = (Path(__file__).parents[2] / "docs" / "capfilt.md").read_text(encoding="utf-8")
    group = typer.main.get_command(cli.app)
    assert isinstance(group, typer.core.TyperGroup)
    command = group.commands["capfilt"]
    known = {name for option in command.params for name in option.opts if name.startswith("--")}
    assert known - {"--output"} == set(re.findall(r"--[a-z][a-z-]+", document)) - {"--nproc-per-node"}
    whole = [line for line in document.splitlines() if line.startswith("qformer capfilt") and "..." not in line]
    assert len(whole) == 4
    for line in whole:
        assert command.make_context("capfilt", shlex.split(line)[2:]).args == []  # parsed, not run


def test_what_cannot_be_meant_is_refused(models: Models, photos: Path, tmp_path: Path) -> None:
    for shard_of, expected in (("3/3", "give i/n"), ("a/b", "give i/n"), ("1", "give i/n")):
        with pytest.raises(UsageError, match=expected):
            capfilt(settings(photos), tmp_path / "out", shard=shard_of)
    with pytest.raises(UsageError, match="give one of jsonl, webdataset"):
        capfilt(settings(photos, form="parquet"), tmp_path / "out")
    bad = jsonl(tmp_path / "bad.jsonl", ["{", {"image": 3}])
    with pytest.raises(UsageError, match="none of the first 100 samples can be used"):
        capfilt(settings(bad), tmp_path / "bad")
    capfilt(settings(photos), tmp_path / "out")
    with pytest.raises(UsageError, match="was started with captions 6, not 7; give the same value"):
        capfilt(settings(photos, captions=7), tmp_path / "out")


def test_the_command_with_true_models(run: Run, tmp_path: Path) -> None:
    """Stage two and BLIP write, stage one and CLIP rank; a folder without captions is data, too."""
    root = make_workspace(tmp_path / "space")
    stages.train(config(root, "stage1"))
    stages.train(config(root, "stage2", init=str(root / "runs" / "stage1")))
    save_tiny_blip(root / "blip")
    save_tiny_clip(root / "clip")
    ranks = (
        "--captioner",
        str(root / "runs/stage2"),
        "--ranker",
        str(root / "clip"),
        "--captions",
        "3",
        "--batch",
        "5",
    )
    code, out, err = run("capfilt", str(root / "captions.jsonl"), *ranks, "-o", "out")
    assert code == 0, err
    assert "12 images in 'out'" in out
    assert "train on it: data.train={name: jsonl, path: out/captions-*.jsonl}" in out
    assert {origin for record in lines(Path("out")) for origin in record["origins"]} == {"own", "original"}
    ranks = ("--captioner", str(root / "blip"), "--ranker", str(root / "runs/stage1"), "--captions", "4", "--keep", "3")
    code, out, err = run("capfilt", str(root / "images"), *ranks, "-o", "own", "--format", "webdataset")
    assert code == 0, err
    source = sources.build("webdataset", path="own/captions-*.tar")
    assert len(source) == 12
    assert all(1 <= len(sample.captions) <= 3 for sample in map(source.__getitem__, range(12)))
    code, _, err = run("capfilt", "nothing.jsonl", *ranks, "-o", "none")
    assert (code, err.count("\n")) == (2, 1)
    assert "no file at 'nothing.jsonl'" in err
