"""Connectors turn the image encoder's tokens into the language model's input embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from qformer.model.frontend import join_tiles
from qformer.model.qformer import QFormer
from qformer.types import Plan, Tokens, UsageError, VisualTokens

if TYPE_CHECKING:
    from collections.abc import Sequence


class QFormerConnector(nn.Module):
    """BLIP-2's own bridge: Q query outputs per tile, then one Linear to the LLM's width (section 3.3).

    Its Q-Former keeps only the query path; the queries act as soft visual prompts.
    """

    def __init__(self, qformer: QFormer, llm_width: int, scale: float = 1.0) -> None:
        """The projection starts `scale` times as large as a Linear of PyTorch does."""
        super().__init__()
        self.qformer = qformer
        self.projection = nn.Linear(qformer.config.hidden_size, llm_width)
        with torch.no_grad():
            for parameter in self.projection.parameters():
                parameter.mul_(scale)

    def forward(self, visual: VisualTokens, questions: Sequence[Sequence[str]] | None = None) -> tuple[Tensor, Tensor]:
        """The visual prefix of B images: float[B, M, L] and bool[B, M]; M = Q times the most tiles.

        With the `questions` of each image there is a row for each of them: its image's, whatever is asked.
        """
        prefix, mask = self._join(self.qformer.encode_image(visual), visual.counts)
        if questions is None:
            return prefix, mask
        images = owners(questions).to(prefix.device)
        return prefix[images], mask[images]

    def _join(self, queries: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Query outputs float[N, Q, H] of tiles, so many of each row, as rows for the language model."""
        prefix, mask = join_tiles(self.projection(queries), None, counts)
        return prefix, prefix.new_ones(prefix.shape[:2]).bool() if mask is None else mask

    def count_tokens(self, plan: Plan) -> int:
        """Length of the prefix of one image."""
        return self.qformer.config.queries * len(plan.tiles)


class QuestionConnector(QFormerConnector):
    """The bridge of BLIP-2's fine-tuning for questions (section 4.3): the queries read the question with the image.

    The question's tokens stand beside the queries in self-attention; of what comes out the query rows alone go to the
    language model, which is asked the question as well. Without one, or with an empty one, the queries are alone, as
    in `QFormerConnector`.
    """

    def __init__(
        self, qformer: QFormer, llm_width: int, tokenizer: Any, max_tokens: int = 32, scale: float = 1.0
    ) -> None:
        """`tokenizer`: of the BERT that the Q-Former's text path comes from; questions are cut at `max_tokens`.

        Raises:
            UsageError: more than the Q-Former has positions.
        """
        super().__init__(qformer, llm_width, scale)
        if max_tokens > qformer.config.max_positions:
            raise UsageError(
                f"question.max_tokens is {max_tokens}, more than the {qformer.config.max_positions} positions of the "
                "Q-Former; lower it"
            )
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens

    def forward(self, visual: VisualTokens, questions: Sequence[Sequence[str]] | None = None) -> tuple[Tensor, Tensor]:
        """A prefix for each of n pairs of image and question: float[n, M, L] and bool[n, M]; n = B without questions.

        The keys and values of an image are computed once for all its questions.
        """
        if questions is None or not any(any(asked) for asked in questions):
            return super().forward(visual, questions)
        images = owners(questions)
        tokens = self.tokenize([question for asked in questions for question in asked]).to(visual.device)
        pairs = tile_pairs(visual.counts, images).to(visual.device)
        key_values = self.qformer.keys_values(visual)
        counts = [visual.counts[image] for image in images]
        if len(pairs) == len(visual.rows) == len(images):  # one tile, one question: nothing is shared
            queries = self.qformer.match(key_values, None, tokens.ids, tokens.mask)
        else:
            queries = self.qformer.match_pairs(key_values, tokens.ids, tokens.mask, pairs)
        return self._join(queries, counts)

    def tokenize(self, questions: Sequence[str]) -> Tokens:
        """`[CLS] words [SEP]`, padded on the right; of an empty question all is padding, which nobody sees."""
        made = self.tokenizer(list(questions), truncation=True, max_length=self.max_tokens)["input_ids"]
        rows = [torch.tensor(row, dtype=torch.long) for row in made]
        exists = [
            torch.full_like(row, bool(question), dtype=torch.bool)
            for question, row in zip(questions, rows, strict=True)
        ]
        pad = self.tokenizer.pad_token_id
        return Tokens(pad_sequence(rows, True, pad), pad_sequence(exists, True, False))


def owners(questions: Sequence[Sequence[str]]) -> Tensor:
    """The image of each question, long[n]."""
    return torch.tensor([image for image, asked in enumerate(questions) for _ in asked], dtype=torch.long)


def tile_pairs(counts: Sequence[int], images: Tensor) -> Tensor:
    """Which tile is read with which question: long[m, 2], all the tiles of the question's image one after the other.

    Args:
        counts: tiles of each of the B images.
        images: of each question, long[n].
    """
    starts = torch.tensor([0, *counts]).cumsum(0)
    rows = [
        (tile, number)
        for number, image in enumerate(images.tolist())
        for tile in range(int(starts[image]), int(starts[image + 1]))
    ]
    return torch.tensor(rows, dtype=torch.long).view(-1, 2)
