"""What a stage-two model says of drawn scenes it never saw: answers, beside those of a blind model, and captions."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from qformer.scenes.scenes import GROUND, KINDS, Scenes

if TYPE_CHECKING:
    from qformer.model.vision_language import VisionLanguageModel
    from qformer.scenes.text import Scene

# Scenes like those of training, and scenes with combinations that training never shows.
UNSEEN: Literal["val"] = "val"
NEW: Literal["test"] = "test"
SIZE = 120  # pixels, of the pictures and of the shipped ViT
GROUP = 64  # pictures encoded at a time
#: What captions go on from. An encoder-decoder learned to go on from the first words of a caption, never from none.
CAPTION_PROMPTS = {"causal": "", "seq2seq": "a"}
GREEDY: dict[str, Any] = {"num_beams": 1, "length_penalty": 1.0}


@dataclass(frozen=True)
class BlindScenes(Scenes):
    """`Scenes` behind one grey picture: a model trained on it learns what can be said without seeing."""

    def picture(self, scene: Scene) -> np.ndarray:
        width, height = self.pixels
        return np.full((height, width, 3), sum(GROUND) // 2, np.uint8)


@dataclass(frozen=True)
class Reply:
    """A question, its right answer, and what the model said."""

    kind: str
    question: str
    answer: str
    said: str

    @property
    def right(self) -> bool:
        return self.said.strip().strip(".") == self.answer


def answer_all(model: VisionLanguageModel, source: Scenes) -> list[Reply]:
    """The model's answers to the question of each sample of a source with `questions`."""
    replies: list[Reply] = []
    for start in range(0, len(source), GROUP):
        places = range(start, min(start + GROUP, len(source)))
        samples = [source[place] for place in places]
        tiles = model.frontend.tiles([sample.image for sample in samples])
        said = model.answer(tiles, [sample.question or "" for sample in samples], **GREEDY)
        replies += [
            Reply(sample.key.rpartition(":")[2], sample.question or "", sample.answers[0], text)
            for sample, text in zip(samples, said, strict=True)
        ]
    return replies


def accuracy(replies: list[Reply]) -> tuple[float, dict[str, float]]:
    """Share of right answers, of all and of each kind."""
    kinds = {kind: [reply.right for reply in replies if reply.kind == kind] for kind in KINDS}
    return float(np.mean([reply.right for reply in replies])), {
        kind: float(np.mean(right)) for kind, right in kinds.items() if right
    }


def majority(replies: list[Reply]) -> float:
    """Accuracy of the most frequent answer of each kind, whatever is asked: what balance leaves to be guessed."""
    counts = {kind: Counter(reply.answer for reply in replies if reply.kind == kind) for kind in KINDS}
    return sum(max(count.values()) for count in counts.values() if count) / len(replies)


@dataclass(frozen=True)
class Captioned:
    """A scene of one object, and the caption it was given."""

    scene: Scene
    caption: str

    @property
    def named(self) -> bool:
        """Whether colour and shape of the object are both in the caption."""
        (item,) = self.scene.objects
        return {item.colour, item.shape} <= set(self.caption.replace(",", " ").split())


def caption_all(model: VisionLanguageModel, source: Scenes) -> list[Captioned]:
    """The model's captions of a source whose scenes hold one object each."""
    told: list[Captioned] = []
    for start in range(0, len(source), GROUP):
        places = range(start, min(start + GROUP, len(source)))
        tiles = model.frontend.tiles([source[place].image for place in places])
        said = model.generate(tiles, CAPTION_PROMPTS[model.llm.family], **GREEDY)
        told += [Captioned(source.scene(place), text) for place, text in zip(places, said, strict=True)]
    return told


def named(told: list[Captioned]) -> float:
    """Share of captions that name colour and shape."""
    return sum(one.named for one in told) / len(told)
