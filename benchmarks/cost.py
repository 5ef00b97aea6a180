"""Cost of a picture in each preset: tokens, operations, seconds to the first token, memory.

    python benchmarks/cost.py [-o cost.json] [--rounds 3] [--full]

Each `configs/system_*.yaml` reads pictures of 224 x 224, 672 x 1008 and 1344 x 1344 pixels. Tokens and operations are
counted by the real modules without numbers (`stages/plan/first_token.py`), with `--full` also those of the published
sizes. The seconds are measured with the shipped towers and a bridge at random: from the picture in memory to the first
token, cutting included. Rounds alternate presets and sizes in one process; the fastest round counts. CPU seconds of
one thread are what an idle machine takes, and other processes matter little to them; those by the clock are kept too.
The estimate is the operations by the rate of matrix products, in CPU seconds as well. Memory is the highest of the
process during a reading, less what it had before (Linux).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from qformer.config import load_config
from qformer.figures.cost import PARTS
from qformer.model.assembly import build_vision_language
from qformer.model.vision_language import VisionLanguageModel
from qformer.stages.checking import check
from qformer.stages.plan.first_token import Reader
from qformer.types import UsageError

SYSTEMS = ("blip2", "llava15", "llava_uhd", "internvl15", "anyres", "oryx", "qwen2vl")
SIZES = ((224, 224), (672, 1008), (1344, 1344))  # width, height


def counted(name: str, device: str = "cpu") -> list[dict[str, Any]]:
    """Tokens and operations of a configuration for each size."""
    reader, found = Reader(load_config(f"configs/{name}.yaml"), device), []
    for size in SIZES:
        plan = reader.plan(*size)
        row = {"preset": name, "size": list(size), "tiles": len(plan.tiles)}
        row["tokens"] = reader.tokens(plan) + plan.markers
        found.append(row)
        try:
            operations = reader.operations(*size)
        except UsageError as error:  # more than the positions of the language model
            row["refused"] = str(error)
            continue
        row |= {part: sum(operations[part].values()) for part in PARTS}
    return found


def build(name: str) -> VisionLanguageModel:
    """The model of a preset with the shipped towers, its bridge at random."""
    torch.manual_seed(0)
    model, _ = build_vision_language(check(load_config(f"configs/{name}.yaml")))
    return model.eval()


def rate() -> float:
    """FLOP per CPU second of products of two matrices in fp32, in which the shipped towers are: the best of five."""
    matrix = torch.ones(1024, 1024)
    spent = []
    for _ in range(5):
        start = time.process_time()
        matrix @ matrix
        spent.append(time.process_time() - start)
    return 2 * 1024**3 / min(spent)


def first_token(model: VisionLanguageModel, picture: torch.Tensor) -> tuple[float, float, float]:
    """CPU seconds and seconds until the first token of a caption, and MB that were needed for it."""
    before = _resident("VmRSS", reset=True)
    start, spent = time.perf_counter(), time.process_time()
    model.generate(model.frontend.tiles([picture]), "", num_beams=1, max_new_tokens=1, min_new_tokens=0)
    spent, seconds = time.process_time() - spent, time.perf_counter() - start
    return spent, seconds, max(_resident("VmHWM") - before, 0.0)


def _resident(key: str, reset: bool = False) -> float:
    """MB of this process, now (`VmRSS`) or at most since the last reset (`VmHWM`)."""
    if reset:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1e3


def measured(rows: list[dict[str, Any]], rounds: int) -> None:
    """Add `cpu_seconds`, `seconds`, `estimate` and `megabytes` to rows: the fastest of the rounds, the most memory."""
    speed = rate()
    models = {name: build(name) for name in dict.fromkeys(row["preset"] for row in rows)}
    pictures = {size: torch.randint(0, 256, (3, size[1], size[0]), dtype=torch.uint8) for size in SIZES}
    for _ in range(rounds + 1):  # the first warms up
        for row in rows:
            if "refused" not in row:
                row.setdefault("all", []).append(first_token(models[row["preset"]], pictures[tuple(row["size"])]))
    for row in rows:
        if "all" in row:
            kept = row.pop("all")[1:]
            row["cpu_seconds"], row["seconds"] = (min(one[place] for one in kept) for place in (0, 1))
            row["megabytes"] = max(megabytes for *_, megabytes in kept)
            row["estimate"] = sum(row[part] for part in PARTS) / speed


def show(rows: list[dict[str, Any]], unit: float, name: str) -> Table:
    """The rows as a table, operations in `unit` FLOPs."""
    timed = any("seconds" in row for row in rows)
    head = ["preset", "picture", "tiles", "tokens", f"encoder, {name}", "connector", "prefill"]
    table = Table(*head, *(["CPU ms to the first token", "estimated", "MB"] if timed else []))
    for row in rows:
        cells = [row["preset"], "{} x {}".format(*row["size"]), f"{row['tiles']}", f"{row['tokens']:,}"]
        if "refused" in row:
            table.add_row(*cells, "refused")
            continue
        cells += [f"{row[part] / unit:,.2f}" for part in PARTS]
        if timed:
            cells += [f"{1e3 * row['cpu_seconds']:,.0f}", f"{1e3 * row['estimate']:,.0f}", f"{row['megabytes']:,.0f}"]
        table.add_row(*cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--full", action="store_true", help="count the published sizes as well")
    parser.add_argument("--presets", nargs="+", default=list(SYSTEMS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=140)
    rows = [row for name in given.presets for row in counted(f"system_{name}")]
    measured(rows, given.rounds)
    console.print(show(rows, 1e9, "GFLOP"))
    full = [row for name in given.presets if given.full for row in counted(f"system_{name}_full", "cuda")]
    if full:
        console.print(show(full, 1e12, "TFLOP"))
    if given.output is not None:
        given.output.write_text(json.dumps({"mini": rows, "full": full}, indent=1) + "\n")


if __name__ == "__main__":
    main()
