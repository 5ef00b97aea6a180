"""Does a Q-Former that reads the question answer better (BLIP-2, section 4.3)? Fine-tuned both ways on drawn scenes.

    python benchmarks/vqa_conditioned.py --folder runs/vqa_conditioned

Stage one and stage two (captions only) are those of `configs/quickstart` with so few queries that not everything in a
picture fits through them; they are trained once and are the start of all runs. From there the bridge learns to answer,
once with the question for the language model alone and once with the question in the Q-Former too (whose text path is
stage one's): the same steps, data, learning rate and frozen towers, for each of three seeds. Answers are greedy, to
questions about scenes that training never shows. What is done is kept: the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

import stages
from qformer import load
from qformer.config import load_config
from qformer.data.scenes import Scenes
from qformer.model.vision_language import VisionLanguageModel
from stages import zero_shot
from stages.zero_shot import NEW, SIZE, UNSEEN

SEEDS = (0, 1, 2)
WAYS = {"language model alone": (), "Q-Former too": ("question.max_tokens=32",)}
#: Over the configurations of the quickstart; the full ones and the quick ones, which show only that everything runs.
STEPS = {False: (1080, 400, 600), True: (60, 20, 20)}
ASKED = {False: 490, True: 70}


def prepare(folder: Path, queries: int, quick: bool) -> None:
    """Stage one, then stage two on captions: the start of all runs."""
    first, second, _ = STEPS[quick]
    common = [f"train.steps={first}", f"qformer.queries={queries}", "data.validation=null"]
    stages.train(load_config("configs/quickstart/stage1.yaml", [f"run={folder / 'stage1'}", *common]))
    common = [f"run={folder / 'stage2'}", f"init={folder / 'stage1'}", f"train.steps={second}", "train.save_every=250"]
    stages.train(load_config("configs/quickstart/stage2.yaml", common))


def measure(folder: Path, way: str, seed: int, quick: bool) -> dict[str, Any]:
    """Fine-tune one way with one seed and ask; or what was found before."""
    run = folder / f"{'with' if WAYS[way] else 'without'}-{seed}"
    found = run / "answers.json"
    if found.is_file():
        return json.loads(found.read_text(encoding="utf-8"))
    steps = STEPS[quick][2]
    own = [*WAYS[way], f"question.init={folder / 'stage1'}"] if WAYS[way] else []
    changes = [
        *(f"run={run}", f"init={folder / 'stage2'}", f"seed={seed}", "data.train.questions=true", *own),
        *(f"data.train.seed={seed + 1}", f"train.steps={steps}", "train.lr=1e-3", "train.save_every=200"),
    ]
    begun = time.perf_counter()
    stages.train(load_config("configs/quickstart/stage2.yaml", changes))
    seconds = time.perf_counter() - begun
    model = load(run)
    assert isinstance(model, VisionLanguageModel)
    result: dict[str, Any] = {
        "seconds": seconds,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    for name, split in (("unseen", UNSEEN), ("new", NEW)):
        replies = zero_shot.answer_all(model, Scenes(split, SIZE, count=ASKED[quick], questions=True))
        result[name], result[f"{name}_by_kind"] = zero_shot.accuracy(replies)
        result[f"{name}_majority"] = zero_shot.majority(replies)
    found.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/vqa_conditioned"))
    parser.add_argument("--queries", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    given = parser.parse_args()
    torch.set_num_threads(1)
    prepare(given.folder, given.queries, given.quick)
    results = {seed: {way: measure(given.folder, way, seed, given.quick) for way in WAYS} for seed in given.seeds}
    show(results)


def show(results: dict[int, dict[str, dict[str, Any]]]) -> None:
    """Accuracies in percent as Markdown: by seed with the difference, then by kind of question."""
    plain, reads = WAYS
    for split, what in (("unseen", "unseen scenes"), ("new", "new combinations")):
        print(f"\n| {what}, % right | {plain} | {reads} | difference |\n|---|---|---|---|")
        gains = []
        for seed, ways in results.items():
            before, after = (100 * ways[way][split] for way in WAYS)
            gains.append(after - before)
            print(f"| seed {seed} | {before:.1f} | {after:.1f} | {after - before:+.1f} |")
        spread = f" (standard deviation {stdev(gains):.1f})" if len(gains) > 1 else ""
        means = [100 * mean(ways[way][split] for ways in results.values()) for way in WAYS]
        print(f"| mean | {means[0]:.1f} | {means[1]:.1f} | {mean(gains):+.1f}{spread} |")
        for kind in next(iter(results.values()))[plain][f"{split}_by_kind"]:
            a, b = (100 * mean(ways[way][f"{split}_by_kind"][kind] for ways in results.values()) for way in WAYS)
            print(f"| {kind} | {a:.1f} | {b:.1f} | {b - a:+.1f} |")
    first = next(iter(results.values()))
    print(f"\nthe commonest answer to each kind of question is right for {100 * first[plain]['unseen_majority']:.1f} %")
    for way in WAYS:
        seconds = mean(ways[way]["seconds"] for ways in results.values())
        print(f"{way}: {first[way]['parameters'] / 1e6:.2f} M parameters learn, {seconds:.0f} s a run")


if __name__ == "__main__":
    main()
