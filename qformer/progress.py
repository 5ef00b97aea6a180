"""Progress of long work: a bar in a terminal, or one line per minute if the output goes to a file."""

from __future__ import annotations

import time
from collections.abc import Sized
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from rich import get_console
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from rich.progress import Task, TaskID

MINUTE = 60.0
console = Console(markup=False, emoji=False)  # names and texts of others hold brackets and colons
Item = TypeVar("Item")


class Bar(Progress):
    """Progress bar of rich with the usual columns; one line per minute if the console is not a terminal.

    Lines are written on updates of the progress, never by a separate thread. If any line was written, a last one is
    written at the end.
    """

    def __init__(
        self, *fields: str, console: Console | None = None, disable: bool = False, redirect_stdout: bool = True
    ) -> None:
        """Add columns for `fields`, which are templates such as `{task.fields[losses]}`."""
        console = console or get_console()
        self.fields = fields
        self._writes = not disable and not console.is_terminal
        self._began = self._last_line = time.monotonic()
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        times = (TimeElapsedColumn(), TimeRemainingColumn())
        super().__init__(
            *columns,
            *times,
            *(TextColumn(field, markup=False) for field in fields),
            console=console,
            disable=disable or self._writes,
            redirect_stdout=redirect_stdout,
        )

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        if self._writes and time.monotonic() - self._last_line >= MINUTE:
            self._write()

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        if self._writes and time.monotonic() - self._last_line >= MINUTE:
            self._write()

    def stop(self) -> None:
        super().stop()
        if self._last_line > self._began:
            self._write()

    def _write(self) -> None:
        self._last_line = time.monotonic()
        for task in self.tasks:
            self.console.print(self._line(task), markup=False, highlight=False, soft_wrap=True)

    def _line(self, task: Task) -> str:
        total = "" if task.total is None else f" of {int(task.total):,}"
        parts = [f"{int(task.completed):,}{total}", f"{_rounded(task.elapsed)} passed"]
        parts += [] if task.time_remaining is None else [f"{_rounded(task.time_remaining)} left"]
        parts += [text for field in self.fields if (text := field.format(task=task).strip())]
        return f"{task.description}: {', '.join(parts)}"


def _rounded(seconds: float | None) -> str:
    return str(timedelta(seconds=int(seconds or 0)))


def track(items: Iterable[Item], description: str, total: int | None = None, disable: bool = False) -> Iterator[Item]:
    """Yield the items and show on standard output, as a bar or one line per minute, how many are done."""
    with Bar(disable=disable) as bar:
        known = len(items) if total is None and isinstance(items, Sized) else total
        task = bar.add_task(description, total=known)
        for item in items:
            yield item
            bar.advance(task)
