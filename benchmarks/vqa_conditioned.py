"""Q-Former with and without the question (BLIP-2, section 4.3), fine-tuned both ways on drawn scenes.

    python benchmarks/vqa_conditioned.py --folder runs/vqa_conditioned [--stage1 RUN] [--queries 1] [--steps 2000]

Stage one is that of `qformer quickstart`, or a given run. Its 8 queries carry most of a drawn scene, so that no
question would have to select anything. So only the first query is kept, and stage two learns captions with it: the
start of all runs. From there the bridge learns to answer, once with the question for the language model alone and once
also for the Q-Former, whose text path is stage one's: the same steps, data, learning rate and frozen towers, for each
of three seeds, which order the data. Training pictures are encoded once. Answers are greedy, about scenes that training
never shows. Finished parts are kept: the same command resumes.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from qformer import load, stages
from qformer.checkpoints import folder as checkpoint
from qformer.config import load_config
from qformer.evaluation import zero_shot
from qformer.evaluation.zero_shot import SIZE, UNSEEN
from qformer.model.bert import read_tokenizer
from qformer.model.vision_language import VisionLanguageModel
from qformer.scenes.scenes import Scenes

SEEDS = (0, 1, 2)
WAYS = {"language model alone": False, "Q-Former too": True}
#: Steps of the three trainings, training scenes and test questions; the quick ones only check that it runs.
FULL, QUICK = (1080, 400, 2000, 16000, 980), (60, 20, 20, 100, 70)


def prepare(given: argparse.Namespace) -> Path:
    """Train stage one, unless it is given, and stage two on captions, where all runs start; returns stage one."""
    first, second, *_ = QUICK if given.quick else FULL
    whole = given.stage1 or given.folder / "whole"
    if given.stage1 is None:
        stages.train(load_config("configs/quickstart/stage1.yaml", [f"run={whole}", f"train.steps={first}"]))
    stage1 = given.folder / "stage1"
    if checkpoint.newest(stage1) is None:
        narrow(whole, stage1, given.queries)
    common = [f"run={given.folder / 'stage2'}", f"init={stage1}", f"train.steps={second}", "train.save_every=100"]
    stages.train(load_config("configs/quickstart/stage2.yaml", common))
    return stage1


def narrow(source: Path, target: Path, queries: int) -> None:
    """Copy a checkpoint of stage one with its first `queries` queries only."""
    saved = checkpoint.read(source)
    sizes = saved.config.qformer.model_copy(update={"queries": queries})
    tensors = saved.tensors | {"qformer.queries": saved.tensors["qformer.queries"][:, :queries]}
    config = saved.config.model_copy(update={"qformer": sizes})
    extra = read_tokenizer(saved.path).save_pretrained
    checkpoint.save(target, saved.meta["step"], config, tensors, {"narrowed_from": str(saved.path)}, extra=extra)


def measure(given: argparse.Namespace, stage1: Path, way: str, seed: int) -> dict[str, Any]:
    """Fine-tune one way with one seed and measure it, or return earlier results."""
    run = given.folder / f"{'with' if WAYS[way] else 'without'}-{seed}"
    found = run / "answers.json"
    if found.is_file():
        return json.loads(found.read_text(encoding="utf-8"))
    _, _, usual, scenes, asked = QUICK if given.quick else FULL
    steps = given.steps or usual
    changes = [
        *(f"run={run}", f"init={given.folder / 'stage2'}", f"seed={seed}", f"train.steps={steps}", "train.lr=1e-3"),
        *("data.train.questions=true", "data.train.captions=null", f"data.train.count={scenes}"),
        *(f"data.features={given.folder / 'tokens'}", "train.save_every=100"),
        *([f"question.init={stage1}"] if WAYS[way] else []),
    ]
    begun = time.process_time()
    stages.train(load_config("configs/quickstart/stage2.yaml", changes))
    seconds = time.process_time() - begun
    model = load(run)
    assert isinstance(model, VisionLanguageModel)
    replies = zero_shot.answer_all(model, Scenes(UNSEEN, SIZE, count=asked, questions=True))
    right, by_kind = zero_shot.accuracy(replies)
    result = {
        "right": right,
        "by_kind": by_kind,
        "majority": zero_shot.majority(replies),
        "cpu_seconds": seconds,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    found.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/vqa_conditioned"))
    parser.add_argument("--stage1", type=Path, help="a run of configs/quickstart/stage1.yaml, such as quickstart's")
    parser.add_argument("--queries", type=int, default=1, help="queries of stage one to keep")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--steps", type=int, help=f"steps of fine-tuning, by default {FULL[2]}")
    parser.add_argument("--quick", action="store_true", help="a few steps, to check that it runs")
    given = parser.parse_args()
    torch.set_num_threads(1)
    stage1 = prepare(given)
    results: dict[int, dict[str, dict[str, Any]]] = {}
    for seed in given.seeds:
        results[seed] = {way: measure(given, stage1, way, seed) for way in WAYS}
        show(results)


def show(results: dict[int, dict[str, dict[str, Any]]]) -> None:
    """Print accuracies in percent as Markdown: by seed with the difference, then by kind of question."""
    plain, reads = WAYS
    print(f"\n| % right | {plain} | {reads} | difference |\n|---|---|---|---|")
    gains = []
    for seed, ways in results.items():
        before, after = (100 * ways[way]["right"] for way in WAYS)
        gains.append(after - before)
        print(f"| seed {seed} | {before:.1f} | {after:.1f} | {after - before:+.1f} |")
    means = [100 * mean(ways[way]["right"] for ways in results.values()) for way in WAYS]
    spread = f" (standard deviation {stdev(gains):.1f})" if len(gains) > 1 else ""
    print(f"| mean | {means[0]:.1f} | {means[1]:.1f} | {mean(gains):+.1f}{spread} |")
    first = next(iter(results.values()))
    for kind in first[plain]["by_kind"]:
        before, after = (100 * mean(ways[way]["by_kind"][kind] for ways in results.values()) for way in WAYS)
        print(f"| {kind} | {before:.1f} | {after:.1f} | {after - before:+.1f} |")
    print(f"\nthe commonest answer to each kind of question is right for {100 * first[plain]['majority']:.1f} %")
    for way in WAYS:
        seconds = mean(ways[way]["cpu_seconds"] for ways in results.values())
        print(
            f"{way}: {first[way]['parameters'] / 1e6:.2f} M parameters learn, {seconds:.0f} s of CPU a run", flush=True
        )


if __name__ == "__main__":
    main()
