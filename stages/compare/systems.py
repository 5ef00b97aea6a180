"""Systems that are compared, and those that cannot be."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Refused:
    """A system that has no row of numbers, with the reason as one sentence."""

    reason: str
