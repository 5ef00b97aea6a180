"""Rows that weave examples with their pictures into a prefix, each picture in front of its text."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qformer.connectors.base import Prefix
from qformer.llm.mrope import TEXT
from qformer.types import Tiles, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qformer.llm.base import LanguageModel

    Text = str | tuple[str, str]  # behind an image: a text, or a prompt and what is written after it


def interleave(
    llm: LanguageModel,
    visual: Tensor,
    mask: Tensor,
    rows: Sequence[Sequence[int | Text]],
    places: Tensor | None = None,
) -> Prefix:
    """Prefixes in which images and texts alternate, for k-shot prompts: rows of any length.

    A text is written as behind an image of training: with the token that begins texts, where the model has one, and
    the one that ends them. So an example is such a row, and the asked image stands behind it as behind another row.
    With a template, it is a turn of the user, who shows the image, and one of the assistant.

    Args:
        visual: float[N, M, L], the visual tokens of N images. mask: bool[N, M].
        rows: B rows of numbers of images and texts, in the order in which they are read; a text may be a pair of a
            prompt and what is written after it.
        places: of the visual tokens, long[N, M, 3], see `Prefix`.

    Returns:
        float[B, X, L] and bool[B, X], a prefix as any other.
    """
    texts = [("", part) if isinstance(part, str) else part for row in rows for part in row if not isinstance(part, int)]
    embed = llm.model.get_input_embeddings()
    ids = iter(llm.examples(texts)) if texts else iter(())
    joined, placed = [], []
    for row in rows:
        parts = [
            visual[part][mask[part]].to(embed.weight.dtype)
            if isinstance(part, int)
            else embed(torch.tensor(next(ids), device=visual.device))
            for part in row
        ]
        joined.append(torch.cat(parts))
        if places is not None:
            words = (places.new_full((len(part), 3), TEXT) for part in parts)
            seen = zip(row, words, strict=True)
            placed.append(torch.cat([places[p][mask[p]] if isinstance(p, int) else text for p, text in seen]))
    lengths = torch.tensor([len(row) for row in joined], device=visual.device)
    prefix = pad_sequence(joined, batch_first=True)
    exists = torch.arange(prefix.shape[1], device=visual.device) < lengths[:, None]
    return Prefix(prefix, exists, pad_sequence(placed, True, TEXT) if placed else None)


def put_in_front(
    tiles: Tiles, questions: Sequence[Sequence[str]], examples: Sequence[Sequence[tuple[Tiles, str, Text]]]
) -> tuple[Tiles, list[list[str]], list[list[int | Text]]]:
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
    rows: list[list[int | Text]] = []
    for number, shown in enumerate(examples):
        front: list[int | Text] = []
        for image, question, text in shown:
            other = place[id(image)]
            front += [first[other] + asked[other].index(question), text]
        rows += [[*front, row] for row in range(first[number], first[number + 1])]
    return Tiles.join(parts), asked, rows
