"""Random damage of what a run reads: named in a sentence, or of no effect; and nothing that is good is written over.

A seeded edit (a byte flipped, a file cut, a key taken out, a value of another type) of a run folder, a checkpoint, a
store of features or a configuration, then `qformer train`, which goes on with the run for one step.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from qformer import cli, stages
from qformer.checkpoints import folder as checkpoint
from qformer.figures import curves as pictures
from qformer.files import pretrained
from qformer.stages import features
from tests.commands import outcome
from tests.workspace import config, make_workspace

pytestmark = pytest.mark.slow

NEWEST = "step-0000003"
OTHER_TYPES: list[Any] = ["x", 7, -1, 0.5, True, None, [], {}, [1], {"a": 1}, "", "1", 1e400, 2**70]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`run` stopped after three of four steps, `store`, `run.yaml`; `reference`: the run that was not stopped."""
    root = make_workspace(tmp_path_factory.mktemp("space"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "SHARD_SAMPLES", 2)
        patch.setattr(pictures, "curves", lambda *_: None)  # here and below what takes long each time, and is the same
        patch.setattr(cli, "app", typer.main.get_command(cli.app))
        read, known = pretrained.read, functools.cache(pretrained.read)  # an image encoder uses up what it is given
        patch.setattr(pretrained, "read", lambda kind, *a, **o: (read if kind is AutoModel else known)(kind, *a, **o))
        base = root / "base"
        data = {"batch": 8, "features": str(base / "store"), "validation": None}
        settings = config(
            root, "stage1", run=str(base / "run"), data=data, train={"save_every": 1, "keep_last": 3, "log_every": 2}
        )
        stages.train(settings)
        shutil.copytree(base / "run", root / "reference")
        shutil.rmtree(base / "run" / "checkpoints" / "step-0000004")
        shutil.rmtree(base / "run" / "tensorboard")
        metrics = (base / "run" / "metrics.jsonl").read_text().splitlines(keepends=True)
        (base / "run" / "metrics.jsonl").write_text("".join(metrics[:3]))
        (base / "run" / "skipped.jsonl").write_text(
            '{"batch": 1, "kind": "missing", "index": "3", "detail": "3.png"}\n'
        )
        (base / "run.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json", exclude_unset=True)))
        shutil.copytree(base, root / "whole")
        yield root
    torch.set_num_threads(before)


@pytest.fixture
def base(whole: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that is damaged, whole again."""
    monkeypatch.chdir(whole)
    return whole / "base"


def renew(whole: Path, old: bool) -> None:
    """The base as it was; `old`: as it was written before there were checksums."""
    shutil.rmtree(whole / "base")
    shutil.copytree(whole / "whole", whole / "base")
    if not old:
        return
    for file in (whole / "base").rglob("*.json"):
        if file.name in ("meta.json", "store.json"):
            values = json.loads(file.read_text())
            file.write_text(json.dumps({k: v for k, v in values.items() if k not in ("checksum", "checksums")}))
    for file in (whole / "base" / "store").glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            faults = opened.metadata()["faults"]
        save_file(load_file(file), file, {"faults": faults})


def prints(folder: Path) -> dict[str, str]:
    """Of every file, so that a change is seen; what a run may write at any time is left out."""
    return {
        file.relative_to(folder).as_posix(): hashlib.md5(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file() and "tensorboard" not in file.parts and file.suffix != ".lock" and file.name != ".lock"
    }


def flip(file: Path, rng: random.Random) -> None:
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def cut(file: Path, rng: random.Random) -> None:
    file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size)])


def places(values: Any) -> list[tuple[Any, Any]]:
    """Every place in plain data that can be changed: what holds it, and its key."""
    keys: list[Any] = list(values) if isinstance(values, dict) else []
    keys = list(range(len(values))) if isinstance(values, list) else keys
    return [(values, key) for key in keys] + [place for key in keys for place in places(values[key])]


def changed(values: Any, rng: random.Random, remove: bool) -> Any:
    held, key = rng.choice(places(values))
    if remove:
        del held[key]
    else:
        held[key] = rng.choice([other for other in OTHER_TYPES if type(other) is not type(held[key])])
    return values


def edit(file: Path, rng: random.Random, remove: bool) -> None:
    """A key taken out of structured data, or a value of another type put in."""
    if file.suffix == ".yaml":
        file.write_text(yaml.safe_dump(changed(yaml.safe_load(file.read_text()), rng, remove)))
    elif file.suffix == ".jsonl":
        lines = file.read_text().splitlines()
        at = rng.randrange(len(lines))
        lines[at] = json.dumps(changed(json.loads(lines[at]), rng, remove))
        file.write_text("".join(line + "\n" for line in lines))
    elif file.suffix == ".json":
        file.write_text(json.dumps(changed(json.loads(file.read_text()), rng, remove)))
    elif file.suffix == ".pt":
        torch.save(changed(torch.load(file, weights_only=True), rng, remove), file)
    else:
        tensors = load_file(file)
        name = rng.choice(sorted(tensors))
        tensors[name] = tensors[name].flatten()[:-1] if remove else tensors[name].to(torch.int16)
        with safe_open(file, "pt") as opened:
            save_file(tensors, file, opened.metadata())


EDITS: dict[str, Callable[[Path, random.Random], None]] = {
    "flip": flip,
    "cut": cut,
    "remove": lambda file, rng: edit(file, rng, remove=True),
    "retype": lambda file, rng: edit(file, rng, remove=False),
}


def damaged_once(whole: Path, file: str, kind: str, rng: random.Random, old: bool) -> tuple[int, str]:
    """Damage, train, and hold what came of it against what is promised."""
    base = whole / "base"
    renew(whole, old)
    EDITS[kind](base / file, rng)
    before = prints(base)
    code, out, err = outcome("train", base / "run.yaml")
    said = " ".join((out + err).split())
    assert code in (0, 2), said
    assert "Traceback" not in said, said
    now = prints(base)
    written = {name for name in before if now.get(name) != before[name]}
    folder = Path(file).parent.as_posix()
    if code == 2:
        assert err.strip().splitlines()[-1].startswith("qformer: "), err
        assert Path(file).name in said or (base / folder).as_posix() in said or file == "run.yaml", said
        assert written <= {"run/config.yaml"}, written
    elif file != "run.yaml":  # by that another run may have been meant
        again = {name for name in before if f"'{base / folder}' is damaged" in said and name.startswith(folder)}
        refilled = {file} if f"'{base / file}' is cut off" in said else set()
        assert written <= again | refilled | {"run/metrics.jsonl", "run/config.yaml"}, written
        if not old:
            end, expected = (
                checkpoint.read(run / "checkpoints" / "step-0000004").tensors
                for run in (base / "run", whole / "reference")
            )
            assert all(torch.equal(end[name], tensor) for name, tensor in expected.items()), said
    return code, said


@pytest.mark.parametrize(("old", "count"), [(False, 120), (True, 50)])
def test_damage_is_named_and_costs_nothing_good(base: Path, whole: Path, old: bool, count: int) -> None:
    rng = random.Random(2026 + old)
    newest = base / "run" / "checkpoints" / NEWEST
    renew(whole, old)
    files = ["run.yaml", "run/metrics.jsonl", "run/skipped.jsonl", "run/config.yaml", "store/store.json"]
    files += [f"store/shard-{number:06d}.safetensors" for number in range(4)]
    files += sorted(file.relative_to(base).as_posix() for file in newest.iterdir())
    for number in range(count):
        file = files[number % len(files)]
        kind = list(EDITS)[(number // len(files) + number) % len(EDITS)]
        try:
            code, said = damaged_once(whole, file, kind, rng, old)
        except Exception as error:
            raise AssertionError(f"edit {number}: {kind} of {file}") from error
        print(number, kind, file, code, said[-200:].strip())
