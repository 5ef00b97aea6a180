"""How text is generated, and beam search by the rule of transformers 4.26.

With that the original (LAVIS) and its published numbers were made. What has changed since is how long a text is, by a
power of which its score is divided: then the prompt and the new tokens, today the new tokens and the end. So today's
search prefers other captions behind a prompt, and much shorter answers where the length penalty is negative.
`beam_search` serves the Q-Former's own captions, `search_as_original` the `generate` of a language model.

Nucleus sampling can take its random numbers from outside: one for each token. A text then depends on its own numbers
alone, whatever else is in its batch, and can be made again.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from qformer.lookup import build
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

#: What `generate` of transformers hands to a search with a row for each beam.
REPEATED = ("inputs_embeds", "attention_mask", "position_ids", "encoder_outputs")
NEVER = -1e9  # score of a beam that does not exist yet: all beams of a text begin alike, so only one may go on


@dataclass(frozen=True)
class GenerateConfig:
    """How text is generated; the defaults are those of the paper's captioning (beam search).

    `max_new_tokens` and `min_new_tokens` count generated tokens only, the end among the former. `top_p` and
    `temperature` act when `do_sample` is True, `length_penalty` when there are several beams (see the top of this
    module for what counts). `repetition_penalty` lowers the scores of tokens that were generated already (those of the
    prompt may come again), and no `no_repeat_ngram_size` generated tokens in a row come twice. `num_return_sequences`
    texts are sampled of each row. `draws` are the numbers in [0, 1) that sampling would else draw from the global
    random state: for each text as many as there may be new tokens.
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
            "temperature": (self.temperature > 0, "above 0"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0"),
            "no_repeat_ngram_size": (self.no_repeat_ngram_size >= 0, "at least 0"),
            "num_return_sequences": (
                self.num_return_sequences == 1
                or (self.do_sample and (self.num_beams == 1 or 1 < self.num_return_sequences <= self.num_beams)),
                "1, or more with do_sample, and of several beams not more than these",
            ),
            "draws": (
                self.draws is None or (self.do_sample and min(map(len, self.draws)) >= self.max_new_tokens),
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

    def to_transformers(self) -> GenerationConfig:
        """Only what acts is set: transformers warns of the rest. What `processors` do is left out."""
        settings = asdict(self)
        for name in ("draws", "repetition_penalty", "no_repeat_ngram_size"):
            del settings[name]
        if self.do_sample:
            settings["top_k"] = 0  # nucleus sampling alone; transformers would keep the 50 likeliest tokens first
        if not self.do_sample or self.draws is not None:
            del settings["top_p"], settings["temperature"]
        if self.num_beams == 1:
            del settings["length_penalty"]
        return GenerationConfig(**settings)

    def processors(self) -> LogitsProcessorList:
        """What changes the scores of tokens beside `to_transformers`: to be passed to the same `generate`.

        That of repetitions is made here because transformers 5.23, told by its own option, takes the first new tokens
        of a row for padding where the prompt is given as embeddings: a text would depend on the rows beside it.
        """
        made = LogitsProcessorList()
        if self.repetition_penalty != 1:
            made.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.no_repeat_ngram_size:
            made.append(NoRepeatNGramLogitsProcessor(self.no_repeat_ngram_size))
        if self.draws is not None:
            made.append(_Drawn(self))
        return made


class _Drawn(LogitsProcessor):
    """Leaves of the scores of each step the one token that was drawn."""

    def __init__(self, config: GenerateConfig) -> None:
        self.config, self.step = config, 0
        self.draws = torch.tensor(config.draws)  # (n, tokens)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """float[n, V], the logits behind texts long[n, t] -> the same, -inf but for one token of each row."""
        draws = self.draws[:, self.step].to(scores.device)
        self.step += 1
        token = nucleus(scores, draws, self.config.top_p, self.config.temperature)[:, None]
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


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
def sample(
    step: Callable[[Tensor], Tensor],
    start: Tensor,
    end: int,
    pad: int,
    draws: Tensor,
    *,
    top_p: float = 0.9,
    max_length: int = 30,
    min_length: int = 0,
) -> Tensor:
    """A text of each row by nucleus sampling.

    Args:
        step: texts so far long[n, t] -> logits of the next token, float[n, V].
        start: long[n, t], what each text begins with. end, pad: as of `beam_search`.
        draws: float[n, new], a number in [0, 1) for each new token.
        max_length, min_length: in tokens, the start counted.

    Returns:
        long[n, new], without the start, padded on the right.
    """
    texts, done = start, torch.zeros(len(start), dtype=torch.bool, device=start.device)
    for place, length in enumerate(range(start.shape[1], max_length)):
        logits = step(texts)
        if length < min_length:
            logits[:, end] = -torch.inf
        token = nucleus(logits, draws[:, place], top_p).masked_fill(done, pad)
        texts = torch.cat([texts, token[:, None]], dim=1)
        done |= token == end
        if done.all():
            break
    return texts[:, start.shape[1] :]


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
            begins = texts.shape[1] == front
            if begins:  # all beams of a text begin alike: image and prompt are read once for them
                alike = {name: _every(kwargs[name], beams) for name in REPEATED if kwargs.get(name) is not None}
                inputs = model.prepare_inputs_for_generation(texts[::beams], is_first_iteration=True, **kwargs | alike)
            else:
                cache = kwargs["past_key_values"]  # what an encoder read is the same for all beams of a text
                getattr(cache, "self_attention_cache", cache).reorder_cache(rows)
                inputs = model.prepare_inputs_for_generation(texts, next_sequence_length=1, **kwargs)
            output = model(**inputs, return_dict=True)
            log_probs = output.logits[:, -1].float().log_softmax(dim=1)
            if begins:
                output.past_key_values.batch_repeat_interleave(beams)
                log_probs = log_probs.repeat_interleave(beams, dim=0)
            encodes = model.config.is_encoder_decoder
            kwargs = model._update_model_kwargs_for_generation(output, kwargs, is_encoder_decoder=encodes)
            return logits_processor(texts, log_probs)

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


def _every(value: Any, beams: int) -> Any:
    """Every `beams`-th row of a tensor, or of what an encoder gave."""
    if isinstance(value, Tensor):
        return value[::beams]
    return type(value)(**{name: tensor[::beams] for name, tensor in value.items() if isinstance(tensor, Tensor)})


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
