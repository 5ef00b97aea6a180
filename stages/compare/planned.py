"""Visual tokens of a system on the pictures of a source, by their plans: no picture is cut and no weight is read."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from qformer.data.base import indices
from qformer.images import read_image
from qformer.stages.plan.first_token import Reader
from qformer.types import BadSample, UsageError
from qformer.videos import Clip, is_video, read_video
from qformer.videos.rows import parts_of, plan_row

if TYPE_CHECKING:
    from qformer.data.base import Source
    from qformer.model.room import Room
    from qformer.resolution.base import ResolutionStrategy
    from qformer.schema import Config
    from qformer.types import Plan

    Part = tuple[int, int, int, float]  # width, height, frames (0: a picture), frames a second (0: chosen already)

MOST = 500  # rows of a source that are looked at, evenly spread


@dataclass(frozen=True)
class Rows:
    """Sizes of what the rows of a source show, and how many rows show these; `bad` rows could not be read."""

    sizes: Counter[tuple[Part, ...]]
    bad: int = 0

    @classmethod
    def of(cls, source: Source) -> Rows:
        """Look at the rows of a source, `MOST` of them where there are more.

        Raises:
            UsageError: none can be read.
        """
        every = list(indices(source))
        sizes: Counter[tuple[Part, ...]] = Counter()
        bad = 0
        for number in range(min(len(every), MOST)):
            try:
                shown = source[every[number * len(every) // min(len(every), MOST)]].image
                sizes[tuple(map(_look, parts_of(shown)))] += 1
            except BadSample:
                bad += 1
        if not sizes:
            raise UsageError(f"none of {bad} samples of the data can be read; give others")
        return cls(sizes, bad)


def _look(shown: Any) -> Part:
    """Size of a picture or clip."""
    seen: list[tuple[int, float]] = []

    def first(total: int, fps: float) -> list[int]:
        seen.append((total, fps))
        return [0]

    if is_video(shown):
        frames = read_video(shown, first).frames
        return frames.shape[-1], frames.shape[-2], *seen[0]
    if isinstance(shown, Clip):
        rate = 0.0 if shown.sampled else shown.fps
        return shown.frames.shape[-1], shown.frames.shape[-2], len(shown.frames), rate
    picture = read_image(shown)
    return picture.shape[2], picture.shape[1], 0, 0.0


@dataclass
class Planner:
    """The model of a configuration without numbers, which counts what it would read of rows.

    Args:
        config: of stage two.

    Raises:
        UsageError: options that do not fit, or a tower whose sizes are not known.
    """

    config: Config
    reader: Reader = field(init=False)
    _room: Room = field(init=False)
    _tried: set[tuple[int, int]] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        self.reader = Reader(self.config)
        self._room = self.reader.model.room(self.reader.model.max_tokens)

    @property
    def patch(self) -> int:
        """Side of a patch of the image encoder, in pixels."""
        return self.reader.model.frontend.encoder.patch_size

    def mean(self, rows: Rows) -> tuple[float, int]:
        """Mean number of vectors that the language model reads in place of a row, and the rows that are refused.

        A row is refused that the strategy or the connector does not take, or that leaves no room for a text.

        Raises:
            UsageError: all are refused; the message is that of the first.
        """
        total = seen = 0
        first: UsageError | None = None
        for sizes, count in rows.sizes.items():
            try:
                total += count * self._tokens(sizes)
                seen += count
            except UsageError as error:
                first = first or error
        if not seen:
            raise first or UsageError("the data have no rows; give some")
        return total / seen, rows.sizes.total() - seen

    def _tokens(self, sizes: tuple[Part, ...]) -> int:
        model = self.reader.model
        strategy = model.frontend.strategy
        plan = plan_row([_chosen(part, strategy) for part in sizes], strategy)
        self._room(plan)
        if not self.config.has_qformer:
            self._try(plan)
        return self._room.count(plan)

    @torch.no_grad()
    def _try(self, plan: Plan) -> None:
        """Let the connector project a tile of each size of a plan that is new: some refuse only then.

        Raises:
            UsageError: it does not take one of them.
        """
        model = self.reader.model
        for part in plan.parts or (plan,):
            for size in {tile.size for tile in part.tiles} - self._tried:
                encoder = model.frontend.encoder
                grid = encoder.grid(*size)
                tokens = self.reader.blank(1, encoder.per_patch * math.prod(grid), encoder.width)
                model.connector.project(tokens, grid, **model.connector.options_of(part, grid))
                self._tried.add(size)


def _chosen(part: Part, strategy: ResolutionStrategy) -> tuple[int, int, int]:
    """Width, height and number of frames that a strategy chooses of a picture or clip."""
    width, height, frames, fps = part
    return width, height, len(strategy.sample(frames, fps)) if frames and fps else frames
