"""Rows: what a sample shows, one picture, several, or a clip, is read, cropped and cut into tiles together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from qformer.images import read_image
from qformer.resolution.base import cut, resize
from qformer.types import Plan, Tiles, UsageError
from qformer.videos import Clip, is_video, read_shown, read_video

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def parts_of(shown: Any) -> list[Any]:
    """List the pictures and clips of a row: `Sample.image`, or what `FrontEnd.tiles` takes for a row.

    Raises:
        UsageError: an empty list.
    """
    parts = list(shown) if isinstance(shown, list | tuple) else [shown]
    if not parts:
        raise UsageError("a row shows nothing; give a list of at least one picture or clip")
    return parts


def read_row(shown: Any, strategy: Any) -> list[Tensor | Clip]:
    """Read the pictures of a row, uint8[3, h, w], and of its videos the frames that the strategy chooses.

    Args:
        strategy: a `ResolutionStrategy`.

    Raises:
        UsageError, BadSample: as `read_image` and `read_video` do.
    """
    return [read_shown(one, strategy) for one in parts_of(shown)]


def glance(shown: Any) -> Tensor:
    """Read a row for somebody to look at, uint8[3, h, w]: its pictures side by side, and the middle frame of a video.

    Raises:
        UsageError, BadSample: as `read_image` and `read_video` do.
    """
    pictures = []
    for one in parts_of(shown):
        clip = read_video(one, lambda total, _: [total // 2]) if is_video(one) else one
        pictures.append(clip.frames[len(clip.frames) // 2] if isinstance(clip, Clip) else read_image(clip))
    height = pictures[0].shape[1]
    widths = [max(round(one.shape[2] * height / one.shape[1]), 1) for one in pictures]
    return torch.cat([resize(one, width, height) for one, width in zip(pictures, widths, strict=True)], dim=2)


def cut_row(row: Sequence[Tensor | Clip], strategy: Any) -> Tiles:
    """Plan the pictures and clips of one row and cut them into its tiles.

    Raises:
        UsageError: the strategy refuses them; the error is a `BadSample` as well.
    """
    pixels, plan = plan_row(row, strategy)
    exact = strategy.rule.exact
    cuts = [cut(own, part, exact) for own, part in zip(pixels, plan.parts or (plan,), strict=True)]
    return Tiles([tile for own in cuts for tile in own], [plan])


def plan_row(row: Sequence[Tensor | Clip], strategy: Any) -> tuple[list[Tensor], Plan]:
    """Plan a row that shows several pictures and clips; pictures share what the strategy gives to several of them.

    Args:
        row: uint8[3, h, w] or `Clip`s, at least one.
        strategy: a `ResolutionStrategy`.

    Returns:
        The pixels of each part of the plan: of a picture, or of the frames of a clip that are shown, uint8[F, 3, h, w].
    """
    pixels, sizes = [], []
    for one in row:
        kept = one
        if isinstance(one, Clip):
            kept = one.frames if one.sampled else one.frames[strategy.sample(len(one.frames), one.fps)]
        sizes.append((kept.shape[-1], kept.shape[-2], len(kept) if isinstance(one, Clip) else 0))
        pixels.append(kept)
    return pixels, plan_sizes(sizes, strategy)


def plan_sizes(sizes: Sequence[Sequence[int]], strategy: Any) -> Plan:
    """Plan a row from width, height and number of frames of each part, 0 for a picture; see `plan_row`."""
    pictures = [(width, height) for width, height, frames in sizes if not frames]
    stills: Plan | None = strategy.plan_many(pictures) if pictures else None
    if stills is not None and len(pictures) == len(sizes):
        return stills
    left = iter(() if stills is None else stills.parts or (stills,))
    return strategy.join([strategy.plan_video(*size) if size[2] else next(left) for size in sizes])
