"""Scenes as files with questions, for whoever wants to try a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from qformer.scenes.scenes import Scenes
from qformer.scenes.stories import statement
from qformer.scenes.text import COLOURS, Question

if TYPE_CHECKING:
    from pathlib import Path

EXAMPLES = 4
EXAMPLE_SIZE = 240  # pixels


def draw_examples(folder: Path) -> list[list[str]]:
    """Draw scenes that training never shows into `folder`: rows (file, question, context), the last one misleading."""
    source = Scenes("val", size=EXAMPLE_SIZE, seed=785, count=EXAMPLES, questions=True)
    samples = [source[place] for place in range(EXAMPLES)]
    rows = [[str(folder / f"scene{place}.png"), sample.question or "", ""] for place, sample in enumerate(samples)]
    for sample, (file, *_) in zip(samples, rows, strict=True):
        Image.fromarray(np.asarray(sample.image)).save(file)
    first = samples[0]  # its question asks for a color
    wrong = next(colour for colour in COLOURS if colour not in first.answers)
    claim = statement(Question("colour", first.question or "", ""), wrong)
    return [*rows, [rows[0][0], rows[0][1], f"{claim}."]]
