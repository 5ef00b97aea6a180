"""How a run is saved, ends early and goes on: `kill -9` at any moment, then the same command, gives the same bits.

Checkpoints hold the optimizer, the scaler, and of every process the random states and the losses that are not logged
yet; batches and the learning rate are functions of the step. What a run has written past its newest checkpoint is
forgotten when it resumes.
"""

from __future__ import annotations

import signal
import threading
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, Self

import torch
from filelock import FileLock, Timeout
from rich.console import Console

from qformer import checkpoint, distributed
from qformer.model.loading import load_trained, trained_tensors
from qformer.records import read_records, replace_records
from qformer.types import UsageError
from stages import pictures

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from stages.loop import Run

console = Console()
#: What may differ between the configuration of a checkpoint and that of the command that resumes it.
MAY_CHANGE = {
    "": {"run"},  # a run folder may have been moved
    "data": {"workers", "max_bad"},
    "train": {"log_every", "validate_every", "save_every", "keep_last", "keep_every"},
}
BY_STEP = ("metrics.jsonl", "captions.jsonl")  # files with a record per step, to which a resumed run appends


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Make the run folder and keep it from any other run meanwhile; however the process ends, that ends with it.

    What is started anew after `kill -9` of a launcher could else meet the processes that it had started.

    Raises:
        UsageError: the folder cannot be written, or another process trains in it.
    """
    lock, fault = FileLock(folder / ".lock"), ""
    if distributed.rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            fault = f"another process trains in the run folder '{folder}'; wait until it ends, or stop it"
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
    """Takes SIGTERM and SIGINT down instead of obeying at once; a second one does end the process.

    Attributes:
        asked: name of the signal, None while there was none.
    """

    asked: str | None = None

    def __enter__(self) -> Self:
        here = threading.current_thread() is threading.main_thread()  # no other thread may handle signals
        self._before = {n: signal.signal(n, self._note) for n in (signal.SIGTERM, signal.SIGINT) if here}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if self.asked is not None:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name


def end(run: Run, asked: str | None) -> NoReturn:
    """Leave a run that has been asked to stop and is saved.

    Raises:
        SystemExit: code 0.
    """
    distributed.barrier()
    run.accelerator.end_training()
    console.print(
        f"stopped by {asked or 'another process'}: step {run.step} is saved; the same command goes on from here"
    )
    raise SystemExit(0)


def save(run: Run, must: bool) -> None:
    """Write a checkpoint of this step: rank 0 does, and the others wait.

    Raises:
        OSError: it cannot be written and it `must` be; else the run goes on and says so.
    """
    scaler, device = run.accelerator.scaler, run.accelerator.device
    own = {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "pending": [(step, {name: loss.cpu() for name, loss in losses.items()}) for step, losses in run.pending],
    }
    trainer = {
        "optimizer": run.optimizer.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
        "processes": distributed.gather_objects(own),
        "extent": run.extent,
    }
    kinds = _skipped(run)
    fault = _write_checkpoint(run, trainer, kinds) if distributed.rank() == 0 else None
    fault = distributed.gather_objects(fault)[0]
    if fault is not None:
        before = checkpoint.newest(run.folder)
        kept = "there is none before it" if before is None else f"'{before.name}' before it is whole"
        told = f"the checkpoint of step {run.step} could not be written ({fault}); {kept}"
        if must:
            raise OSError(f"{told}; make room in '{run.folder}' and give the same command again")
        console.print(f"{told}; training goes on", soft_wrap=True)


def _skipped(run: Run) -> dict[str, int]:
    return dict(sum(distributed.gather_objects(run.skipped.kinds), Counter()).most_common())


def tell_skipped(run: Run) -> None:
    """Say what all processes have skipped, if anything."""
    if kinds := _skipped(run):
        told = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        console.print(f"skipped: {told}; listed in {run.skipped.path}", soft_wrap=True)


def _write_checkpoint(run: Run, trainer: dict[str, Any], skipped: dict[str, int]) -> str | None:
    """What went wrong, if anything did."""
    train, tensors = run.config.train, trained_tensors(run.inner)
    meta = {"parameters": sum(tensor.numel() for tensor in tensors.values()), "skipped": skipped}
    keep = train.keep_last, train.keep_every
    try:
        checkpoint.save(run.folder, run.step, run.config, tensors, meta, trainer, run.extra, *keep)
    except OSError as error:
        return str(error)
    try:
        pictures.curves(run.folder, run.config)
    except OSError as error:
        console.print(f"the curves could not be drawn ({error})")
    return None


def resume(run: Run) -> None:
    """Continue from the newest checkpoint of the run folder that is whole, if it has one.

    Raises:
        UsageError: all are damaged, it is of another configuration or number of processes, or not all processes see it.
    """
    found = _agree(run)
    if found is not None:
        _load(run, found)
    if distributed.rank() == 0:
        for name in BY_STEP:
            _forget_after(run.folder / name, run.step)
    run.skipped.forget_from(run.step * run.config.train.accumulate * distributed.world())
    if found is not None:
        console.print(f"resuming {run.folder} at step {run.step}", soft_wrap=True)


def _agree(run: Run) -> Path | None:
    """The checkpoint from which all processes go on: rank 0 chooses, and the others see whether it is there."""
    name, fault = None, ""
    if distributed.rank() == 0:
        try:
            chosen = _newest_whole(run.folder)
            name = None if chosen is None else chosen.name
        except UsageError as error:
            fault = str(error)
    name, fault = distributed.gather_objects((name, fault))[0]
    if fault:
        raise UsageError(fault)
    folder = None if name is None else run.folder / checkpoint.FOLDER / name
    if not all(distributed.gather_objects(folder is None or folder.is_dir())):
        raise UsageError(f"not all processes see the files in '{run.folder}'; set run to a folder that they share")
    return folder


def _newest_whole(run: Path) -> Path | None:
    found = checkpoint.complete(run)
    for folder in reversed(found):
        try:
            checkpoint.check(folder)
            checkpoint.read(folder)
            checkpoint.read_trainer(folder)
            return folder
        except checkpoint.Damaged as damage:
            if folder == found[0]:
                raise
            console.print(f"{damage}: trying the one before it", soft_wrap=True)
    return None


def _load(run: Run, found: Path) -> None:
    saved, trainer = checkpoint.read(found), checkpoint.read_trainer(found)
    if differs := _differences(saved.config.model_dump(), run.config.model_dump()):
        raise UsageError(
            f"the run '{run.folder}' was started with another configuration ({'; '.join(differs)}); "
            "set run to another folder, or remove this one"
        )
    # Checkpoints from before there were several processes hold the random state of the one.
    processes = trainer.get("processes") or [{"cpu": trainer["random"], "cuda": None, "pending": []}]
    if len(processes) != distributed.world():
        raise UsageError(
            f"the run '{run.folder}' was trained by {len(processes)} processes, not {distributed.world()}; "
            "start as many, or begin another run with init set to this one"
        )
    before = trainer.get("extent")  # which checkpoints of earlier versions lack
    if before is not None and before != run.extent:
        raise UsageError(
            f"data.train has {run.extent} samples or shards, and had {before} when the run '{run.folder}' began: it "
            "would go on in another order; put the data back as they were, or begin another run with init set to this "
            "one"
        )
    load_trained(run.inner, saved.tensors, found)
    run.optimizer.load_state_dict(trainer["optimizer"])
    if trainer["scaler"] is not None and run.accelerator.scaler is not None:
        run.accelerator.scaler.load_state_dict(trainer["scaler"])
    own, device = processes[distributed.rank()], run.accelerator.device
    torch.set_rng_state(own["cpu"])
    if device.type == "cuda" and own["cuda"] is not None:
        torch.cuda.set_rng_state(own["cuda"], device)
    run.pending = [(step, {name: loss.to(device) for name, loss in losses.items()}) for step, losses in own["pending"]]
    run.step = int(saved.meta["step"])


def _differences(saved: dict[str, Any], now: dict[str, Any], path: str = "") -> list[str]:
    """Keys whose values differ and may not, as `key was a, is b`."""
    found = []
    for key in sorted(saved.keys() | now.keys()):
        a, b = saved.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{path}{key}.")
        elif a != b and key not in MAY_CHANGE.get(path.rstrip("."), ()):
            found.append(f"{path}{key} was {a}, is {b}")
    return found


def _forget_after(file: Path, step: int) -> None:
    """Drop the records of steps that will be done again."""
    if file.is_file():
        replace_records(file, [record for record in read_records(file) if record["step"] <= step])
