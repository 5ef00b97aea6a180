"""Processes among which the runs of a comparison are spread; each run is claimed by one of them at a time."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console

from qformer.progress import Bar, console
from qformer.stages.compare.runs import Exam, Run, carry_out, is_done
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from multiprocessing.process import BaseProcess

POLL = 1.0  # seconds between looks at what the processes have done
GRACE = 60.0  # seconds for a process that was told to end to save its step


def spread(runs: Sequence[Run], exam: Exam, processes: int) -> None:
    """Carry out all runs, in this process or in several; returns when all are done.

    Raises:
        UsageError: the disk is full, or a process was killed; what is finished stays.
    """
    todo = [run for run in runs if not is_done(run, exam)]
    with Bar(console=Console(file=sys.stdout, quiet=console.quiet)) as bar:
        task = bar.add_task("runs", total=len(runs), completed=len(runs) - len(todo))
        if processes == 1 or len(todo) < 2:
            for run in _finished(todo, exam):
                bar.update(task, description=f"{run.system}, seed {run.seed}", advance=1)
            return
        _spread(todo, exam, min(processes, len(todo)), lambda left: bar.update(task, completed=len(runs) - left))


def _spread(todo: Sequence[Run], exam: Exam, processes: int, tell: Callable[[int], None]) -> None:
    context = multiprocessing.get_context("spawn")
    said = context.SimpleQueue()
    started = [
        context.Process(target=_work, args=(_turned(todo, number, processes), exam, said), daemon=False)
        for number in range(processes)
    ]
    with _one_thread():
        for process in started:
            process.start()
    try:
        while any(process.is_alive() for process in started):
            time.sleep(POLL)
            tell(sum(not is_done(run, exam) for run in todo))
            if not said.empty():
                break
    finally:
        _end(started)
    if not said.empty():
        raise UsageError(said.get())
    if killed := [process.exitcode for process in started if process.exitcode]:
        raise UsageError(
            f"a process of the comparison ended with exit code {killed[0]}, perhaps for want of memory; what is "
            "finished stays: run the same command again, with fewer --processes"
        )
    if any(not is_done(run, exam) for run in todo):
        raise SystemExit(0)  # somebody has asked the processes to stop, and they have saved their steps


def _turned(runs: Sequence[Run], number: int, processes: int) -> list[Run]:
    """All runs, beginning with those of this process, so that as few as possible are waited for."""
    own = list(runs[number::processes])
    return own + [run for run in runs if run not in own]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Environment in which a new process computes with one thread, as every run does."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]
        os.environ |= {} if before is None else {"OMP_NUM_THREADS": before}


def _end(started: Sequence[BaseProcess]) -> None:
    """Let processes that still run save their step and end."""
    for process in started:
        if process.is_alive():
            process.terminate()
    for process in started:
        process.join(GRACE)
        if process.is_alive():
            process.kill()
            process.join()


def _work(runs: Sequence[Run], exam: Exam, said: Any) -> None:
    try:
        for _ in _finished(runs, exam):
            pass
    except UsageError as error:
        said.put(str(error))


def _finished(runs: Sequence[Run], exam: Exam) -> Iterator[Run]:
    """Carry out runs that no other process is at, and yield each that is done, until all are."""
    left = list(runs)
    while left:
        before = len(left)
        for run in list(left):
            if is_done(run, exam) or carry_out(run, exam):
                left.remove(run)
                yield run
        if len(left) == before:
            time.sleep(POLL)
