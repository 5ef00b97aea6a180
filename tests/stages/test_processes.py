"""Whole runs by several processes: the same losses and weights as one process with as large a batch, and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qformer import distributed, stages
from qformer.checkpoints import folder as checkpoint
from qformer.data.loader import ENDING, Batches, BatchRecord
from qformer.schema import Config
from qformer.stages import stage1, stage2
from qformer.types import UsageError
from tests.processes import together
from tests.workspace import config, make_workspace

pytestmark = pytest.mark.slow  # the collectives have quick tests, tests/test_distributed.py

SAME = {"dropout": 0.0, "queries": 3}


class Forced(Batches):
    """Batches whose negatives follow from the step and the row of the global batch alone."""

    def __getitem__(self, number: int) -> BatchRecord:
        loaded = super().__getitem__(number)
        step, rank = divmod(number, distributed.world())
        count, of = self.data.batch, self.data.batch * distributed.world()
        rows = torch.arange(rank * count, (rank + 1) * count)
        loaded.batch.negatives = ((rows + 1 + step % (of - 1)) % of, (rows + of - 1 - step % 2) % of)
        return loaded


def train(settings: Config) -> None:
    stage1.Batches = stage2.Batches = Forced  # type: ignore[misc,attr-defined]
    stages.train(settings)


def train_all(runs: list[Config]) -> None:
    """Several runs by the same processes, which meet once."""
    from accelerate import PartialState

    PartialState.destroy_process_group = lambda self, group=None: None  # type: ignore[method-assign,assignment]
    for settings in runs:
        train(settings)


def runs(root: Path, world: int) -> dict[str, Config]:
    """Two batches to a step, clipped gradients, a global batch of 6: stage one, in chunks, both kinds of stage two.

    Those of several processes also with the frozen layers spread over them and activations computed twice.
    """
    train = {"accumulate": 2, "clip": 0.7, "steps": 3, "save_every": 1, "keep_last": 3}
    first: dict[str, Any] = {"qformer": SAME, "loss": {"gather_grad": "full"}}
    second: dict[str, Any] = {"init": str(root / "one-1")}
    t5 = second | {"llm": {"path": str(root / "flan-t5")}}
    kinds: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
        "one": ("stage1", first, {}),
        "chunked": ("stage1", first, {"chunk": 2}),
        "opt": ("stage2", second, {}),
        "t5": ("stage2", t5, {}),
    }
    if world > 1:
        spread = {"fsdp": True, "gradient_checkpointing": True}
        kinds |= {f"fsdp-{name}": (*kind[:2], kind[2] | spread) for name, kind in list(kinds.items())}
    return {
        name: config(
            root,
            stage,
            run=str(root / f"{name}-{world}"),
            data={"batch": 6 // world},
            train=train | own,
            **changes,
        )
        for name, (stage, changes, own) in kinds.items()
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which one, two and three processes have trained."""
    root = make_workspace(tmp_path_factory.mktemp("space"))
    with pytest.MonkeyPatch.context() as patch:
        for module in (stage1, stage2):
            patch.setattr(module, "Batches", Forced)
        for settings in runs(root, 1).values():
            stages.train(settings)
    for world in (2, 3):
        together(root / f"world-{world}", world, train_all, list(runs(root, world).values()))
    return root


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", ["one", "chunked", "opt", "t5", "fsdp-one", "fsdp-chunked", "fsdp-opt", "fsdp-t5"])
def test_runs_are_those_of_one_process(trained: Path, name: str, world: int) -> None:
    """After steps of two batches each. The gradient of keys' biases is rounding alone, which Adam blows up."""
    same = name.removeprefix("fsdp-").replace("chunked", "one")
    alone, shared = trained / f"{same}-1", trained / f"{name}-{world}"
    for mine, theirs in zip(_records(shared), _records(alone), strict=True):
        if mine["kind"] == "train":
            assert mine == pytest.approx(theirs, abs=1e-5)
    expected = checkpoint.read(alone).tensors
    first, second = (checkpoint.read(alone / "checkpoints" / f"step-000000{step}").tensors for step in (1, 2))
    for key, tensor in checkpoint.read(shared).tensors.items():
        if not key.endswith("key.bias"):
            torch.testing.assert_close(tensor, expected[key], atol=1e-5, rtol=0, msg=lambda m, k=key: f"{k}: {m}")
            assert (second[key] - first[key]).abs().max() > 1e-4  # far more than what is called close


def _records(run: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "images_per_second"} for record in records]


def test_only_one_process_writes(trained: Path) -> None:
    run = trained / "one-3"
    assert [r["step"] for r in _records(run) if r["kind"] == "train"] == [1, 2, 3]
    assert [r["kind"] for r in _records(run)].count("validation") == 1
    assert len(list((run / "tensorboard").rglob("events*"))) == 1
    assert len(checkpoint.read_trainer(checkpoint.find(run))["processes"]) == 3


class Interrupted(Batches):
    """Process 1 alone is sent a signal while it makes its batch of a step, numbered from 0."""

    number, step = signal.SIGTERM, 2

    def __getitem__(self, number: int) -> BatchRecord:
        if number == self.step * distributed.world() + 1:
            os.kill(os.getpid(), self.number)
        return super().__getitem__(number)


def interrupted(settings: Config) -> list[Any]:
    """Of every signal, each in another step of the run, how it ended and where."""
    from accelerate import PartialState

    PartialState.destroy_process_group = lambda self, group=None: None  # type: ignore[method-assign,assignment]
    stage1.Batches = Interrupted  # type: ignore[misc,attr-defined]
    ends: list[Any] = []
    for place, number in enumerate(sorted(ENDING)):
        Interrupted.number, Interrupted.step = number, 2 + 3 * place
        try:
            ends.append(stages.train(settings).name)
        except SystemExit as stopped:
            ends.append((stopped.code, checkpoint.find(settings.run).name, len(_records(Path(settings.run)))))
    return ends


def test_a_signal_to_one_process_stops_all_at_the_same_step(trained: Path) -> None:
    """Saved, and gone on with from there: the weights and the logged means of the run that nobody stopped."""
    changes: dict[str, Any] = {"data": {"batch": 2}, "train": {"steps": 21, "log_every": 3, "save_every": 21}}
    whole = config(trained, "stage1", run=str(trained / "unstopped"), **changes)
    cut = config(trained, "stage1", run=str(trained / "stopped"), **changes)
    together(trained / "store", 2, stages.train, whole)
    ends = [(0, f"step-{4 + 3 * place:07d}", 1 + place) for place in range(len(ENDING))]  # all know one step later
    assert together(trained / "store", 2, interrupted, cut) == [ends, ends]
    together(trained / "store", 2, stages.train, cut)
    assert _records(Path(cut.run)) == _records(Path(whole.run))
    expected = checkpoint.read(whole.run).tensors
    assert all(torch.equal(expected[name], tensor) for name, tensor in checkpoint.read(cut.run).tensors.items())


def test_another_number_of_processes_is_refused(trained: Path) -> None:
    settings = runs(trained, 2)["one"]
    with pytest.raises(UsageError, match=r"trained by 2 processes, not 1; start 2 processes"):
        stages.train(settings)


def test_torchrun_trains_resumes_and_speaks_once(trained: Path) -> None:
    """The command itself, dropout and random draws on: cut and resumed it gives the bits of the uninterrupted run."""
    whole = _torchrun(trained, "whole", 4)
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.strip().splitlines()[-1].endswith("whole/checkpoints/step-0000004")
    assert whole.stdout.count("whole/checkpoints/step-0000004") == 1
    for name in ("skipped.jsonl", "skipped-1.jsonl"):
        assert not (trained / "whole" / name).exists()
    metrics, end = (trained / "whole" / name for name in ("metrics.jsonl", "checkpoints/step-0000004"))
    expected, records = checkpoint.read(end).tensors, _records(trained / "whole")
    (end / "model.safetensors").unlink()  # as if it had not come so far
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:3]))
    again = _torchrun(trained, "whole", 4)
    assert again.returncode == 0, again.stderr
    assert "at step 2" in again.stdout
    assert all(torch.equal(expected[k], v) for k, v in checkpoint.read(end).tensors.items())
    assert _records(trained / "whole") == records


def _torchrun(root: Path, name: str, steps: int) -> subprocess.CompletedProcess[str]:
    file = root / f"{name}.yaml"
    settings = config(root, "stage1", run=str(root / name), data={"batch": 2}, train={"steps": steps})
    file.write_text(yaml.safe_dump(settings.model_dump(mode="json", exclude_unset=True)))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    command += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    return subprocess.run(
        [*command, "-m", "qformer", "train", str(file)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent.parent,
        timeout=600,
    )
