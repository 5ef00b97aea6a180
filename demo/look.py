"""Functions of the tab Look in one module: attention of the queries, relevance for an answer, and slices."""

from __future__ import annotations

from qformer.evaluation.attention import answer_relevance, query_maps
from qformer.figures.heat import QueryMaps, overlay, sheet
from qformer.figures.tiles import STRATEGIES, slices

__all__ = ["STRATEGIES", "QueryMaps", "answer_relevance", "overlay", "query_maps", "sheet", "slices"]
