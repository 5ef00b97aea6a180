"""BLIP-2's own connector: a Q-Former on each tile, and a Linear to the language model's width."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from qformer.model.connectors.base import Connector, Prefix, owners
from qformer.model.frontend import join_tiles
from qformer.model.qformer import QFormer
from qformer.types import Plan, Tokens, UsageError, VisualTokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qformer.model.qformer import QFormerLayer


class QFormerConnector(Connector):
    """BLIP-2's own bridge: Q query outputs per tile, then one Linear to the LLM's width (section 3.3).

    Its Q-Former keeps only the query path; the queries act as soft visual prompts. With a `tokenizer` it keeps the
    text path, too, and the queries read the question with the image, as in BLIP-2's fine-tuning for questions (section
    4.3): the question's tokens stand beside the queries in self-attention, and of what comes out the query rows alone
    go to the language model, which is asked the question as well. Without a question, or with an empty one, the queries
    are alone.
    """

    normalized = True

    def __init__(
        self, qformer: QFormer, llm_width: int, scale: float = 1.0, tokenizer: Any = None, max_tokens: int = 32
    ) -> None:
        """The projection starts `scale` times as large as a Linear of PyTorch does.

        Args:
            tokenizer: of the BERT that the Q-Former's text path comes from; None: questions are not read.
            max_tokens: questions are cut here.

        Raises:
            UsageError: questions may be longer than the Q-Former has positions.
        """
        super().__init__()
        if tokenizer is not None and max_tokens > qformer.config.max_positions:
            raise UsageError(
                f"question.max_tokens is {max_tokens}, more than the {qformer.config.max_positions} positions of the "
                "Q-Former; lower it"
            )
        self.qformer = qformer
        self.projection = nn.Linear(qformer.config.hidden_size, llm_width)
        self.rescale(scale)
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        """Make the projection `factor` times as large."""
        for parameter in self.projection.parameters():
            parameter.mul_(factor)

    @torch.no_grad()
    def spread(self) -> float:
        """Estimate the root mean square of what the projection makes of query outputs, from the weights alone.

        Query outputs come from a LayerNorm, so its weight and bias tell how large they are.
        """
        norm = cast("QFormerLayer", self.qformer.layers[-1]).query_ffn.norm
        inputs = norm.weight.square().mean() + norm.bias.square().mean()
        weight, bias = self.projection.weight, self.projection.bias
        return float((inputs * weight.square().sum(dim=1).mean() + bias.square().mean()).sqrt())

    def forward(self, visual: VisualTokens, questions: Sequence[Sequence[str]] | None = None) -> Prefix:
        """Make the visual prefix of B images; M = Q times the most tiles.

        With the `questions` of each image there is a row for each of them: its image's where questions are not read.
        The keys and values of an image are computed once for all its questions.
        """
        if questions is None or self.tokenizer is None or not any(any(asked) for asked in questions):
            prefix = self._join(self.qformer.encode_image(visual), visual.counts)
            return prefix if questions is None else prefix.select(owners(questions).to(prefix.embeds.device))
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

    def _join(self, queries: Tensor, counts: Sequence[int]) -> Prefix:
        """Query outputs float[N, Q, H] of tiles, so many of each row, as rows for the language model."""
        embeds, mask = join_tiles(self.projection(queries), None, counts)
        return Prefix(embeds, embeds.new_ones(embeds.shape[:2]).bool() if mask is None else mask)

    def count_tokens(self, plan: Plan) -> int:
        """Length of the prefix of a plan: Q for each tile."""
        return self.qformer.config.queries * len(plan.tiles)

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

    @property
    def reader(self) -> QFormer:
        return self.qformer


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
