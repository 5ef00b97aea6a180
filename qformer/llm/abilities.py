"""Abilities of a language model after image tokens, found by a trial when it is loaded.

A few short rows go through the model, alone and padded in a batch, with and without its cache; and backward, before a
bridge is trained. So an unlisted family is rejected, or handled as it needs, at the start and not after hours of work.
The name of the model plays no role.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qformer.llm.base import Abilities
from qformer.llm.steps import cache_name
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from qformer.llm.base import LanguageModel

PROMPTS = ["a b c", "a"]  # the second row also has fewer image tokens, so it is shorter with any tokenizer
TEXTS = ["a b", "b"]
VISUAL = torch.tensor([[1, 1, 1], [0, 1, 0]]).bool()  # mask of the three image tokens of each row
SWAP = torch.tensor([1, 0, 3, 2])  # the two texts of each row change places
EXACT, ROUGH = 1e-3, 0.15  # tolerance, as a share of the spread of the scores: in float32, and in 16 or 8 bits


def examine(llm: LanguageModel, source: str) -> Abilities:
    """Test the abilities of `llm` that generation can rely on; on the meta device the defaults are assumed.

    Args:
        source: where it was loaded from, for messages.

    Raises:
        UsageError: the model cannot write after image tokens.
    """
    usual = Abilities(caches=cache_name(llm.model) is not None)
    if _is_meta(llm):
        return usual
    name = f"the {llm.model.config.model_type} model in '{source}'"
    found = _Trial(llm).write(usual, name)
    if not found.caches:
        warnings.warn(
            f"{name} has no cache that beams can share, so every token re-reads its whole row; "
            "generation gives the same texts, but is slower",
            stacklevel=3,
        )
    if not found.batches:
        warnings.warn(
            f"{name} gives other scores for padded rows, so it generates one row at a time, which is slower",
            stacklevel=3,
        )
    return found


def require_training(llm: LanguageModel) -> None:
    """Check that a bridge can be trained with this model: gradients pass, and its loss does not depend on padding.

    Raises:
        UsageError: it cannot, with the reason.
    """
    if _is_meta(llm):
        return
    if reason := _Trial(llm).learn():
        hint = ", or leave llm.quantize out" if getattr(llm.model, "is_quantized", False) else ""
        raise UsageError(
            f"no bridge can be trained with this {llm.model.config.model_type} model ({reason}); "
            f"use another language model{hint}"
        )


def _is_meta(llm: LanguageModel) -> bool:
    return any(weight.is_meta for weight in llm.model.parameters())


class _Trial:
    """A trial of one model, which reads rows in several ways and compares the scores."""

    def __init__(self, llm: LanguageModel) -> None:
        self.llm = llm
        self.device = next(llm.model.parameters()).device
        quantized = getattr(llm.model.config, "quantization_config", None)
        self.exact = llm.model.dtype == torch.float32 and getattr(quantized, "load_in_4bit", quantized is None)
        self.tolerance = EXACT if self.exact else ROUGH

    def write(self, usual: Abilities, name: str) -> Abilities:
        plain = replace(usual, caches=False)
        alone, error = self._attempt(lambda: [self._scores(plain, [row]) for row in (0, 1)])
        if alone is None:
            hint = ", or leave quantize out" if getattr(self.llm.model, "is_quantized", False) else ""
            raise UsageError(f"{name} cannot write after image tokens ({error}); use another language model{hint}")
        if not self.exact:  # in 8 bits, other rows of the batch affect rounding: differences of that size are noise
            beside, _ = self._attempt(lambda: self._scores(plain, [0, 0])[: len(alone[0])])
            self.tolerance = max(ROUGH, 0.0 if beside is None else 3 * _difference(beside, alone[0]))
        both = torch.cat(alone)
        if usual.caches and self._agree(lambda: self._scores(usual, [0, 1]), both):
            return usual
        batches = self._agree(lambda: self._scores(plain, [0, 1]), both)
        caches = usual.caches and self._agree(lambda: torch.cat([self._scores(usual, [row]) for row in (0, 1)]), both)
        return Abilities(caches, batches and not caches)  # if both work only separately, padding breaks the cache

    def learn(self) -> str:
        """Find the reason why no bridge can be trained with this model; empty if there is none."""
        prefix = self._image_tokens().detach().requires_grad_()
        for row in (None, 0):
            gradient, error = self._attempt(partial(self._gradient, prefix, row), grad=True)
            if error:
                return error
            if not bool(gradient.any()):
                return "no gradient reaches the image tokens"
        losses, error = self._attempt(lambda: [float(self._loss(prefix, row)) for row in (None, 0, 1)])
        if error:
            return error
        if not all(map(math.isfinite, losses)):
            return "its loss is not a finite number"
        # In lower precision, rounding errors are as large as the effect of a wrong mask.
        if self.exact and not math.isclose(losses[0], losses[1] + losses[2], rel_tol=EXACT):
            return "the loss of a row depends on its padding"
        return ""

    def _attempt(self, work: Callable[[], Any], grad: bool = False) -> tuple[Any, str]:
        """Run `work` in eval mode; returns its result, or None and the reason, as models fail in many ways."""
        training = self.llm.training
        self.llm.train(False)
        try:
            with torch.set_grad_enabled(grad), torch.autocast(self.device.type, enabled=False):
                return work(), ""
        except torch.OutOfMemoryError:
            raise
        except UsageError as error:
            return None, str(error)
        except Exception as error:
            return None, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0].rstrip('.')}"
        finally:
            self.llm.train(training)

    def _agree(self, work: Callable[[], Tensor], expected: Tensor) -> bool:
        """Return True if `work` gives the expected scores up to rounding."""
        scores, _ = self._attempt(work)
        return scores is not None and _difference(scores, expected) <= self.tolerance

    def _image_tokens(self) -> Tensor:
        """Make vectors with the norms of word embeddings, float[2, 3, L], the same each time."""
        embed = self.llm.model.get_input_embeddings()
        words = torch.arange(1, 7, device=self.device) % embed.weight.shape[0]
        return embed(words).float().view(2, 3, -1)

    def _scores(self, abilities: Abilities, rows: list[int]) -> Tensor:
        """Compute scores while the two texts of each row grow and change places: float[2 * rows, 3, V].

        A single row has no padding. If a row is given twice, its copy has the image tokens in reverse order.
        """
        prefix, mask = self._image_tokens()[rows], VISUAL[rows].to(self.device)
        if len(set(rows)) == 1:
            prefix, mask = prefix[:, mask[0]], mask[:, mask[0]]
            prefix[1:] = prefix[1:].flip(1)
        self.llm.abilities, kept = abilities, self.llm.abilities
        try:
            step, start, _ = self.llm.begin(prefix, mask, [PROMPTS[row] for row in rows], 3)
        finally:
            self.llm.abilities = kept
        each = torch.arange(len(rows), device=self.device).repeat_interleave(2)
        texts = start[each]
        scores = [step(texts, each)]
        words = torch.tensor([2, 5], device=self.device).repeat(len(rows)) % scores[0].shape[1]
        texts = torch.cat([texts, words[:, None]], dim=1)
        scores.append(step(texts, None))
        swap = SWAP[: len(texts)].to(self.device)
        texts = torch.cat([texts[swap], words[:, None]], dim=1)
        scores.append(step(texts, swap))
        return torch.stack(scores, dim=1)

    def _gradient(self, prefix: Tensor, row: int | None) -> Tensor:
        """Compute the gradient of the image tokens only; gradients left in adapters would enter the next update."""
        return torch.autograd.grad(self._loss(prefix, row), prefix)[0]

    def _loss(self, prefix: Tensor, row: int | None = None) -> Tensor:
        """Compute the summed loss of both rows, or of one row without its padding."""
        mask = VISUAL.to(self.device)
        if row is None:
            return self.llm.loss(prefix, mask, TEXTS, PROMPTS)[0]
        own = slice(row, row + 1)
        return self.llm.loss(prefix[own, mask[row]], mask[own, mask[row]], TEXTS[own], PROMPTS[own])[0]


def _difference(scores: Tensor, expected: Tensor) -> float:
    """Compute the largest difference between finite scores float[..., V], as a share of their spread."""
    known = expected.isfinite()
    if not bool(known.any()):
        return 0.0  # nothing to compare
    mean = expected.masked_fill(~known, torch.nan).nanmean(dim=-1, keepdim=True)
    spread = (expected - mean)[known].square().mean().sqrt().clamp(min=1e-12)
    return float((scores - expected)[known].abs().nan_to_num(torch.inf).max() / spread)
