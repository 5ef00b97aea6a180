"""What the page does, as plain functions that know nothing of Gradio."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from demo.limits import open_picture
from qformer.cleaning import clean_question
from qformer.data.scene_text import COLOURS, Question
from qformer.data.scenes import Scenes
from qformer.data.stories import statement
from qformer.types import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from qformer.model.vision_language import VisionLanguageModel

EXAMPLES = 4
EXAMPLE_SIZE = 240  # pixels


def answer(model: VisionLanguageModel, image: str | None, question: str, context: str) -> str:
    """What the model says of an image file: the answer, or without a question a caption.

    Args:
        image: a file. question: as a person types it. context: text in front of the question; may be empty.

    Raises:
        UsageError: no image, or a file that is none.
    """
    if image is None:
        raise UsageError("there is no picture yet; choose, drop or paste one")
    tiles = model.frontend.tiles([open_picture(image)])
    asked = clean_question(question)
    if not asked:
        return model.generate(tiles)[0]
    return model.answer(tiles, [asked], context=context.strip() or None)[0]


def draw_examples(folder: Path) -> list[list[str]]:
    """Scenes that no training shows, drawn into `folder`: rows of (file, question, context); the last is misled."""
    source = Scenes("test", size=EXAMPLE_SIZE, seed=7, count=EXAMPLES, questions=True)
    samples = [source[place] for place in range(EXAMPLES)]
    rows = [[str(folder / f"scene{place}.png"), sample.question or "", ""] for place, sample in enumerate(samples)]
    for sample, (file, *_) in zip(samples, rows, strict=True):
        Image.fromarray(np.asarray(sample.image)).save(file)
    first = samples[0]  # its question asks for a colour
    wrong = next(colour for colour in COLOURS if colour not in first.answers)
    claim = statement(Question("colour", first.question or "", ""), wrong)
    return [*rows, [rows[0][0], rows[0][1], f"Context: {claim}."]]
