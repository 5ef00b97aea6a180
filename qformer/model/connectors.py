"""Connectors turn the image encoder's tokens into the language model's input embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qformer.model.frontend import join_tiles
from qformer.model.qformer import QFormer
from qformer.types import Plan, VisualTokens


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

    def forward(self, visual: VisualTokens) -> tuple[Tensor, Tensor]:
        """The visual prefix of B images: float[B, M, L] and bool[B, M]; M = Q times the most tiles."""
        rows = self.projection(self.qformer.encode_image(visual.features, visual.mask))  # (N, Q, L)
        prefix, mask = join_tiles(rows, None, visual.counts)
        return prefix, prefix.new_ones(prefix.shape[:2]).bool() if mask is None else mask

    def count_tokens(self, plan: Plan) -> int:
        """Length of the prefix of one image."""
        return self.qformer.config.queries * len(plan.tiles)
