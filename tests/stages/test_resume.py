"""Runs that are killed, stopped or out of disk: what was finished stays, and the same command gives the same bits."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from qformer import devices, stages
from qformer.checkpoints import folder as checkpoint
from qformer.data.loader import ENDING, Batches, BatchRecord
from qformer.model.assembly import build_image_text
from qformer.schema import Config
from qformer.stages import loop, resume, stage1
from qformer.stages.optim import adamw
from qformer.stages.trainer_state import NonFiniteLoss, NonFiniteWeights, check_finite, restore
from qformer.types import UsageError
from tests.workspace import config, make_workspace

STEPS = {"steps": 24, "save_every": 2, "log_every": 3}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums over more threads may differ in the last bit, and the runs in processes of their own have one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a run of 24 steps that nobody disturbed."""
    root = make_workspace(tmp_path_factory.mktemp("space"))
    stages.train(config(root, "stage1", run=str(root / "whole"), train=STEPS))
    return root


def records(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def assert_same(run: Path, whole: Path, name: str = "step-0000024") -> None:
    assert records(run) == records(whole)
    mine, expected = (checkpoint.read(folder / "checkpoints" / name).tensors for folder in (run, whole))
    assert mine.keys() == expected.keys()
    assert all(torch.equal(mine[key], expected[key]) for key in mine)


def settings_file(root: Path, run: Path) -> Path:
    file = root / f"{run.name}.yaml"
    settings = config(root, "stage1", run=str(run), train=STEPS)
    file.write_text(yaml.safe_dump(settings.model_dump(mode="json", exclude_unset=True)))
    return file


def start(root: Path, run: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "qformer", "train", str(settings_file(root, run))],
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        cwd=Path(__file__).parent.parent.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def kill_when(process: subprocess.Popen[str], due: Callable[[], bool]) -> None:
    """`kill -9` the process and all it has started."""
    end = time.monotonic() + 300
    while not due():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.0005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_killed_runs_end_with_the_same_bits(trained: Path) -> None:
    """Killed before the first checkpoint, inside a save and at any time."""
    run = trained / "killed"
    saves = run / "checkpoints"
    kill_when(start(trained, run), lambda: (run / "metrics.jsonl").is_file() or saves.is_dir())
    kill_when(start(trained, run), lambda: any(saves.glob("*.partial")))
    kill_when(start(trained, run), lambda: any(int(f.name[-7:]) > 12 for f in checkpoint.complete(run)))
    last = start(trained, run)
    said, _ = last.communicate(timeout=300)
    assert last.returncode == 0, said
    assert "resuming" in said
    assert_same(run, trained / "whole")


class Asked(Batches):
    """Sends this process a signal while the batch of a step is made."""

    number, step = signal.SIGTERM, 7

    def __getitem__(self, number: int) -> BatchRecord:
        if number == self.step - 1:
            os.kill(os.getpid(), self.number)
        return super().__getitem__(number)


def stopped(settings: Config, number: signal.Signals, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train until the signal, which comes in the middle of that step."""
    handlers = {each: signal.getsignal(each) for each in ENDING}
    with monkeypatch.context() as patch:
        patch.setattr(Asked, "number", number)
        patch.setattr(Asked, "step", step)
        patch.setattr(stage1, "Batches", Asked)
        with pytest.raises(SystemExit) as stop:
            stages.train(settings)
    assert stop.value.code == 0
    assert checkpoint.find(settings.run).name == f"step-{step:07d}"
    assert {each: signal.getsignal(each) for each in ENDING} == handlers


def test_a_signal_saves_and_exits_0(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the middle of the two steps that are logged together: what was not logged yet is saved, too."""
    run = trained / "asked"
    settings = config(trained, "stage1", run=str(run), train=STEPS)
    stopped(settings, signal.SIGTERM, 7, monkeypatch)
    assert "stopped by SIGTERM: step 7 is saved" in capsys.readouterr().out
    assert [r["step"] for r in records(run)] == [2, 3, 4, 6]
    stages.train(settings)
    assert_same(run, trained / "whole")


@pytest.mark.slow
def test_every_signal_that_asks_a_run_to_end_saves(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One after the other in the same run, in different places between two logs and saves."""
    settings = config(trained, "stage1", run=str(trained / "often"), train=STEPS)
    numbers = [signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGTERM]
    assert set(numbers) == set(ENDING)
    for place, number in enumerate(numbers):
        stopped(settings, number, 3 * place + 5, monkeypatch)
        assert f"stopped by {number.name}: step {3 * place + 5} is saved" in capsys.readouterr().out
    stages.train(settings)
    assert_same(trained / "often", trained / "whole")


def test_the_same_signal_again_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does Ctrl-C; but not at once: a terminal and torchrun, or systemd, ask twice for the same thing."""
    now = [0.0]
    monkeypatch.setattr(resume.time, "monotonic", lambda: now[0])
    for again, waits in ((signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGHUP, True)):
        with resume.Stop() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), again)
            assert stop.asked == "SIGTERM"
            now[0] += 3
            with nullcontext() if waits else pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), again)


def test_a_signal_that_was_ignored_stays_ignored() -> None:
    """As `nohup` ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with resume.Stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.asked is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_a_terminal_that_closes_costs_nothing(trained: Path) -> None:
    """Nothing can be written to it any more, and the run is saved all the same."""
    run = trained / "closed"
    process, terminal = pty.fork()
    if not process:
        os.chdir(Path(__file__).parent.parent.parent)
        os.environ |= {"OMP_NUM_THREADS": "1", "TERM": "xterm"}
        os.execv(sys.executable, [sys.executable, "-m", "qformer", "train", str(settings_file(trained, run))])
    said, end = b"", time.monotonic() + 300
    while not any(checkpoint.complete(run)):
        said += os.read(terminal, 1 << 16)
        assert time.monotonic() < end, said
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    last = checkpoint.find(run)
    assert last.name < "step-0000024", "it was done before it could be stopped"
    stages.train(config(trained, "stage1", run=str(run), train=STEPS))
    assert_same(run, trained / "whole")


@pytest.mark.slow
def test_workers_do_not_die_of_the_signal(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C reaches every process of the terminal."""
    run = trained / "workers"

    class Everyone(Batches):
        def __getitem__(self, number: int) -> BatchRecord:
            for each in ENDING:
                os.kill(os.getpid(), each)  # in the worker
            if number == 7:
                os.kill(os.getppid(), signal.SIGINT)
            return super().__getitem__(number)

    settings = config(trained, "stage1", run=str(run), data={"workers": 1}, train=STEPS)
    with monkeypatch.context() as patch:
        patch.setattr(stage1, "Batches", Everyone)
        with pytest.raises(SystemExit):
            stages.train(settings)
    stages.train(settings)
    assert_same(run, trained / "whole")


@pytest.mark.parametrize("name", ["model.safetensors", "trainer.pt", "meta.json", "tokenizer.json"])
def test_a_half_written_checkpoint_is_passed_over_and_said(
    trained: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained / f"half-{name}"
    shutil.copytree(trained / "whole", run)
    file = run / "checkpoints" / "step-0000024" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    stages.train(config(trained, "stage1", run=str(run), train=STEPS))
    said = " ".join(capsys.readouterr().out.split())
    assert "step-0000024' is damaged" in said
    assert "trying the previous one" in said
    assert "at step 22" in said
    assert_same(run, trained / "whole")


def test_one_flipped_bit_is_passed_over_and_said(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained / "flipped"
    shutil.copytree(trained / "whole", run)
    file = run / "checkpoints" / "step-0000024" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    stages.train(config(trained, "stage1", run=str(run), train=STEPS))
    said = " ".join(capsys.readouterr().out.split())
    assert "step-0000024' is damaged (model.safetensors is not as it was written: its checksum is" in said
    assert_same(run, trained / "whole")


def _first_state(trainer: dict[str, Any]) -> dict[str, Any]:
    return trainer["optimizer"]["state"][0]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda t: t.pop("processes"), "it lacks the states of the processes"),
        (lambda t: t.update(processes=[7]), "the state of a process lacks cpu, cuda or pending"),
        (lambda t: t["processes"][0].update(cpu=torch.zeros(5056)), "the random state cpu is not a tensor of bytes"),
        (lambda t: t["processes"][0].update(cpu=torch.zeros(7, dtype=torch.uint8)), "the random state cpu has 7 bytes"),
        (lambda t: t["processes"][0]["cpu"].zero_(), "its random state is not valid"),
        (
            lambda t: t["processes"][0].update(pending=[(1, {"itc": 2})]),
            "pending is not a list of steps",
        ),
        (lambda t: t.pop("optimizer"), "it lacks the state of the optimizer"),
        (lambda t: t["optimizer"]["param_groups"].pop(), "the optimizer does not have the 2 groups of this run"),
        (
            lambda t: t["optimizer"]["param_groups"][0].update(betas=(2, 0.5)),
            "betas of group 0 of",
        ),
        (lambda t: t["optimizer"]["param_groups"][1].update(weight_decay=None), "weight_decay of group 1"),
        (
            lambda t: t["optimizer"]["state"].update(x=t["optimizer"]["state"].pop(0)),
            "a state 'x', which belongs to no",
        ),
        (lambda t: _first_state(t).pop("exp_avg"), "the optimizer's state 0 lacks step, exp_avg or exp_avg_sq"),
        (
            lambda t: _first_state(t).update(exp_avg=torch.zeros(1)),
            "has an exp_avg that does not fit its weight",
        ),
        (lambda t: _first_state(t).update(step=7), "the optimizer's state 0 has a step that is not a number"),
        (lambda t: _first_state(t)["exp_avg_sq"].fill_(torch.nan), "state 0 has a exp_avg_sq that is NaN or infinite"),
        (lambda t: t.update(scaler={"scale": "x"}), "scale of the scaler is 'x'"),
    ],
)
def test_a_trainer_state_that_does_not_fit_is_named(
    trained: Path, ready: Any, damage: Callable[[dict[str, Any]], Any], said: str
) -> None:
    """Before anything of it is put in."""
    found = checkpoint.find(trained / "whole")
    trainer = checkpoint.read_trainer(found)
    damage(trainer)
    with pytest.raises(checkpoint.Damaged) as caught:
        restore(ready, trainer, found)
    assert said in str(caught.value)
    assert f"remove '{found}' to go on from an earlier one" in str(caught.value)
    assert not ready.optimizer.state


@pytest.fixture(scope="module")
def ready(trained: Path) -> Any:
    """As much of a run as takes a trainer's state, before the first step."""
    settings = config(trained, "stage1", run=str(trained / "whole"), train=STEPS)
    model, _ = build_image_text(settings)
    accelerator = SimpleNamespace(device=torch.device("cpu"), scaler=None)
    return SimpleNamespace(
        folder=trained / "whole",
        pending=[],
        extent=checkpoint.read_trainer(checkpoint.find(trained / "whole"))["extent"],
        step=0,
        inner=model,
        optimizer=adamw(model, settings.train),
        accelerator=accelerator,
    )


@pytest.mark.parametrize("of", ["weight", "optimizer"])
def test_what_is_not_finite_is_not_saved(trained: Path, of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step whose losses were fine; the checkpoint before it stays the newest, and what was logged stays."""
    run = trained / f"broken-{of}"
    settings = config(trained, "stage1", run=str(run), train=STEPS)
    real = loop._train_step

    def breaks(run: Any, stream: Any) -> None:
        real(run, stream)
        if run.step == 4:
            weight = run.inner.itm_head.weight
            (weight.data if of == "weight" else run.optimizer.state[weight]["exp_avg_sq"])[1, 2] = torch.inf

    monkeypatch.setattr(loop, "_train_step", breaks)
    what = "the weight 'itm_head.weight'" if of == "weight" else r"'itm_head.weight \(exp_avg_sq\)'"
    with pytest.raises(
        NonFiniteWeights, match=rf"{what} is NaN or infinite after step 4; .*'step-0000002' is the newest"
    ):
        stages.train(settings)
    assert [folder.name for folder in checkpoint.complete(run)] == ["step-0000002"]


def test_a_loss_that_is_not_logged_yet_is_looked_at_too(ready: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a signal ends the run between two logs."""
    losses = {"itc": torch.tensor(1.5), "itm": torch.tensor(torch.nan)}
    monkeypatch.setattr(ready, "pending", [(6, {"itc": torch.tensor(1.5)}), (7, losses)])
    with pytest.raises(NonFiniteLoss, match=r"the loss 'itm' is nan at step 7; .*'step-0000024' is the newest"):
        check_finite(ready)


def test_no_whole_checkpoint_is_an_error_and_nothing_is_lost(trained: Path) -> None:
    run = trained / "ruined"
    shutil.copytree(trained / "whole", run)
    before = records(run)
    for folder in checkpoint.complete(run):
        (folder / "trainer.pt").write_bytes(b"")
    with pytest.raises(UsageError, match="step-0000022' is damaged"):
        stages.train(config(trained, "stage1", run=str(run), train=STEPS))
    assert records(run) == before
    assert len(checkpoint.complete(run)) == 2


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It goes on without; the last checkpoint must be written, and without it the one before is where to go on from."""
    run = trained / "full"
    settings = config(trained, "stage1", run=str(run), train=STEPS | {"save_every": 10})
    real = checkpoint.save_file
    full = [False, True, True]  # the saves of steps 10, 20 and 24

    def save_file(*given: Any) -> None:
        if full.pop(0):
            raise OSError(28, "No space left on device")
        real(*given)

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    with pytest.raises(
        OSError, match=r"step 24 could not be written .*No space left.*the previous one, 'step-0000010', is complete"
    ):
        stages.train(settings)
    said = " ".join(capsys.readouterr().out.split())
    assert "the checkpoint of step 20 could not be written" in said
    assert "training continues" in said
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["step-0000010"]
    monkeypatch.setattr(checkpoint, "save_file", real)
    stages.train(settings)
    expected, mine = (checkpoint.read(folder).tensors for folder in (trained / "whole", run))
    assert all(torch.equal(mine[key], expected[key]) for key in expected)


def test_losses_that_cannot_be_written_do_not_stop_the_run(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained / "no-metrics"
    (run / "metrics.jsonl").mkdir(parents=True)
    monkeypatch.setattr(resume.pictures, "curves", lambda *_: None)
    stages.train(config(trained, "stage1", run=str(run), train=STEPS | {"steps": 3}))
    assert "could not be written" in capsys.readouterr().out
    assert checkpoint.find(run).name == "step-0000003"


def test_a_folder_that_cannot_be_written_is_said_before_training(trained: Path) -> None:
    (trained / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write to the run folder"):
        stages.train(config(trained, "stage1", run=str(trained / "file" / "run"), train=STEPS))


def test_a_run_can_be_shortened(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It ends at the new step with the lowest rate; once past it, it ends at once and stays as it is."""
    run = trained / "shortened"
    shutil.copytree(trained / "whole", run)
    shutil.rmtree(run / "checkpoints" / "step-0000024")
    stages.train(config(trained, "stage1", run=str(run), train=STEPS | {"steps": 23}))
    assert "lowered from 24 to 23, at which the learning rate now ends" in " ".join(capsys.readouterr().out.split())
    assert checkpoint.find(run).name == "step-0000023"
    assert checkpoint.read(run).config.train.steps == 23
    assert records(run)[-2]["lr"] == pytest.approx(1e-5)  # min_lr; the last record is of validation
    before = records(run), (run / "config.yaml").read_text()
    assert stages.train(config(trained, "stage1", run=str(run), train=STEPS | {"steps": 20})) == checkpoint.find(run)
    assert "is at step 23, past train.steps 20, so nothing is trained" in " ".join(capsys.readouterr().out.split())
    assert (records(run), (run / "config.yaml").read_text()) == before
    with pytest.raises(UsageError, match=r"train\.steps was 23, is 24"):
        stages.train(config(trained, "stage1", run=str(run), train=STEPS))


def test_auto_may_take_another_precision_elsewhere(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a CPU that has other instructions; the log says so, and training goes on."""
    run = trained / "auto"
    for steps, features, said in (
        (2, {"avx512_bf16"}, "auto takes bf16: this CPU has avx512_bf16"),
        (4, set(), "auto takes fp32: this CPU has neither amx_bf16 nor avx512_bf16"),
    ):
        monkeypatch.setattr(devices, "cpu_features", lambda features=features: features)
        with monkeypatch.context() as patch:
            patch.setattr(stage1, "Batches", Asked)
            patch.setattr(Asked, "step", steps)
            with nullcontext() if steps == 4 else pytest.raises(SystemExit):
                stages.train(config(trained, "stage1", run=str(run), train={"steps": 4, "precision": "auto"}))
        printed = " ".join(capsys.readouterr().out.split())
        assert said in printed
    assert "was in bf16 until step 2 and goes on in fp32" in printed
    assert checkpoint.read(run).config.train.precision == "auto"
    assert checkpoint.read(run).meta["precision"] == "fp32"


def test_what_was_logged_before_the_first_checkpoint_is_forgotten(trained: Path) -> None:
    """And a line that a kill cut off is no hindrance."""
    run = trained / "early"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "itc": 3.0}\n{"kind": "tra')
    stages.train(config(trained, "stage1", run=str(run), train=STEPS))
    assert_same(run, trained / "whole")


def test_data_that_grew_are_refused_before_they_are_read_in_another_order(trained: Path) -> None:
    """Put back as they were, the run goes on."""
    lines, file = (trained / "captions.jsonl").read_text().splitlines(), trained / "grows.jsonl"
    file.write_text("\n".join(lines))
    data = {"train": {"name": "jsonl", "path": str(file)}, "validation": None}
    settings = config(trained, "stage1", run=str(trained / "grown"), data=data, train={"steps": 2, "save_every": 1})
    stages.train(settings)
    (trained / "grown" / "checkpoints" / "step-0000002" / "model.safetensors").unlink()
    file.write_text("\n".join([*lines, lines[0]]))
    with pytest.raises(UsageError, match=r"has 13 samples or shards, but had 12 when the run .* began"):
        stages.train(settings)
    file.write_text("\n".join(lines))
    stages.train(settings)
    assert checkpoint.find(trained / "grown").name == "step-0000002"


def test_a_batch_of_one_is_told(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for batch in (1, 2):
        settings = {"run": str(trained / f"batch-{batch}"), "data": {"batch": batch, "validation": None}}
        stages.train(config(trained, "stage1", **settings, train={"steps": 1, "warmup": 0}))
        told = "data.batch is 1: with a single image" in " ".join(capsys.readouterr().out.split())
        assert told == (batch == 1)
    assert [record["itc"] for record in records(trained / "batch-1")] == [0.0]


@pytest.mark.slow
def test_a_folder_in_which_another_process_trains_is_refused(trained: Path) -> None:
    """Also when that one has outlived the launcher that was killed; what it writes stays its own."""
    run = trained / "claimed"
    first = start(trained, run)
    while not (run / "metrics.jsonl").is_file():
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGSTOP)
    second = start(trained, run)
    said, _ = second.communicate(timeout=300)
    assert second.returncode == 2, said
    assert f"another process is training in the run folder '{run}'" in " ".join(said.split())
    os.kill(first.pid, signal.SIGCONT)
    assert first.wait(timeout=300) == 0
    assert_same(run, trained / "whole")
