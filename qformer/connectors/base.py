"""Contract of connectors: image tokens in, input embeddings of the language model out, as many as a plan says.

A connector of one's own is a subclass with an `__init__(width, llm_width, **options)` and a `project`. It overrides
`pieces` and `count_part` where the language model reads more than the tokens of the tiles one after the other.
"""

from __future__ import annotations

import math
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from qformer.types import Plan, Tile, VisualTokens

    # The vector of a marker's text, float[L]; called with (text, words=True), those of its tokens, float[n, L].
    Marker = Callable[..., Tensor]


class _Pair(NamedTuple):
    embeds: Tensor
    mask: Tensor


class Prefix(_Pair):
    """The visual prefix of B rows; it unpacks and indexes as the pair (embeds, mask).

    Attributes:
        embeds: float[B, M, L], input embeddings of the language model, padded to the longest row.
        mask: bool[B, M], True at embeddings that exist.
        places: long[B, M, 3], time, row and column of each in its image, -1 at what is read as text, such as markers;
            None where all is. Language models without M-RoPE (`qformer.llm.mrope`) ignore them.
    """

    places: Tensor | None

    def __new__(cls, embeds: Tensor, mask: Tensor, places: Tensor | None = None) -> Self:
        made = super().__new__(cls, embeds, mask)
        made.places = places
        return made

    @property
    def placing(self) -> dict[str, Any]:
        """The places as an argument by name of a language model's methods; none where everything is text."""
        return {} if self.places is None else {"places": self.places}

    def select(self, rows: Tensor | slice | list[int]) -> Prefix:
        """Those of the rows, long[n], in that order; a row may be taken several times."""
        return Prefix(self.embeds[rows], self.mask[rows], None if self.places is None else self.places[rows])


class Connector(nn.Module):
    """Turns the image encoder's tokens into the language model's input embeddings.

    `forward` of this class is for connectors that read each tile by itself: the tokens in front of the patch grid are
    dropped, tiles with the same grid pass `project` together, and `sequence` orders what came of the tiles of a plan.

    Attributes:
        normalized: whether the LayerNorm of BLIP-2's front end stands before it; tokens come as they are otherwise.
        patch: side in pixels of the encoder's patches, by which `count_tokens` goes; None is taken from the encoder
            when a model is assembled. An encoder with other patches is refused then.
        per_patch: tokens of each patch that it reads; None reads any number.
        keeps_grid: the language model gets the tokens of a plan as the grid that the plan says (`fine`), so that one
            with M-RoPE numbers them by time, row and column; otherwise they are read as text.
        tokenizer: of the questions that the connector reads, saved with its checkpoints; None where it reads none.
    """

    normalized: bool = False
    patch: int | None = None
    per_patch: int | None = 1
    keeps_grid: bool = False
    tokenizer: Any = None

    def project(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Project tiles of one size, each by itself.

        Args:
            tokens: float[n, per_patch * S, D] of n tiles, without those in front of the patches; row by row.
            grid: (rows, columns) of their patches; S = rows * columns.

        Returns:
            float[n, rows, columns, L], perhaps of fewer rows and columns; or float[n, Q, L] where there is no grid.
        """
        raise NotImplementedError(f"{type(self).__name__} has no `project`")

    def options_of(self, plan: Plan, grid: tuple[int, int]) -> dict[str, Any]:
        """Further arguments of `project` for tiles of this plan with this grid of patches; none by default."""
        return {}

    def pieces(self, tiles: Sequence[Tensor], plan: Plan) -> list[Tensor]:
        """Flatten what came of each tile, and put in what the connector itself adds between them.

        Args:
            tiles: for each tile of the plan what `project` gave, float[n, rows, columns, L] or float[n, Q, L], of n
                images of this plan.

        Returns:
            float[n, m, L] for each tile, in their order: `sequence` joins them, and markers stand around them. Where
            several tiles become one view, the first of them has it and those of the others are empty.
        """
        return [tile.flatten(1, -2) for tile in tiles]

    def sequence(self, tiles: Sequence[Tensor], plan: Plan) -> Tensor:
        """Order the embeddings of the tiles of one image, without markers.

        Args:
            tiles: what `project` gave for each tile of the plan, float[rows, columns, L] or float[Q, L].

        Returns:
            float[M, L], M = `count_tokens(plan)`.
        """
        return torch.cat(self.pieces([tile[None] for tile in tiles], plan), dim=1)[0]

    def count_tokens(self, plan: Plan) -> int:
        """Length of the prefix of a plan without its markers; of a plan with `parts`, the sum of theirs.

        Raises:
            UsageError: as of `count_part`.
        """
        return sum(map(self.count_part, units([plan])))

    def count_part(self, plan: Plan) -> int:
        """Length of the prefix of one picture or clip; by default an embedding for each patch of each tile.

        Raises:
            UsageError: the connector says neither its `patch` nor how it counts, or the tiles are not for it.
        """
        return sum(rows * columns for rows, columns in map(self.grid_of, plan.tiles))

    def grid_of(self, tile: Tile) -> tuple[int, int]:
        """(rows, columns) of the patches of a tile.

        Raises:
            UsageError: the connector has no `patch`.
        """
        if self.patch is None:
            raise UsageError(
                f"the connector {type(self).__name__} does not say how many tokens it makes; give it a `patch`, or a "
                "`count_tokens` of its own"
            )
        width, height = tile.size
        return height // self.patch, width // self.patch

    def forward(
        self, visual: VisualTokens, questions: Sequence[Sequence[str]] | None = None, marker: Marker | None = None
    ) -> Prefix:
        """Make the visual prefix of B images; of a plan with `parts` these stand one after the other.

        With the `questions` of each image there is a row for each of them: its image's, whatever is asked. `marker`
        gives the vectors that plans ask for around their tiles; without it they are left out.

        Raises:
            UsageError: tiles, or tokens of a patch, that the connector cannot read.
        """
        parts = units(visual.plans)
        groups = self._lay_out(visual, parts, marker)
        if len(groups) == 1 and len(parts) == len(visual.plans):  # images of one plan, at once
            embeds = groups[0][1]
            prefix = Prefix(embeds, embeds.new_ones(embeds.shape[:2], dtype=torch.bool))
        else:
            found = {number: row for numbers, rows in groups for number, row in zip(numbers, rows, strict=True)}
            own = (found[number] for number in range(len(parts)))
            rows = [[next(own) for _ in plan.parts or (plan,)] for plan in visual.plans]
            prefix = join_rows([torch.cat(row) if len(row) > 1 else row[0] for row in rows])
        if questions is None or all(len(asked) == 1 for asked in questions):  # a row each, as they are
            return prefix
        return prefix.select(owners(questions).to(prefix.embeds.device))

    def _lay_out(
        self, visual: VisualTokens, parts: Sequence[Plan], marker: Marker | None
    ) -> list[tuple[list[int], Tensor]]:
        """Numbers of the pictures and clips of each plan, and what the language model reads of them: float[n, M, L]."""
        made, places = self._project_all(visual, parts)
        starts = [0, *accumulate(len(part.tiles) for part in parts)]
        alike: dict[Any, list[int]] = {}
        for number, part in enumerate(parts):
            alike.setdefault((part, *visual.grids[starts[number] : starts[number + 1]]), []).append(number)
        found = []
        for (plan, *_), numbers in alike.items():
            tiles = []
            for tile in range(len(plan.tiles)):
                group, _ = places[starts[numbers[0]] + tile]
                rows = [places[starts[number] + tile][1] for number in numbers]
                whole = rows == list(range(len(made[group])))
                tiles.append(made[group] if whole else made[group][torch.tensor(rows, device=made[group].device)])
            found.append((numbers, self._rows(tiles, plan, marker)))
        return found

    def _rows(self, tiles: Sequence[Tensor], plan: Plan, marker: Marker | None) -> Tensor:
        """Order the tiles of n images of a plan, float[n, ..., L] each, with their markers: float[n, M, L]."""
        marker = marker if plan.has_text else None
        if type(self).sequence is Connector.sequence:
            pieces = self.pieces(tiles, plan)
            return torch.cat(pieces if marker is None else with_markers(pieces, plan, marker), dim=1)
        whole = torch.stack([self.sequence(own, plan) for own in zip(*tiles, strict=True)])  # (n, M, L)
        if marker is None:
            return whole
        inside = bool(plan.tiles[0].before) + bool(plan.tiles[-1].after) != plan.markers
        if inside or any(tile.lead for tile in plan.tiles[1:]):
            raise UsageError(
                f"the connector {type(self).__name__} orders tiles by a `sequence` of its own, which has no place for "
                "the markers between them; give it `pieces` instead, or use another strategy"
            )
        return torch.cat(with_markers([whole, *[whole[:, :0]] * (len(tiles) - 1)], plan, marker), dim=1)

    def _project_all(
        self, visual: VisualTokens, parts: Sequence[Plan]
    ) -> tuple[list[Tensor], dict[int, tuple[int, int]]]:
        """Project the N tiles, those that are projected alike together; and where each is: (group, row)."""
        if self.per_patch not in (None, visual.per_patch):
            raise UsageError(
                f"the connector {type(self).__name__} reads {self.per_patch} tokens of a patch, but this image encoder "
                f"makes {visual.per_patch}; use the connector 'mlp' with as many adapters"
            )
        owner = (part for part in parts for _ in part.tiles)
        groups: dict[Any, list[int]] = {}
        for tile, (grid, plan) in enumerate(zip(visual.grids, owner, strict=True)):
            groups.setdefault((grid, *self.options_of(plan, grid).items()), []).append(tile)
        made = []
        for ((rows, columns), *options), members in groups.items():
            tokens = self._stack(visual, members, visual.per_patch * rows * columns)  # (n, per_patch * S, D)
            made.append(self.project(tokens, (rows, columns), **dict(options)))
        numbers = enumerate(groups.values())
        return made, {tile: (group, row) for group, tiles in numbers for row, tile in enumerate(tiles)}

    @staticmethod
    def _stack(visual: VisualTokens, members: Sequence[int], count: int) -> Tensor:
        """The tokens of the patches of those tiles, so many of each, in single precision: float[n, count, D]."""
        kept = slice(visual.extra, visual.extra + count)
        if len(members) == len(visual.rows):  # at once, however many they are
            return visual.packed.unflatten(0, (len(members), -1))[:, kept].float()
        # fp32 first: autocast in bf16 cannot stack rows of a store in fp16
        return torch.stack([visual.rows[tile][kept].float() for tile in members])

    @property
    def reader(self) -> Any:
        """The Q-Former whose cross-attention shows where the connector looks; None where there is none."""
        return None


def is_clip(plan: Plan) -> bool:
    """Return True if the tiles are frames of a clip of which the language model reads `fine` tokens each."""
    return plan.overview is None and plan.fine is not None


def with_markers(pieces: Sequence[Tensor], plan: Plan, marker: Marker) -> list[Tensor]:
    """The piece of each tile of a plan, float[n, m, L], with the vectors of its texts in front of it and behind it."""
    found = []
    for piece, tile in zip(pieces, plan.tiles, strict=True):
        around = [
            marker(text).to(piece.dtype).expand(len(piece), 1, -1) if text else piece[:, :0]
            for text in (tile.before, tile.after)
        ]
        if tile.lead:
            found.append(marker(tile.lead, words=True).to(piece.dtype).expand(len(piece), -1, -1))
        found += [around[0], piece, around[1]]
    return found


def units(plans: Sequence[Plan]) -> list[Plan]:
    """The plans of single pictures and clips: the `parts` of those that have some."""
    return [part for plan in plans for part in plan.parts or (plan,)]


def join_rows(rows: Sequence[Tensor]) -> Prefix:
    """A prefix of B rows float[M, L] of any lengths."""
    embeds = pad_sequence(list(rows), batch_first=True)  # (B, M, L)
    lengths = torch.tensor([len(row) for row in rows], device=embeds.device)
    return Prefix(embeds, torch.arange(embeds.shape[1], device=embeds.device) < lengths[:, None])


def owners(questions: Sequence[Sequence[str]]) -> Tensor:
    """The image of each question, long[n]."""
    return torch.tensor([image for image, asked in enumerate(questions) for _ in asked], dtype=torch.long)


def square_root(queries: int, connector: Connector) -> int:
    """Side of a square of so many queries.

    Raises:
        UsageError: they are no square.
    """
    side = max(math.isqrt(max(queries, 0)), 1)
    if side * side != queries:
        raise UsageError(
            f"queries of the connector {type(connector).__name__} is {queries}; its queries are a square grid, so give "
            f"a square number such as {side**2} or {(side + 1) ** 2}"
        )
    return side


def require_blocks(grid: tuple[int, int], side: int, connector: Connector) -> None:
    """Check that a grid of patches divides into blocks of `side` x `side`.

    Raises:
        UsageError: it does not.
    """
    rows, columns = grid
    if rows % side or columns % side:
        pixels = f"{side} patches" if connector.patch is None else f"{side * connector.patch} pixels"
        raise UsageError(
            f"the connector {type(connector).__name__} joins {side}x{side} patches, but a tile has {rows}x{columns} "
            f"(rows x columns); use a resolution whose tiles are multiples of {pixels} (`multiple: {side}` of uhd)"
        )


def perceptron(width: int, hidden: int, out: int, activation: type[nn.Module] = nn.GELU) -> nn.Sequential:
    """Linear, activation, Linear; the weights are numbers 0 and 2."""
    return nn.Sequential(nn.Linear(width, hidden), activation(), nn.Linear(hidden, out))


def new_vector(width: int) -> nn.Parameter:
    """A learned embedding of the language model's width, about as long as a word's; as LLaVA's newline starts."""
    return nn.Parameter(torch.randn(width) * width**-0.5)
