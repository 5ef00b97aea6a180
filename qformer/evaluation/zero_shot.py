"""Zero-shot evaluation of a stage-two model on unseen drawn scenes: answers, those of a blind model, and captions."""

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
SIZE = 120  # pixels, of the images and of the shipped ViT
GROUP = 64  # images encoded at a time
#: Prompts of captions. An encoder-decoder was trained to continue the first words of a caption, never an empty text.
CAPTION_PROMPTS = {"causal": "", "seq2seq": "a"}
GREEDY: dict[str, Any] = {"num_beams": 1, "length_penalty": 1.0}


@dataclass(frozen=True)
class BlindScenes(Scenes):
    """Scenes whose images are all gray: a model trained on them learns to answer without vision."""

    def picture(self, scene: Scene) -> np.ndarray:
        width, height = self.pixels
        return np.full((height, width, 3), sum(GROUND) // 2, np.uint8)


@dataclass(frozen=True)
class Reply:
    """A question, its right answer, and the text of the model's answer."""

    kind: str
    question: str
    answer: str
    text: str

    @property
    def right(self) -> bool:
        return self.text.strip().strip(".") == self.answer


def answer_all(model: VisionLanguageModel, source: Scenes) -> list[Reply]:
    """Let the model answer the question of each sample of a source with `questions`."""
    replies: list[Reply] = []
    for start in range(0, len(source), GROUP):
        places = range(start, min(start + GROUP, len(source)))
        samples = [source[place] for place in places]
        tiles = model.frontend.tiles([sample.image for sample in samples])
        texts = model.answer(tiles, [sample.question or "" for sample in samples], **GREEDY)
        replies += [
            Reply(sample.key.rpartition(":")[2], sample.question or "", sample.answers[0], text)
            for sample, text in zip(samples, texts, strict=True)
        ]
    return replies


def accuracy(replies: list[Reply]) -> tuple[float, dict[str, float]]:
    """Compute the share of right answers, over all and by kind."""
    kinds = {kind: [reply.right for reply in replies if reply.kind == kind] for kind in KINDS}
    return float(np.mean([reply.right for reply in replies])), {
        kind: float(np.mean(right)) for kind, right in kinds.items() if right
    }


def majority(replies: list[Reply]) -> float:
    """Compute the accuracy of always giving the most common answer of each kind."""
    counts = {kind: Counter(reply.answer for reply in replies if reply.kind == kind) for kind in KINDS}
    return sum(max(count.values()) for count in counts.values() if count) / len(replies)


@dataclass(frozen=True)
class Captioned:
    """A scene of one object, and the caption that the model wrote."""

    scene: Scene
    caption: str

    @property
    def named(self) -> bool:
        """True if the caption names both the color and the shape of the object."""
        (item,) = self.scene.objects
        return {item.colour, item.shape} <= set(self.caption.replace(",", " ").split())


def caption_all(model: VisionLanguageModel, source: Scenes) -> list[Captioned]:
    """Let the model caption a source whose scenes have one object each."""
    captioned: list[Captioned] = []
    for start in range(0, len(source), GROUP):
        places = range(start, min(start + GROUP, len(source)))
        tiles = model.frontend.tiles([source[place].image for place in places])
        texts = model.generate(tiles, CAPTION_PROMPTS[model.llm.family], **GREEDY)
        captioned += [Captioned(source.scene(place), text) for place, text in zip(places, texts, strict=True)]
    return captioned


def named(captioned: list[Captioned]) -> float:
    """Compute the share of captions that name color and shape."""
    return sum(one.named for one in captioned) / len(captioned)
