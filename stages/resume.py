"""Saving, stopping and resuming a run: `kill -9` at any moment, then the same command, gives bit-identical results.

Checkpoints hold the optimizer, the scaler, and for every process its random states and the losses not logged yet;
batches and the learning rate are functions of the step. Records written after the newest checkpoint are dropped when
the run resumes.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, Self

from filelock import FileLock, Timeout

from qformer import distributed
from qformer.checkpoints import folder as checkpoint
from qformer.checkpoints.weights import load_trained, trained_tensors
from qformer.data.loader import ENDING
from qformer.figures import curves as pictures
from qformer.files.records import Form, Metrics, Step, read_lines, replace_records
from qformer.progress import console
from qformer.stages.trainer_state import check_finite, collect, restore
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from qformer.schema import Config
    from qformer.stages.run import Run

#: Keys that can differ between the configuration of a checkpoint and that of the command that resumes it.
MAY_CHANGE = {
    "": {"run"},  # the run folder can be moved
    "data": {"workers", "max_bad"},
    "train": {"log_every", "validate_every", "save_every", "keep_last", "keep_every"},
}
#: Files with a record per step, to which a resumed run appends.
BY_STEP: dict[str, type[Form]] = {"metrics.jsonl": Metrics, "captions.jsonl": Step}
MOMENTS = 2.0  # seconds


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Create the run folder and lock it until the process ends, however it ends.

    Without the lock, a run restarted after `kill -9` of its launcher could collide with processes that still run.

    Raises:
        UsageError: the folder cannot be written, or another process trains in it.
    """
    lock, fault = FileLock(folder / ".lock"), ""
    if distributed.rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            fault = f"another process is training in the run folder '{folder}'; wait until it ends, or stop it"
        except NotImplementedError:  # some network file systems have no locks
            pass
        except OSError as error:
            fault = f"cannot write to the run folder '{folder}' ({error.strerror}); set run to another"
    fault = distributed.gather_objects(fault)[0]
    if fault:
        raise UsageError(fault)
    try:
        yield
    finally:
        lock.release()


class Stop:
    """A context that records the signals which ask the run to end, so that the current step can be saved first.

    Signals that were ignored before stay ignored (`nohup`). The same signal again, or Ctrl-C, ends the process at once,
    except within the first `MOMENTS`: one request can arrive twice, from the terminal or its shell and from torchrun,
    or as SIGTERM and SIGHUP from systemd.

    Attributes:
        asked: name of the first signal; None before it arrives.
    """

    asked: str | None = None

    def __enter__(self) -> Self:
        here = threading.current_thread() is threading.main_thread()  # only it can handle signals
        self._terminals = [number for number in (1, 2) if os.isatty(number)]
        numbers = [n for n in ENDING if here and signal.getsignal(n) not in (signal.SIG_IGN, None)]
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if self.asked is None:
            self.asked, self._since = name, now
            if name == "SIGHUP":
                self._leave_terminal()
        elif now - self._since > MOMENTS and name in (self.asked, "SIGINT"):
            raise KeyboardInterrupt

    def _leave_terminal(self) -> None:
        """Redirect output for a closed terminal to the null device, since writing to it would fail."""
        for number in self._terminals:
            if not os.isatty(number):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, number)
                os.close(nowhere)


def end(run: Run, asked: str | None) -> NoReturn:
    """End a run that was asked to stop, after its step was saved.

    Raises:
        SystemExit: with code 0.
    """
    distributed.barrier()
    run.accelerator.end_training()
    console.print(
        f"stopped by {asked or 'another process'}: step {run.step} is saved; run the same command to continue"
    )
    raise SystemExit(0)


def save(run: Run, must: bool) -> None:
    """Write a checkpoint of this step in rank 0, while the other processes wait.

    Args:
        must: raise if the checkpoint cannot be written; otherwise print a message and go on training.

    Raises:
        NonFiniteLoss, NonFiniteWeights: nothing is saved, and the previous checkpoint stays the newest.
        OSError: the checkpoint cannot be written, and `must` is set.
    """
    check_finite(run)
    trainer = collect(run)
    kinds = _skipped(run)
    fault = _write_checkpoint(run, trainer, kinds) if distributed.rank() == 0 else None
    fault = distributed.gather_objects(fault)[0]
    if fault is not None:
        before = checkpoint.newest(run.folder)
        kept = "there is no earlier one" if before is None else f"the previous one, '{before.name}', is complete"
        message = f"the checkpoint of step {run.step} could not be written ({fault}); {kept}"
        if must:
            raise OSError(f"{message}; free some disk space in '{run.folder}' and run the same command again")
        console.print(f"{message}; training continues", soft_wrap=True)


def _skipped(run: Run) -> dict[str, int]:
    return dict(sum(distributed.gather_objects(run.skipped.kinds), Counter()).most_common())


def print_skipped(run: Run) -> None:
    """Print how many samples all processes have skipped, by kind, if any."""
    if kinds := _skipped(run):
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        console.print(f"skipped: {counts}; listed in {run.skipped.path}", soft_wrap=True)


def _write_checkpoint(run: Run, trainer: dict[str, Any], skipped: dict[str, int]) -> str | None:
    """Write the checkpoint and the curves; returns the reason if the checkpoint could not be written."""
    train, tensors = run.config.train, trained_tensors(run.inner)
    count = sum(tensor.numel() for tensor in tensors.values())
    meta = {"parameters": count, "skipped": skipped, "precision": run.precision}
    keep = train.keep_last, train.keep_every
    try:
        checkpoint.save(run.folder, run.step, run.config, tensors, meta, trainer, run.extra, *keep)
    except OSError as error:
        return str(error)
    try:
        pictures.curves(run.folder, run.config)
    except (OSError, UsageError) as error:
        console.print(f"the curves could not be drawn ({error})", soft_wrap=True)
    return None


def resume(run: Run) -> None:
    """Continue from the newest undamaged checkpoint of the run folder, if there is one.

    Raises:
        UsageError: all checkpoints are damaged, the configuration or the number of processes differs, or not all
            processes see the checkpoint.
    """
    found = _agree(run)
    if found is not None:
        _load(run, found)
    _in_rank_zero(lambda: _drop_after(run.folder, run.step))
    run.skipped.forget_from(run.step * run.config.train.accumulate * distributed.world())
    if found is not None:
        console.print(f"resuming {run.folder} at step {run.step}", soft_wrap=True)


def _agree(run: Run) -> Path | None:
    """Agree on the checkpoint to resume from: rank 0 chooses it, and the others check that they see it."""
    name = _in_rank_zero(lambda: _newest_whole(run.folder))
    folder = None if name is None else run.folder / checkpoint.FOLDER / name
    if not all(distributed.gather_objects(folder is None or folder.is_dir())):
        raise UsageError(f"not all processes see the files in '{run.folder}'; set run to a folder that they share")
    return folder


def _in_rank_zero(act: Callable[[], str | None]) -> str | None:
    """Call `act` in rank 0 only and return its result in every process.

    Raises:
        UsageError: in every process, if `act` raised it.
    """
    done, fault = None, ""
    if distributed.rank() == 0:
        try:
            done = act()
        except UsageError as error:
            fault = str(error)
    done, fault = distributed.gather_objects((done, fault))[0]
    if fault:
        raise UsageError(fault)
    return done


def _newest_whole(run: Path) -> str | None:
    found = checkpoint.complete(run)
    for folder in reversed(found):
        try:
            checkpoint.check(folder)
            checkpoint.read(folder)
            checkpoint.read_trainer(folder)
            return folder.name
        except checkpoint.Damaged as damage:
            if folder == found[0]:
                raise
            console.print(f"{damage}; trying the previous one", soft_wrap=True)
    return None


def _load(run: Run, found: Path) -> None:
    saved, trainer = checkpoint.read(found, verify=False), checkpoint.read_trainer(found, verify=False)  # rank 0 did
    if differs := _differences(_shortened(saved.config, run.config).model_dump(), run.config.model_dump()):
        raise UsageError(
            f"the run '{run.folder}' was started with another configuration ({'; '.join(differs)}); "
            "set run to another folder, or remove this one"
        )
    restore(run, trainer, found)
    load_trained(run.inner, saved.tensors, found)
    run.step = saved.meta["step"]
    _tell_changes(run, saved)


def _shortened(saved: Config, now: Config) -> Config:
    """Give the saved configuration the steps of this run if they are fewer: a run can be shortened."""
    steps = min(saved.train.steps, now.train.steps)
    return saved.model_copy(update={"train": saved.train.model_copy(update={"steps": steps})})


def _tell_changes(run: Run, saved: checkpoint.Checkpoint) -> None:
    """Print what differs from the run so far: its number of steps, or the precision that `auto` takes."""
    steps, before = run.config.train.steps, saved.config.train.steps
    if run.step > steps:
        console.print(
            f"{run.folder} is at step {run.step}, past train.steps {steps}, so nothing is trained", soft_wrap=True
        )
    elif steps < before:
        console.print(
            f"train.steps is lowered from {before} to {steps}, at which the learning rate now ends", soft_wrap=True
        )
    was = saved.meta.get("precision") or run.precision  # checkpoints of earlier versions lack it
    if was != run.precision:
        console.print(f"this run was in {was} until step {run.step} and goes on in {run.precision}", soft_wrap=True)


def _differences(saved: dict[str, Any], now: dict[str, Any], path: str = "") -> list[str]:
    """List the keys that differ and must not, as `key was a, is b`."""
    found = []
    for key in sorted(saved.keys() | now.keys()):
        a, b = saved.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{path}{key}.")
        elif a != b and key not in MAY_CHANGE.get(path.rstrip("."), ()):
            found.append(f"{path}{key} was {a}, is {b}")
    return found


def _drop_after(folder: Path, step: int) -> None:
    """Drop the records of steps that will be repeated."""
    kept = {
        folder / name: [record for record in read_lines(folder / name, form) if record["step"] <= step]
        for name, form in BY_STEP.items()
        if (folder / name).is_file()
    }
    for file, records in kept.items():
        replace_records(file, records)
