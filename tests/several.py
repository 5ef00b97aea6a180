"""Defaults of resolution strategies for several pictures and clips, where their base class has none yet."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from qformer.model import frontend
from qformer.resolution.base import ResolutionStrategy, cut
from qformer.types import Plan

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytest
    from torch import Tensor


def complete(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every strategy plan rows of pictures and clips, and `cut` cut clips."""
    if hasattr(ResolutionStrategy, "plan_video"):
        return
    for one in (plan_many, plan_video, sample):
        monkeypatch.setattr(ResolutionStrategy, one.__name__, one, raising=False)
    monkeypatch.setattr(frontend, "cut", cut_frames)


def plan_many(self: Any, sizes: Sequence[tuple[int, int]]) -> Plan:
    return Plan.join([self.plan(*size) for size in sizes])


def plan_video(self: Any, width: int, height: int, frames: int) -> Plan:
    plan: Plan = self.plan(width, height)
    tiles = tuple(replace(tile, frames=(frame,)) for frame in range(frames) for tile in plan.tiles)
    return replace(plan, tiles=tiles, overview=None, tokens=frames * plan.tokens)


def sample(self: Any, total: int, fps: float) -> list[int]:
    return list(range(0, total, max(round(fps), 1)))[:32]


def cut_frames(image: Tensor, plan: Plan) -> list[Tensor]:
    clip = image if image.ndim == 4 else image[None]
    found = []
    for tile in plan.tiles:
        frames = [cut(clip[frame], replace(plan, tiles=(tile,)))[0] for frame in tile.frames]
        found.append(frames[0] if len(frames) == 1 else torch.stack(frames))
    return found
