"""The small vocabularies of the golden models, from which either side makes its own tokenisers.

Plain Python, so that the environment of the original can import it too. Two variants, `a` and `b`, of different sizes;
words that only `a` knows fall to pieces in `b`.
"""

from __future__ import annotations

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = {
    "a": "a an the of on in is are two three red blue old small cat dog bus train man woman people beach rain photo "
    "riding holding stands sleeping what colour how many where question answer short yes no umbrella station",
    "b": "a the of on is red cat dog bus beach photo what question answer",
}
PRINTABLE = [chr(code) for code in range(33, 127)]
OPT_SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]


def bert(variant: str) -> list[str]:
    """WordPiece tokens in the order of their ids; `[DEC]` comes behind them."""
    letters = [*PRINTABLE, *(f"##{letter}" for letter in PRINTABLE)]
    return list(dict.fromkeys([*SPECIAL, *WORDS[variant].split(), *letters]))


def byte_level(variant: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a byte-level BPE as OPT's: every word of the variant is one token behind a space."""
    bytes_as_letters = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256))]
    bytes_as_letters += [chr(256 + n) for n in range(256 - len(bytes_as_letters))]  # GPT-2's letters for the others
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS[variant].split():
        left = "Ġ"
        for letter in word:
            merges[left, letter] = None
            left += letter
    vocabulary = dict.fromkeys([*OPT_SPECIAL, *bytes_as_letters, *(left + right for left, right in merges)])
    return {token: index for index, token in enumerate(vocabulary)}, list(merges)


def unigram(variant: str) -> list[tuple[str, float]]:
    """Pieces and scores of a T5 tokeniser: ids 0, 1, 2 are pad, end and unknown."""
    words = [(f"▁{word}", -2.0) for word in WORDS[variant].split()]
    letters = [(letter, -4.0) for letter in ["▁", *PRINTABLE]]
    return [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), *words, *letters]
