"""`qformer index` in several processes makes the gallery that one makes, and ends as a whole."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from qformer import distributed, stages
from qformer.checkpoints import folder as checkpoint
from qformer.commands.searching import index
from qformer.retrieval.gallery import Gallery
from qformer.types import Sample, UsageError
from tests.processes import together
from tests.workspace import config, make_workspace

ROOT = Path(__file__).parent.parent.parent

pytestmark = pytest.mark.slow  # CI runs them too


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_workspace(tmp_path_factory.mktemp("space"))
    last = stages.train(config(root, "stage1", run=str(root / "one"), train={"steps": 2}))
    shutil.copytree(last, root / "other")
    tensors = load_file(root / "other" / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, root / "other" / "model.safetensors")
    checkpoint.write_meta(root / "other", checkpoint.read_meta(root / "other"))
    return root


@pytest.fixture(scope="module")
def one(root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return work(root, tmp_path_factory.mktemp("one"))


def draw(file: Path, number: int) -> None:
    pixels = np.random.default_rng(number).integers(0, 255, (30 + number % 5, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)


def make_photos(folder: Path) -> Path:
    """13 files of ten contents, one of which is no image; copies stand side by side, so in one round of any cut."""
    folder.mkdir(parents=True)
    for number in range(9):
        draw(folder / f"{number}.png", number)
        (folder / f"{number}.txt").write_text(f"photo number {number}\n")
    for copy, of in (("0b", 0), ("3b", 3), ("3c", 3)):
        shutil.copy(folder / f"{of}.png", folder / f"{copy}.png")
        (folder / f"{copy}.txt").write_text(f"copy {copy}\n")
    (folder / "5b.png").write_bytes(b"no image")
    return folder


def change_photos(folder: Path) -> None:
    """Moved, deleted, overwritten, swapped, told anew, one more, and more copies than processes."""
    (folder / "1.png").rename(folder / "moved.png")
    (folder / "2.png").unlink()
    draw(folder / "4.png", 40)
    (folder / "6.png").rename(folder / "spare")
    (folder / "7.png").rename(folder / "6.png")
    (folder / "spare").rename(folder / "7.png")
    (folder / "8.txt").write_text("something else\n")
    for copy in "uvwxyz":
        draw(folder / f"{copy}.png", 50)


def work(root: Path, out: Path) -> list[Any]:
    """What each process does; rank 0 changes the files in between."""
    first = distributed.rank() == 0
    if first:
        make_photos(out / "photos")
        make_photos(out / "single")
        for file in (out / "single").iterdir():
            if not file.name.startswith("1"):
                file.unlink()
    distributed.barrier()
    told: list[Any] = []

    def run(checkpoint: str, data: str, gallery: str, batch: int = 2) -> None:
        try:
            index(str(root / checkpoint), [str(out / data)], out / gallery, batch=batch, device="cpu")
        except UsageError as error:
            told.append(str(error).replace(str(out), "OUT").replace(str(root), "ROOT"))
        distributed.barrier()
        if first:
            told.append(content(out / gallery, out))
        distributed.barrier()

    run("one", "photos", "gallery")
    if first:
        change_photos(out / "photos")
    distributed.barrier()
    run("one", "photos", "gallery", 3)
    run("one", "photos", "gallery", 1)
    run("one", "single", "small")  # fewer images than processes
    run("other", "photos", "gallery")  # another model
    return told


def content(gallery: Path, out: Path) -> list[Any]:
    """Of every entry: id, places, captions and rows; and what was skipped. Numbers tell rounds, whose size differs."""
    store = Gallery.open(gallery).store
    entries = sorted(store.get([known.id for known in store.known()]).values(), key=lambda entry: entry.id)
    assert len({entry.seq for entry in entries}) == len(entries)
    rows = [np.concatenate([e.embeds, e.caption_embeds.reshape(-1, e.embeds.shape[1])]) for e in entries]
    plain = [(e.id, [(Path(p.name).name, *p[2:4]) for p in e.places], e.captions) for e in entries]
    skipped = [json.loads(line) for line in (gallery / "skipped.jsonl").read_text().splitlines()]
    return [plain, [(Path(one["path"]).name, one["kind"]) for one in skipped], rows]


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.weekly)])
def test_several_processes_make_the_gallery_of_one(root: Path, one: list[Any], tmp_path: Path, world: int) -> None:
    several = together(tmp_path / "processes", world, work, root, tmp_path / "several")
    faults = [said for said in one if isinstance(said, str)]
    assert [len(run[0]) for run in one if not isinstance(run, str)] == [9, 9, 9, 1, 9]
    assert len(faults) == 1
    assert "was embedded by another model" in faults[0]
    assert [[said for said in told if isinstance(said, str)] for told in several] == [faults] * world
    for mine, theirs in zip(one, several[0], strict=True):
        assert mine[:2] == theirs[:2]
        if not isinstance(mine, str):
            assert all(
                a.shape == b.shape and np.abs(a - b).max() < 2e-3 for a, b in zip(mine[2], theirs[2], strict=True)
            )


@dataclass
class Fatal:
    """Images of which the process whose rank `DIES` says dies: `kill -9` in the middle of the work."""

    path: str

    def __post_init__(self) -> None:
        self.files = sorted(Path(self.path).glob("*.png"))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> Sample:
        if os.environ["RANK"] == os.environ["DIES"] and number > 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return Sample(self.files[number], self.files[number].name)


def start(words: list[str], world: int, **environment: str) -> list[subprocess.Popen[str]]:
    """The command in `world` processes, as torchrun starts them, but with nobody who ends the others when one ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world)} | environment
    shared |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", "qformer", *words]
    return [
        subprocess.Popen(
            command, env=shared | {"RANK": str(r), "LOCAL_RANK": str(r)}, text=True, stdout=pipe, stderr=pipe, cwd=ROOT
        )
        for r in range(world)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("dies", ["0", "1"])
def test_when_one_is_killed_the_others_end_and_what_was_committed_stays(root: Path, tmp_path: Path, dies: str) -> None:
    folder = make_photos(tmp_path / "photos")
    data = ["name=tests.retrieval.test_processes:Fatal", f"path={folder}"]
    words = ["index", str(root / "one"), *data, "-o", str(tmp_path / "g"), "--batch", "1", "--device", "cpu"]
    processes = start(words, 2, DIES=dies)
    try:
        ended = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    assert codes[int(dies)] == -signal.SIGKILL
    assert codes[1 - int(dies)] == 1, ended
    kept = len(Gallery.open(tmp_path / "g").store)
    assert 0 < kept < 9
    (again,) = start(words, 1, DIES="nobody")
    out, err = again.communicate(timeout=240)
    assert again.returncode == 0, err
    assert "9 images" in out + err
    assert f"({9 - kept} embedded now" in out + err
