"""Images and videos given to a command, in groups; other files are reported, counted and skipped."""

from __future__ import annotations

import sys
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from qformer.data.folders import Listing, list_images
from qformer.images import read_image
from qformer.progress import Bar
from qformer.resolution.base import require_canvas
from qformer.types import BadSample, UsageError
from qformer.videos import Clip, Video, is_video, moves

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from qformer.model.vision_language import VisionLanguageModel

    Images = list[tuple[Path, Tensor | Clip | Video]]  # a video before it is read, when it has become a clip

FORMATS = "give JPEG, PNG or WebP files, or videos in MP4, MOV, WebM or MKV"


def open_file(file: Path) -> Tensor | Video:
    """Read a picture, or list the frames of a video or of a GIF that moves.

    Raises:
        UsageError, BadSample: as `read_image` and `Video` do.
    """
    return Video(file) if is_video(file) or moves(file) else read_image(file)


class ImageFiles:
    """Images, videos, and the images in folders, read in groups; other files are reported, counted and skipped.

    Frames of videos are read by `track`, since the strategy of a model chooses them.
    """

    def __init__(self, given: list[Path], batch: int | None) -> None:
        """Find the files; without a `batch` all are one group."""
        self.files: list[Path] = []
        for path in given:
            inside = list_images(path) if path.is_dir() else Listing()
            self.files += sorted([*inside.images, *inside.unread]) or [path]
            inside.unread, inside.alone = [], 0  # reported when they are read; captions are not used here
            if inside.left_out:
                print(f"qformer: '{path}': left out: {inside.left_out}", file=sys.stderr)
        self.batch = batch or len(self.files)
        self.skipped: list[str] = []
        self.reported = 0  # how many of the skipped files

    def groups(self) -> Iterator[Images]:
        """Groups of readable images; the first group is read at once.

        Raises:
            SystemExit: code 1, no file can be read as an image.
        """
        images = self._images()
        first = list(islice(images, self.batch))
        if not first:
            more = f"; and {len(self.skipped) - 1} more" if len(self.skipped) > 1 else ""
            print(f"qformer: no file can be read as an image ({self.skipped[0]}{more}); {FORMATS}", file=sys.stderr)
            sys.exit(1)
        return chain([first], iter(lambda: list(islice(images, self.batch)), []))

    def _images(self) -> Iterator[tuple[Path, Tensor | Clip | Video]]:
        for file in self.files:
            try:
                if file.is_dir():
                    raise BadSample("a folder without images")
                pixels = open_file(file)
            except BadSample as bad:
                self.skipped.append(f"{file}: {bad}")
                continue
            self._report()
            yield file, pixels

    def _report(self) -> None:
        for fault in self.skipped[self.reported :]:
            print(f"qformer: skipped {fault}", file=sys.stderr)
        self.reported = len(self.skipped)

    def tell_skipped(self) -> None:
        """Report the skipped files after the last image, and the total."""
        self._report()
        if self.skipped:
            print(f"qformer: skipped {len(self.skipped)} of {len(self.files)} files", file=sys.stderr)
        if len(self.skipped) == len(self.files):
            sys.exit(1)

    def track(
        self, what: str, groups: Iterator[Images], model: VisionLanguageModel, new: int | None
    ) -> Iterator[Images]:
        """Groups whose videos are read, of which the model's strategy chooses frames, without images that it refuses.

        Nor are there any behind which the language model has no positions for `new` tokens; None does not ask.

        What cannot be used is skipped; groups without any image are left out.

        A progress bar is shown on standard error, or a line a minute, unless printed results already show progress.

        Raises:
            UsageError: the only file is an image that is refused, or a video whose frames cannot be decoded.
        """
        quiet = len(self.files) <= self.batch or sys.stdout.isatty()
        with Bar(console=Console(stderr=True), disable=quiet, redirect_stdout=False) as progress:
            task = progress.add_task(what, total=len(self.files))
            for group in groups:
                if taken := self._ready(group, model, new):
                    yield taken
                progress.update(task, completed=self.files.index(group[-1][0]) + 1)

    def _ready(self, group: Images, model: VisionLanguageModel, new: int | None) -> Images:
        """The group with clips in place of its videos, without images that the model cannot be shown."""
        taken: Images = []
        for file, shown in group:
            try:
                taken.append((file, _usable(shown, model, new)))
            except BadSample as bad:
                if len(self.files) == 1 and isinstance(bad, UsageError):
                    raise
                if len(self.files) == 1:
                    raise UsageError(f"'{file}' cannot be read as a video ({bad}); {FORMATS}") from bad
                self.skipped.append(f"{file}: {bad}")
        self._report()
        return taken


def _usable(shown: Tensor | Clip | Video, model: VisionLanguageModel, new: int | None) -> Tensor | Clip:
    """A picture, or the frames of a video that the strategy chooses, if the model can be shown them."""
    strategy = model.frontend.strategy
    seen = shown.read(strategy.sample) if isinstance(shown, Video) else shown
    if isinstance(seen, Clip):
        plan = strategy.plan_video(seen.frames.shape[3], seen.frames.shape[2], len(seen.frames))
    else:
        plan = strategy.plan(seen.shape[2], seen.shape[1])
    for tile in plan.tiles:
        require_canvas(tile)
    if new is not None:
        model.require_positions(plan, new)
    return seen
