"""What a language model can do after image tokens, found by trying it once when it is loaded.

A few short rows go through the model: alone and padded in a batch, with its cache and without, forward and backward.
So a family that nobody has listed is refused, or treated as it needs, before hours of work and not in the middle.
Which model it is called plays no part.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qformer.model.llm import Abilities
from qformer.model.steps import cache_name
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from qformer.model.llm import LanguageModel

PROMPTS = ["a b c", "a"]  # with fewer image tokens, so that the second row is the shorter one for any tokenizer
TEXTS = ["a b", "b"]
VISUAL = torch.tensor([[1, 1, 1], [0, 1, 0]]).bool()  # of the three image tokens of each row, those that exist
SWAP = torch.tensor([1, 0, 3, 2])  # two texts of each row change places
EXACT, ROUGH = 1e-3, 0.15  # of the spread of the scores: of float32, and of 16 or 8 bits


def examine(llm: LanguageModel, source: str) -> Abilities:
    """Try what writing and training with `llm` can rely on; on the meta device the usual is assumed.

    Args:
        source: where it was loaded from, for messages.

    Raises:
        UsageError: the model cannot write after image tokens.
    """
    usual = Abilities(caches=cache_name(llm.model) is not None)
    if any(weight.is_meta for weight in llm.model.parameters()):
        return usual
    training = llm.training
    llm.train(False)
    try:
        found = _Trial(llm, source).run(usual)
    finally:
        llm.train(training)
    name = f"the {llm.model.config.model_type} model in '{source}'"
    if not found.caches:
        warnings.warn(
            f"{name} has no cache that texts can share: every token reads its whole row again, which is slower",
            stacklevel=3,
        )
    if not found.batches:
        warnings.warn(f"{name} answers padded rows differently: it writes one row at a time", stacklevel=3)
    return found


class _Trial:
    """Rows that one model reads in several ways, and how far the scores differ."""

    def __init__(self, llm: LanguageModel, source: str) -> None:
        self.llm, self.source, self.tolerance = llm, source, EXACT

    def run(self, usual: Abilities) -> Abilities:
        plain = replace(usual, caches=False)
        alone, error = _attempt(lambda: [self._write(plain, [row]) for row in (0, 1)])
        if alone is None:
            hint = "; or leave quantize out" if getattr(self.llm.model, "is_quantized", False) else ""
            raise UsageError(
                f"the {self.llm.model.config.model_type} model in '{self.source}' cannot write after image tokens "
                f"({error}); use another language model{hint}"
            )
        self.tolerance = self._tolerance(plain, alone[0])
        both = torch.cat(alone)
        batches = self._agree(lambda: self._write(plain, [0, 1]), both)
        caches = usual.caches and self._agree(lambda: torch.cat([self._write(usual, [row]) for row in (0, 1)]), both)
        if caches and batches:
            batches = self._agree(lambda: self._write(usual, [0, 1]), both)
        return Abilities(caches, batches, self._why_not_trained())

    def _tolerance(self, plain: Abilities, alone: Tensor) -> float:
        """How far scores of one row may differ, of their spread.

        In 8 bits a row is rounded by what stands beside it, padded or not: so much is noise.
        """
        quantized = getattr(self.llm.model.config, "quantization_config", None)
        if self.llm.model.dtype == torch.float32 and getattr(quantized, "load_in_4bit", quantized is None):
            return EXACT
        beside, _ = _attempt(lambda: self._write(plain, [0, 0])[: len(alone)])
        return max(ROUGH, 0.0 if beside is None else 3 * _difference(beside, alone))

    def _agree(self, work: Callable[[], Tensor], expected: Tensor) -> bool:
        """True where `work` gives these scores but for rounding. Those that are not finite show nothing."""
        scores, _ = _attempt(work)
        if scores is None:
            return False
        return not bool(expected.isfinite().all()) or _difference(scores, expected) <= self.tolerance

    def _image_tokens(self) -> Tensor:
        """Vectors of the size of words, float[2, 3, L], the same each time."""
        words = torch.arange(1, 7, device=next(self.llm.model.parameters()).device)
        return self.llm.model.get_input_embeddings()(words).float().view(2, 3, -1)

    def _write(self, abilities: Abilities, rows: list[int]) -> Tensor:
        """Scores while two texts of each row grow and change places: float[2 * rows, 3, V].

        A single row has no padding. One row twice stands beside itself in reverse.
        """
        prefix, mask = self._image_tokens()[rows], VISUAL[rows]
        if len(set(rows)) == 1:
            prefix, mask = prefix[:, mask[0]], mask[:, mask[0]]
            prefix[1:] = prefix[1:].flip(1)
        self.llm.abilities, kept = abilities, self.llm.abilities
        try:
            step, start, _ = self.llm.begin(prefix, mask.to(prefix.device), [PROMPTS[row] for row in rows], 3)
        finally:
            self.llm.abilities = kept
        each = torch.arange(len(rows), device=start.device).repeat_interleave(2)
        texts = start[each]
        scores = [step(texts, each)]
        words = torch.tensor([2, 5], device=start.device).repeat(len(rows))
        texts = torch.cat([texts, words[:, None]], dim=1)
        scores.append(step(texts, None))
        swap = SWAP[: len(texts)].to(start.device)
        texts = torch.cat([texts[swap], words[:, None]], dim=1)
        scores.append(step(texts, swap))
        return torch.stack(scores, dim=1).float()

    def _why_not_trained(self) -> str:
        """Why nothing can be trained in front of this model; empty where it can."""
        prefix = self._image_tokens().detach().requires_grad_()
        for row in (None, 0):
            _, error = _attempt(partial(self._learn, prefix, row), grad=True)
            if error:
                return error
        if prefix.grad is None or not bool(prefix.grad[VISUAL.to(prefix.device)].any()):
            return "no gradient reaches the image tokens"
        if self.tolerance == EXACT:  # else rounding differs as much as a wrong mask would
            (together, *alone), error = _attempt(lambda: [float(self._loss(prefix, row)) for row in (None, 0, 1)])
            if not math.isclose(together, sum(alone), rel_tol=EXACT):
                return "the loss of a row depends on its padding"
        return ""

    def _learn(self, prefix: Tensor, row: int | None) -> None:
        self._loss(prefix, row).backward()

    def _loss(self, prefix: Tensor, row: int | None = None) -> Tensor:
        """The summed loss of both rows, or of one without its padding."""
        mask = VISUAL.to(prefix.device)
        if row is None:
            return self.llm.loss(prefix, mask, TEXTS, PROMPTS)[0]
        own = slice(row, row + 1)
        return self.llm.loss(prefix[own, mask[row]], mask[own, mask[row]], TEXTS[own], PROMPTS[own])[0]


def _attempt(work: Callable[[], Any], grad: bool = False) -> tuple[Any, str]:
    """What `work` returns, or None and why not: models fail in their own ways."""
    try:
        with torch.set_grad_enabled(grad):
            return work(), ""
    except (UsageError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        return None, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0].rstrip('.')}"


def _difference(scores: Tensor, expected: Tensor) -> float:
    """The largest difference of scores float[..., V], as a share of how far they spread."""
    spread = (expected - expected.mean(dim=-1, keepdim=True)).square().mean().sqrt()
    return float((scores - expected).abs().max() / spread.clamp(min=1e-12))
