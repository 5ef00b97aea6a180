"""Streaming of a text, piece by piece, while it is generated.

A generator over the tokens of `LanguageModel.stream` yields each piece of text once later tokens can no longer change
it. Generation stops when the caller stops reading.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qformer.llm.decoding import GenerateConfig
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from qformer.llm.base import LanguageModel

UNFINISHED = "\ufffd"  # stands for the first bytes of a character


def stream(
    llm: LanguageModel,
    prefix: Tensor,
    mask: Tensor,
    prompt: str,
    options: dict[str, Any],
    places: Tensor | None = None,
) -> Iterator[str]:
    """Generate the text after [visual][prompt] in pieces, which add up to the text of `generate`.

    Args:
        prefix: float[1, M, L]. mask: bool[1, M].
        options: fields of `GenerateConfig`; one beam is the default.
        places: long[1, M, 3], see `LanguageModel.loss`.

    Raises:
        UsageError: several beams or texts, an unknown option, or a row that exceeds the positions of the model.
    """
    options = {"num_beams": 1, **options}
    config = GenerateConfig.of(options)
    if config.searches or config.num_return_sequences != 1:
        raise UsageError(
            "only one greedy or sampled text can be streamed, because beam search can change any word until the end; "
            "leave num_beams and num_return_sequences out, or use generate"
        )
    return _pieces(llm, llm.stream(prefix, mask, prompt, places, **options))


def _pieces(llm: LanguageModel, tokens: Iterator[int]) -> Iterator[str]:
    ids: list[int] = []
    shown = ""
    for token in tokens:
        ids.append(token)
        text = _settled(llm, ids)
        if len(text) > len(shown) and text.startswith(shown):
            yield text[len(shown) :]
            shown = text
    if rest := llm.decode([ids])[0][len(shown) :]:
        yield rest


def _settled(llm: LanguageModel, ids: list[int]) -> str:
    """Decode the part of a text that later tokens cannot change: complete characters, no trailing space."""
    text = llm.decode([ids])[0].rstrip(UNFINISHED).rstrip()
    if getattr(llm.tokenizer, "clean_up_tokenization_spaces", False):  # `do n` can still become `don't`
        return text.rpartition(" ")[0]
    return text
