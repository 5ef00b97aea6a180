"""Speed of retrieval with re-ranking compared with LAVIS's `compute_sim_matrix`, on equal weights and candidates.

    python benchmarks/rerank.py --lavis-python .venv/lavis/bin/python [--images 12] [--texts 60] [-k 6] [--rounds 3]

Create the environment of LAVIS as `tests/golden/make_golden.py` says. Both sides run end to end, from pixels and
strings to two score matrices: an EVA ViT of depth 4 and width 352 (224 pixels, 257 tokens), and the Q-Former of the
paper, 12 layers of width 768, with random weights that LAVIS draws and `qformer.load` reads. Rounds of both alternate
on the same number of threads, in fp32, while the other side sleeps. `--quick` checks in a minute that it works.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from rerank_lavis import VISION, WORDS, texts
from rich.console import Console

import qformer
from qformer.evaluation import retrieval
from qformer.model.image_text import ImageTextModel
from qformer.types import Tiles
from tests.golden import golden, vocabulary

SIDES = ("LAVIS", "qformer")
HERE = Path(__file__).resolve().parent


class Lavis:
    """Process that runs LAVIS."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        sizes = [str(number) for number in (options.images, options.texts, options.k, options.threads)]
        self.process = subprocess.Popen(
            [options.lavis_python, str(HERE / "rerank_lavis.py"), str(folder), *sizes],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / "lavis.log").open("w"),
            text=True,
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
            | ({"PYTHONPATH": os.environ["LAVIS_SRC"]} if "LAVIS_SRC" in os.environ else {}),
        )
        if self._answer() != "ready\n":
            raise SystemExit(f"LAVIS did not start:\n{(folder / 'lavis.log').read_text()[-2000:]}")

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def round(self) -> dict[str, float]:
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)
        return json.loads(self._answer())


def our_model(folder: Path) -> ImageTextModel:
    vocabulary.WORDS["race"] = WORDS
    golden.bert_tokenizer("race").save_pretrained(folder / "tokenizer")
    model = qformer.load(folder / "lavis.pth", "cpu", vision_heads=VISION["heads"], tokenizer=str(folder / "tokenizer"))
    assert isinstance(model, ImageTextModel)
    return model


def our_round(
    model: ImageTextModel, pixels: torch.Tensor, captions: list[str], k: int
) -> tuple[dict[str, float], retrieval.Scores]:
    wall, cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryFile() as file:
        images = retrieval.Images(model, file)
        images.add(Tiles.from_pixels(pixels))
        scores = images.score(captions, k)
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}, scores


def compare(scores: retrieval.Scores, folder: Path) -> str:
    """Describe the differences of scores of common pairs, and the number of pairs that only one side scored."""
    apart, alone, spread = 0.0, 0, 0.0
    ours = scores.image_to_text, scores.text_to_image.T
    for own, theirs in zip(ours, torch.load(folder / "scores.pt"), strict=True):
        taken = [matrix > retrieval.NO_CANDIDATE for matrix in (own, theirs)]
        both = taken[0] & taken[1]
        alone += int((taken[0] ^ taken[1]).sum())
        apart = max(apart, float((own - theirs)[both].abs().max()))
        spread = float(theirs[both].std())
    return f"scores, which spread by {spread:.2f}, differ by {apart:.0e} at most; {alone} candidates of one side alone"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lavis-python", required=True, help="Python of the environment of LAVIS")
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--texts", type=int, default=60)
    parser.add_argument("-k", type=int, default=6, help="candidates of each query")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="4 images, 12 texts, k 3, one round")
    options = parser.parse_args()
    if options.quick:
        options.images, options.texts, options.k, options.rounds = 4, 12, 3, 1
    torch.set_num_threads(options.threads)
    console = Console()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lavis = Lavis(options, folder)
        model, pixels, captions = our_model(folder), torch.load(folder / "pixels.pt"), texts(options.texts)
        our_round(model, pixels[:2], captions[:4], 1)  # loads everything loaded at first use
        rounds = []
        for number in range(options.rounds):
            theirs = lavis.round()
            ours, scores = our_round(model, pixels, captions, options.k)
            rounds.append((theirs, ours))
            times = [
                f"{who} {used['wall']:.1f} s ({used['cpu']:.1f} of CPU)"
                for who, used in zip(SIDES, rounds[-1], strict=True)
            ]
            console.print(f"round {number + 1}: {', '.join(times)}")
        lavis.process.terminate()
        agreement = compare(scores, folder)
    asked = (options.images + options.texts) * options.k
    scored = int((scores.of_image | scores.of_text).sum())
    for kind in ("wall", "cpu"):
        middle = [statistics.median(each[side][kind] for each in rounds) for side in (0, 1)]
        console.print(
            f"{kind}: {asked / middle[0]:.2f} and {asked / middle[1]:.2f} pairs/s, {middle[0] / middle[1]:.2f} times; "
            f"by pairs that differ {middle[0] / middle[1] * scored / asked:.2f}"
        )
    console.print(f"{asked} candidates, of which {scored} differ; {options.threads} threads; {agreement}")


if __name__ == "__main__":
    main()
