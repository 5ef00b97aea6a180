"""Few-shot answers: does a stage-two model learn from 0, 1, 2 and 4 examples in the prompt?

    python benchmarks/few_shot.py runs/quickstart/opt [--shots 0 1 2 4] [--count 210] [--seeds 3]
    python benchmarks/few_shot.py CKPT --asked name=jsonl path=val.jsonl --shown name=jsonl path=train.jsonl

By default, questions are about drawn scenes of the validation split, and examples about those of the training split,
which has no questions. `--words TASK` selects another row of the table of prompts.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from few_shot_trial import SHOTS, few_shot
from rich.console import Console
from rich.table import Table

import qformer
from qformer.data import base, sources
from qformer.data.arguments import pairs
from qformer.evaluation.zero_shot import SIZE


def source(words: list[str] | None, split: str, count: int) -> base.Source:
    scenes: dict[str, Any] = {"name": "scenes", "split": split, "size": SIZE, "count": count, "questions": True}
    options = scenes if words is None else pairs(words)
    return sources.build(str(options.pop("name", "jsonl")), **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--shots", type=int, nargs="+", default=SHOTS)
    parser.add_argument("--count", type=int, default=210, help="number of questions about drawn scenes")
    parser.add_argument("--seeds", type=int, default=3, help="number of draws of examples")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--asked", nargs="+", metavar="KEY=VALUE", help="data for the questions")
    parser.add_argument("--shown", nargs="+", metavar="KEY=VALUE", help="data for the examples")
    parser.add_argument("--words", default="vqa", metavar="TASK")
    options = parser.parse_args()
    model = qformer.load(options.checkpoint)
    asked, shown = source(options.asked, "val", options.count), source(options.shown, "train", 1000)
    runs = [
        few_shot(model, asked, shown, options.shots, options.batch, seed, task=options.words)
        for seed in range(options.seeds)
    ]
    table = Table("examples", "right, %", "of each draw", "answer is one of theirs, %", title=options.checkpoint)
    for number in runs[0].said:
        right = [100 * run.accuracy[number] for run in runs]
        copied = [100 * run.copied[number] for run in runs]
        draws = ", ".join(f"{share:.1f}" for share in right)
        table.add_row(str(number), f"{np.mean(right):.1f}", draws, f"{np.mean(copied):.1f}")
    Console().print(table)
    Console().print(f"{len(asked)} questions, {options.seeds} draws of examples")


if __name__ == "__main__":
    main()
