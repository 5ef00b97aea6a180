"""Resolution strategies: pure geometry that divides an image of a given size into tiles, without pixels or weights.

`ResolutionStrategy.plan` plans the tiles; `cut` cuts them from an image. A new strategy is a dataclass with a `plan`
method and an entry in the table of `qformer.resolution`; nothing else changes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from math import isfinite
from typing import TYPE_CHECKING, Any, ClassVar

from qformer.types import BadSample, Plan, Tile, Tiles, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

#: (width, height) of pictures whose plans show the markers of a strategy that does not name them.
SHOWN = ((64, 64), (640, 480), (480, 640), (2000, 2000), (4000, 1000), (1000, 4000))
LARGEST = 178_956_970  # pixels of a canvas: as many as a picture may have that is read (Pillow's limit)


class Refused(UsageError, BadSample):
    """A picture or clip that a strategy does not take: wrong input to a command, a bad sample of a data set."""

    def __init__(self, message: str) -> None:
        UsageError.__init__(self, message)
        self.kind, self.detail = "refused", message

    def __str__(self) -> str:
        return self.detail


class ResolutionStrategy(ABC):
    """A rule that divides images of any size into tiles. Subclasses are frozen dataclasses; fields are YAML options.

    Attributes:
        exact: let `cut_all` resize as Pillow does, to the last bit; otherwise it is faster, see `resize`.
        reduced_by: options that lower the number of tiles or tokens, for messages.
        exposed: the fault that a strategy is there to show, in lists and to probes; empty: it is there to be used.
        between: text of the language model between the pictures and clips of a row.
        max_frames: frames that `sample` takes of a clip; more than these are thinned out evenly.

    Options that came after the first stores and galleries have `repr=False`: galleries know a strategy by its `repr`,
    and a store leaves them out at their defaults. What they change is not seen on a picture by itself.
    """

    exact: ClassVar[bool] = False
    reduced_by: ClassVar[str] = ""
    exposed: ClassVar[str] = ""
    between = ""
    max_frames: int | None = 32

    @property
    def rule(self) -> ResolutionStrategy:
        """The strategy whose fields are the options: itself, unless it is wrapped in limits."""
        return self

    @abstractmethod
    def plan(self, width: int, height: int) -> Plan:
        """Plan the tiles for an image of `width` x `height` pixels, in the order in which the LLM reads them.

        Raises:
            UsageError: a side is below 1 pixel, or the strategy has no plan for this size.
        """

    def plan_many(self, sizes: Sequence[tuple[int, int]]) -> Plan:
        """Plan several pictures of one row, each (width, height); their own plans are its `parts`.

        Raises:
            UsageError: see `plan`; or there are no pictures.
        """
        return Plan.join([self.plan(*size) for size in some(sizes)], self.between)

    def plan_video(self, width: int, height: int, frames: int) -> Plan:
        """Plan a clip of so many frames, which are sampled already: by default each frame as a picture.

        Raises:
            UsageError: see `plan`; or there are no frames.
        """
        require_frames(frames)
        plan = self.plan(width, height)
        tiles = tuple(replace(tile, frames=(frame,)) for frame in range(frames) for tile in plan.tiles)
        return Plan(plan.image, tiles, plan.grid, None, frames * plan.tokens)

    def join(self, plans: Sequence[Plan]) -> Plan:
        """Plan a row that shows pictures and clips, whose plans these are; see `Plan.join`."""
        return Plan.join(plans, self.between)

    def sample(self, total: int, fps: float) -> list[int]:
        """Choose frames of a clip of `total` frames, `fps` of them a second: by default one a second.

        Raises:
            UsageError: there are no frames, or the rate is no positive number.
        """
        return spread(total, fps, rate=1.0, most=self.max_frames or total)

    def markers(self) -> tuple[str, ...]:
        """List the texts that may stand around tiles (`Tile.before` and `after`), each once.

        By default they are looked for in plans of pictures of a few sizes; a strategy that shows others elsewhere, such
        as in clips, names them itself.
        """
        found: dict[str, None] = {}
        for size in SHOWN:
            try:
                tiles = self.plan(*size).tiles
            except UsageError:
                continue  # too large or too narrow for it
            found |= dict.fromkeys(text for tile in tiles for text in (tile.before, tile.after) if text)
        return tuple(found)

    def slice(self, image: Tensor) -> list[Tensor]:
        """Plan and cut an image: uint8[3, h, w] -> its tiles, see `cut`."""
        return cut(image, self.plan(image.shape[2], image.shape[1]))


def require(strategy: ResolutionStrategy, *names: str, least: int = 1) -> None:
    """Check that these options are `least` or more; None is allowed.

    Raises:
        UsageError: one is not.
    """
    for name in names:
        value: Any = getattr(strategy, name)
        if value is not None and value < least:
            raise UsageError(f"resolution.{name} is {value}; give {least} or more")


def require_size(width: int, height: int) -> None:
    """Check that a picture has pixels.

    Raises:
        UsageError: a side is below 1.
    """
    if width < 1 or height < 1:
        raise Refused(f"the picture is {width} x {height} pixels; give one whose sides have at least 1 pixel")


def require_frames(frames: int) -> None:
    """Check that a clip has frames.

    Raises:
        UsageError: it has none.
    """
    if frames < 1:
        raise Refused(f"the clip has {frames} frames; give one with at least 1 frame")


def some(sizes: Sequence[tuple[int, int]]) -> Sequence[tuple[int, int]]:
    """The sizes of the pictures of a row, of which there must be at least one.

    Raises:
        UsageError: there is none.
    """
    if not sizes:
        raise Refused("the row has no pictures; give at least one")
    return sizes


def whole(width: int, height: int, **more: Any) -> Tile:
    """A tile that is the whole picture, resized to `width` x `height`; `more` are other fields of the tile."""
    size = (width, height)
    return Tile(size, size, (0, 0), (0, 0, width, height), **more)


def spread(total: int, fps: float, rate: float, most: int) -> list[int]:
    """Take `rate` frames a second, or `most` frames evenly spread over the clip where that is more than `most`.

    Raises:
        UsageError: there are no frames, or the frame rate of the clip is no positive number.
    """
    require_frames(total)
    if not (isfinite(fps) and fps > 0):
        raise Refused(f"the clip has {fps} frames a second; give a positive number")
    frames = range(0, total, max(round(fps / rate), 1))
    if len(frames) <= most:
        return list(frames)
    import numpy as np

    return np.linspace(0, total - 1, most, dtype=int).tolist()


def resize(image: Tensor, width: int, height: int, exact: bool = False) -> Tensor:
    """Resize bicubically with antialiasing, as PIL does: uint8[3, h, w] -> uint8[3, height, width].

    Args:
        exact: let Pillow resize bytes. Torch needs a third of its time, but about one value in 200 differs, by one
            level (by two where a picture is enlarged). Floats from 0 to 1 are always resized by torch.
    """
    import torch  # imported here, so that the options of a strategy are checked without torch
    import torch.nn.functional as F

    if image.shape[-2:] == (height, width):
        return image
    if exact and not image.is_floating_point():
        import numpy as np
        from PIL import Image

        picture = Image.fromarray(image.permute(1, 2, 0).cpu().contiguous().numpy())
        pixels = np.array(picture.resize((width, height), Image.Resampling.BICUBIC))
        return torch.from_numpy(pixels).permute(2, 0, 1).to(image.device)
    # Bytes in channels-last order take torch's vectorized path, which rounds to bytes between the two passes like PIL.
    batch = image.unsqueeze(0).contiguous(memory_format=torch.channels_last)
    made = F.interpolate(batch, (height, width), mode="bicubic", antialias=True, align_corners=False).squeeze(0)
    return made.clamp(0, 1) if made.is_floating_point() else made  # bicubic interpolation overshoots; bytes are clamped


def cut(image: Tensor, plan: Plan, exact: bool = True) -> list[Tensor]:
    """Cut the tiles of an image or clip: uint8[3, h, w] or [F, 3, h, w] -> a list of uint8[3, tile height, tile width].

    A tile of several frames is uint8[frames, 3, tile height, tile width]. Tiles that share content, canvas and offset
    are cropped from one resized image; where a canvas is larger than its content it has the color `fill`. A crop that
    is `scaled` is resized once more.

    Args:
        exact: see `resize`.

    Raises:
        UsageError: the plan names frames that the clip lacks, or a canvas is too large to be painted.
    """
    import torch

    clip = image if image.ndim == 4 else image.unsqueeze(0)
    last = max(frame for tile in plan.tiles for frame in tile.frames)
    if last >= len(clip):
        raise Refused(f"the plan reads frame {last}, but there are {len(clip)}; plan the frames that are there")
    canvases: dict[Any, Tensor] = {}
    tiles = []
    for tile in plan.tiles:
        shown = [_crop(clip[frame], tile, canvases, (frame, exact)) for frame in tile.frames]
        tiles.append(shown[0] if len(shown) == 1 else torch.stack(shown))
    return tiles


def _crop(image: Tensor, tile: Tile, canvases: dict[Any, Tensor], kind: tuple[int, bool]) -> Tensor:
    """Pixels of a tile of one frame; `canvases` keeps what its other tiles are cropped from."""
    key = (*kind, tile.content, tile.canvas, tile.offset, tile.fill)
    if key not in canvases:
        canvases[key] = _paste(resize(image, *tile.content, kind[1]), tile)
    left, top, right, bottom = tile.box
    pixels = canvases[key][:, top:bottom, left:right]
    return (pixels if tile.scaled is None else resize(pixels, *tile.scaled, kind[1])).contiguous()


def _paste(content: Tensor, tile: Tile) -> Tensor:
    import torch

    if tile.canvas == tile.content:
        return content
    require_canvas(tile)
    (width, height), (x, y) = tile.canvas, tile.offset
    fill = torch.tensor(tile.fill, device=content.device)[:, None, None]
    canvas = content.new_empty(height, width, 3).permute(2, 0, 1)  # channels last, as Pillow reads it without a copy
    canvas[:] = fill / 255 if content.is_floating_point() else fill
    canvas[:, y : y + content.shape[1], x : x + content.shape[2]] = content
    return canvas


def require_canvas(tile: Tile) -> None:
    """Check that the canvas of a tile can be painted.

    Raises:
        UsageError: padding makes it too large.
    """
    width, height = tile.canvas
    if tile.canvas != tile.content and width * height > LARGEST:
        raise Refused(
            f"a picture of {tile.content[0]} x {tile.content[1]} pixels would be padded to {width} x {height}, more "
            f"than {LARGEST:,} pixels; crop or shrink it, or use another strategy"
        )


def plannable(image: Tensor, strategy: ResolutionStrategy) -> Tensor:
    """The same image, uint8[3, h, w], if the strategy has a plan for it that can be cut.

    Raises:
        BadSample: it has none (`Refused`).
    """
    for tile in strategy.plan(image.shape[2], image.shape[1]).tiles:
        require_canvas(tile)
    return image


def cut_all(images: Sequence[Tensor], strategy: ResolutionStrategy) -> Tiles:
    """Plan and cut several images, each uint8[3, h, w].

    Raises:
        UsageError: the strategy refuses one of them; the error is a `BadSample` as well.
    """
    plans = [strategy.plan(image.shape[2], image.shape[1]) for image in images]
    exact = strategy.rule.exact
    return Tiles([tile for image, plan in zip(images, plans, strict=True) for tile in cut(image, plan, exact)], plans)
