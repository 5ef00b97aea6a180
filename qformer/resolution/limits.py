"""Limits of what a picture and a request may take: tiles to encode, tokens for the language model to read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qformer.resolution.base import Refused, ResolutionStrategy

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from qformer.types import Plan

ALL = "max_slices (uhd), max_tiles (internvl), max_side or max_patches (anyres), high (oryx) or max_tokens (qwen2vl)"


def guard(plans: Sequence[Plan], tiles: int | None = None, tokens: int | None = None, reduced_by: str = ALL) -> None:
    """Refuse plans with more tiles or tokens than these; None is no limit.

    Where a row shows several pictures, the limits hold for each of them and for the whole row.

    Args:
        reduced_by: options of the strategy that lower these numbers, for the message.

    Raises:
        UsageError: a plan exceeds a limit.
    """
    for whole in plans:
        for plan in (*whole.parts, whole):
            for what, number, most in (("tiles", len(plan.tiles), tiles), ("tokens", plan.tokens, tokens)):
                if most is None or number <= most:
                    continue
                raise Refused(
                    f"{named(plan)} makes {number:,} {what}, but limits.{what} is {most:,}; "
                    + (f"lower {reduced_by} of resolution, " if reduced_by else "")
                    + f"{'or ' * bool(reduced_by)}raise limits.{what}"
                )


def named(plan: Plan) -> str:
    """Say what a plan is of, for messages."""
    if plan.parts:
        return f"a row of {len(plan.parts)} pictures"
    frames = 1 + max(frame for tile in plan.tiles for frame in tile.frames)
    return f"a {'picture' if frames == 1 else f'clip of {frames} frames'} of {plan.image[0]} x {plan.image[1]} pixels"


@dataclass(frozen=True)
class Limited(ResolutionStrategy):
    """Another strategy, whose plans must stay within limits; see `guard`.

    `check` is called with each plan as well, and raises `Refused`.
    """

    inner: ResolutionStrategy
    tiles: int | None = None
    tokens: int | None = None
    check: Callable[[Plan], None] | None = field(default=None, repr=False)

    @property
    def rule(self) -> ResolutionStrategy:
        return self.inner.rule

    def plan(self, width: int, height: int) -> Plan:
        return self._within(self.inner.plan(width, height))

    def plan_many(self, sizes: Sequence[tuple[int, int]]) -> Plan:
        return self._within(self.inner.plan_many(sizes))

    def plan_video(self, width: int, height: int, frames: int) -> Plan:
        return self._within(self.inner.plan_video(width, height, frames))

    def join(self, plans: Sequence[Plan]) -> Plan:
        return self._within(self.inner.join(plans))

    def sample(self, total: int, fps: float) -> list[int]:
        return self.inner.sample(total, fps)

    def markers(self) -> tuple[str, ...]:
        """Those of the other strategy, also where its plans for common sizes exceed the limits."""
        return self.inner.markers()

    def _within(self, plan: Plan) -> Plan:
        guard([plan], self.tiles, self.tokens, self.inner.reduced_by)
        if self.check is not None:
            self.check(plan)
        return plan
