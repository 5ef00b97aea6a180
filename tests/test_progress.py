"""Progress where the output goes to a file: a line a minute, and nothing of work that is short."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from qformer import progress


class Clock:
    """Seconds that pass when somebody says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


def work(console: Console, clock: Clock, seconds: float, disable: bool = False) -> None:
    with progress.Bar("{task.fields[losses]}", console=console, disable=disable) as bar:
        task = bar.add_task("stage1", total=2000, losses="")
        for step in range(1, 11):
            clock.now += seconds
            bar.update(task, completed=100 * step, losses=f"loss {step}")


def lines(seconds: float, clock: Clock, **options: bool) -> list[str]:
    file = io.StringIO()
    work(Console(file=file, width=40), clock, seconds, **options)
    return file.getvalue().splitlines()


def test_a_line_a_minute_and_one_at_the_end(clock: Clock) -> None:
    told = lines(25, clock)  # 250 seconds: a line at 75, 150 and 225
    assert [line.partition(",")[0] for line in told] == [
        "stage1: 300 of 2",
        "stage1: 600 of 2",
        "stage1: 900 of 2",
        "stage1: 1",
    ]
    assert told[0].startswith("stage1: 300 of 2,000, ")
    assert told[0].endswith(", loss 3")
    assert told[-1].startswith("stage1: 1,000 of 2,000, ")


def test_nothing_is_told_of_short_work_and_where_another_process_speaks(clock: Clock) -> None:
    assert lines(5, clock) == []
    assert lines(25, clock, disable=True) == []


def test_a_terminal_has_a_bar(clock: Clock) -> None:
    file = io.StringIO()
    work(Console(file=file, width=120, force_terminal=True), clock, 25)
    assert "━" in file.getvalue()
    assert "of 2,000" not in file.getvalue()


def test_tracked_items(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO())
    monkeypatch.setattr(progress, "get_console", lambda: console)
    seen = []
    for item in progress.track(["a", "b", "c"], "embedding images"):
        clock.now += 61
        seen.append(item)
    assert seen == ["a", "b", "c"]
    assert console.file.getvalue().splitlines()[0].startswith("embedding images: 1 of 3, ")
