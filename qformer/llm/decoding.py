"""How text is written: beams, greedy and nucleus sampling, all over one `step(texts, rows) -> scores`.

A step is given the texts so far, long[n, t], and for each of them which row of its last call it continues, long[n];
at first these are rows of what the texts start with, and None means that every text continues its own row. It returns
logits of the next token, float32[n, V]. Language models (`qformer.llm.steps`) and the Q-Former each bring a step.

Beams follow the rule of transformers 4.26, with which the original (LAVIS) and its published numbers were made. What
has changed since is how long a text is, by a power of which its score is divided: then the prompt and the new tokens,
today the new tokens and the end. So today's search prefers other captions after a prompt, and much shorter answers
where the length penalty is negative.

Nucleus sampling can take its random numbers from outside: one for each token. A text then depends on its own numbers
alone, whatever else is in its batch, and can be made again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from transformers import LogitsProcessorList, NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

from qformer.lookup import build
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Step = Callable[[Tensor, Tensor | None], Tensor]

MOST = 1e6  # by which logits are multiplied or divided: more are no numbers any more
STEEPEST = 50  # power of a length: of a length of a thousand, a higher one is beyond what a float holds
NEVER = -1e9  # score of a beam that does not exist yet: all beams of a text begin alike, so only one may go on


@dataclass(frozen=True)
class GenerateConfig:
    """How text is generated; the defaults are those of the paper's captioning (beam search).

    `max_new_tokens` and `min_new_tokens` count generated tokens only, the end among the former. `top_p` and
    `temperature` act when `do_sample` is True, `length_penalty` when there are several beams (see the top of this
    module for what counts). `repetition_penalty` lowers the scores of tokens that were generated already (those of the
    prompt may come again), and no `no_repeat_ngram_size` generated tokens in a row come twice. `num_return_sequences`
    texts are sampled of each row. `draws` are numbers in [0, 1) that are used in place of the global random state: for
    each text as many as there may be new tokens.
    """

    num_beams: int = 5
    max_new_tokens: int = 30
    min_new_tokens: int = 1
    top_p: float = 0.9
    do_sample: bool = False
    repetition_penalty: float = 1.0
    length_penalty: float = 1.0
    temperature: float = 1.0
    num_return_sequences: int = 1
    no_repeat_ngram_size: int = 0
    draws: list[list[float]] | None = None

    def __post_init__(self) -> None:
        rules = {
            "num_beams": (self.num_beams >= 1, "at least 1"),
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "min_new_tokens": (0 <= self.min_new_tokens <= self.max_new_tokens, "between 0 and max_new_tokens"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "temperature": (1 / MOST <= self.temperature <= MOST, f"a number from {1 / MOST:g} to {MOST:g}"),
            "repetition_penalty": (
                1 / MOST <= self.repetition_penalty <= MOST,
                f"a number from {1 / MOST:g} to {MOST:g}",
            ),
            "length_penalty": (abs(self.length_penalty) <= STEEPEST, f"a number from {-STEEPEST} to {STEEPEST}"),
            "no_repeat_ngram_size": (self.no_repeat_ngram_size >= 0, "at least 0"),
            "num_return_sequences": (
                self.num_return_sequences == 1 or (self.do_sample and self.num_return_sequences > 1),
                "1, or more with do_sample",
            ),
            "draws": (
                self.draws is None or (self.do_sample and min(map(len, self.draws), default=0) >= self.max_new_tokens),
                "a number for each new token of each text, with do_sample",
            ),
        }
        for name, (holds, expected) in rules.items():
            if not holds:
                raise UsageError(f"{name} must be {expected}, but got {getattr(self, name)}")

    @classmethod
    def of(cls, options: dict[str, Any]) -> Self:
        """The defaults overridden by `options`; an unknown name is a UsageError that names the nearest."""
        return build({"generate": cls}, "generate", options, "generate")

    @property
    def searches(self) -> bool:
        """True where beams are compared. Sampling never does: its texts are independent of one another."""
        return self.num_beams > 1 and not self.do_sample

    def check_draws(self, texts: int) -> None:
        """Refuse `draws` of another number of texts.

        Raises:
            UsageError: saying how many are needed.
        """
        if self.draws is not None and len(self.draws) != texts:
            raise UsageError(f"draws must hold a row of numbers for each of {texts} texts, but got {len(self.draws)}")

    def of_rows(self, rows: slice) -> Self:
        """The same for these rows of a batch alone: the draws of their texts."""
        if self.draws is None:
            return self
        each = self.num_return_sequences
        return replace(self, draws=self.draws[rows.start * each : rows.stop * each])


@torch.no_grad()
def write(step: Step, start: Tensor, end: int, pad: int, config: GenerateConfig, unseen: Tensor | int = 0) -> Tensor:
    """The texts of B rows as `config` asks for them.

    Args:
        step: logits of the next token, see the top of this module.
        start: long[B, t], what each text begins with.
        end, pad: ids of the token that ends a text, and of what stands after it.
        unseen: see `beam_search`.

    Returns:
        long[B * n, new], n texts of a row together, without the start, padded on the right.
    """
    if not config.searches:
        return torch.stack(list(write_tokens(step, start, end, pad, config)), dim=1)
    adjust, front = _Constraints(config, end), start.shape[1]

    def scored(texts: Tensor, rows: Tensor) -> Tensor:
        return adjust(texts[:, front:], step(texts, rows).log_softmax(dim=1))

    return beam_search(
        scored,
        start,
        end,
        pad,
        beams=config.num_beams,
        max_length=front + config.max_new_tokens,
        length_penalty=config.length_penalty,
        unseen=unseen,
    )


def write_tokens(step: Step, start: Tensor, end: int, pad: int, config: GenerateConfig) -> Iterator[Tensor]:
    """Tokens of texts as they come, greedy or drawn: long[B * n] at a time, until every text has ended.

    Arguments are those of `write`. Whoever stops reading stops the writing.
    """
    rows = torch.arange(len(start), device=start.device).repeat_interleave(config.num_return_sequences)
    config.check_draws(len(rows))
    texts, adjust, front = start[rows], _Constraints(config, end), start.shape[1]
    given = None
    if config.draws is not None:
        given = torch.tensor([row[: config.max_new_tokens] for row in config.draws], device=start.device)
    done = torch.zeros(len(texts), dtype=torch.bool, device=start.device)
    for place in range(config.max_new_tokens):
        scores = adjust(texts[:, front:], step(texts, None if place else rows))
        if config.do_sample:
            draws = torch.rand(len(texts), device=scores.device) if given is None else given[:, place]
            token = nucleus(scores, draws, config.top_p, config.temperature)
        else:
            token = scores.argmax(dim=1)
        token = token.masked_fill(done, pad)
        yield token
        done |= token == end
        if done.all():
            return
        texts = torch.cat([texts, token[:, None]], dim=1)


class _Constraints:
    """Adjusts scores by what was written so far: no early end, no repetition."""

    def __init__(self, config: GenerateConfig, end: int) -> None:
        self.least, self.end = config.min_new_tokens, end
        self.repeats: Any = LogitsProcessorList()
        if config.repetition_penalty != 1:
            self.repeats.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
        if config.no_repeat_ngram_size:
            self.repeats.append(NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))

    def __call__(self, written: Tensor, scores: Tensor) -> Tensor:
        """New tokens long[n, t] and scores of the next one float[n, V] -> scores float[n, V]."""
        if written.shape[1] < self.least:
            scores = scores.clone()
            scores[:, self.end] = -torch.inf
        return self.repeats(written, scores)


def nucleus(logits: Tensor, draws: Tensor, top_p: float = 0.9, temperature: float = 1.0) -> Tensor:
    """A token of each row by nucleus sampling (Holtzman et al., arXiv:1904.09751): of the likeliest that hold `top_p`.

    Args:
        logits: float[n, V]. draws: float[n], from 0 to 1; the likeliest token is the one of the lowest numbers.

    Returns:
        long[n].
    """
    probs, order = (logits.float() / temperature).softmax(dim=1).sort(dim=1, descending=True, stable=True)
    cumulative = probs.cumsum(dim=1)
    kept = (cumulative - probs < top_p).sum(dim=1, keepdim=True).clamp(min=1)  # (n, 1)
    held = cumulative.gather(1, kept - 1)
    place = (cumulative <= draws.float()[:, None] * held).sum(dim=1, keepdim=True)
    return order.gather(1, torch.minimum(place, kept - 1)).squeeze(1)  # a draw next to 1 may have been rounded up


@torch.no_grad()
def beam_search(
    step: Callable[[Tensor, Tensor], Tensor],
    start: Tensor,
    end: int,
    pad: int,
    *,
    beams: int = 3,
    max_length: int = 30,
    min_length: int = 0,
    length_penalty: float = 1.0,
    unseen: Tensor | int = 0,
) -> Tensor:
    """The likeliest text of each row.

    A text that ends is worth its summed log probability / length ** `length_penalty`, where what it starts with counts
    and the end does not. A row is done when `beams` texts have ended and nothing that goes on is worth more than the
    worst. One beam is greedy search.

    Args:
        step: texts so far long[n, t] and the rows long[n] of the last call that they continue (at first: rows of
            `start`) -> log probabilities of the next token, float32[n, V].
        start: long[B, t], what each text begins with.
        end, pad: ids of the token that ends a text, and of what stands after it.
        max_length, min_length: in tokens, the start counted.
        unseen: tokens in front of each `start`, long[B] or one number, that count for the length penalty alone.

    Returns:
        long[B, new], without the start; the end is there where there was room for it.
    """
    batch, device = len(start), start.device
    rows = torch.arange(batch, device=device).repeat_interleave(beams)  # (B * beams)
    texts = start[rows]  # (B * beams, t)
    scores = torch.full((batch, beams), NEVER, device=device)
    scores[:, 0] = 0
    unseen = torch.as_tensor(unseen, device=device).expand(batch)[:, None]
    ended = _Ended(batch, beams, max_length, pad, device)
    done = torch.zeros(batch, dtype=torch.bool, device=device)
    for length in range(start.shape[1], max_length):
        log_probs = step(texts, rows)
        if length < min_length:
            log_probs[:, end] = -torch.inf
        totals = (scores.view(-1, 1) + log_probs).view(batch, -1)  # (B, beams * V)
        best, origin, candidates = _grow(texts, totals, beams)
        ends = candidates[..., -1] == end
        closes = ends & ~done[:, None]
        closes[:, beams:] = False  # an end that is not among the best `beams` is not worth keeping
        worth = best / (unseen + length) ** length_penalty
        ended.add(candidates, worth.masked_fill(~closes, -torch.inf))
        done |= ended.worst() >= worth[:, 0]

        scores, place = best.masked_fill(ends, -torch.inf).topk(beams, dim=1)
        rows = origin.gather(1, place).flatten()
        texts = candidates.take_along_dim(place[..., None], dim=1).flatten(0, 1)
        if done.all():
            break
    worth = scores / (unseen + texts.shape[1]) ** length_penalty
    ended.add(texts.view(batch, beams, -1), worth.masked_fill(done[:, None], -torch.inf))
    return ended.best()[:, start.shape[1] :]


def _grow(texts: Tensor, totals: Tensor, beams: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best continuations of each row, twice as many as there are beams: even if half of them end, enough go on.

    Args:
        texts: long[B * beams, t]. totals: float[B, beams * V], scores of every next token behind each.

    Returns:
        Their scores float[B, 2 * beams], the best first, the rows of `texts` that they continue, and the longer texts.
    """
    batch, vocabulary = len(totals), totals.shape[1] // beams
    best, index = totals.topk(min(2 * beams, totals.shape[1]), dim=1)
    origin = torch.arange(batch, device=totals.device)[:, None] * beams + index // vocabulary
    token = index % vocabulary
    return best, origin, torch.cat([texts[origin], token[..., None]], dim=2)  # (B, 2 * beams, t + 1)


class _Ended:
    """The `beams` best texts of each row that have come to an end, the best first."""

    def __init__(self, batch: int, beams: int, max_length: int, pad: int, device: torch.device) -> None:
        self.pad = pad
        self.scores = torch.full((batch, beams), -torch.inf, device=device)
        self.texts = torch.full((batch, beams, max_length), pad, device=device)
        self.lengths = torch.zeros(batch, beams, dtype=torch.long, device=device)

    def add(self, texts: Tensor, scores: Tensor) -> None:
        """long[B, n, t] with float[B, n]; a score of -inf is no text."""
        padded = torch.nn.functional.pad(texts, (0, self.texts.shape[2] - texts.shape[2]), value=self.pad)
        self.scores, place = torch.cat([self.scores, scores], dim=1).topk(self.scores.shape[1], dim=1)
        self.texts = torch.cat([self.texts, padded], dim=1).take_along_dim(place[..., None], dim=1)
        lengths = torch.full_like(place[:, :1], texts.shape[2]).expand(-1, texts.shape[1])
        self.lengths = torch.cat([self.lengths, lengths], dim=1).gather(1, place)

    def worst(self) -> Tensor:
        """float[B]; -inf as long as there is room."""
        return self.scores[:, -1]

    def best(self) -> Tensor:
        """long[B, longest], padded on the right."""
        return self.texts[:, 0, : int(self.lengths[:, 0].max())]
