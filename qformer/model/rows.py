"""Rows of what a language model reads: ids padded, visual and text embeddings joined, examples put in front.

A row is visual tokens and text in any order, in a tensor with a mask that may have holes; `pack` closes them.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qformer.types import Tiles, Tokens, TooLong, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qformer.model.llm import LanguageModel


def pad(rows: Sequence[Sequence[int]], end: int, device: torch.device) -> Tokens:
    """Rows of ids, padded on the right with `end`: any model can embed it, and a tokenizer may lack a pad token."""
    ids = pad_sequence([torch.tensor(r, dtype=torch.long) for r in rows], batch_first=True, padding_value=end)
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(ids.shape[1]) < lengths[:, None]  # (B, T)
    return Tokens(ids, mask).to(device)


def pack(embeds: Tensor, mask: Tensor, side: Literal["left", "right"]) -> tuple[Tensor, Tensor, Tensor]:
    """Gather the valid tokens of each row, their order kept, with all the padding on one `side`.

    Args:
        embeds: float[B, X, L]. mask: bool[B, X].

    Returns:
        The packed embeds and mask, and order long[B, X]: the column that each packed column came from.
    """
    last = mask if side == "left" else ~mask
    order = last.byte().argsort(dim=1, stable=True)
    return embeds.take_along_dim(order[..., None], dim=1), mask.take_along_dim(order, dim=1), order


def positions(model: Any) -> int | None:
    """How many positions a model of transformers has; None where they are relative (T5) and rows may be of any length.

    Rotary positions are counted as what the configuration allows.
    """
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def join(
    model: Any,
    prefix: Tensor,
    prefix_mask: Tensor,
    text: Tokens,
    side: Literal["left", "right"],
    new: int | None = None,
) -> dict[str, Tensor]:
    """Inputs of a model of transformers: packed rows [visual][text], with the padding on one `side`.

    Args:
        prefix: float[B, M, L]. prefix_mask: bool[B, M].
        new: how many tokens are to be generated behind them: the columns are then as many as the longest row has. None:
            M + T, whatever the masks say, so that nothing need be read from a GPU.

    Raises:
        TooLong: more tokens than the model has positions.
    """
    embeds = model.get_input_embeddings()(text.ids)
    embeds = torch.cat([prefix.to(embeds.dtype), embeds], dim=1)
    embeds, mask, _ = pack(embeds, torch.cat([prefix_mask, text.mask], dim=1), side)
    visual, words = prefix.shape[1], text.ids.shape[1]
    if new is not None and len(embeds):
        lengths = prefix_mask.sum(dim=1), text.mask.sum(dim=1)
        longest = int((lengths[0] + lengths[1]).argmax())
        visual, words = (int(length[longest]) for length in lengths)
        kept = slice(-(visual + words) or None, None) if side == "left" else slice(visual + words)
        embeds, mask, words = embeds[:, kept], mask[:, kept], words + new
    limit = positions(model)
    if limit is not None and visual + words > limit:
        raise TooLong(
            f"{visual} visual and {words} text tokens exceed the {limit} positions of this {model.config.model_type} "
            "model; use fewer tiles or examples, a connector with fewer tokens, or shorter text"
        )
    return {"inputs_embeds": embeds, "attention_mask": mask.long()}


def interleave(
    llm: LanguageModel, visual: Tensor, mask: Tensor, rows: Sequence[Sequence[int | str]]
) -> tuple[Tensor, Tensor]:
    """Prefixes in which images and texts alternate, for k-shot prompts: rows of any length.

    A text is written as behind an image of training: with the token that begins texts, where the model has one, and
    the one that ends them. So an example is such a row, and the asked image stands behind it as behind another row.

    Args:
        visual: float[N, M, L], the visual tokens of N images. mask: bool[N, M].
        rows: B rows of numbers of images and texts, in the order in which they are read.

    Returns:
        float[B, X, L] and bool[B, X], a prefix as any other.
    """
    texts = [part for row in rows for part in row if isinstance(part, str)]
    embed = llm.model.get_input_embeddings()
    ids = iter(llm.ended(texts)) if texts else iter(())
    joined = []
    for row in rows:
        parts = [
            visual[part][mask[part]].to(embed.weight.dtype)
            if isinstance(part, int)
            else embed(torch.tensor(next(ids), device=visual.device))
            for part in row
        ]
        joined.append(torch.cat(parts))
    lengths = torch.tensor([len(row) for row in joined], device=visual.device)
    prefix = pad_sequence(joined, batch_first=True)
    return prefix, torch.arange(prefix.shape[1], device=visual.device) < lengths[:, None]


def put_in_front(
    tiles: Tiles, questions: Sequence[Sequence[str]], examples: Sequence[Sequence[tuple[Tiles, str, str]]]
) -> tuple[Tiles, list[list[str]], list[list[int | str]]]:
    """Plan k-shot prompts: each image of several examples is encoded once.

    Args:
        questions: those of each of the B images.
        examples: in front of each of the B images: one image, its question, and the text that is read behind it.

    Returns:
        The images and then the examples; their questions; and the `rows` of `interleave` for the questions of the B
        images, by the numbers of all questions.

    Raises:
        UsageError: not one list of examples for each image, or an example of several images.
    """
    if len(examples) != len(tiles):
        raise UsageError(f"got {len(examples)} lists of examples for {len(tiles)} images; give one for each image")
    parts, asked = [tiles], [list(own) for own in questions]
    place: dict[int, int] = {}  # of the images of examples among all
    for image, question, _ in (example for shown in examples for example in shown):
        if len(image) != 1:
            raise UsageError(f"an example holds {len(image)} images; give the tiles of one, and its text")
        if id(image) not in place:
            place[id(image)] = len(asked)
            parts.append(image)
            asked.append([])
        if question not in asked[place[id(image)]]:
            asked[place[id(image)]].append(question)
    first = [0, *accumulate(len(own) for own in asked)]
    rows: list[list[int | str]] = []
    for number, shown in enumerate(examples):
        front: list[int | str] = []
        for image, question, text in shown:
            other = place[id(image)]
            front += [first[other] + asked[other].index(question), text]
        rows += [[*front, row] for row in range(first[number], first[number + 1])]
    return Tiles.join(parts), asked, rows
