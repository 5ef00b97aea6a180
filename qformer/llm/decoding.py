"""Decoding of text: beam search, greedy search and nucleus sampling, all over one `step(texts, rows) -> scores`.

A step receives the texts so far, long[n, t], and for each of them the row of the previous call that it continues,
long[n]. In the first call these are rows of the start of the texts; None means that every text continues its own row.
A step returns the logits of the next token, float32[n, V]. Language models (`qformer.llm.steps`) and the Q-Former each
provide a step.

Beam search follows transformers 4.26, which the original (LAVIS) and its published numbers used. Scores are divided by
a power of the text length, and transformers has since changed this length: it was the prompt and the new tokens, and is
now the new tokens and the end. So newer versions prefer other captions after a prompt, and much shorter answers if the
length penalty is negative.

Nucleus sampling can take its random numbers from outside, one for each token. A text then depends on its own numbers
alone, whatever else is in its batch, and can be reproduced.
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

MOST = 1e6  # largest factor or divisor of logits; beyond it they overflow
STEEPEST = 50  # largest power of a length; a length of 1000 to a higher power overflows a float
NEVER = -1e9  # score of a beam that does not exist yet: the beams of a text start equal, so only one can continue


@dataclass(frozen=True)
class GenerateConfig:
    """Options of generation; the defaults are those of captioning in the paper (beam search).

    `max_new_tokens` and `min_new_tokens` count generated tokens only; the end token counts toward `max_new_tokens`.
    `top_p` and `temperature` apply if `do_sample` is True, `length_penalty` if there are several beams (see the top of
    this module for the length). `repetition_penalty` lowers the scores of tokens that were already generated, but not
    of those in the prompt; no sequence of `no_repeat_ngram_size` generated tokens occurs twice. `num_return_sequences`
    texts are sampled for each row. `draws` are numbers in [0, 1) that replace the global random state: at least
    `max_new_tokens` of them for each text.
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
        """Override the defaults by `options`; an unknown name is a UsageError that suggests the nearest name."""
        return build({"generate": cls}, "generate", options, "generate")

    @property
    def searches(self) -> bool:
        """True for beam search. Sampling never compares beams: its texts are independent of one another."""
        return self.num_beams > 1 and not self.do_sample

    def check_draws(self, texts: int) -> None:
        """Check that `draws`, if given, has a row for each text.

        Raises:
            UsageError: the number of rows differs.
        """
        if self.draws is not None and len(self.draws) != texts:
            raise UsageError(f"draws must hold a row of numbers for each of {texts} texts, but got {len(self.draws)}")

    def of_rows(self, rows: slice) -> Self:
        """Select the options for some rows of a batch, that is the draws of their texts."""
        if self.draws is None:
            return self
        each = self.num_return_sequences
        return replace(self, draws=self.draws[rows.start * each : rows.stop * each])


@torch.no_grad()
def write(step: Step, start: Tensor, end: int, pad: int, config: GenerateConfig, unseen: Tensor | int = 0) -> Tensor:
    """Generate the texts of B rows with the options of `config`.

    Args:
        step: logits of the next token, see the top of this module.
        start: long[B, t], the start of each text.
        end, pad: ids of the token that ends a text, and of the padding after it.
        unseen: see `beam_search`.

    Returns:
        long[B * n, new], the n texts of a row together, without the start, padded on the right.
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
    """Yield the tokens of greedy or sampled texts as they are generated, long[B * n] at a time, until all texts end.

    The arguments are those of `write`. Generation stops when the caller stops reading.
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
    """Adjustments of scores by the text so far: no early end, no repetition."""

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
    """Sample a token of each row from the nucleus, the likeliest tokens that hold `top_p` (arXiv:1904.09751).

    Args:
        logits: float[n, V].
        draws: float[n], from 0 to 1; the lowest numbers select the likeliest token.

    Returns:
        long[n].
    """
    probs, order = (logits.float() / temperature).softmax(dim=1).sort(dim=1, descending=True, stable=True)
    cumulative = probs.cumsum(dim=1)
    kept = (cumulative - probs < top_p).sum(dim=1, keepdim=True).clamp(min=1)  # (n, 1)
    held = cumulative.gather(1, kept - 1)
    place = (cumulative <= draws.float()[:, None] * held).sum(dim=1, keepdim=True)
    return order.gather(1, torch.minimum(place, kept - 1)).squeeze(1)  # a draw close to 1 can be rounded up


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
    """Find the likeliest text of each row.

    The score of a finished text is its summed log probability / length ** `length_penalty`, where the length includes
    the start but not the end. A row is done when `beams` texts have ended and no unfinished text scores higher than the
    worst of them. One beam is greedy search.

    Args:
        step: texts so far long[n, t] and the rows long[n] of the previous call that they continue (in the first call:
            rows of `start`) -> log probabilities of the next token, float32[n, V].
        start: long[B, t], the start of each text.
        end, pad: ids of the token that ends a text, and of the padding after it.
        max_length, min_length: in tokens, including the start.
        unseen: number of tokens before each `start`, long[B] or one number, that count only for the length penalty.

    Returns:
        long[B, new], without the start; with the end if there was room for it.
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
        closes[:, beams:] = False  # only ends among the best `beams` are kept
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
    """Find the best 2 * beams continuations of each row: even if half of them end, enough remain.

    Args:
        texts: long[B * beams, t].
        totals: float[B, beams * V], the score of every next token after each text.

    Returns:
        Their scores float[B, 2 * beams], the best first; the rows of `texts` that they continue; and the longer texts.
    """
    batch, vocabulary = len(totals), totals.shape[1] // beams
    best, index = totals.topk(min(2 * beams, totals.shape[1]), dim=1)
    origin = torch.arange(batch, device=totals.device)[:, None] * beams + index // vocabulary
    token = index % vocabulary
    return best, origin, torch.cat([texts[origin], token[..., None]], dim=2)  # (B, 2 * beams, t + 1)


class _Ended:
    """The best `beams` finished texts of each row, the best first."""

    def __init__(self, batch: int, beams: int, max_length: int, pad: int, device: torch.device) -> None:
        self.pad = pad
        self.scores = torch.full((batch, beams), -torch.inf, device=device)
        self.texts = torch.full((batch, beams, max_length), pad, device=device)
        self.lengths = torch.zeros(batch, beams, dtype=torch.long, device=device)

    def add(self, texts: Tensor, scores: Tensor) -> None:
        """Add texts long[B, n, t] with scores float[B, n]; a score of -inf means no text."""
        padded = torch.nn.functional.pad(texts, (0, self.texts.shape[2] - texts.shape[2]), value=self.pad)
        self.scores, place = torch.cat([self.scores, scores], dim=1).topk(self.scores.shape[1], dim=1)
        self.texts = torch.cat([self.texts, padded], dim=1).take_along_dim(place[..., None], dim=1)
        lengths = torch.full_like(place[:, :1], texts.shape[2]).expand(-1, texts.shape[1])
        self.lengths = torch.cat([self.lengths, lengths], dim=1).gather(1, place)

    def worst(self) -> Tensor:
        """Return the lowest score of each row, float[B]; -inf while there is room."""
        return self.scores[:, -1]

    def best(self) -> Tensor:
        """Return the best text of each row, long[B, longest], padded on the right."""
        return self.texts[:, 0, : int(self.lengths[:, 0].max())]
