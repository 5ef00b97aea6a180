"""Visual tokens of a system on the pictures of a source, by their plans: no picture is cut and no weight is read."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from qformer.data.base import indices
from qformer.images import read_image
from qformer.model.assembly import assemble
from qformer.model.vision_language import VisionLanguageModel
from qformer.stages.checking import check
from qformer.stages.plan.first_token import Reader
from qformer.stages.plan.outline import Words
from qformer.types import BadSample, UsageError
from qformer.videos import Clip, is_video, read_video
from qformer.videos.rows import parts_of, plan_row

if TYPE_CHECKING:
    from qformer.data.base import Source
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


class Planner:
    """The model of a configuration without numbers, which counts what it would read of rows.

    Args:
        config: of stage two.
        like: of a configuration with the same towers, which are taken from it.
        model: of this configuration, with numbers; by default it is made without.

    Raises:
        UsageError: options that do not fit, or a tower whose sizes are not known.
    """

    def __init__(self, config: Config, like: Planner | None = None, model: VisionLanguageModel | None = None) -> None:
        known = None if like is None else like.model
        self.model: VisionLanguageModel
        if model is not None:
            self.model = model
        elif known is None or config.question is not None or (config.llm is not None and config.llm.lora is not None):
            self.model = Reader(config).model
        else:
            with torch.device("meta"):
                made, _ = assemble(check(config), "cpu", known.frontend.encoder, known.llm, Words())
            assert isinstance(made, VisionLanguageModel)
            self.model = made
        self._room = self.model.room(self.model.max_tokens)
        self._has_qformer = config.has_qformer
        self._tiles: dict[tuple[tuple[int, int], bool], Plan] = {}  # size, and if it is of a clip -> a plan with it

    @property
    def patch(self) -> int:
        """Side of a patch of the image encoder, in pixels."""
        return self.model.frontend.encoder.patch_size

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
        strategy = self.model.frontend.strategy
        plan = plan_row([_chosen(part, strategy) for part in sizes], strategy)
        self._room(plan)
        for part in plan.parts or (plan,):
            self._tiles |= {(tile.size, part.fine is None): part for tile in part.tiles}
        return self._room.count(plan)

    @torch.no_grad()
    def projects(self) -> bool:
        """Return True if the connector takes the tiles of all rows that were counted: some refuse only then."""
        if self._has_qformer:
            return True
        encoder, connector = self.model.frontend.encoder, self._room.connector  # which is on the meta device
        for (size, _), plan in self._tiles.items():
            grid = encoder.grid(*size)
            tokens = torch.empty(1, encoder.per_patch * math.prod(grid), encoder.width, device="meta")
            try:
                connector.project(tokens, grid, **connector.options_of(plan, grid))
            except UsageError:
                return False
        return True


def _chosen(part: Part, strategy: ResolutionStrategy) -> tuple[int, int, int]:
    """Width, height and number of frames that a strategy chooses of a picture or clip."""
    width, height, frames, fps = part
    return width, height, len(strategy.sample(frames, fps)) if frames and fps else frames
