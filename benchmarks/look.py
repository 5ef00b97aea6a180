"""Relevance of the page against the objects that a question asks about, measured on drawn scenes.

    python benchmarks/look.py runs/quickstart/opt [--scenes 100] [--seed 5] [--compare] [--quick]

The model answers a question about an unseen scene; `answer_relevance` shows where its answer comes from. The generator
knows the box of the object in question (of both in a relation, of all in a count). *Inside* is the share of the
relevance in that box, divided by the box's share of the picture: 1 is chance. Controls: the box of another, random
object of the same scene, and the same box on the relevance of the previous scene. *Hit* is the share of answers for
which at least a quarter of the most relevant patch is in the box. Questions about absent objects are skipped.
`--compare` also measures other methods. Fails if *inside* is below 2, the goal.
"""

from __future__ import annotations

import argparse
import random
import re
from collections import defaultdict
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from qformer.checkpoints.loading import load_vision_language
from qformer.evaluation import attention as look
from qformer.evaluation.zero_shot import GREEDY, SIZE, UNSEEN
from qformer.scenes.scenes import Scenes
from qformer.scenes.text import KINDS, Scene, SceneObject

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qformer.model.vision_language import VisionLanguageModel
    from qformer.types import VisualTokens

    Box = tuple[float, float, float, float]
    Method = Callable[[VisionLanguageModel, VisualTokens, Tensor, tuple[str, str, None]], Tensor]

GOAL = 2.0
FINE = 240  # pixels a side on which boxes are compared with patches


def asked(scene: Scene, question: str) -> list[SceneObject]:
    """Objects that a question of `qformer.scenes.text` names; none if it asks about absent ones."""
    return [item for item in scene.objects if re.search(rf"\b({_names(item)})(?! left| right)\b", question)]


def _names(item: SceneObject) -> str:
    """Names of an object or of its group in questions, as alternatives of a regular expression."""
    singular = rf"the ({item.colour} {item.shape}|{item.colour} object|{item.shape})"
    there = rf"is there an? {item.colour} {item.shape}"
    plural = rf"how many ({item.colour} )?({item.shape}e?s|{item.colour} objects|objects)"
    word = rf"|word {item.word}" if item.word else ""
    return rf"{singular}|{there}|{plural}|object at the {item.position}{word}"


def covered(boxes: list[Box], height: int, width: int) -> tuple[Tensor, float]:
    """Share of each patch that the boxes cover together, float[h, w], and share of the whole picture."""
    places = (torch.arange(FINE) + 0.5) / FINE
    inside = torch.zeros(FINE, FINE, dtype=torch.bool)
    for left, top, right, bottom in boxes:
        inside |= ((places >= top) & (places <= bottom))[:, None] & ((places >= left) & (places <= right))
    share = torch.nn.functional.adaptive_avg_pool2d(inside.float()[None], (height, width))[0]
    return share, float(inside.float().mean())


@dataclass
class Found:
    """Results of one method: ratios by kind of question, controls, hits."""

    inside: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    other: list[float] = field(default_factory=list)
    before: list[float] = field(default_factory=list)
    hits: list[bool] = field(default_factory=list)
    last: Tensor | None = None

    def add(self, kind: str, heat: Tensor, boxes: list[Box], other: Box | None) -> None:
        share, area = covered(boxes, *heat.shape)
        self.inside[kind].append(float((heat * share).sum()) / area)
        self.hits.append(float(share.flatten()[heat.argmax()]) >= 0.25)
        if other is not None:
            share_of_other, area_of_other = covered([other], *heat.shape)
            self.other.append(float((heat * share_of_other).sum()) / area_of_other)
        if self.last is not None:
            self.before.append(float((self.last * share).sum()) / area)
        self.last = heat

    @property
    def ratios(self) -> list[float]:
        return [ratio for ratios in self.inside.values() for ratio in ratios]


def attention(model: VisionLanguageModel, visual: VisualTokens, _: Tensor, text: tuple[str, str, None]) -> Tensor:
    """Attention of the queries, independent of the answer."""
    with torch.no_grad(), look.watch(model.connector.qformer) as weights:
        model.connector(visual, [[text[0]]])
    return _of_tokens(visual, sum(one.mean(dim=1).sum(dim=1) for one in weights))


def gradient_times_input(
    model: VisionLanguageModel, visual: VisualTokens, _: Tensor, text: tuple[str, str, None]
) -> Tensor:
    features = visual.packed[None].detach().requires_grad_()
    (gradient,) = torch.autograd.grad(look.score(model, visual, features, *text)[1].sum(), features)
    return (gradient * features).sum(dim=2)[0].detach()


def gradient_times_attention(
    model: VisionLanguageModel, visual: VisualTokens, _: Tensor, text: tuple[str, str, None]
) -> Tensor:
    """Cross-attention step of Chefer et al., arXiv:2103.15679, summed over queries and layers."""
    weights: list[Tensor] = []

    def attend(attention: Any, inputs: tuple[Any, ...], _: Tensor) -> Tensor:
        hidden, keys, values, mask = inputs
        weights.append(look.cross_weights(attention, hidden, keys, mask))
        mixed = (weights[-1] @ values).transpose(1, 2).flatten(2)  # (N, Q, H)
        return attention.norm(hidden + attention.output(mixed))

    layers: Any = model.connector.qformer.layers
    hooks = [layer.cross_attention.register_forward_hook(attend) for layer in layers if layer.cross_attention]
    features = visual.packed[None].detach().requires_grad_()
    found = torch.autograd.grad(look.score(model, visual, features, *text)[1].sum(), weights)
    for hook in hooks:
        hook.remove()
    return _of_tokens(
        visual, sum((w * g).clamp(min=0).mean(dim=1).sum(dim=1) for w, g in zip(weights, found, strict=True))
    )


def _of_tokens(visual: VisualTokens, padded: Any) -> Tensor:
    """Float[N, longest] of tiles -> float[sum of S], without padding."""
    return torch.cat([row[:length] for row, length in zip(padded.detach(), visual.lengths, strict=True)])


@torch.no_grad()
def occlusion(model: VisionLanguageModel, visual: VisualTokens, blank: Tensor, text: tuple[str, str, None]) -> Tensor:
    """Compute the loss of log-probability when an image token is replaced by that of a blank picture; one tile."""
    whole = visual.packed[None]
    hidden = torch.eye(whole.shape[1], dtype=torch.bool)[:, :, None]  # (S, S, 1)
    scores = look.score(model, visual, torch.where(hidden, blank, whole), *text)[1].sum(dim=1)
    return look.score(model, visual, whole, *text)[1].sum() - scores


METHODS: dict[str, Method] = {
    "its absolute values": lambda *given: look.integrate(*given)[1].abs(),
    "from the mean token": lambda model, visual, _, text: look.integrate(
        model, visual, torch.cat([row.mean(dim=0).expand_as(row) for row in visual.rows]), text
    )[1],
    "occlusion": occlusion,
    "gradient x input": gradient_times_input,
    "gradient x attention": gradient_times_attention,
    "attention alone": attention,
}


def examples(model: VisionLanguageModel, count: int, seed: int) -> Iterator[tuple[str, Any, str, str, Scene]]:
    """Kind, picture, question and the model's own answer, for `count` unseen scenes with something to find."""
    source = Scenes(UNSEEN, SIZE, seed=seed, count=100 * count, questions=True)
    for place in range(len(source)):
        sample, scene = source[place], source.scene(place)
        question = sample.question or ""
        if not asked(scene, question):
            continue
        said = model.answer(model.frontend.tiles([sample.image]), [question], **GREEDY)[0]
        if said.strip():
            yield sample.key.rpartition(":")[2], Image.fromarray(sample.image), question, said, scene
            count -= 1
        if not count:
            return


def measure(model: VisionLanguageModel, given: argparse.Namespace) -> dict[str, Found]:
    """Measure the page's own method, and with `--compare` the others."""
    generator = random.Random(given.seed)
    found: dict[str, Found] = {"answer_relevance": Found()}
    for kind, picture, question, said, scene in examples(model, given.scenes, given.seed):
        named = asked(scene, question)
        boxes, rest = [item.box() for item in named], [item.box() for item in scene.objects if item not in named]
        other = generator.choice(rest) if rest else None
        _, heat = look.answer_relevance(model, picture, question, said)
        found["answer_relevance"].add(kind, heat, boxes, other)
        if given.compare:
            visual, blank = look.see_with_blank(model, picture)
            for name, method in METHODS.items():
                scores = method(model, visual, blank, (question, said, None))
                heat = look.on_picture(visual, scores.clamp(min=0))
                found.setdefault(name, Found()).add(kind, heat, boxes, other)
    return found


def show(found: dict[str, Found]) -> None:
    """Print a row for each method, and the first method by kind of question."""
    columns = "method", "inside", "its standard error", "another object", "scene before", "hit, %"
    table = Table(*columns, *KINDS)
    for name, one in found.items():
        ratios = one.ratios
        error = stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else 0.0
        controls = (f"{mean(control):.2f}" if control else "-" for control in (one.other, one.before))
        kinds = (f"{mean(one.inside[kind]):.1f}" if kind in one.inside else "-" for kind in KINDS)
        table.add_row(name, f"{mean(ratios):.2f}", f"{error:.2f}", *controls, f"{100 * mean(one.hits):.0f}", *kinds)
    Console(width=170).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoint", help="checkpoint of stage two trained on drawn scenes: RUNS/opt of `qformer quickstart`"
    )
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--compare", action="store_true", help="also measure other methods")
    parser.add_argument("--quick", action="store_true", help="14 scenes, to check that it runs; never fails")
    given = parser.parse_args()
    if given.quick:
        given.scenes = 14
    found = measure(load_vision_language(given.checkpoint, "cpu"), given)
    print(f"{given.checkpoint}: {given.scenes} unseen scenes, seed {given.seed}")
    show(found)
    reached = mean(found["answer_relevance"].ratios)
    if reached < GOAL and not given.quick:
        raise SystemExit(f"{reached:.2f} times the box's share of the picture, less than {GOAL}")


if __name__ == "__main__":
    main()
