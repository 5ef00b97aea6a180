"""Seconds, CPU-seconds and memory of a quickstart."""

from __future__ import annotations

import os
import resource
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qformer.progress import console

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass
class Clock:
    """A clock that prints the seconds of each phase, with its budget if it has one.

    Attributes:
        phases: seconds of each phase. cpu: the same in seconds of all cores, processes that have ended included.
    """

    start: float = field(default_factory=time.perf_counter)
    phases: dict[str, float] = field(default_factory=dict)
    cpu: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str, budget: int | None = None) -> Iterator[None]:
        console.rule(name if budget is None else f"{name} (budget {budget} s)")
        begun, worked = time.perf_counter(), cpu_seconds()
        yield
        self.phases[name], self.cpu[name] = time.perf_counter() - begun, cpu_seconds() - worked
        of = "" if budget is None else f" of {budget}"
        console.print(f"{name}: {self.phases[name]:.0f}{of} s, {self.cpu[name]:.0f} s of CPU")

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start


def cpu_seconds() -> float:
    """Return the CPU-seconds of this process and of its children that have ended."""
    return sum(os.times()[:4])


def peak_memory() -> float:
    """Return the peak resident memory of this process in GB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9
