"""CPU seconds and memory of `qformer mine-pairs`: of the whole command on drawn pictures, and of its search alone.

    python benchmarks/mine_pairs.py pictures --count 50000 --folder /tmp/mined
    python benchmarks/mine_pairs.py search --count 50000 --near 768 --far 1024
    python benchmarks/mine_pairs.py search --count 1000000 --near 768 --far 1024 --stripes 2

`pictures` draws scenes of 64 px, mines them with the two poolings of `mini:vit`, and mines again with nothing left to
embed. `search` writes random vectors to two files in fp16, as the command does: groups of resembling ones, as photos
have them. With `--stripes` it searches only so many and tells what all of them would take, since a stripe's time is
proportional to the pairs in it.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from qformer.data import sources
from qformer.evaluation import mining

GROUP = 100  # vectors around one center
NOISE = 0.35  # length of what is added to a center of length 1: near cosines in a group are about 0.89


def draw(folder: Path, count: int) -> None:
    """Draw so many scenes into a folder; those that are there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    scenes = sources.build("scenes", size=64, count=count)
    for index in range(len(list(folder.iterdir())), count):
        pixels = scenes[index].image
        Image.fromarray(np.asarray(pixels)).save(folder / f"{index:07}.png", compress_level=1)


def mine(folder: Path) -> None:
    """Run the command, twice."""
    words = [
        "mine-pairs",
        str(folder / "pictures"),
        "-o",
        str(folder / "out"),
        "--near",
        "mini:vit",
        "--near-pooling",
        "mean",
    ]
    words += ["--far", "mini:vit", "--far-pooling", "cls", "--quantiles", "0.9999,0.5"]
    for name in ("first run", "second run"):
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run([sys.executable, "-m", "qformer", *words], check=True)
        used, passed = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
        seconds = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
        peak = used.ru_maxrss / 2**20
        print(f"{name}: {seconds:.0f} CPU seconds in {passed:.0f} s, peak memory {peak:.2f} GiB", flush=True)
    size = sum(file.stat().st_size for file in (folder / "out").rglob("*") if file.is_file())
    print(f"{size / 2**20:.0f} MiB in {folder / 'out'}")


def write(file: Path, count: int, width: int, seed: int, noise: float) -> np.ndarray:
    """Write random vectors, float16[count, width], and read them back from the disk."""
    rng = np.random.default_rng(seed)
    rows = np.lib.format.open_memmap(file, "w+", np.float16, (count, width))
    centers = rng.standard_normal((-(-count // GROUP), width), np.float32) / np.sqrt(width)
    for start in range(0, count, 10_000):
        numbers = np.arange(start, min(start + 10_000, count)) % len(centers)
        around = rng.standard_normal((len(numbers), width), np.float32) * noise / np.sqrt(width)
        rows[start : start + len(numbers)] = centers[numbers] + around
    rows.flush()
    return np.load(file, mmap_mode="r")


class Enough(Exception):
    """As many stripes as were asked for."""


def search(count: int, widths: tuple[int, int], stripes: int | None) -> None:
    """Time the search of random vectors."""
    with tempfile.TemporaryDirectory() as folder:
        near = write(Path(folder) / "near.npy", count, widths[0], 0, NOISE)
        far = write(Path(folder) / "far.npy", count, widths[1], 1, 1.0)
        thresholds = mining.Thresholds.of(0.895, mining.BELOW, *mining.GRID)
        moments = [time.process_time()]

        def report(_: mining.Part) -> None:
            moments.append(time.process_time())
            if len(moments) - 1 == stripes:
                raise Enough

        try:
            found = mining.search(near, far, thresholds, most=20_000, report=report)
            print(f"{len(found.pairs):,} pairs kept; counts {found.counts}")
        except Enough:
            pass
    compared = [_compared(number, count) for number in range(len(moments))]
    rate = (compared[-1] - compared[1]) / (moments[-1] - moments[1])  # before the first, all vectors are checked
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    every = count * (count - 1) / 2
    seconds = moments[-1] - moments[0]
    print(f"{torch.get_num_threads()} threads; {compared[-1]:.3g} of {every:.3g} pairs in {seconds:.0f} CPU seconds")
    print(f"{rate / 1e6:.1f} million pairs in a CPU second, so {every / rate / 3600:.2f} h of one CPU for all")
    print(f"peak memory {peak:.2f} GiB, pages of files among it; {2 * count * sum(widths) / 1e9:.2f} GB of vectors")


def _compared(stripes: int, count: int) -> float:
    rows = min(stripes * mining.BLOCK, count)
    return rows * (2 * count - rows - 1) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pictures", "search"))
    parser.add_argument("--count", type=int, default=50_000)
    parser.add_argument("--folder", type=Path, default=Path("runs/mine_pairs"))
    parser.add_argument("--near", type=int, default=768)
    parser.add_argument("--far", type=int, default=1024)
    parser.add_argument("--stripes", type=int)
    given = parser.parse_args()
    if given.what == "pictures":
        draw(given.folder / "pictures", given.count)
        mine(given.folder)
    else:
        search(given.count, (given.near, given.far), given.stripes)


if __name__ == "__main__":
    main()
