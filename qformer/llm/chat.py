"""Chat templates of language models: the turns of a user who shows an image and of an assistant who answers.

A row is [head][visual][between][prompt][after], and then the answer and what ends the assistant's turn. Only these
parts are read with their special tokens; whatever people type between them is plain text, so nobody can end a turn that
is not theirs. The template of a tokenizer is code (Jinja), which transformers runs in its sandbox. It is run once, on
the names of the places instead of their contents, when a model is made from `llm.template: auto`, or from a folder of a
system whose turns show pictures; the text that comes out is saved with checkpoints, so that loading one runs no code
and a changed tokenizer or date changes nothing.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

import torch

from qformer.llm.plain_text import adds_bos
from qformer.template import ANSWER, AUTO, IMAGE, NONE, TEXT, Template
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from qformer.llm.decoding import Step
    from qformer.llm.plain_text import PlainText

LONGEST = 20_000  # characters of a template; system prompts are long, and this is too long for anything else
TURNS = [{"role": "user", "content": IMAGE + TEXT}, {"role": "assistant", "content": ANSWER}]


@dataclass(frozen=True)
class Chat:
    """Ids of what a template puts around image, prompt and answer; all are empty without a template.

    Attributes:
        head: ids in front of the image.
        between: ids between image and prompt.
        after: ids between prompt and answer.
        ending: ids that end an answer, of which the last one ends generation; empty means the usual end.
        other: a second id that ends generation, the tokenizer's own end; None if that is the last of `ending`.
    """

    head: tuple[int, ...] = ()
    between: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    ending: tuple[int, ...] = ()
    other: int | None = None

    def __bool__(self) -> bool:
        """Return True if there is a template."""
        return self != Chat()

    @property
    def length(self) -> int:
        """Count the ids around image, prompt and answer, without the ending."""
        return len(self.head) + len(self.between) + len(self.after)

    def around(self, prompts: list[list[int]]) -> list[list[int]]:
        """Put the ids that a template has around prompts around them."""
        return [[*self.between, *prompt, *self.after] for prompt in prompts]

    def headed(self, embed: Callable[[Tensor], Tensor], prefix: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Put the head in front of a visual prefix float[B, M, L] and its mask bool[B, M]."""
        if not self.head:
            return prefix, mask
        ids = torch.tensor([self.head], device=prefix.device).expand(len(prefix), -1)  # (B, head)
        head = embed(ids)
        return torch.cat([head, prefix.to(head.dtype)], dim=1), torch.cat([ids.ge(0), mask], dim=1)

    def ending_step(self, step: Step, end: int) -> Step:
        """Let a step count `other` as `end`: with either, a model says that a text is over."""
        if self.other is None:
            return step

        def scores(texts: Tensor, rows: Tensor | None) -> Tensor:
            logits = step(texts, rows).clone()
            logits[:, end] = logits[:, [end, self.other]].logsumexp(dim=1)
            logits[:, self.other] = -torch.inf
            return logits

        return scores


def resolve(template: str, tokenizer: Any, source: str) -> str:
    """Find the text of a template: of `auto` that of the tokenizer, or `none` if it has no template.

    Args:
        source: where the tokenizer was loaded from, for messages.

    Raises:
        UsageError: the tokenizer's template fails, or does not repeat what a user and an assistant say.
    """
    if template != AUTO:
        return template
    if not tokenizer.chat_template:
        return NONE
    hint = f"set llm.template to {NONE}, or write a template"
    try:
        text = tokenizer.apply_chat_template(TURNS, tokenize=False)
    except Exception as error:  # a template can raise what it likes
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise UsageError(
            f"the chat template of the tokenizer in '{source}' fails ({type(error).__name__}: {reason}); {hint}"
        ) from error
    odd = [place for place in (IMAGE, TEXT, ANSWER) if text.count(place) != 1]
    if odd:
        raise UsageError(
            f"the chat template of the tokenizer in '{source}' writes {odd[0]}, which it was told to say once, "
            f"{text.count(odd[0])} times; {hint}"
        )
    if len(text) > LONGEST:
        raise UsageError(
            f"the chat template of the tokenizer in '{source}' writes {len(text):,} characters, more than "
            f"{LONGEST:,}; {hint}"
        )
    Template.parse(text)
    return str(text)


def shown(tokenizer: Any, source: str, words: Sequence[str]) -> tuple[str, str] | None:
    """The text of the template of a tokenizer whose turns show pictures, and what it writes between two pictures.

    The assistant's turn begins as it does when an answer is generated, which some templates write in another way.

    Args:
        source: where the tokenizer was loaded from, for messages.
        words: what the template may write for a picture, the likeliest first.

    Returns:
        The text with its places, and the text between two pictures; None where the tokenizer has no template.

    Raises:
        UsageError: the template fails, or does not repeat the picture and what a user and an assistant say.
    """
    if not tokenizer.chat_template:
        return None

    def turns(pictures: int) -> list[dict[str, Any]]:
        said = [{"type": "text", "text": TEXT}]
        return [{"role": "user", "content": [{"type": "image"}] * pictures + said}]

    answer = {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]}
    try:
        whole = tokenizer.apply_chat_template([*turns(1), answer], tokenize=False)
        asked, asked_two = (
            tokenizer.apply_chat_template(turns(pictures), tokenize=False, add_generation_prompt=True)
            for pictures in (1, 2)
        )
        bare = tokenizer.apply_chat_template(turns(1), tokenize=False)
    except Exception as error:  # a template can raise what it likes
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise UsageError(
            f"the chat template of the tokenizer in '{source}' fails ({type(error).__name__}: {reason}); remove it"
        ) from error
    word = next((word for word in words if word in asked), words[0])
    if asked != bare:
        whole = asked + ANSWER + whole.rpartition(ANSWER)[2]
    for place in (word, TEXT, ANSWER):
        if whole.count(place) != 1 or len(whole) > LONGEST:
            raise UsageError(
                f"the chat template of the tokenizer in '{source}' writes {place}, which it was told to say once, "
                f"{whole.count(place)} times in {len(whole):,} characters; remove it"
            )
    if adds_bos(tokenizer) and not whole.startswith(tokenizer.bos_token):
        whole = tokenizer.bos_token + whole
    front, back = asked.split(word)
    pieces = asked_two.split(word)
    between = pieces[1] if (len(pieces), pieces[0], pieces[-1]) == (3, front, back) else ""
    text = whole.replace(word, IMAGE)
    Template.parse(text)
    return text, between


def encode(template: str, words: PlainText, ends: bool) -> Chat:
    """Tokenize the parts of a template, each by itself, as the answer must be when it is generated.

    The ending is what stands after the answer up to its first special token; without one, the usual end is taken.

    Args:
        template: a text, or `none`.
        ends: take the ending, too; the decoder of an encoder-decoder ends its texts as ever.
    """
    if template == NONE:
        return Chat()
    head, between, after, end = (tuple(words.meant(part)) for part in astuple(Template.parse(template)))
    special = {number for number, token in words.tokenizer.added_tokens_decoder.items() if token.special}
    last = next((place for place, number in enumerate(end) if ends and number in special), -1)
    usual = words.tokenizer.eos_token_id
    other = usual if last >= 0 and end[last] != usual else None
    return Chat(head, between, after, end[: last + 1], other)
