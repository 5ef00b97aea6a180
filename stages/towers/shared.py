"""Several prompts about one description, which an OPT reads once.

Most tokens of a story are its description, and an answer is one or a few. Each prompt sees the description and itself
alone, so the result is that of separate rows at a fraction of the work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from qformer.losses import IGNORE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from qformer.llm.base import LanguageModel


def predict_shared(
    llm: LanguageModel,
    prefix: Tensor,
    mask: Tensor,
    owners: Sequence[int],
    texts: list[str],
    prompts: list[str],
    max_tokens: int,
    table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the logits at the positions of texts, and their targets, as `LanguageModel.predict` does.

    Args:
        llm: an OPT.
        prefix: float[B, M, L]. mask: bool[B, M], with the padding on the right; no row is empty.
        owners: row of the prefix that each of R texts follows.
        texts, prompts: R of each. max_tokens: length at which each text is cut.
        table: long[B, N], position of token t of a row with one text; None: t.

    Returns:
        float[R, T, V], and long[R, T] with `IGNORE` for no target.
    """
    row, targets = llm.targets(texts, prompts, max_tokens, prefix.device)  # T of the longest text
    lengths, known = row.mask.sum(dim=1), mask.sum(dim=1)
    owner = torch.tensor(owners, device=prefix.device)
    starts = _starts(owners, lengths.tolist(), prefix.shape[1])  # (R,) column of the first token of each text
    steps = torch.arange(row.ids.shape[1], device=prefix.device)
    columns = starts[:, None] + steps  # (R, T)
    count = int((starts + lengths).max())
    texts_at, offsets_at = owner[:, None].expand_as(columns)[row.mask], columns[row.mask]

    embeds = prefix.new_zeros(len(prefix), count, prefix.shape[2])
    embeds[:, : prefix.shape[1]] = prefix
    embeds[texts_at, offsets_at] = llm.model.get_input_embeddings()(row.ids[row.mask]).to(prefix.dtype)
    # Number of the text that a column belongs to: 0 the description, -1 padding.
    segment = torch.full((len(prefix), count), -1, device=prefix.device)
    segment[:, : prefix.shape[1]] = mask.long() - 1
    segment[texts_at, offsets_at] = (torch.arange(len(texts), device=prefix.device) + 1)[:, None].expand_as(columns)[row.mask]
    numbers = torch.zeros_like(segment)
    numbers[:, : prefix.shape[1]] = torch.arange(prefix.shape[1], device=prefix.device)
    numbers[texts_at, offsets_at] = (known[owner][:, None] + steps)[row.mask]
    if table is not None:
        numbers = table.gather(1, numbers)

    logits = llm.model(
        inputs_embeds=embeds, attention_mask=_visible(segment, embeds.dtype), position_ids=numbers, use_cache=False
    ).logits
    before = torch.where(steps == 0, known[owner][:, None] - 1, columns - 1).clamp(max=count - 1)  # predicts the token
    return logits[owner[:, None], before], targets


def _starts(owners: Sequence[int], lengths: Sequence[int], first: int) -> Tensor:
    """Columns at which texts begin when those of a row stand one behind the other, from `first` on: long[R]."""
    ends: dict[int, int] = {}
    starts = []
    for owner, length in zip(owners, lengths, strict=True):
        starts.append(ends.get(owner, first))
        ends[owner] = starts[-1] + length
    return torch.tensor(starts)


def _visible(segment: Tensor, dtype: Any) -> Tensor:
    """Mask that is added to attention scores: every token sees the description and its own text up to itself.

    Args:
        segment: long[B, S], 0 for the description, other numbers for texts, -1 for padding.

    Returns:
        float[B, 1, S, S].
    """
    asks, seen = segment[:, :, None], segment[:, None, :]
    allowed = ((seen == 0) | (seen == asks)).tril()
    allowed = allowed & (seen >= 0) | torch.eye(segment.shape[1], dtype=torch.bool, device=segment.device)
    zeros = torch.zeros(allowed.shape, dtype=dtype, device=segment.device)
    return zeros.masked_fill(~allowed, torch.finfo(dtype).min)[:, None]
