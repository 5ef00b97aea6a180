"""Patterns of blind pairs, by a model that sees both pictures side by side: MMVP's nine (Tong et al. 2024, section 3).

Replies are a stranger's text: one that names no pattern, or several, is kept and counts for none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from PIL import Image

from qformer.types import UsageError

Ask = Callable[[list[Image.Image], list[str]], list[str]]

GAP = 16  # pixels between the pictures
SIDE = 512  # of each picture, at most
IN_A_ROW = 2  # requests that fail before a server is given up
KEPT = 500  # characters of a reply


class Tag(NamedTuple):
    """A reply about a pair, and the pattern that it names; None where it names none or several."""

    key: str
    reply: str
    pattern: str | None


def question(patterns: Sequence[str]) -> str:
    """Write the question about a picture that shows both of a pair."""
    names = "\n".join(f"{number}. {name}" for number, name in enumerate(patterns, start=1))
    return (
        "Two similar pictures stand side by side. Which of these describes best what differs between the left one and "
        f"the right one?\n{names}\nAnswer with one number."
    )


def parse_pattern(reply: str, patterns: Sequence[str]) -> str | None:
    """Find the only pattern that a reply names, in words, or else by its only number, with which it begins or ends."""
    named = [name for name in patterns if re.search(rf"\b{re.escape(name)}\b", reply, re.IGNORECASE)]
    if not named:
        numbers = dict.fromkeys(re.findall(r"(?<![\w.,])\d+(?![\w]|[.,]\d)", reply))
        named = [patterns[int(one) - 1] for one in numbers if len(one) < 4 and 0 < int(one) <= len(patterns)]
        if len(numbers) > 1 or not re.search(r"\A\W*\d+\b|\b\d+\W*\Z", reply):
            return None
    return named[0] if len(named) == 1 else None


def side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    """Draw two pictures next to each other, of one height, on white."""
    height = min(SIDE, max(left.height, right.height))
    both = [
        one.convert("RGB").resize((max(1, min(SIDE, one.width * height // one.height)), height))
        for one in (left, right)
    ]
    joined = Image.new("RGB", (both[0].width + GAP + both[1].width, height), "white")
    joined.paste(both[0], (0, 0))
    joined.paste(both[1], (both[0].width + GAP, 0))
    return joined


def tag_pairs(
    pairs: Iterable[tuple[str, Image.Image, Image.Image]],
    ask: Ask,
    patterns: Sequence[str],
    keep: Callable[[Tag], None],
    skip: Callable[[str, str], None],
) -> None:
    """Ask a model about one pair after the other.

    Args:
        pairs: a key and both pictures of each.
        ask: one picture and one question -> one reply.
        keep: called with each reply as it comes. skip: called with the key and the reason where there is none.

    Raises:
        UsageError: `IN_A_ROW` requests have failed, one after the other; what was kept stays.
    """
    failed = 0
    for key, left, right in pairs:
        try:
            replies = ask([side_by_side(left, right)], [question(patterns)])
            if len(replies) != 1 or not isinstance(replies[0], str):
                raise UsageError(f"one question got {len(replies)} replies; ask a model that answers each")
        except UsageError as error:
            skip(key, str(error))
            failed += 1
            if failed == IN_A_ROW:
                raise
            continue
        failed = 0
        keep(Tag(key, replies[0][:KEPT], parse_pattern(replies[0][:KEPT], patterns)))
