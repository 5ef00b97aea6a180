"""Quantized language models compared with full precision: answers and memory.

    python benchmarks/quantized.py [--quick] [--runs runs/quickstart] [--questions 245]

The shipped OPT and T5 run in fp32, int8 and nf4 on the CPU. Text: scenes are described in words in place of a picture.
Pictures: questions about and captions of unseen scenes, with the bridges of `qformer quickstart` (RUNS/opt and RUNS/t5;
missing ones are skipped). `same` is the share of texts equal to those of fp32, `right` that of right answers, or of
captions that name color and shape. Memory is that of the weights, scales included.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

import qformer
from qformer.evaluation import zero_shot
from qformer.llm.loading import load_language_model
from qformer.llm.quantize import nbytes
from qformer.scenes.scenes import Scenes
from qformer.scenes.stories import Stories
from qformer.stages.towers.stories import LONG

if TYPE_CHECKING:
    from qformer.llm.base import LanguageModel

MODES = ("none", "int8", "nf4")
LEAST = {"none": 1.0, "int8": 0.95, "nf4": 0.85}
BATCH = 64


def from_text(llm: LanguageModel, count: int) -> tuple[list[str], list[bool]]:
    """Answers to questions about described scenes, and a mask of right ones."""
    stories = Stories("test", count=count)
    asked = [story for story in (stories[i] for i in range(count)) if story.kind not in LONG]
    table, said = llm.model.get_input_embeddings(), []
    for start in range(0, len(asked), BATCH):
        part = asked[start : start + BATCH]
        ids = llm.tokenizer([story.description for story in part], add_special_tokens=False)["input_ids"]
        rows = [table(torch.tensor(row)) for row in ids]
        prefix = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.arange(prefix.shape[1]) < torch.tensor([len(row) for row in ids])[:, None]
        prompts = [story.prompt for story in part]
        said += llm.decode(llm.generate(prefix, mask, prompts, num_beams=1, max_new_tokens=8))
    return said, [text == story.reply for text, story in zip(said, asked, strict=True)]


def from_pictures(model: Any, count: int) -> dict[str, tuple[list[str], list[bool]]]:
    """Answers and captions of a bridge, and masks of right ones."""
    replies = zero_shot.answer_all(model, Scenes("val", zero_shot.SIZE, count=count, questions=True))
    captioned = zero_shot.caption_all(model, Scenes("val", zero_shot.SIZE, count=count, objects=(1, 1), seed=1))
    return {
        "answers": ([reply.text for reply in replies], [reply.right for reply in replies]),
        "captions": ([one.caption for one in captioned], [one.named for one in captioned]),
    }


def measure(kind: str, run: Path, count: int) -> list[dict[str, Any]]:
    """Measure all modes of one language model."""
    rows: list[dict[str, Any]] = []
    full: dict[str, list[str]] = {}
    for mode in MODES:
        llm = load_language_model(f"mini:{kind}", quantize=mode)
        size, begun = nbytes(llm.model), time.perf_counter()
        said = {"text": from_text(llm, count)}
        if run.is_dir():
            said |= from_pictures(qformer.load(run, device="cpu", quantize=mode), count)
        for task, (texts, right) in said.items():
            wanted = full.setdefault(task, texts)
            same = sum(a == b for a, b in zip(texts, wanted, strict=True)) / len(texts)
            rows.append(
                {
                    "model": kind,
                    "task": task,
                    "mode": mode,
                    "texts": len(texts),
                    "same": same,
                    "right": sum(right) / len(right),
                    "empty": sum(not text for text in texts),
                    "bytes": size,
                    "ok": same >= LEAST[mode],
                }
            )
        print(f"{kind} {mode}: {time.perf_counter() - begun:.0f} s", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="text only, 60 questions")
    parser.add_argument("--runs", type=Path, default=Path("runs/quickstart"), help="folder of `qformer quickstart`")
    parser.add_argument("--questions", type=int, default=245)
    parser.add_argument("--output", type=Path, help="write the numbers as JSON")
    options = parser.parse_args()
    count, runs = (60, Path("none")) if options.quick else (options.questions, options.runs)
    rows = [row for kind in ("opt", "t5") for row in measure(kind, runs / kind, count)]
    table = Table("model", "task", "kept in", "texts", "same, %", "right, %", "empty", "bytes", "of fp32")
    for row in rows:
        whole = next(other["bytes"] for other in rows if other["model"] == row["model"])
        shares = [f"{100 * row[key]:.1f}" for key in ("same", "right")]
        numbers = [*shares, str(row["empty"]), f"{row['bytes']:,}", f"{row['bytes'] / whole:.3f}"]
        table.add_row(row["model"], row["task"], row["mode"].replace("none", "fp32"), str(row["texts"]), *numbers)
    Console(width=110).print(table)
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    if not all(row["ok"] for row in rows):
        raise SystemExit("too few texts are equal to those of full precision")


if __name__ == "__main__":
    main()
