"""Memory of a process in which many threads call a model in turn, with glibc's heaps as they are and bounded.

    python benchmarks/heaps.py [runs/quickstart/opt] [--threads 16] [--calls 64]

Each round answers a question about so many pictures of random sizes with beam search, one at a time, each in whichever
thread is free, as on the page. Printed is the resident memory in MB before and after each round.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import qformer
from qformer.demo.limits import bound_heaps


def resident() -> int:
    """Read the resident memory of this process, in MB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) // 1024


def call_in_turn(model: Any, threads: int, calls: int, rounds: int) -> list[int]:
    """Ask about random pictures from many threads; returns the memory before and after each round."""
    rng, lock = np.random.default_rng(0), threading.Lock()

    def ask(_: int) -> None:
        with lock:
            picture = rng.integers(0, 255, (*rng.integers(50, 900, 2), 3), dtype=np.uint8)
            model.answer(model.frontend.tiles([picture]), ["what color is the star?"], num_beams=5)

    found = [resident()]
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(rounds):
            list(pool.map(ask, range(calls)))
            found.append(resident())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default="runs/quickstart/opt")
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--calls", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--only", choices=["free", "bounded"], help="in this process; by default a process for each")
    given = parser.parse_args()
    if given.only is None:
        for kind in ("free", "bounded"):
            subprocess.run([sys.executable, *sys.argv, "--only", kind], check=True)
        return
    if given.only == "bounded":
        bound_heaps()
    model = qformer.load(given.checkpoint, device="cpu")
    found = call_in_turn(model, given.threads, given.calls, given.rounds)
    print(f"{given.only}: {' -> '.join(map(str, found))} MB")


if __name__ == "__main__":
    main()
