"""How text is generated, and beam search by the rule of transformers 4.26.

With that the original (LAVIS) and its published numbers were made. What has changed since is how long a text is, by a
power of which its score is divided: then the prompt and the new tokens, today the new tokens and the end. So today's
search prefers other captions behind a prompt, and much shorter answers where the length penalty is negative.
`beam_search` serves the Q-Former's own captions, `search_as_original` the `generate` of a language model.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from transformers import GenerationConfig

from qformer.lookup import build
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

NEVER = -1e9  # score of a beam that does not exist yet: all beams of a text begin alike, so only one may go on


@dataclass(frozen=True)
class GenerateConfig:
    """How text is generated; the defaults are those of the paper's captioning (beam search).

    `max_new_tokens` and `min_new_tokens` count generated tokens only. `top_p` and `temperature` act when `do_sample` is
    True, `length_penalty` when there are several beams (see the top of this module for what counts).
    """

    num_beams: int = 5
    max_new_tokens: int = 30
    min_new_tokens: int = 1
    top_p: float = 0.9
    do_sample: bool = False
    repetition_penalty: float = 1.0
    length_penalty: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        rules = {
            "num_beams": (self.num_beams >= 1, "at least 1"),
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "min_new_tokens": (0 <= self.min_new_tokens <= self.max_new_tokens, "between 0 and max_new_tokens"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "temperature": (self.temperature > 0, "above 0"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0"),
        }
        for name, (holds, expected) in rules.items():
            if not holds:
                raise UsageError(f"{name} must be {expected}, but got {getattr(self, name)}")

    @classmethod
    def of(cls, options: dict[str, Any]) -> Self:
        """The defaults overridden by `options`; an unknown name is a UsageError that names the nearest."""
        return build({"generate": cls}, "generate", options, "generate")

    def to_transformers(self) -> GenerationConfig:
        """Only what acts is set: transformers warns of the rest."""
        settings = asdict(self)
        if self.do_sample:
            settings["top_k"] = 0  # nucleus sampling alone; transformers would keep the 50 likeliest tokens first
        else:
            del settings["top_p"], settings["temperature"]
        if self.num_beams == 1:
            del settings["length_penalty"]
        return GenerationConfig(**settings)


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
        end, pad: ids of the token that ends a text, and of what stands behind it.
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


def search_as_original(prompt: Tensor | int) -> Callable[..., Tensor]:
    """What to pass to a `generate` of transformers as `custom_generate`, to search with beams as the original does.

    Args:
        prompt: tokens of each row, long[B], that the model reads as embeddings but that count; visual ones never do.
    """

    def search(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Ids long[B * beams, t] that stand in front, each repeated -> long[B, t + new]."""
        beams, front = generation_config.num_beams, input_ids.shape[1]

        def step(texts: Tensor, rows: Tensor) -> Tensor:
            nonlocal kwargs
            if texts.shape[1] == front:
                inputs = model.prepare_inputs_for_generation(texts, is_first_iteration=True, **kwargs)
            else:
                kwargs["past_key_values"].reorder_cache(rows)
                inputs = model.prepare_inputs_for_generation(texts, next_sequence_length=1, **kwargs)
            output = model(**inputs, return_dict=True)
            encodes = model.config.is_encoder_decoder
            kwargs = model._update_model_kwargs_for_generation(output, kwargs, is_encoder_decoder=encodes)
            return logits_processor(texts, output.logits[:, -1].float().log_softmax(dim=1))

        start = input_ids[::beams]
        new = beam_search(
            step,
            start,
            generation_config.eos_token_id,
            generation_config.pad_token_id,
            beams=beams,
            max_length=front + generation_config.max_new_tokens,
            length_penalty=generation_config.length_penalty,
            unseen=prompt,
        )
        return torch.cat([start, new], dim=1)

    return search


class _Ended:
    """The `beams` best texts of each row that have come to an end, the best first."""

    def __init__(self, batch: int, beams: int, max_length: int, pad: int, device: torch.device) -> None:
        self.pad = pad
        self.scores = torch.full((batch, beams), -torch.inf, device=device)
        self.texts = torch.full((batch, beams, max_length), pad, device=device)

    def add(self, texts: Tensor, scores: Tensor) -> None:
        """long[B, n, t] with float[B, n]; a score of -inf is no text."""
        padded = torch.nn.functional.pad(texts, (0, self.texts.shape[2] - texts.shape[2]), value=self.pad)
        self.scores, place = torch.cat([self.scores, scores], dim=1).topk(self.scores.shape[1], dim=1)
        self.texts = torch.cat([self.texts, padded], dim=1).take_along_dim(place[..., None], dim=1)

    def worst(self) -> Tensor:
        """float[B]; -inf as long as there is room."""
        return self.scores[:, -1]

    def best(self) -> Tensor:
        """long[B, longest], padded on the right."""
        best = self.texts[:, 0]
        used = (best != self.pad).any(dim=0)
        return best[:, : len(used) - int(used.flip(0).byte().argmax())] if used.any() else best[:, :1]
