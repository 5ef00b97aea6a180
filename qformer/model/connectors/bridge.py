"""BLIP-2's own connector: a Q-Former on each tile, and a Linear to the language model's width."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from qformer.connectors.base import Connector, Prefix, join_rows, owners, units, with_markers
from qformer.model.frontend import join_tiles
from qformer.model.qformer import QFormer
from qformer.types import Plan, Tokens, UsageError, VisualTokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qformer.connectors.base import Marker
    from qformer.model.key_values import KeyValues
    from qformer.model.qformer import QFormerLayer

Links = Literal["none", "joint", "per_slice"]


class QFormerConnector(Connector):
    """BLIP-2's own bridge: Q query outputs per tile, then one Linear to the LLM's width (section 3.3).

    Its Q-Former keeps only the query path; the queries act as soft visual prompts. With a `tokenizer` it keeps the
    text path, too, and the queries read the question with the image, as in BLIP-2's fine-tuning for questions (section
    4.3): the question's tokens stand beside the queries in self-attention, and of what comes out the query rows alone
    go to the language model, which is asked the question as well. Without a question, or with an empty one, the queries
    are alone.

    Tiles are read each by itself, or linked: with `joint` one set of queries reads all tiles of a picture or clip, with
    `per_slice` there is a set for each tile that reads all of them. Then tokens, and the queries of a tile, carry an
    embedding of the tile's place (`QFormer.link`).
    """

    normalized = True
    per_patch = None

    def __init__(
        self,
        qformer: QFormer,
        llm_width: int,
        scale: float = 1.0,
        tokenizer: Any = None,
        max_tokens: int = 32,
        links: Links = "none",
    ) -> None:
        """The projection starts `scale` times as large as a Linear of PyTorch does.

        Args:
            tokenizer: of the BERT that the Q-Former's text path comes from; None: questions are not read.
            max_tokens: questions are cut here.
            links: between the tiles of a picture or clip.

        Raises:
            UsageError: questions may be longer than the Q-Former has positions.
        """
        super().__init__()
        if tokenizer is not None and max_tokens > qformer.config.max_positions:
            raise UsageError(
                f"question.max_tokens is {max_tokens}, more than the {qformer.config.max_positions} positions of the "
                "Q-Former; lower it"
            )
        self.qformer = qformer if links == "none" else qformer.link(each=links == "per_slice")
        self.links = links
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

    def forward(
        self, visual: VisualTokens, questions: Sequence[Sequence[str]] | None = None, marker: Marker | None = None
    ) -> Prefix:
        """Make the visual prefix of B images; M = Q times the most sets of queries, and their markers.

        With the `questions` of each image there is a row for each of them: its image's where questions are not read.
        The keys and values of an image are computed once for all its questions.
        """
        plans = visual.plans
        linked = visual
        if self.links != "none":
            linked = replace(visual, plans=units(plans), counts=[]).repack(visual.packed)
        counts = [self._sets(plan) for plan in plans] if self.links == "joint" else visual.counts
        if questions is None or self.tokenizer is None or not any(any(asked) for asked in questions):
            key_values, images, places = self._sets_of(linked)
            queries = self.qformer.encode_image(
                key_values if images is None else key_values.select(images), places=places
            )
            prefix = self._join(queries, counts, plans, marker)
            return prefix if questions is None else prefix.select(owners(questions).to(prefix.embeds.device))
        rows = owners(questions)
        tokens = self.tokenize([question for asked in questions for question in asked]).to(visual.device)
        pairs = tile_pairs(counts, rows).to(visual.device)  # (set of queries, question)
        key_values, images, places = self._sets_of(linked)
        if images is not None:
            sets, texts = pairs.unbind(dim=1)
            read = key_values.select(images[sets])
            queries = self.qformer.match(
                read, None, tokens.ids[texts], tokens.mask[texts], None if places is None else places[sets]
            )
        elif len(pairs) == len(key_values) == len(rows):  # one set, one question: nothing is shared
            queries = self.qformer.match(key_values, None, tokens.ids, tokens.mask)
        else:
            queries = self.qformer.match_pairs(key_values, tokens.ids, tokens.mask, pairs)
        return self._join(queries, [counts[row] for row in rows], [plans[row] for row in rows], marker)

    def _sets_of(self, visual: VisualTokens) -> tuple[KeyValues, Tensor | None, Tensor | None]:
        """Keys and values that the sets of queries read; which of them each set reads; and what is added to it.

        The second is long[n], None where each set has its own; the third is float[n, H], None for nothing.
        """
        if self.links == "none":
            return self.qformer.keys_values(visual), None, None
        joined = self.qformer.join_keys_values(visual)[1]
        if self.qformer.place_queries is None:
            return joined, None, None
        images = torch.arange(len(visual)).repeat_interleave(torch.tensor(visual.counts)).to(visual.device)
        return joined, images, self.qformer.place_queries(visual)

    def _sets(self, plan: Plan) -> int:
        """Number of sets of queries that read an image: one for each tile, or for each picture."""
        return len(units([plan])) if self.links == "joint" else len(plan.tiles)

    def _join(self, queries: Tensor, counts: Sequence[int], plans: Sequence[Plan], marker: Marker | None) -> Prefix:
        """Query outputs float[n, Q, H], so many sets of each row, as rows for the language model."""
        embeds = self.projection(queries)  # (n, Q, L)
        if marker is None or not any(plan.has_text for plan in plans):
            embeds, mask = join_tiles(embeds, None, counts)
            return Prefix(embeds, embeds.new_ones(embeds.shape[:2]).bool() if mask is None else mask)
        starts = [0, *accumulate(counts)]
        rows = []
        for plan, start in zip(plans, starts, strict=False):
            sets, parts = iter(embeds[start:, None]), []  # (1, Q, L) each
            for part in units([plan]):
                mine = [next(sets) for _ in range(self._sets(part))]
                mine += [mine[0][:, :0]] * (len(part.tiles) - len(mine))  # a picture that is read as one
                parts += with_markers(mine, part, marker)
            rows.append(torch.cat(parts, dim=1)[0])
        return join_rows(rows)

    def count_part(self, plan: Plan) -> int:
        """Length of the prefix of one picture or clip: Q for each tile, or for all of it where tiles are joint."""
        return self.qformer.config.queries * self._sets(plan)

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
