"""Tokenization of texts from people, for a language model: special tokens in them are read as plain words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qformer.types import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PlainText:
    """A tokenizer that reads `</s>` letter by letter, so that no text can end in its middle.

    A Unigram tokenizer, such as T5's, always finds special tokens; they are replaced by letters afterward.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        special = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
        letters: dict[int, Any] = {number: tokenizer.convert_tokens_to_ids(list(name)) for number, name in special}
        letters.pop(tokenizer.unk_token_id, None)  # it stands for unknown text
        self.letters = {number: [letter for letter in row if letter is not None] for number, row in letters.items()}

    def ids(self, texts: list[str], template: str = "") -> list[list[int]]:
        """Tokenize each text without adding special tokens.

        Args:
            template: a prefix of texts in which special tokens are read as such.

        Raises:
            UsageError: a text cannot be encoded in UTF-8.
        """
        if not texts:
            return []
        try:
            "".join(texts).encode()
        except UnicodeError as error:
            raise UsageError(
                f"a text holds half of a character ({error}); give text that can be encoded in UTF-8"
            ) from error
        rests = [text.removeprefix(template) for text in texts]
        rows = self._read(rests, split=True)
        rows = [[letter for one in row for letter in self.letters.get(one, (one,))] for row in rows]
        if template:
            front = self.meant(template)
            rows = [front + row if rest != text else row for text, rest, row in zip(texts, rests, rows, strict=True)]
        return rows

    def meant(self, text: str) -> list[int]:
        """Tokenize a text of the configuration, in which special tokens are read as such."""
        return self._read([text], split=False)[0] if text else []

    def _read(self, texts: list[str], split: bool) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, split_special_tokens=split, verbose=False)["input_ids"]


def newline(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of a newline; None if the tokenizer has none."""
    ids = tokenizer("\n", add_special_tokens=False)["input_ids"]
    return ids[-1] if ids else None


def single_token(tokenizer: PreTrainedTokenizerBase, text: str) -> int | None:
    """Return the id of the one token that is this text, without a space that a tokenizer adds; None if there is none.

    T5 writes a comma as a piece for a space and the comma itself: the comma.
    """
    found = tokenizer.convert_tokens_to_ids(text)
    if isinstance(found, int) and found != tokenizer.unk_token_id:
        return found
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    own = [number for number in ids if str(tokenizer.decode([number])).strip(" ")]
    return own[0] if len(own) == 1 and str(tokenizer.decode(own)).strip(" ") == text else None


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return True if the tokenizer starts texts with its BOS; many have a BOS and never use it."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    return tokenizer("a")["input_ids"][: 1 + len(plain)] == [tokenizer.bos_token_id, *plain]


def spaced(prompt: str, text: str) -> str:
    """Join prompt and text with a space, unless there is one already or one of them is empty."""
    touching = prompt and text and not prompt[-1].isspace() and not text[0].isspace()
    return f"{prompt} {text}" if touching else prompt + text
