"""Ten times `kill -9` on a run of two processes, at least twice during a save; it must end with the same bits.

    python benchmarks/kill.py [--kills 10] [--steps 60] [--folder runs/kill]

Stage one on the mini towers and drawn scenes, two processes over gloo on the CPU, a checkpoint every second step, with
dropout, random crops, mirrors and a worker. One run is undisturbed; of the other, the launcher and all its processes
are killed, alternately while a checkpoint is half written, and at a uniformly drawn moment between its start (even
before training) and half of the training. The same command resumes each time. A kill counts as inside a save if it
left a folder `step-N.partial`. At the end, the logged losses and the weights of both runs must be equal.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch

from qformer.checkpoints import folder as checkpoint

SETTINGS = ["data.validation=null", "data.batch=4", "train.warmup=2", "train.save_every=2", "train.log_every=3"]
SETTINGS += ["qformer.dropout=0.1", "data.workers=1", "data.crop=[0.5,1.0]", "data.flip=0.5"]


def start(run: Path, steps: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "-m", "qformer", "train"]
    command += ["configs/quickstart/stage1.yaml", f"run={run}", f"train.steps={steps}", *SETTINGS]
    log = (run.parent / f"{run.name}.log").open("ab")
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(command, stdout=log, stderr=log, env=env)


def kill(process: subprocess.Popen[bytes], run: Path, inside: bool, after: float) -> str | None:
    """Kill at a half-written checkpoint, or `after` seconds; returns what it interrupted, None if the run had ended."""
    begun, since, first = time.monotonic(), time.time(), checkpoint.newest(run)
    while process.poll() is None:
        moved = checkpoint.newest(run) != first
        half = moved and any((run / checkpoint.FOLDER).glob("*.partial"))  # not one left by an earlier kill
        if half if inside else time.monotonic() - begun > after:
            launcher = psutil.Process(process.pid)  # its processes have their own groups
            for one in [launcher, *launcher.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
            process.wait()
            partial = (run / checkpoint.FOLDER).glob("*.partial")
            left = [folder.name for folder in partial if folder.stat().st_mtime > since]
            newest = checkpoint.newest(run)
            caught = f"inside the save of {left[0]}" if left else "outside a save"
            return f"{caught}; newest checkpoint {newest.name if newest else 'none'}"
        time.sleep(0.0002 if inside else 0.01)
    return None


def losses(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--folder", type=Path, default=Path("runs/kill"))
    options = parser.parse_args()
    whole, killed = options.folder / "whole", options.folder / "killed"
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    begun, alone = time.monotonic(), start(whole, options.steps)
    while alone.poll() is None and not (whole / checkpoint.CONFIG).is_file():
        time.sleep(0.05)
    starting = time.monotonic() - begun
    if alone.wait():
        sys.exit(f"the undisturbed run failed; see {options.folder / 'whole.log'}")
    training = time.monotonic() - begun - starting
    print(f"undisturbed: {options.steps} steps in {training:.0f} s, {starting:.0f} s to start", flush=True)

    generator, inside = random.Random(0), 0
    for number in range(options.kills):
        after = generator.uniform(0, starting + 0.5 * training)
        found = kill(start(killed, options.steps), killed, number % 2 == 0, after)
        if found is None:
            sys.exit(f"the run ended after {number} kills; give more --steps")
        inside += "inside" in found
        print(f"kill {number + 1}: {found}", flush=True)
    if start(killed, options.steps).wait():
        sys.exit(f"it does not resume after {options.kills} kills; see {options.folder / 'killed.log'}")
    mine, theirs = checkpoint.read(killed).tensors, checkpoint.read(whole).tensors
    weights = mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in theirs)
    logged = losses(killed) == losses(whole)
    print(f"{options.kills} kills, {inside} inside a save: losses equal {logged}, weights equal {weights}")
    sys.exit(0 if weights and logged and inside >= 2 else 1)


if __name__ == "__main__":
    main()
