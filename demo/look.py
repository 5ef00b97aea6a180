"""What the tab Look shows, under one name: where a bridge looks, drawn, and how strategies slice."""

from __future__ import annotations

from qformer.evaluation.attention import answer_relevance, query_maps
from qformer.figures.heat import QueryMaps, overlay, sheet
from qformer.figures.tiles import STRATEGIES, slices

__all__ = ["STRATEGIES", "QueryMaps", "answer_relevance", "overlay", "query_maps", "sheet", "slices"]
