"""Rows: what a sample shows, one picture, several, or a clip, is read, cropped and cut into tiles together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from qformer.images import read_image
from qformer.resolution.base import cut, resize
from qformer.types import BadSample, Plan, Tiles, UsageError
from qformer.videos import Clip, is_video, read_shown, read_video

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from qformer.types import Sample


def parts_of(shown: Any) -> list[Any]:
    """List the pictures and clips of a row: `Sample.image`, or what `FrontEnd.tiles` takes for a row.

    Raises:
        UsageError: an empty list.
    """
    parts = list(shown) if isinstance(shown, list | tuple) else [shown]
    if not parts:
        raise UsageError("a row shows nothing; give a list of at least one picture or clip")
    return parts


def only_picture(sample: Sample) -> Any:
    """Get the picture of a sample, for what takes one picture each, such as a gallery.

    Raises:
        BadSample: kinds `several images`, and `no image` for a video.
    """
    parts = parts_of(sample.image)
    if len(parts) > 1:
        raise BadSample("several images", f"{sample.key} shows {len(parts)} together; one is taken here")
    if is_video(parts[0]):
        raise BadSample("no image", f"{sample.key} shows a video; a picture is taken here")
    return parts[0]


def read_row(shown: Any, strategy: Any) -> list[Tensor | Clip]:
    """Read the pictures of a row, uint8[3, h, w], and of its videos the frames that the strategy chooses.

    Args:
        strategy: a `ResolutionStrategy`.

    Raises:
        UsageError, BadSample: as `read_image` and `read_video` do.
    """
    parts = parts_of(shown)
    read: list[Tensor | Clip] = []
    for number, one in enumerate(parts, 1):
        try:
            found = read_shown(one, strategy)
        except BadSample as bad:
            if len(parts) == 1 or isinstance(bad, UsageError):
                raise
            raise BadSample(bad.kind, f"{bad.detail} (number {number} of the {len(parts)} shown)") from bad
        if isinstance(found, Clip) and not found.sampled:
            found = Clip(found.frames[strategy.sample(len(found.frames), found.fps)], found.fps, True)
        read.append(found)
    return read


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


def sizes_of(row: Sequence[Tensor | Clip]) -> list[tuple[int, int, int]]:
    """Width, height and number of frames of each part of a row, 0 frames of a picture."""
    pixels = [(one.frames, len(one.frames)) if isinstance(one, Clip) else (one, 0) for one in row]
    return [(own.shape[-1], own.shape[-2], frames) for own, frames in pixels]


def cut_row(row: Sequence[Tensor | Clip], strategy: Any) -> Tiles:
    """Plan what `read_row` has read, and cut it into the tiles of one row.

    Raises:
        UsageError: the strategy refuses it; the error is a `BadSample` as well.
    """
    plan, exact = plan_row(sizes_of(row), strategy), strategy.rule.exact
    pixels = [one.frames if isinstance(one, Clip) else one for one in row]
    cuts = [cut(own, part, exact) for own, part in zip(pixels, plan.parts or (plan,), strict=True)]
    return Tiles([tile for own in cuts for tile in own], [plan])


def plan_row(sizes: Sequence[Sequence[int]], strategy: Any) -> Plan:
    """Plan a row by its `sizes_of`; its pictures share what the strategy gives to several of them.

    Args:
        strategy: a `ResolutionStrategy`.

    Raises:
        UsageError: as `cut_row`.
    """
    pictures = [(width, height) for width, height, frames in sizes if not frames]
    stills: Plan | None = strategy.plan_many(pictures) if pictures else None
    if stills is not None and len(pictures) == len(sizes):
        return stills
    left = iter(() if stills is None else stills.parts or (stills,))
    return strategy.join([strategy.plan_video(*size) if size[2] else next(left) for size in sizes])
