"""Tokenization of prompts, texts and examples for a language model, with what its template puts around them."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from qformer.llm.plain_text import PlainText, spaced

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from qformer.llm.chat import Chat


class Tokenization:
    """The part of a `LanguageModel` that turns texts into ids and back; its attributes are explained there."""

    tokenizer: PreTrainedTokenizerBase
    start: list[int]
    end: int
    template: str
    chat: Chat

    def decode(self, ids: Tensor | list[list[int]]) -> list[str]:
        """Decode ids long[B, T] to texts, without special tokens and outer whitespace (OPT ends texts by a newline)."""
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        """Tokenize texts after `start`. The tokenizer adds nothing: some end prompts, and some omit BOS."""
        return [self.start + row for row in self._plain_text.ids(texts, self.template)]

    @cached_property
    def _plain_text(self) -> PlainText:
        return PlainText(self.tokenizer)

    def words_of(self, text: str) -> list[int]:
        """Tokenize a text of the configuration by itself, without `start`."""
        return self._plain_text.meant(text)

    def ended(self, texts: list[str], limit: int | None = None) -> list[list[int]]:
        """Tokenize texts between `start` and `end`; a text that is cut at `limit` keeps its end."""
        ending = self.chat.ending or (self.end,)
        cut = None if limit is None else limit - len(ending)
        return [[*row[:cut], *ending] for row in self._ids(texts)]

    def count_tokens(self, text: str) -> int:
        """Count the tokens of a prompt, including `start`."""
        return len(self._ids([text])[0])

    def examples(self, pairs: list[tuple[str, str]]) -> list[list[int]]:
        """Tokenize prompts with their texts as rows of training after their image; a template begins the next turn."""
        if not self.chat:
            return self.ended([spaced(*pair) for pair in pairs])
        asked = self.chat.around(self._ids([prompt for prompt, _ in pairs]))
        said = self.ended([text for _, text in pairs])
        return [[*front, *back, *self.chat.head] for front, back in zip(asked, said, strict=True)]
