"""Markers around tiles: a text of the language model that is one vector, such as `<|vision_start|>` or a comma."""

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

    def vector(self, text: str, llm: LanguageModel) -> Tensor:
        """The vector of a marker, float[L].

        Raises:
            UsageError: it is no token of the language model, and was none of the strategy's when the model was made.
        """
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
        embed = llm.model.get_input_embeddings()
        return embed(torch.tensor([token], device=embed.weight.device))[0]
