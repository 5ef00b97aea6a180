"""Texts of the mini towers behind a bridge of fixed numbers, and by how little each could have come out otherwise.

    python -m tests.canary.recording > tests/canary/texts.json

records them anew: only where a change of texts is meant. Every text has a margin: the least difference, over all steps
of its writing, between two scores whose order decides about it. Only texts with a margin far above what processors and
releases of torch differ by are recorded, so that another text is a fault and never a rounding.
"""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from functools import cache
from itertools import count, pairwise
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from qformer.checkpoints.weights import trained_tensors
from qformer.config import parse_config
from qformer.llm import base as module
from qformer.llm.decoding import GenerateConfig, write
from qformer.model.assembly import build_vision_language
from qformer.model.vision_language import VisionLanguageModel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MARGIN = 1e-3
KINDS = ("opt", "t5")
WAYS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 5},
    "greedy": {"num_beams": 1},
    "drawn": {"num_beams": 1, "do_sample": True, "temperature": 0.7},
}
QUESTIONS = ("what color is the square?", "how many objects are there?", "is the circle above the star?")
EACH = 3  # texts of each kind and way
SIDE = 120
NEW = 20  # longest text, in tokens


@cache
def model(kind: str) -> VisionLanguageModel:
    """The shipped ViT and language model, and a bridge whose numbers no release of torch changes."""
    built, _ = build_vision_language(
        parse_config(
            {
                "stage": "stage2",
                "run": "unused",
                "vision": {"name": "hf", "path": "mini:vit"},
                "resolution": {"name": "fixed", "size": SIDE},
                "qformer": {
                    "hidden_size": 32,
                    "layers": 2,
                    "heads": 4,
                    "intermediate_size": 64,
                    "queries": 6,
                    "cross_attention_every": 1,
                    "dropout": 0,
                },
                "llm": {"path": f"mini:{kind}", "visual_scale": 8},
                "data": {"train": {"name": "scenes"}},
                "train": {"steps": 1, "warmup": 0},
            }
        )
    )
    numbers = np.random.RandomState(7)  # the one generator of NumPy whose numbers are promised never to change
    with torch.no_grad():
        for name, parameter in sorted(trained_tensors(built).items()):
            if parameter.dim() == 1:
                parameter.fill_(name.endswith("norm.weight"))
            else:  # attention so sharp that it tells pictures apart
                scale = 1.0 if "cross_attention" in name else 0.3
                parameter.copy_(torch.from_numpy(scale * numbers.standard_normal(parameter.shape)))
    return built.eval()


def image(number: int) -> np.ndarray:
    """Coloured rectangles on grey: uint8[SIDE, SIDE, 3]."""
    numbers = np.random.RandomState(number)
    drawn = np.full((SIDE, SIDE, 3), 140, dtype=np.uint8)
    for _ in range(4):
        top, left = numbers.randint(0, SIDE - 40, 2)
        height, width = numbers.randint(15, 60, 2)
        drawn[top : top + height, left : left + width] = numbers.randint(0, 255, 3)
    return drawn


def texts(kind: str, way: str, images: list[int], questions: list[str] | None) -> list[str]:
    """Captions of the images, or an answer to a question about each; the draws are those of the image's number."""
    written = model(kind)
    options = WAYS[way] | {"max_new_tokens": NEW}
    if way == "drawn":
        options["draws"] = [np.random.RandomState(1000 + number).rand(NEW).tolist() for number in images]
    tiles = written.frontend.tiles([image(number) for number in images])
    return written.generate(tiles, **options) if questions is None else written.answer(tiles, questions, **options)


def measured(kind: str, way: str, number: int, question: str | None) -> tuple[str, float]:
    """One text alone, and its margin."""
    with watched() as gaps:
        (text,) = texts(kind, way, [number], None if question is None else [question])
    return text, min(gaps)


@contextmanager
def watched() -> Iterator[list[float]]:
    """What is written meanwhile, a row at a time, adds to this list by how much each of its choices was one."""
    gaps: list[float] = []

    def watching(
        step: Callable[..., Tensor], start: Tensor, end: int, pad: int, config: GenerateConfig, unseen: Any = 0
    ) -> Tensor:
        watch = Watch(step, start.shape[1], end, config, int(unseen), gaps)
        written = write(watch, start, end, pad, config, unseen)
        watch.close()
        return written

    with mock.patch.object(module, "write", watching):
        yield gaps


class Watch:
    """A step of writing one row, and the differences of the scores that decide what is written."""

    def __init__(
        self,
        step: Callable[..., Tensor],
        front: int,
        end: int,
        config: GenerateConfig,
        unseen: int,
        gaps: list[float],
    ) -> None:
        self.step, self.front, self.end, self.config, self.unseen, self.gaps = step, front, end, config, unseen, gaps
        self.totals: dict[tuple[int, ...], float] = {}  # of texts that may go on
        self.worths: list[float] = []  # of texts that have ended

    def __call__(self, texts: Tensor, rows: Tensor | None = None) -> Tensor:
        logits = self.step(texts, rows)
        scores = logits.float().log_softmax(dim=1)
        if texts.shape[1] - self.front < self.config.min_new_tokens:
            scores[:, self.end] = -torch.inf
        if self.config.do_sample:
            self._draw(scores[0], texts.shape[1] - self.front)
        elif self.config.num_beams == 1:
            first, second = scores[0].topk(2).values.tolist()
            self.gaps.append(first - second)
        else:
            self._search(texts, scores)
        return logits

    def _draw(self, scores: Tensor, place: int) -> None:
        """Of a nucleus: from the draw to the next token's, from what is kept to its limit, and between neighbours."""
        assert self.config.draws is not None
        probs = (scores / self.config.temperature).softmax(dim=0).sort(descending=True).values
        sums = probs.cumsum(dim=0)
        before = sums - probs
        kept = int((before < self.config.top_p).sum())
        point = self.config.draws[0][place] * float(sums[kept - 1])
        chosen = int((sums[:kept] <= point).sum())
        self.gaps += [abs(float(limit) - point) for limit in sums[:kept]]
        self.gaps += [abs(float(limit) - self.config.top_p) for limit in before[1 : kept + 1]]
        self.gaps += [abs(float(probs[n] - probs[n + 1])) for n in (chosen - 1, chosen) if n >= 0]

    def _search(self, texts: Tensor, scores: Tensor) -> None:
        """Of beams: between all that may be kept, in their order, and the first that may not."""
        beams, length = self.config.num_beams, texts.shape[1]
        found: dict[tuple[int, ...], float] = {}
        for text, row in zip(map(tuple, texts.tolist()), scores, strict=True):
            if text in self.totals or not self.totals:
                best = row.topk(2 * beams + 1)
                before = self.totals.get(text, 0.0)
                found |= {
                    (*text, token): before + score
                    for token, score in zip(best.indices.tolist(), best.values.tolist(), strict=True)
                }
        ranked = sorted(found.items(), key=lambda candidate: -candidate[1])[: 2 * beams + 1]
        self.gaps += [above[1] - below[1] for above, below in pairwise(ranked)]
        self.worths += [
            total / (self.unseen + length) ** self.config.length_penalty
            for text, total in ranked[:beams]
            if text[-1] == self.end
        ]
        self.totals = {text: total for text, total in ranked[: 2 * beams] if text[-1] != self.end}

    def close(self) -> None:
        """Adds the difference between the best text and the second, those that were cut included."""
        if self.config.num_beams > 1 and self.totals:
            length = len(next(iter(self.totals)))
            if length == self.front + self.config.max_new_tokens:
                alive = sorted(self.totals.values())[-self.config.num_beams :]
                self.worths += [total / (self.unseen + length) ** self.config.length_penalty for total in alive]
            best = sorted(self.worths)[-2:]
            self.gaps.append(best[-1] - best[0] if len(best) == 2 else torch.inf)


def record() -> dict[str, Any]:
    """For each model, `caption` or `answer`, and way: numbers of images, questions and texts; no text comes twice."""
    made: dict[str, Any] = {}
    for kind in KINDS:
        for task in ("caption", "answer"):
            for way in WAYS:
                found: dict[str, tuple[int, str | None, str]] = {}
                for number in count():
                    question = QUESTIONS[number % len(QUESTIONS)] if task == "answer" else None
                    text, margin = measured(kind, way, number, question)
                    plain = way != "drawn" or text != measured(kind, "greedy", number, question)[0]
                    long = task == "answer" or len(text.split()) >= 4
                    if margin >= 2 * MARGIN and text and text not in found and plain and long:
                        found[text] = (number, question, text)
                    print(kind, task, way, number, f"{margin:.4f}", text, file=sys.stderr)
                    if len(found) == EACH:
                        break
                made.setdefault(kind, {}).setdefault(task, {})[way] = list(found.values())
    return made


if __name__ == "__main__":
    json.dump(record(), sys.stdout, indent=1)
    print()
