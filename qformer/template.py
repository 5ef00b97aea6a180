"""Templates of a chat: what a language model reads around the image, the words about it, and its answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from qformer.types import UsageError

IMAGE, TEXT, ANSWER = "{image}", "{text}", "{answer}"
NONE, AUTO = "none", "auto"  # instead of a template: no template, and that of the tokenizer
EXAMPLE = f"'USER: {IMAGE}{TEXT} ASSISTANT:'"


@dataclass(frozen=True)
class Template:
    """The parts of a template, each possibly empty.

    Attributes:
        head: text in front of the image.
        between: text between the image and the words about it.
        after: text between these words and the answer.
        end: text after the answer.
    """

    head: str
    between: str
    after: str
    end: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Split a template at its places: `{image}`, `{text}`, and perhaps `{answer}`, in this order, each once.

        Raises:
            UsageError: a place is missing, is there twice, or is out of order.
        """
        for place, least in ((IMAGE, 1), (TEXT, 1), (ANSWER, 0)):
            if not least <= (count := text.count(place)) <= 1:
                raise UsageError(
                    f"llm.template has {place} {count} times; write {IMAGE} and {TEXT} once each, as in {EXAMPLE}, or "
                    f"give {AUTO} or {NONE}"
                )
        head, _, rest = text.partition(IMAGE)
        between, found, rest = rest.partition(TEXT)
        after, _, end = rest.partition(ANSWER)
        if not found or ANSWER in head + between:
            raise UsageError(
                f"llm.template has its places out of order; write {IMAGE}, then {TEXT}, then {ANSWER} if it is there, "
                f"as in {EXAMPLE}"
            )
        return cls(head, between, after, end)


def check_template(given: str) -> str:
    """Return `auto`, `none` or a sound template.

    Raises:
        UsageError: see `Template.parse`.
    """
    if given not in (AUTO, NONE):
        Template.parse(given)
    return given
