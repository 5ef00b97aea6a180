"""Functions of the tab Look in one module: attention of the queries, relevance for an answer, and slices."""

from __future__ import annotations

from qformer.evaluation.attention import answer_relevance, query_maps
from qformer.figures.heat import QueryMaps, overlay, sheet
from qformer.figures.tiles import STRATEGIES, slices

__all__ = ["STRATEGIES", "QueryMaps", "answer_relevance", "overlay", "query_maps", "sheet", "slices", "words"]


def words(answer: str, tokens: list[str]) -> list[tuple[str, list[int]]]:
    """Divide the tokens of an answer among its words.

    Returns:
        Each word of the answer with the indices of its tokens; a token that stands between words goes to the former.
    """
    found: list[tuple[str, list[int]]] = [(word, []) for word in answer.split()]
    letters = [place for place, (word, _) in enumerate(found) for _ in word]  # whose word is each letter
    read = 0
    for number, token in enumerate(tokens):
        if letters:
            found[letters[min(read, len(letters) - 1)]][1].append(number)
        read += len("".join(token.split()))
    return [(word, numbers) for word, numbers in found if numbers]
