"""Positions at which an OPT reads a prefix in training: any that it has, and not only the first ones.

Texts are short, but the visual tokens of tiles fill hundreds of positions in front of a prompt. Trained on short texts
at increasing positions that are drawn from all of them, a model can read rows of any length (Ruoss et al. 2023,
randomized positional encodings).
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qformer.llm.rows import positions

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn


class Places:
    """Numbers for the tokens of an OPT, which otherwise counts them from zero.

    Attributes:
        count: positions of the model; None for relative ones, which are never changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.count = positions(model)
        self._table: Tensor | None = None
        if self.count is not None:
            model.register_forward_pre_hook(self._number, with_kwargs=True)

    @contextmanager
    def at(self, table: Tensor | None) -> Iterator[None]:
        """Context in which token t of row b has the position `table[b, t]`, long[B, T]; None: t, as usual."""
        self._table = table
        try:
            yield
        finally:
            self._table = None

    def draw(self, lengths: Tensor, loose: Tensor, text: int) -> Tensor | None:
        """Draw positions for rows of a prefix and a text, as `at` takes them.

        One third of the rows begin at zero and one third anywhere. In the last third there are gaps in between the
        tokens of a prefix if it is `loose`. Every text follows its prefix without gaps.

        Args:
            lengths: long[B], tokens in each prefix.
            loose: bool[B], True where the tokens of a prefix belong together in no other way than by their order.
            text: tokens that follow at most.

        Returns:
            long[B, count]; None for a model with relative positions.
        """
        if self.count is None:
            return None
        table = torch.arange(self.count).repeat(len(lengths), 1)
        for row, length, is_loose, way in zip(
            table, lengths.tolist(), loose.tolist(), torch.randint(3, (len(table),)), strict=True
        ):
            room = self.count - text - length  # positions that stay free
            if room <= 0 or way == 0:
                continue
            if way == 1 or not is_loose:
                row += torch.randint(room + 1, ())
            else:
                chosen = torch.randperm(self.count - text)[:length].sort().values
                row[:length], row[length:] = chosen, row[length:] + (chosen[-1] - length + 1)
        return table.clamp(max=self.count - 1).to(lengths.device)

    def start_at(self, start: int, rows: int) -> Tensor | None:
        """Positions of rows that begin at `start`."""
        if self.count is None:
            return None
        return (torch.arange(self.count) + start).clamp(max=self.count - 1).repeat(rows, 1)

    def _number(self, model: Any, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if self._table is None:
            return None
        order = (given["attention_mask"].long().cumsum(dim=1) - 1).clamp(min=0)  # (B, X), also of what is cached
        new = given["inputs_embeds" if given.get("inputs_embeds") is not None else "input_ids"].shape[1]
        numbers = self._table.to(order.device).gather(1, order)[:, -new:]
        return args, given | {"position_ids": numbers}
