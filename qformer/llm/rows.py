"""Input rows of a language model: ids are padded, and visual and text embeddings joined.

A row holds visual tokens and text in any order, in a tensor with a mask that can have gaps; `pack` closes them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qformer.llm import mrope
from qformer.types import Tokens, TooLong

if TYPE_CHECKING:
    from collections.abc import Sequence


def pad(rows: Sequence[Sequence[int]], end: int, device: torch.device) -> Tokens:
    """Pad rows of ids on the right with `end`: every model can embed it, and some tokenizers have no pad token."""
    ids = pad_sequence([torch.tensor(r, dtype=torch.long) for r in rows], batch_first=True, padding_value=end)
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(ids.shape[1]) < lengths[:, None]  # (B, T)
    return Tokens(ids, mask).to(device)


def shared(prompt: list[int], whole: list[int]) -> int:
    """Count the leading ids that a row shares with its prompt tokenized alone.

    A token that merges the end of the prompt with the beginning of the text belongs to the text.
    """
    differ = (place for place, (one, other) in enumerate(zip(prompt, whole, strict=False)) if one != other)
    return next(differ, min(len(prompt), len(whole)))


def pack(embeds: Tensor, mask: Tensor, side: Literal["left", "right"]) -> tuple[Tensor, Tensor, Tensor]:
    """Gather the valid tokens of each row in their order, with all the padding on one `side`.

    Args:
        embeds: float[B, X, L]. mask: bool[B, X].

    Returns:
        The packed embeds and mask, and order long[B, X]: the column that each packed column came from.
    """
    last = mask if side == "left" else ~mask
    order = last.byte().argsort(dim=1, stable=True)
    return embeds.take_along_dim(order[..., None], dim=1), mask.take_along_dim(order, dim=1), order


def positions(model: Any) -> int | None:
    """Count the positions of a transformers model; None if they are relative (T5), so that rows can have any length.

    Rotary positions count as many as the configuration states.
    """
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


@torch.no_grad()
def word_spread(model: Any, words: int) -> float:
    """Measure the root mean square of the embeddings of the first `words` tokens as the model gets them; the median.

    Some families scale their embeddings (Gemma), and some hold rows that no tokenizer uses.
    """
    embed = model.get_input_embeddings()
    device = next(embed.parameters()).device
    ids = torch.arange(min(words, embed.weight.shape[0]), device=device)
    return float(torch.cat([embed(part).float().square().mean(dim=1).sqrt() for part in ids.split(4096)]).median())


def join(
    model: Any,
    prefix: Tensor,
    prefix_mask: Tensor,
    text: Tokens,
    side: Literal["left", "right"],
    new: int | None = None,
    places: Tensor | None = None,
    clip_ids: mrope.Rule = "paper",
) -> dict[str, Tensor]:
    """Build the inputs of a transformers model: packed rows [visual][text], with the padding on one `side`.

    Args:
        prefix: float[B, M, L]. prefix_mask: bool[B, M].
        new: the number of tokens to generate after the rows, which are then cut to the longest of them. None keeps
            all M + T columns, so that nothing has to be copied from a GPU.
        places: long[B, M, 3], see `qformer.llm.mrope`; then `position_ids`, long[3, B, X], are among the inputs.
        clip_ids: rule by which they are numbered.

    Raises:
        TooLong: more tokens than the model has positions.
    """
    embeds = model.get_input_embeddings()(text.ids)
    embeds = torch.cat([prefix.to(embeds.dtype), embeds], dim=1)
    embeds, mask, order = pack(embeds, torch.cat([prefix_mask, text.mask], dim=1), side)
    visual, words = prefix.shape[1], text.ids.shape[1]
    if places is not None:
        places = F.pad(places, (0, 0, 0, words), value=mrope.TEXT).take_along_dim(order[..., None], dim=1)
    if new is not None and len(embeds):
        lengths = prefix_mask.sum(dim=1), text.mask.sum(dim=1)
        longest = int((lengths[0] + lengths[1]).argmax())
        visual, words = (int(length[longest]) for length in lengths)
        kept = slice(-(visual + words) or None, None) if side == "left" else slice(visual + words)
        embeds, mask, words = embeds[:, kept], mask[:, kept], words + new
        places = None if places is None else places[:, kept]
    limit = positions(model)
    if limit is not None and visual + words > limit:
        raise TooLong(
            f"{visual} visual and {words} text tokens exceed the {limit} positions of this {model.config.model_type} "
            "model; use fewer tiles, frames or examples, a connector with fewer tokens, or shorter text"
        )
    inputs = {"inputs_embeds": embeds, "attention_mask": mask.long()}
    return inputs if places is None else inputs | {"position_ids": mrope.number(places, mask, clip_ids)[0]}
