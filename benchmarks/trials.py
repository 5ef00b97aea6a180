"""Trials like those of BLIP-2's first users, on drawn scenes: identify, follow up, correct, mislead, read and others.

    python benchmarks/trials.py runs/quickstart/opt [--scenes 100] [--seed 0] [-o trials.json]

The checkpoint is one of stage two trained on scenes, as by `qformer quickstart`. `--scenes 5` checks that it works.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import trial_set as trials
from rich.console import Console
from rich.table import Table

import qformer
from qformer.model.vision_language import VisionLanguageModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--scenes", type=int, default=100, help="scenes per trial")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, help="write every trial as JSON")
    options = parser.parse_args()
    model = qformer.load(options.checkpoint)
    if not isinstance(model, VisionLanguageModel):
        parser.error(f"'{options.checkpoint}' is a checkpoint of stage one; give one of stage two")
    found = trials.run(model, options.scenes, options.seed)
    table = Table("trial", "right", "of", *trials.FAILURES, "counts as right", title=options.checkpoint)
    for trial in found:
        failed = [str(trial.failures()[kind]) for kind in trials.FAILURES]
        table.add_row(trial.name, str(trial.right), str(len(trial.asked)), *failed, trial.counts)
    console = Console(width=150)
    console.print(table)
    for trial in found:
        for one in trial.asked[:3]:
            console.print(f"{trial.name}: {one.prompt} [b]{one.said}[/b] ({one.failure or 'right'})")
    if options.output is not None:
        record = {
            trial.name: [
                {"prompt": one.prompt, "said": one.said, "expected": one.expected, "failure": one.failure}
                for one in trial.asked
            ]
            for trial in found
        }
        options.output.write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
