"""Beginning of a language tower: from the weights of a former one, whatever words and positions it has.

A tokenizer that is trained anew gives words other ids, so words are matched by their text. Positions begin as sines;
behind those that a former tower has, the sines go on.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qformer.llm.loading import load_language_model
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

LONGEST = 256  # wavelength of the slowest sine, in units of the fastest
NUMBER = re.compile(r"[▁Ġ]?(\d+)")  # a word that is a number, with the mark of a space or without
ALIKE = 0.5  # mean cosine from which numbers cannot be told apart


def sine_table(rows: int, width: int) -> Tensor:
    """Compute sines and cosines of the row number, of length one together: float[rows, width]."""
    waves = math.pi / 2 * LONGEST ** -torch.linspace(0, 1, width // 2)  # radians per row
    angles = torch.arange(rows)[:, None] * waves
    return (2 / width) ** 0.5 * torch.cat([angles.sin(), angles.cos()], dim=1)


@torch.no_grad()
def start_from(model: Any, tokenizer: Any, path: str) -> None:
    """Give an OPT or a T5 the weights of a former one.

    A word that the former tokenizer has keeps its row. A new word begins as the mean of the former pieces of it that
    are longer than a letter, or of all former words, with some noise. Numbers get rows of their own, see
    `spread_numbers`.

    Args:
        path: folder, or name of a tower.

    Raises:
        UsageError: the former one has other sizes, or more positions.
    """
    former = load_language_model(path)
    given = dict(former.model.named_parameters())
    words = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    for name, own in model.named_parameters():
        old = given.get(name)
        if old is None or old.shape[1:] != own.shape[1:]:
            shape = "none" if old is None else list(old.shape)
            raise UsageError(
                f"backbone.start '{path}' has another architecture: its weight '{name}' has the shape {shape}, and "
                f"{list(own.shape)} is needed; give backbone the kind and the sizes of that tower"
            )
        if any(own is table for table in words):
            own.copy_(spread_numbers(matched_rows(old, former.tokenizer, tokenizer), tokenizer.get_vocab()))
        elif len(old) < len(own) and name.endswith("embed_positions.weight"):
            own.copy_(longer(old, len(own)))
        elif len(old) == len(own):
            own.copy_(old)
        else:
            raise UsageError(
                f"backbone.start '{path}' has {len(old)} rows in '{name}', and {len(own)} are wanted; give backbone "
                "its sizes, and at least its positions"
            )


def matched_rows(table: Tensor, former: Any, tokenizer: Any) -> Tensor:
    """Rows of the former words for those of another tokenizer: float[V, L] -> float[W, L]; see `start_from`."""
    known, pieces = former.get_vocab(), former.backend_tokenizer.model
    long = torch.tensor([row for word, row in known.items() if len(word) > 1])
    middle, spread = table[long].mean(dim=0), table[long].std(dim=0)
    vocabulary = tokenizer.get_vocab()
    rows = table.new_zeros(max(vocabulary.values()) + 1, table.shape[1])
    for word, row in sorted(vocabulary.items(), key=lambda item: item[1]):
        if word in known:
            rows[row] = table[known[word]]
            continue
        parts = [piece.id for piece in pieces.tokenize(word) if len(piece.value) > 1]
        mean = table[parts].mean(dim=0) if parts else middle
        rows[row] = mean + spread * torch.randn(len(mean)) / 2
    return rows


def spread_numbers(table: Tensor, vocabulary: Mapping[str, int]) -> Tensor:
    """Give each number a random row of a word's length if the rows of all numbers are nearly alike.

    Numbers that a former tokenizer does not have begin as the mean of its words, and all of them are rare: training
    keeps them together, and a model that cannot tell them apart does not learn to copy one. Both forms of a number,
    behind a space and not, get the same row, and tables of the same width the same ones.

    Args:
        table: float[W, L], which stays as it is.
        vocabulary: rows by word.
    """
    found = {word: match for word in vocabulary if (match := NUMBER.fullmatch(word))}
    rows = torch.tensor([vocabulary[word] for word in found], dtype=torch.long)
    count = len(rows)
    if count < 2:
        return table
    unit = nn.functional.normalize(table[rows], dim=1)
    if (unit.sum(dim=0).square().sum() - count) / (count * (count - 1)) < ALIKE:
        return table
    values = [int(match[1]) for match in found.values()]
    directions = torch.randn(max(values) + 1, table.shape[1], generator=torch.Generator().manual_seed(0))
    others = table[sorted(set(range(len(table))) - set(rows.tolist()))]
    length = others.norm(dim=1).mean()
    return table.index_copy(0, rows, nn.functional.normalize(directions, dim=1)[values] * length)


def longer(table: Tensor, rows: int) -> Tensor:
    """Continue a table of positions that began as sines; its own rows stay as they are.

    Rows that training did not reach are sines still, which weight decay has made shorter, so the last row gives the
    length of the new ones.
    """
    more = sine_table(rows, table.shape[1])[len(table) :]
    return torch.cat([table, more * table[-1].norm()])
