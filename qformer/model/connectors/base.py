"""Contract of connectors: image tokens in, input embeddings of the language model out, as many as a plan says.

A connector of one's own is a subclass with an `__init__(width, llm_width, **options)` and a `project`. It overrides
`sequence` and `count_tokens` where the language model reads more than the tokens of the tiles one after the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qformer.model.qformer import QFormer
    from qformer.types import Plan, VisualTokens


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

    def select(self, rows: Tensor | slice | list[int]) -> Prefix:
        """Those of the rows, long[n], in that order; a row may be taken several times."""
        return Prefix(self.embeds[rows], self.mask[rows], None if self.places is None else self.places[rows])


class Connector(nn.Module):
    """Turns the image encoder's tokens into the language model's input embeddings.

    `forward` of this class is for connectors that read each tile by itself: the tokens in front of the patch grid are
    dropped, tiles with the same grid pass `project` together, and `sequence` orders what came of the tiles of a plan.

    Attributes:
        normalized: whether the LayerNorm of BLIP-2's front end stands before it; tokens come as they are otherwise.
        patch: side in pixels of the encoder's patches, by which `count_tokens` goes; None where it does not matter. An
            encoder with other patches is refused when a model is assembled.
        keeps_grid: the language model gets the tokens of a plan as the grid that the plan says (`fine`), so that one
            with M-RoPE numbers them by time, row and column; otherwise they are read as text.
        tokenizer: of the questions that the connector reads, saved with its checkpoints; None where it reads none.
    """

    normalized: bool = False
    patch: int | None = None
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

    def sequence(self, tiles: Sequence[Tensor], plan: Plan) -> Tensor:
        """Order the embeddings of the tiles of one image: one tile after the other, each row by row.

        Args:
            tiles: what `project` gave for each tile of the plan, float[rows, columns, L] or float[Q, L].

        Returns:
            float[M, L], M = `count_tokens(plan)`.
        """
        return torch.cat([tile.flatten(0, -2) for tile in tiles])

    def count_tokens(self, plan: Plan) -> int:
        """Length of the prefix of a plan; by default an embedding for each patch of each tile.

        Raises:
            UsageError: the connector says neither its `patch` nor how it counts.
        """
        if self.patch is None:
            raise UsageError(
                f"the connector {type(self).__name__} does not say how many tokens it makes; give it a `patch`, or a "
                "`count_tokens` of its own"
            )
        sizes = (tile.size for tile in plan.tiles)
        return sum((width // self.patch) * (height // self.patch) for width, height in sizes)

    def forward(self, visual: VisualTokens, questions: Sequence[Sequence[str]] | None = None) -> Prefix:
        """Make the visual prefix of B images; of a plan with `parts` these stand one after the other.

        With the `questions` of each image there is a row for each of them: its image's, whatever is asked.
        """
        tiles, rows = iter(self._project_all(visual)), []
        for plan in visual.plans:
            parts = [self.sequence([next(tiles) for _ in part.tiles], part) for part in plan.parts or (plan,)]
            rows.append(torch.cat(parts) if len(parts) > 1 else parts[0])
        embeds = pad_sequence(rows, batch_first=True)  # (B, M, L)
        lengths = torch.tensor([len(row) for row in rows], device=embeds.device)
        prefix = Prefix(embeds, torch.arange(embeds.shape[1], device=embeds.device) < lengths[:, None])
        if questions is None or all(len(asked) == 1 for asked in questions):  # a row each, as they are
            return prefix
        return prefix.select(owners(questions).to(embeds.device))

    def _project_all(self, visual: VisualTokens) -> list[Tensor]:
        """Project each of the N tiles; those with equal grids pass together."""
        groups: dict[tuple[int, int], list[int]] = {}
        for tile, grid in enumerate(visual.grids):
            groups.setdefault(grid, []).append(tile)
        found: dict[int, Tensor] = {}
        for (rows, columns), members in groups.items():
            kept = slice(visual.extra, visual.extra + visual.per_patch * rows * columns)
            # fp32 first: autocast in bf16 cannot stack rows of a store in fp16
            tokens = torch.stack([visual.rows[tile][kept].float() for tile in members])  # (n, per_patch * S, D)
            found |= zip(members, self.project(tokens, (rows, columns)), strict=True)
        return [found[tile] for tile in range(len(visual.grids))]

    @property
    def reader(self) -> QFormer | None:
        """The Q-Former whose cross-attention shows where the connector looks; None where there is none."""
        return None


def owners(questions: Sequence[Sequence[str]]) -> Tensor:
    """The image of each question, long[n]."""
    return torch.tensor([image for image, asked in enumerate(questions) for _ in asked], dtype=torch.long)
