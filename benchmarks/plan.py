"""Accuracy of `qformer plan`: memory of real runs on a CPU compared with the plan.

    python benchmarks/plan.py CONFIG.yaml... [-o results.json]

Each file holds a configuration of stage one or two whose towers are given as sizes (see benchmarks/plan/*.yaml); they
are created at random in a temporary folder. A run of three steps in its own process measures the growth of its memory
after the imports (peak resident set from the first step on); another, under torch.profiler, that of tensors alone.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

STEPS = 3
PHOTOS = 8
CAPTION = " ".join(["a red square above a small blue circle"] * 6)  # longer than the model reads


def make_towers(folder: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Replace sizes given for paths (`text.bert`, `llm.path`, `vision.path`) by folders with random weights."""
    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    from qformer.files.pretrained import tower

    for section, key in (("text", "bert"), ("llm", "path"), ("vision", "path")):
        sizes = values.get(section, {}).get(key)
        if not isinstance(sizes, dict):
            continue
        config = AutoConfig.for_model(**sizes)
        auto = {"opt": AutoModelForCausalLM, "t5": AutoModelForSeq2SeqLM}.get(config.model_type, AutoModel)
        path = folder / config.model_type
        model = auto.from_config(config)
        if sizes.get("tie_word_embeddings") is False:  # as in the files of Flan-T5
            model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
        model.save_pretrained(path)
        if section != "vision":
            AutoTokenizer.from_pretrained(tower(f"mini:{config.model_type}")).save_pretrained(path)
        values[section][key] = str(path)
    return values


def make_data(folder: Path) -> Path:
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    records = []
    for number in range(PHOTOS):
        Image.fromarray(rng.integers(0, 255, (240, 320, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        records.append({"image": f"{number}.png", "caption": CAPTION})
    # Ids of their own, so that every sample of a batch has negatives.
    lines = [json.dumps(record) for record in records]
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "captions.jsonl"


def mapped() -> int:
    """Bytes of weights mapped from files, as transformers loads them; the profiler does not count those."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(".safetensors")]
    ends = [[int(end, 16) for end in line[0].split("-")] for line in lines]
    return sum(stop - start for start, stop in ends)


def train(path: str, profiled: bool) -> dict[str, int]:
    """Train as `qformer train` does; returns peak bytes of the steps above those after the imports."""
    import matplotlib.pyplot  # noqa: F401
    import psutil
    import torch
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401
    from transformers import OPTForCausalLM, T5ForConditionalGeneration  # noqa: F401

    from qformer import stages
    from qformer.config import load_config
    from qformer.stages import loop, stage1, stage2  # noqa: F401

    config = load_config(path)
    baseline = psutil.Process().memory_info().rss
    step, peaks = loop._train_step, []
    if profiled:
        loop._train_step = lambda run, stream: (peaks.append(mapped()), step(run, stream))[1]
        profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        with profiler:
            stages.train(config)
        trace = Path(path).with_suffix(".trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
        allocated = max(e["args"]["Total Allocated"] for e in events if e.get("name") == "[memory]")
        return {"tensors": allocated + max(peaks)}

    def watched(run: Any, stream: Any) -> None:
        if not peaks:
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
        step(run, stream)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)

    loop._train_step = watched
    stages.train(config)
    return {"resident": peaks[-1] - baseline}


def measure(path: Path) -> dict[str, Any]:
    """Plan one file, and measure two runs of it."""
    from qformer.config import load_config
    from qformer.stages.plan import hardware
    from qformer.stages.plan.outline import outline
    from qformer.stages.plan.rehearsal import Subject

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        values = make_towers(folder, yaml.safe_load(path.read_text()))
        values |= {"run": str(folder / "run")}
        values["data"]["train"] = {"name": "jsonl", "path": str(make_data(folder))}
        values["train"] |= {"steps": STEPS, "warmup": 1, "save_every": 0}
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump(values))
        settings = load_config(config)
        subject = Subject(settings, *outline(settings, "cpu"), "cpu", 1)
        grown = subject.peak(settings.data.batch) - hardware.PROGRAM  # as it is measured, after the imports
        planned = {"resident": grown, "tensors": subject.step(settings.data.batch).peak}
        found: dict[str, int] = {}
        for kind in ("resident", "tensors"):
            command = [sys.executable, __file__, "--child", kind, str(config)]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            found |= json.loads(done.stdout.splitlines()[-1])
            subprocess.run(["rm", "-r", str(folder / "run")], check=True)
    return {"config": path.name} | {kind: {"planned": planned[kind], "measured": found[kind]} for kind in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--child", choices=("resident", "tensors"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(train(str(given.configs[0]), given.child == "tensors")))
        return
    results = []
    for path in given.configs:
        results.append(measure(path))
        for kind in ("resident", "tensors"):
            planned, found = results[-1][kind]["planned"], results[-1][kind]["measured"]
            off = 100 * (planned / found - 1)
            print(
                f"{path.name} {kind}: planned {planned / 1e9:.3f} GB, {found / 1e9:.3f} measured ({off:+.1f} %)",
                flush=True,
            )
    if given.output:
        given.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
