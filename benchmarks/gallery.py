"""Scaling of a gallery: build time, disk, memory, and recall of the index of a large one.

    python benchmarks/gallery.py CKPT DATA.jsonl [--images 100000] [--queries 200] [--folder DIR]
    python benchmarks/gallery.py CKPT DATA.jsonl --quick

Without that many photos, embeddings are resampled from those of a trained model and its images (and not drawn from
clusters, which any index finds) by a smoothed bootstrap (Silverman, Density Estimation, section 6.4). A resampled image
is mean + (a - mean + h (b - c) / sqrt(2)) / sqrt(1 + h^2), rows of unit length, where a, b and c are all rows of three
random real images and h = 0.5. It keeps the mean and the covariance of the real images, over all rows of an image
together, so rows of one image stay as close to each other as before. The first table compares the scores of real and
resampled images: a search is hard if many images score just below the best.

Queries are embeddings of real captions that were not used to tune the index. The first process writes and indexes; a
second, fresh one searches, so that its memory is that of a search. ITC stage: from the embedding of a text to the 100
best.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from qformer import load
from qformer.data import sources
from qformer.data.held_out import held_out
from qformer.retrieval.entries import Entry, Place
from qformer.retrieval.gallery import Gallery
from qformer.retrieval.reading import embed_captions

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

SMOOTH = 0.5  # h
CHUNK = 2_000  # images in a commit
BEST = 100


def embed(checkpoint: str, data: str) -> dict[str, Tensor]:
    """Embed the images of a file of JSON lines, float16[n, V, P], and a caption of each, float32[n, P]."""
    model = load(checkpoint).eval()
    held = held_out(sources.build("jsonl", path=data), model.frontend.strategy, None, 64)
    with torch.no_grad():
        rows = torch.cat([model.embed_images(tiles)[0].half() for tiles in held.groups])
        texts = [
            embed_captions(model, [captions[0] for captions in held.captions[i : i + 64]])
            for i in range(0, len(held), 64)
        ]
    return {"images": rows, "texts": torch.from_numpy(np.concatenate(texts)).float()}


def resampled(real: Tensor, count: int) -> Iterator[Tensor]:
    """Resample `count` images from real ones, float16[CHUNK, V, P] at a time."""
    draws = torch.Generator().manual_seed(0)
    real = real.float()
    mean = real.mean(dim=0)
    for start in range(0, count, CHUNK):
        a, b, c = torch.randint(len(real), (3, min(CHUNK, count - start)), generator=draws)
        rows = mean + (real[a] - mean + SMOOTH * (real[b] - real[c]) / 2**0.5) / (1 + SMOOTH**2) ** 0.5
        yield torch.nn.functional.normalize(rows, dim=-1).half()


def build(folder: Path, known: dict[str, Tensor], count: int) -> dict[str, Any]:
    _, queries, width = known["images"].shape
    gallery = Gallery.create(
        folder, "lance", fingerprint="", checkpoint="", features=None, queries=queries, width=width
    )
    writing, number = 0.0, 0
    for rows in resampled(known["images"], count):
        entries = []
        for own in rows.numpy():
            place = Place(0, f"/photos/{number // 1000:04d}/{number:08d}.jpg", -1, 100_000, 0)
            entries.append(Entry(f"{number:032x}", [place], 100_000, 640, 480, own, seq=number))
            number += 1
        start = time.perf_counter()
        gallery.store.commit(entries, [], [])
        writing += time.perf_counter() - start
    start = time.perf_counter()
    index = gallery.store.refresh(known["texts"][::2][:100])
    indexing = time.perf_counter() - start
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return {"writing": writing, "indexing": indexing, "disk": size, "index": index}


def search(folder: Path, known: dict[str, Tensor], queries: int) -> dict[str, Any]:
    store = Gallery.open(folder).store
    texts = known["texts"][1::2][:queries]
    store.nearest(texts[:1], BEST)
    times, found = [], []
    for text in texts:
        start = time.perf_counter()
        found.append({name for name, _ in store.nearest(text[None], BEST)})
        times.append(time.perf_counter() - start)
    start = time.perf_counter()
    store.nearest(texts[:1], BEST, exact=True)
    exact = time.perf_counter() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    truth = store.truth(list(texts[:, None]), BEST)
    recall = [len(a & b) / BEST for a, b in zip(found, truth, strict=True)]
    p50, p99 = np.percentile(times, [50, 99]) * 1e3
    return {
        "p50": p50,
        "p99": p99,
        "exact": exact,
        "recall": np.mean(recall),
        "worst": np.min(recall),
        "memory": memory,
    }


def likeness(known: dict[str, Tensor]) -> Table:
    """Compare scores of real images, and of the same number of resampled ones, with the same texts."""
    real, texts = known["images"], known["texts"][1::2][:200]
    ours = torch.cat(list(resampled(real, len(real))))
    table = Table(
        "",
        "mean",
        "deviation",
        "best",
        "10th",
        "100th",
        "within an image",
        title="cosines of texts and images; the last: of rows",
    )
    for name, rows in (("real", real), ("resampled", ours)):
        scores = torch.cat(
            [torch.einsum("nvp,tp->tnv", some.float(), texts).amax(dim=2) for some in rows.split(500)], dim=1
        )
        best = scores.sort(dim=1, descending=True).values
        some = rows[:500].float()
        values = [
            scores.mean(),
            scores.std(dim=1).mean(),
            *(best[:, i].mean() for i in (0, 9, 99)),
            (some @ some.mT).mean(),
        ]
        table.add_row(name, *(f"{float(value):.3f}" for value in values))
    return table


def report(count: int, built: dict[str, Any], found: dict[str, Any]) -> Table:
    table = Table("", "", title=f"{count:,} images")
    index = built["index"]
    table.add_row("written", f"{built['writing']:.0f} s")
    if index is not None:
        table.add_row("indexed", f"{built['indexing']:.0f} s: {json.dumps(index)}")
    table.add_row("disk", f"{built['disk'] / 1e9:.2f} GB")
    table.add_row("memory: building, searching", f"{built['memory'] / 1e9:.2f} GB, {found['memory'] / 1e9:.2f} GB")
    table.add_row("ITC stage: p50, p99", f"{found['p50']:.1f} ms, {found['p99']:.1f} ms")
    table.add_row("reading everything", f"{1e3 * found['exact']:.0f} ms")
    table.add_row(f"recall@{BEST} against that", f"{found['recall']:.4f} (worst query {found['worst']:.2f})")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("data")
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--folder", type=Path, help="folder of the gallery; by default a temporary one")
    parser.add_argument("--quick", action="store_true", help="6,000 images, 20 queries")
    parser.add_argument("--phase", choices=("build", "search"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.images, options.queries = 6_000, 20
    torch.set_num_threads(2)
    if options.phase is not None:
        known = torch.load(options.folder / "embeds.pt")
        done = (
            build(options.folder / "gallery", known, options.images)
            if options.phase == "build"
            else search(options.folder / "gallery", known, options.queries)
        )
        print(json.dumps({"memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024} | done))
        return
    folder = options.folder or Path(tempfile.mkdtemp())
    folder.mkdir(exist_ok=True)
    (folder / "gallery").mkdir()
    try:
        if not (folder / "embeds.pt").exists():
            torch.save(embed(options.checkpoint, options.data), folder / "embeds.pt")
        console = Console(width=120)
        console.print(likeness(torch.load(folder / "embeds.pt")))
        done = {}
        for phase in ("build", "search"):
            command = [
                sys.executable,
                __file__,
                options.checkpoint,
                options.data,
                "--folder",
                str(folder),
                "--phase",
                phase,
            ]
            sizes = ["--images", str(options.images), "--queries", str(options.queries)]
            done[phase] = json.loads(
                subprocess.run([*command, *sizes], check=True, stdout=subprocess.PIPE, text=True).stdout
            )
        console.print(report(options.images, done["build"], done["search"]))
    finally:
        shutil.rmtree(folder if options.folder is None else folder / "gallery", ignore_errors=True)


if __name__ == "__main__":
    main()
