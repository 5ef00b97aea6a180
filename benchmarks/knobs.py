"""Trade-offs of time and memory: one step of each stage, with and without each option.

    python benchmarks/knobs.py [--steps 3] [--batch 8]

Stage one has the Q-Former of the paper (12 layers of width 768, 32 queries) over 257 image tokens, which are random,
since the frozen encoder does not affect the comparison. Stage two adds a random OPT with 125 million parameters. Each
line is measured in its own process: median seconds of a step (forward, backward, AdamW), and peak memory above that
before the first step. Ratios are relative to the plain line.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

from qformer.files.pretrained import tower
from qformer.llm.base import CausalLM
from qformer.model.connectors import QFormerConnector
from qformer.model.image_text import ImageTextModel
from qformer.model.qformer import QFormer
from qformer.model.vision_language import VisionLanguageModel
from qformer.schema import QFormerConfig
from qformer.stages.recompute import recompute_layers
from qformer.types import Batch, Tiles
from qformer.vision.base import VisionEncoder

KNOBS = ("plain", "bf16", "gradient checkpointing", "fused AdamW", "torch.compile")
CAPTION = "a red square above a small blue circle and the word tree"


class Given(VisionEncoder):
    """Encoder that returns 257 random tokens for each image."""

    def __init__(self) -> None:
        super().__init__(width=1408, patch_size=14, image_size=224, extra=1)
        self.register_buffer("tokens", torch.randn(1, 257, 1408))

    def encode(self, pixels: Tensor) -> Tensor:
        return self.tokens.expand(len(pixels), -1, -1)


def build(stage: int) -> nn.Module:
    torch.manual_seed(0)
    if stage == 1:
        tokenizer = AutoTokenizer.from_pretrained(tower("mini:bert"))
        tokenizer.add_special_tokens({"bos_token": "[DEC]"})
        return ImageTextModel(Given().freeze(), QFormer(QFormerConfig()), tokenizer)
    llm = CausalLM(OPTForCausalLM(OPTConfig(dropout=0.0)), AutoTokenizer.from_pretrained(tower("mini:opt")))
    return VisionLanguageModel(Given().freeze(), QFormerConnector(QFormer(QFormerConfig()).drop_text(), llm.width), llm)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measure(stage: int, knob: str, batch: int, steps: int) -> dict[str, float]:
    model = build(stage).train()
    if knob == "gradient checkpointing":
        recompute_layers(model)
    if knob == "torch.compile":
        for blocks in [m for m in model.modules() if isinstance(m, nn.ModuleList)]:
            for layer in blocks:
                layer.compile(dynamic=True)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=knob == "fused AdamW")
    half = torch.autocast("cpu", torch.bfloat16) if knob == "bf16" else nullcontext()
    data = Batch(Tiles.from_pixels(torch.zeros(batch, 3, 224, 224, dtype=torch.uint8)), [CAPTION] * batch)
    before, seconds = resident(), []
    for _ in range(steps + 1):
        begun = time.perf_counter()
        with half:
            loss = model(data)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - begun)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {"seconds": statistics.median(seconds[1:]), "first": seconds[0], "peak": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        stage, knob = options.measure
        print(json.dumps(measure(int(stage), knob, options.batch, options.steps)))
        return
    for stage in (1, 2):
        table = Table("", "seconds", "ratio", "first step", "peak GB", "ratio", title=f"stage {stage}")
        plain: dict[str, Any] = {}
        for knob in KNOBS:
            command = [sys.executable, __file__, "--steps", str(options.steps), "--batch", str(options.batch)]
            done = subprocess.run([*command, "--measure", str(stage), knob], stdout=subprocess.PIPE, text=True)
            if done.returncode:
                table.add_row(knob, "failed")
                continue
            found = json.loads(done.stdout.splitlines()[-1])
            plain = plain or found
            values = found["seconds"], found["seconds"] / plain["seconds"], found["first"], found["peak"] / 1e9
            table.add_row(knob, *(f"{value:.2f}" for value in values), f"{found['peak'] / plain['peak']:.2f}")
        Console(width=100).print(table)


if __name__ == "__main__":
    main()
