"""Data types of the project, and the table of dimensions that every docstring uses.

    B  images in a batch            H  width of the Q-Former
    N  tiles, all images together   L  width of the language model
    S  visual tokens in a row       P  width of the ITC embedding (256)
    Q  queries (32)                 M  length of the visual prefix of the LLM
    V  vocabulary, or query rows    T  text tokens
    D  width of the image encoder   W  processes

Sizes of images and tiles are `(width, height)` in pixels; grids of tokens are `(rows, columns)`.
A shape is written `float[B, Q, H]`; masks are `bool`, True where something is valid.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import accumulate
from operator import is_
from typing import TYPE_CHECKING, Any, Literal, Self

from qformer.identity import of_picture

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Tile:
    """Geometry of one rectangle that the image encoder sees, without pixels.

    The whole image is resized to `content` and pasted at `offset` on a canvas of size `canvas`; the tile is the `box`
    (left, top, right, bottom) of that canvas. All numbers are pixels, sizes are (width, height).

    Attributes:
        scaled: (width, height) to which the box is resized last; None keeps its size.
        fill: RGB of the canvas around the content, 0..255.
        frames: frames of a clip that the tile is made of; (0,) for a picture.
        before, after: markers, text of the language model around the tile's tokens; each is exactly one vector.
        lead: further text in front of it, as many vectors as it has tokens.
    """

    content: tuple[int, int]
    canvas: tuple[int, int]
    offset: tuple[int, int]
    box: tuple[int, int, int, int]
    scaled: tuple[int, int] | None = None
    fill: tuple[int, int, int] = (0, 0, 0)
    frames: tuple[int, ...] = (0,)
    before: str = ""
    after: str = ""
    lead: str = ""

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the tile in pixels, as the image encoder sees it."""
        left, top, right, bottom = self.box
        return self.scaled or (right - left, bottom - top)


@dataclass(frozen=True)
class Plan:
    """Division of one image into tiles, in the order in which the LLM reads them.

    Attributes:
        image: (width, height) of the image, in pixels.
        tiles: the tiles, in reading order.
        grid: (columns, rows) of the fine view; (1, 1) when the image is not sliced.
        overview: index in `tiles` of the tile that shows the whole image, None if there is none.
        tokens: number of visual tokens of the published system's own connector, including its newline, begin and end
            embeddings but no text separators.
        fine: (rows, columns) of the tokens that the language model reads of the fine view, of one frame of a clip;
            None where they are no grid.
        newline: where the learned newline of AnyRes stands: after each row, each frame, or once at the end; "" nowhere.
        parts: plans of the pictures, where one row shows several; `tiles` and `tokens` are theirs together.
    """

    image: tuple[int, int]
    tiles: tuple[Tile, ...]
    grid: tuple[int, int]
    overview: int | None
    tokens: int
    fine: tuple[int, int] | None = None
    newline: Literal["", "row", "frame", "end"] = ""
    parts: tuple[Plan, ...] = ()

    @property
    def markers(self) -> int:
        """Number of markers, `before` and `after` tiles; they are not in `tokens`."""
        return sum(bool(marker) for tile in self.tiles for marker in (tile.before, tile.after))

    @property
    def has_text(self) -> bool:
        """True where the language model reads markers or other text around tiles."""
        return self.markers > 0 or any(tile.lead for tile in self.tiles)

    @classmethod
    def join(cls, plans: Sequence[Plan], between: str = "") -> Plan:
        """One row that shows several pictures, in this order, with the text `between`; a single plan stays as it is.

        The whole has no fine view, no overview and the `image` of the first; `parts` holds what each has of its own.

        Raises:
            ValueError: no plans.
        """
        if not plans:
            raise ValueError("got no plans to join; give one for each picture")
        if len(plans) == 1:
            return plans[0]
        parts = tuple(part for plan in plans for part in plan.parts or (plan,))
        parts = tuple(part._led_by(between * bool(number), between) for number, part in enumerate(parts))
        tiles = tuple(tile for part in parts for tile in part.tiles)
        return cls(parts[0].image, tiles, (1, 1), None, sum(part.tokens for part in parts), parts=parts)

    def _led_by(self, text: str, old: str) -> Plan:
        """The same plan with `text` in front of its first tile, in place of `old` where that is there."""
        lead = text + self.tiles[0].lead.removeprefix(old)
        return replace(self, tiles=(replace(self.tiles[0], lead=lead), *self.tiles[1:])) if old else self


@dataclass
class Tiles:
    """Pixels of the tiles of B images; the number of tiles per image and their sizes may vary.

    Attributes:
        pixels: N tensors `uint8[3, h, w]` (0..255) or `float[3, h, w]` (0..1): all tiles of the first image
            in the order of its plan, then those of the second, and so on; empty if there are `tokens`.
        plans: B plans.
        tokens: stored output of the frozen image encoder for each tile, packed rows [S, ...] (`files.packing`); None
            if the tiles are still to be encoded.
    """

    pixels: list[Tensor]
    plans: list[Plan]
    tokens: list[Tensor] | None = None

    def __post_init__(self) -> None:
        planned, given = sum(self.counts), len(self.pixels if self.tokens is None else self.tokens)
        if planned != given:
            raise ValueError(f"got {given} tiles, but the plans hold {planned}; give one per planned tile")

    @classmethod
    def from_pixels(cls, pixels: Tensor) -> Tiles:
        """Wrap B images of one size, each as a single tile. `pixels`: float[B, 3, h, w] in 0..1, or uint8."""
        height, width = pixels.shape[-2:]
        size = (width, height)
        tile = Tile(content=size, canvas=size, offset=(0, 0), box=(0, 0, width, height))
        plan = Plan(image=size, tiles=(tile,), grid=(1, 1), overview=0, tokens=32)
        return cls(list(pixels), [plan] * len(pixels))

    @property
    def counts(self) -> list[int]:
        """Number of tiles of each of the B images."""
        return [len(plan.tiles) for plan in self.plans]

    def __len__(self) -> int:
        return len(self.plans)

    def __getitem__(self, index: slice) -> Tiles:
        """Select the images of a slice, with all their tiles."""
        starts = [0, *accumulate(self.counts)]
        chosen = [tile for i in range(*index.indices(len(self))) for tile in range(starts[i], starts[i + 1])]
        if self.tokens is not None:
            return Tiles([], self.plans[index], [self.tokens[tile] for tile in chosen])
        return Tiles([self.pixels[tile] for tile in chosen], self.plans[index])

    @classmethod
    def join(cls, parts: Sequence[Tiles]) -> Tiles:
        """Concatenate the images of all parts, which must be all pixels or all tokens."""
        pixels = [tile for part in parts for tile in part.pixels]
        plans = [plan for part in parts for plan in part.plans]
        stored = any(part.tokens is not None for part in parts)
        return cls(pixels, plans, [tile for part in parts for tile in part.tokens or []] if stored else None)


@dataclass
class VisualTokens:
    """Output of the image encoder, tile by tile, without padding, before any connector.

    Attributes:
        rows: N tensors float[S, D], the tokens of each tile: `extra` ones, then those of the patches row by row.
        grids: N pairs (rows, columns) of the patch grid of each tile.
        extra: number of tokens before the patch grid (1 if the encoder keeps its CLS token).
        plans: the B plans of the images.
        per_patch: tokens of each patch, side by side: S = extra + per_patch * rows * columns.
        counts: number of tiles of each of the B images, by default as planned. Images that come from another process
            have no more than this and their rows: their `grids` and `plans` are empty.
    """

    rows: list[Tensor]
    grids: list[tuple[int, int]]
    extra: int
    plans: list[Plan]
    per_patch: int = 1
    counts: list[int] = field(default_factory=list)
    _whole: Tensor | None = field(default=None, init=False, repr=False, compare=False)
    _views: list[Tensor] = field(default_factory=list, init=False, repr=False, compare=False)  # of `_whole`

    def __post_init__(self) -> None:
        self.counts = self.counts or [len(plan.tiles) for plan in self.plans]
        if sum(self.counts) != len(self.rows):
            raise ValueError(f"got {len(self.rows)} tiles of tokens, but the plans hold {sum(self.counts)}")

    def __len__(self) -> int:
        """Number of images, B."""
        return len(self.counts)

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each of the N tiles."""
        return [len(row) for row in self.rows]

    @property
    def device(self) -> torch.device:
        return (self.rows[0] if self.rows else self.packed).device

    @property
    def packed(self) -> Tensor:
        """All rows, one after the other: float[sum of S, D]; not copied where they are views of one tensor."""
        from qformer.ragged import pack  # here alone: a configuration is read and refused without torch

        if self._whole is not None and len(self.rows) == len(self._views) and all(map(is_, self.rows, self._views)):
            return self._whole
        return pack(self.rows)

    def padded(self) -> tuple[Tensor, Tensor | None]:
        """float[N, S, D] with zeros behind the shorter rows, and bool[N, S], True at tokens that exist.

        The mask is None where all rows are equally long; then nothing is copied that `packed` does not copy.
        """
        from qformer.ragged import Padding

        packed = self.packed
        padding = Padding(self.lengths, packed.device)
        return padding.pad(packed), padding.mask

    @classmethod
    def unpack(cls, packed: Tensor, lengths: Sequence[int], *geometry: Any) -> Self:
        """Rows of these lengths, views of float[sum of S, D]; `geometry` is what the class takes behind them."""
        return cls(list(packed.split(list(lengths))) if lengths else [], *geometry)._keep(packed)

    def repack(self, packed: Tensor) -> Self:
        """The same tiles with other tokens: float[sum of S, any width], of which the rows become views."""
        return replace(self, rows=list(packed.split(self.lengths)) if self.rows else [])._keep(packed)

    def select(self, images: Sequence[int]) -> Self:
        """Those images with all their tiles, in that order; nothing is copied."""
        tiles = self._tiles(images)
        chosen = replace(
            self,
            rows=[self.rows[tile] for tile in tiles],
            grids=[self.grids[tile] for tile in tiles] if self.grids else [],
            plans=[self.plans[image] for image in images] if self.plans else [],
            counts=[self.counts[image] for image in images],
        )
        return chosen if tiles or not self.rows else chosen._keep(self.rows[0][:0])

    def places(self, images: Sequence[int]) -> Tensor:
        """Places of the tokens of those images in `packed`, long[n]."""
        import torch

        starts = [0, *accumulate(self.lengths)]
        places = [torch.arange(starts[tile], starts[tile + 1]) for tile in self._tiles(images)]
        return torch.cat([torch.zeros(0, dtype=torch.long), *places]).to(self.device)

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """The images of all parts, one after the other; nothing is copied."""
        if len(parts) == 1:
            return parts[0]
        known = all(part.plans or not part.counts for part in parts)
        joined = replace(
            parts[0],
            rows=[row for part in parts for row in part.rows],
            grids=[grid for part in parts for grid in part.grids] if known else [],
            plans=[plan for part in parts for plan in part.plans] if known else [],
            counts=[count for part in parts for count in part.counts],
        )
        return joined if joined.rows else joined._keep(parts[0].packed)

    def _tiles(self, images: Sequence[int]) -> list[int]:
        """Numbers of the tiles of those images."""
        starts = [0, *accumulate(self.counts)]
        return [tile for image in images for tile in range(starts[image], starts[image + 1])]

    def _keep(self, packed: Tensor) -> Self:
        """Remember of which tensor the rows are views; no rows at all have a device and a gradient by it."""
        self._whole, self._views = packed, list(self.rows)
        return self


@dataclass
class Tokens:
    """Tokenized text. ids: long[B, T]; mask: bool[B, T], False at padding."""

    ids: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str) -> Tokens:
        return Tokens(self.ids.to(device), self.mask.to(device))

    def select(self, texts: Tensor) -> Tokens:
        """Select texts by their numbers, long[n], in that order."""
        texts = texts.to(self.ids.device)
        return Tokens(self.ids[texts], self.mask[texts])


@dataclass
class Batch:
    """Input of a training step, on the CPU; the model moves tensors to the device where it needs them.

    Attributes:
        tiles: the images.
        text: B captions, as strings or tokenized.
        image_id: B ids; equal ids mark the same image, which is never a negative of itself. None: all images differ.
        question, answers: B questions, and B lists of accepted answers, each as often as it was given.
        answer: B answers to learn at this step, drawn from `answers`. None: not drawn.
        negatives: fixed hard negatives (image for each text, text for each image), long[B] each, as indices into the
            global batch. For parity tests; an ordinary step draws its own.
        cuts: B fractions in [0, 1) of where to split each caption for an encoder-decoder, see `split_caption` of
            `qformer.model.vision_language`. None: not drawn yet.
        targets: divisor of the sum of token losses: mean number of target tokens over the processes and accumulated
            batches of a step. None: mean over the processes alone.
    """

    tiles: Tiles
    text: list[str] | Tokens
    image_id: Sequence[str | int] | Tensor | None = None
    question: list[str] | None = None
    answers: list[list[str]] | None = None
    answer: list[str] | None = None
    negatives: tuple[Tensor, Tensor] | None = None
    cuts: list[float] | None = None
    targets: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tiles)


@dataclass
class Sample:
    """One record of a data source.

    Attributes:
        image: encoded bytes, path of a file, or decoded pixels `uint8[h, w, 3]`; a file that is a video by its name; or
            a list of these, which are shown together, in this order.
        key: name of the record in messages and in `skipped.jsonl` (a path, a line number, a seed).
        image_id: equal for records that show the same image. None is replaced by the identity from
            `qformer.identity`: the normalized path of the file, or the digest of the bytes.
        captions: true captions, any number; one is drawn at each step.
        question, answers: a question about the image and its accepted answers, each as often as it was given.
        prompt: text in front of a cleaned caption.
        facts: other fields of the record, by their own names, such as ids, types, choices and labels, for benchmarks.
    """

    image: bytes | Path | np.ndarray | list[Any]
    key: str
    image_id: Any = None  # str or int once the sample is made
    captions: list[str] = field(default_factory=list)
    question: str | None = None
    answers: list[str] = field(default_factory=list)
    prompt: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.image_id = of_picture(self.image, self.image_id, self.key)


class UsageError(ValueError):
    """User input that cannot be used. The message is one sentence: what was given, what was expected, what to do.

    The command line prints it without a traceback and exits with code 2.
    """


class TooLong(UsageError):
    """Input with more tokens than a language model has positions."""


class LeftOut(Warning):
    """Data that are not used, and how many; the command line prints the warning as one line."""


class BadSample(Exception):
    """A record that cannot be used. It is skipped, counted by `kind` and recorded; it never ends a run by itself."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind, detail)  # both, so that the exception survives pickling between data workers
        self.kind = kind
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}" if self.detail else self.kind
