"""Multimodal rotary positions (M-RoPE) of Qwen2-VL: each token has a time, a row and a column (arXiv:2409.12191).

A text token has the same id on all three axes, and the next one follows it. The tokens of a picture or clip that begins
at id s have s + time, s + row and s + column, row by row on the merged grid; what follows has the largest of all these
ids + 1. This is the rule of the paper and of transformers up to 4.46. transformers 5 differs for clips: text behind one
begins at s + max(rows, columns), so that ids occur twice where a clip has more time steps than that, and the first
token that is generated has the largest of all ids + 1. The rule `transformers` of `position_ids` does the same.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qformer.types import Plan

    Part = int | tuple[int, int, int]
    Rule = Literal["paper", "transformers"]

TEXT = -1  # in place of a time, row and column
PAD = 1  # id of what stands for nothing
RULES = ("paper", "transformers")  # of what follows a clip
FAMILIES = ("qwen2_vl",)  # types of transformers' configurations whose language models have such positions


def position_ids(
    rows: Sequence[Sequence[Part]], side: Literal["left", "right"] = "left", rule: Rule = "paper"
) -> tuple[Tensor, Tensor]:
    """Number the tokens of B rows of text, pictures and clips.

    Args:
        rows: of each row its parts in their order: a number of text tokens (markers are text), or the (time, rows,
            columns) of a merged grid.
        side: where shorter rows are padded.
        rule: what the id of the token behind a clip follows, see the top of this module.

    Returns:
        The ids long[3, B, T], 1 at padding; and long[B], how far the next id of each row is ahead of its length: the
        n-th token of a row, from 0, that is generated behind it has the id n + delta on all three axes.

    Raises:
        UsageError: another side or rule, a negative number of tokens, or a grid with an empty side.
    """
    if side not in ("left", "right"):
        raise UsageError(f"side is '{side}'; give left or right, where shorter rows are padded")
    placed = [places(row) for row in rows]
    longest = max(map(len, placed), default=0)
    given = torch.full((len(placed), longest, 3), TEXT)
    mask = torch.zeros(len(placed), longest, dtype=torch.bool)
    for row, own in enumerate(placed):
        kept = slice(longest - len(own), None) if side == "left" else slice(len(own))
        given[row, kept], mask[row, kept] = own, True
    return number(given, mask, rule)


def places(parts: Sequence[Part]) -> Tensor:
    """Time, row and column of each token in its picture or clip, long[T, 3]; -1 at text.

    Raises:
        UsageError: see `position_ids`.
    """
    found = [torch.empty(0, 3, dtype=torch.long)]
    for part in parts:
        if isinstance(part, int):
            if part < 0:
                raise UsageError(f"a part of a row is {part}; give a number of text tokens, 0 or more")
            found.append(torch.full((part, 3), TEXT))
        else:
            if len(part) != 3 or min(part) < 1:
                raise UsageError(f"a grid is {tuple(part)}; give its time steps, rows and columns, each at least 1")
            found.append(torch.tensor(list(product(*map(range, part)))))
    return torch.cat(found)


def number(places: Tensor, mask: Tensor, rule: Rule = "paper") -> tuple[Tensor, Tensor]:
    """`position_ids` of rows whose tokens have these places.

    Args:
        places: long[B, T, 3], time, row and column of each token in its picture, whole grids row by row; -1 at text.
        mask: bool[B, T], True where there is a token; padding stands on one side of each row.
    """
    if rule not in RULES:
        raise UsageError(f"the ids behind a clip are numbered by '{rule}' (llm.clip_ids); give {' or '.join(RULES)}")
    seen = (places >= 0).all(dim=-1) & mask  # (B, T)
    follows = torch.zeros_like(seen)  # a picture's token that the next one continues
    follows[:, :-1] = seen[:, 1:] & (places[:, 1:] > 0).any(dim=-1)
    # Ids grow by one behind a text token, and behind the last token of a picture, whose place is the farthest, by that.
    farthest = places.amax(dim=-1) if rule == "paper" else places[..., 1:].amax(dim=-1)  # without the time
    growth = torch.where(seen, (farthest + 1).masked_fill(follows, 0), 1) * mask
    first = growth.cumsum(dim=1) - growth
    ids = (first[..., None] + places.clamp(min=0)).masked_fill(~mask[..., None], PAD)
    ids = ids.permute(2, 0, 1)
    return ids, ahead(ids, mask)


def ahead(ids: Tensor, mask: Tensor) -> Tensor:
    """Count how far the id after the largest of each row, long[3, B, T], is ahead of the row's tokens: long[B].

    Args:
        mask: bool or long[B, T], nonzero where there is a token.
    """
    following = (ids.amax(dim=0) + 1) * mask
    return F.pad(following, (1, 0)).amax(dim=1) - mask.sum(dim=1)  # a row may have no column at all


def parts(plan: Plan) -> list[Part]:
    """Divide the row of a plan into its markers and the grids that the language model reads of the pictures.

    A plan of Qwen2-VL for 224 x 224 pixels gives `[1, (1, 8, 8), 1]`. Tokens that are no grid, such as those of a
    Q-Former, are text.
    """
    found: list[Part] = []
    for part in plan.parts or (plan,):
        grid = (len(part.tiles), *part.fine) if part.fine else (0, 0, 0)
        if grid[0] * grid[1] * grid[2] != part.tokens or any(tile.after for tile in part.tiles[:-1]):
            found.append(part.tokens + part.markers)
            continue
        front, back = (bool(part.tiles[0].before), bool(part.tiles[-1].after))
        found += [*[1] * front, grid, *[1] * back]
    return found


def of_plans(plans: Sequence[Plan], counts: Sequence[int], longest: int) -> Tensor:
    """Places of the visual tokens of B rows, long[B, M, 3]; a row with another number of them than planned is text.

    Args:
        plans: of the B rows, whose tokens stand from the first column on.
        counts: tokens of each row, markers included.
        longest: M.
    """
    found = torch.full((len(plans), longest, 3), TEXT)
    for row, (plan, count) in enumerate(zip(plans, counts, strict=True)):
        own = places(parts(plan))
        if len(own) == count:
            found[row, :count] = own
    return found


def rotary(
    ids: Tensor, width: int, sections: Sequence[int] = (16, 24, 24), theta: float = 1e6
) -> tuple[Tensor, Tensor]:
    """Cosines and sines by which heads are turned, both float[..., T, width], each frequency twice.

    Args:
        ids: long[3, ..., T], times, rows and columns.
        width: of a head.
        sections: how many of the width / 2 frequencies, the fastest first, turn by time, by row and by column.
        theta: base of the frequencies.

    Raises:
        UsageError: the sections do not add up to half the width, or there are not three of them.
    """
    if len(sections) != 3 or 2 * sum(sections) != width:
        raise UsageError(
            f"sections is {tuple(sections)} for heads {width} wide; give three numbers that add up to {width / 2:g}"
        )
    frequencies = 1.0 / theta ** (torch.arange(0, width, 2, device=ids.device).float() / width)  # (width / 2)
    axis = torch.arange(3, device=ids.device).repeat_interleave(torch.tensor(sections, device=ids.device))
    angles = ids.movedim(0, -1)[..., axis].float() * frequencies  # (..., T, width / 2)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()
