"""Text around tiles: markers, each one vector, such as `<|vision_start|>` or a comma, and words in front of a tile."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qformer.connectors.base import new_vector
from qformer.llm.plain_text import single_token
from qformer.types import UsageError

if TYPE_CHECKING:
    from qformer.llm.base import LanguageModel
    from qformer.resolution.base import ResolutionStrategy
    from qformer.types import Plan


class Markers(nn.ParameterList):
    """The vectors of the markers of a strategy.

    A marker that is one token of the language model is the embedding of this token, which stays frozen. For any other
    a vector is trained; it is `markers.<n>` in checkpoints, in the order of `ResolutionStrategy.markers`.
    """

    def __init__(self, strategy: ResolutionStrategy, llm: LanguageModel) -> None:
        texts = strategy.markers()
        self._tokens = {text: single_token(llm.tokenizer, text) for text in texts}
        new = [text for text, token in self._tokens.items() if token is None]
        super().__init__(new_vector(llm.width) for _ in new)
        self._places = {text: number for number, text in enumerate(new)}

    def vector(self, text: str, llm: LanguageModel, words: bool = False) -> Tensor:
        """The vector of a marker, float[L]; of `words`, those of all tokens of the text, float[n, L].

        Raises:
            UsageError: it is no token of the language model, and was none of the strategy's when the model was made.
        """
        embed = llm.model.get_input_embeddings()
        if words:
            return embed(torch.tensor(llm.words_of(text), device=embed.weight.device))
        if text in self._places:
            return self[self._places[text]]
        if text not in self._tokens:
            self._tokens[text] = single_token(llm.tokenizer, text)
        token = self._tokens[text]
        if token is None:
            raise UsageError(
                f"the marker {text!r} is no token of this language model and has no trained vector; build the model "
                "with the resolution that asks for it"
            )
        return embed(torch.tensor([token], device=embed.weight.device))[0]

    @staticmethod
    def count_leads(plan: Plan, llm: LanguageModel) -> int:
        """Number of tokens in front of the tiles of a plan, apart from markers."""
        return sum(len(llm.words_of(tile.lead)) for tile in plan.tiles if tile.lead)


def write_out(plan: Plan, whole: str) -> str:
    """Write what a picture or clip puts into a prompt: `whole` for its visual tokens, with their markers around them.

    Where markers stand between tiles, `whole` stands for the first tile and `[tile 2]` for the second.
    """
    first, last = plan.tiles[0], plan.tiles[-1]
    if plan.markers == bool(first.before) + bool(last.after):
        return f"{first.before}{whole}{last.after}"
    names = [whole, *(f"[tile {place}]" for place in range(2, len(plan.tiles) + 1))]
    return "".join(f"{tile.before}{name}{tile.after}" for tile, name in zip(plan.tiles, names, strict=True))
