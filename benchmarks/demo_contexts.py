"""Answers of the page about unseen scenes: without a context, with a true one, and with a false one.

    python benchmarks/demo_contexts.py runs/quickstart/opt [--scenes 100] [--seed 11] [--quick]

Each scene takes the path of a visitor's picture: a file, and `qformer.demo.backend` with the page's defaults. Its
question is about one property (color, shape, count, position, word) that a context can state. A false statement always
has another value than the true one, so an answer that follows it ignores the picture.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from qformer.checkpoints.loading import load_vision_language
from qformer.demo import backend
from qformer.evaluation.zero_shot import UNSEEN
from qformer.scenes.scenes import Scenes
from qformer.scenes.stories import STATEMENTS, statement
from qformer.scenes.text import Question

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qformer.model.vision_language import VisionLanguageModel

SIZE = 240  # pixels
PLAIN, TRUE, FALSE = "no context", "context that is right", "context that misleads, followed"


def asked(count: int, seed: int, kinds: tuple[str, ...]) -> Iterator[tuple[Image.Image, str, str, str, str]]:
    """Draw `count` unseen scenes, with a question of one of `kinds`, its answer, the truth, and a wrong value."""
    source = Scenes(UNSEEN, SIZE, seed=seed, count=100 * count, questions=True)
    for place in range(len(source)):
        sample = source[place]
        kind, answer = sample.key.rpartition(":")[2], sample.answers[0]
        choices = STATEMENTS[kind][2] if kind in kinds else ()
        if answer not in choices or sample.question == "how many objects are there?":
            continue
        wrong = choices[(choices.index(answer) + 1 + place % (len(choices) - 1)) % len(choices)]
        question = Question(kind, sample.question or "", answer)
        yield Image.fromarray(sample.image), question.question, answer, statement(question, answer), wrong
        count -= 1
        if not count:
            return


def contexts(model: VisionLanguageModel, count: int, seed: int) -> dict[str, float]:
    """Shares of expected answers over `count` scenes."""
    hits: dict[str, list[bool]] = {PLAIN: [], TRUE: [], FALSE: []}
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "scene.png")
        given = asked(count, seed, tuple(STATEMENTS))
        for picture, question, answer, truth, wrong in track(given, "scenes", total=count, transient=True):
            picture.save(file)
            untruth = wrong.join(truth.rsplit(answer, 1))
            for name, context, wanted in (
                (PLAIN, "", answer),
                (TRUE, f"{truth}.", answer),
                (FALSE, f"{untruth}.", wrong),
            ):
                hits[name].append(backend.answer_to(model, file, question, context) == wanted)
    return {name: sum(right) / len(right) for name, right in hits.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoint", help="checkpoint of stage two trained on drawn scenes: RUNS/opt of `qformer quickstart`"
    )
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--quick", action="store_true", help="10 scenes, to check that it runs")
    given = parser.parse_args()
    count = 10 if given.quick else given.scenes
    table = Table(
        "context", "expected answers, %", title=f"{given.checkpoint}: {count} unseen scenes, seed {given.seed}"
    )
    for name, share in contexts(load_vision_language(given.checkpoint, "cpu"), count, given.seed).items():
        table.add_row(name, f"{100 * share:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
