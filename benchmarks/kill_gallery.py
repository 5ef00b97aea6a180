"""Twenty times `kill -9` while a gallery is created and updated; nothing may be lost or duplicated.

    python benchmarks/kill_gallery.py [--kills 20] [--images 240] [--folder runs/kill_gallery]

It uses drawn photos with captions, the mini towers with random weights, and an index from 50 images on. A process
indexes and is killed: alternately during a commit, during cleanup (compaction, building the index), and at a random
moment. The same command resumes. Whenever it finishes, photos are added, changed, deleted, renamed and captioned anew,
and it starts over, so that about half of the kills hit an update. After each kill, the store must hold the state last
acknowledged, with or without the complete interrupted commit; no id, place or `seq` may be duplicated; and a search
must return its hits, with and without the index. At the end, the gallery must equal one made without kills.

Each process is forked from one that has imported modules that start no threads, and is killed by SIGKILL.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from qformer.config import load_config
from qformer.model.assembly import build_image_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from qformer.model.image_text import ImageTextModel

WORDS = ("red", "green", "blue", "dog", "cat", "bus", "beach", "snow", "tree", "umbrella", "train", "man")
KINDS = ("commit", "refresh", "anywhere")
BATCH = 8


def photo(path: Path, seed: int) -> None:
    draw = np.random.default_rng(seed)
    colours = draw.integers(0, 256, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(colours).resize((96, 64)).save(path)
    if seed % 3:
        path.with_suffix(".txt").write_text("\n".join(" ".join(draw.choice(WORDS, 4)) for _ in range(1 + seed % 3)))


def alter(photos: Path, draw: random.Random, share: float = 0.3) -> None:
    """Add, change, delete, rename, copy and recaption about this share of the photos."""
    files = sorted(photos.glob("*.png"))
    some = draw.sample(files, int(share * len(files)))
    for number, file in enumerate(some):
        text, seed = file.with_suffix(".txt"), draw.randrange(10**9)
        if number % 6 == 0:
            photo(photos / f"new{seed}.png", seed)
        elif number % 6 == 1:
            text.unlink(missing_ok=True)
            photo(file, seed)
        elif number % 6 == 2:
            file.unlink()
            text.unlink(missing_ok=True)
            photo(photos / f"in{seed}.png", seed)
        elif number % 6 == 3:
            file.rename(photos / f"moved{seed}.png")
            if text.exists():
                text.rename(photos / f"moved{seed}.txt")
        elif number % 6 == 4:
            text.write_text(" ".join(draw.choices(WORDS, k=5)))
        else:
            shutil.copy(file, photos / f"copy{seed}.png")


def forked(work: Callable[[], Any]) -> int:
    """Fork a process that does this work; it exits with 0, or with 1 and a traceback."""
    sys.stdout.flush()
    if process := os.fork():
        return process
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def finished(process: int) -> bool:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


def state(store: Any) -> dict[str, Any]:
    """Contents of a store by id: places and captions.

    Raises:
        AssertionError: something is duplicated.
    """
    known = list(store.known())
    places = [(place.source, place.name) for one in known for place in one.places]
    assert len(known) == len({one.id for one in known}) == len(store), "an id is duplicated"
    assert len(places) == len(set(places)), "a place is duplicated"
    assert len(known) == len({one.seq for one in known}), "a seq is duplicated"
    return {one.id: _about(one) for one in known}


def _about(entry: Any) -> list[Any]:
    return [sorted([place.source, place.name] for place in entry.places), sorted(entry.captions)]


def index(model: ImageTextModel, photos: Path, folder: Path, notes: Path) -> None:
    """Index as `qformer index` does; `notes` gets its activity, and acknowledged and pending entries."""
    from qformer.data import sources
    from qformer.retrieval import lance
    from qformer.retrieval.gallery import MANIFEST, Gallery
    from qformer.retrieval.index import update
    from qformer.retrieval.reading import fingerprint, probes

    lance.INDEXED, lance.PARTITION, lance.STALE = 50, 100, 0.05
    doing = os.open(notes / "doing", os.O_CREAT | os.O_WRONLY)

    def say(what: str) -> None:
        os.pwrite(doing, what.ljust(8).encode(), 0)

    def write(name: str, held: dict[str, Any]) -> None:
        (notes / "partial").write_text(json.dumps(held))
        (notes / "partial").replace(notes / name)

    say("start")
    choice = {"name": "folder", "path": str(photos)}
    if (folder / MANIFEST).exists():
        gallery = Gallery.open(folder)
        gallery.check(fingerprint(model), "mini")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        about = {"checkpoint": "mini", "features": None}
        sizes = {"queries": model.qformer.config.queries, "width": model.config.embed_width}
        gallery = Gallery.create(folder, "lance", fingerprint=fingerprint(model), **about, **sizes)
    if choice not in gallery.about["sources"]:
        gallery.about["sources"].append(choice)
        gallery.save()
    held, commit = state(gallery.store), gallery.store.commit

    def committed(new: Any, changed: Any, gone: Any) -> None:
        after = {id_: one for id_, one in held.items() if id_ not in set(gone)}
        after |= {entry.id: _about(entry) for entry in [*new, *changed]}
        write("pending", after)
        say("commit")
        commit(new, changed, gone)
        say("between")
        write("acknowledged", after)
        held.clear()
        held.update(after)

    gallery.store.commit = committed  # type: ignore[method-assign]
    write("acknowledged", held)
    write("pending", held)
    update(gallery, model, sources.build(**choice), 0, BATCH)
    say("refresh")
    gallery.store.refresh(probes(gallery, model))
    say("end")


def check(model: ImageTextModel, folder: Path, notes: Path) -> None:
    """Check after a kill that acknowledged entries exist, nothing is duplicated, and searches work."""
    from qformer.retrieval.gallery import MANIFEST
    from qformer.retrieval.search import Retriever

    if not (folder / MANIFEST).exists():
        assert not (notes / "acknowledged").exists(), "the gallery is gone"
        return
    retriever = Retriever(folder, model)
    found = state(retriever.gallery.store)
    if not (notes / "acknowledged").exists():
        assert not found, "entries that were never written"
        return
    acknowledged, pending = (json.loads((notes / name).read_text()) for name in ("acknowledged", "pending"))
    counts = f"{len(found)} entries, acknowledged {len(acknowledged)}, being written {len(pending)}"
    assert found in (acknowledged, pending), counts
    for exact in (False, True):
        hits = retriever.text_to_image("a dog on the beach", k=10, shortlist=4, exact=exact)
        assert len({hit.id for hit in hits}) == len(hits) == min(10, len(found)), f"{len(hits)} hits"


def compare(mine: Path, theirs: Path) -> None:
    """Check that both galleries hold the same.

    Raises:
        AssertionError: they differ.
    """
    from qformer.retrieval.gallery import Gallery

    stores = [Gallery.open(folder).store for folder in (mine, theirs)]
    first, second = (state(store) for store in stores)
    assert first == second, f"{len(first)} and {len(second)} entries, {len(first.items() ^ second.keys())} differ"
    entries = [store.get(list(first)) for store in stores]
    bits, most = 0, 0.0
    for id_ in first:
        one, other = (side[id_] for side in entries)
        order = [np.argsort(one.captions), np.argsort(other.captions)]
        for a, b in ((one.embeds, other.embeds), (one.caption_embeds[order[0]], other.caption_embeds[order[1]])):
            assert a.shape == b.shape, f"{id_} has {a.shape} and {b.shape}"
            if a.size:
                bits += not np.array_equal(a, b)
                most = max(most, float(np.abs(a.astype(np.float32) - b.astype(np.float32)).max()))
    assert most < 2e-3, f"embeddings differ by {most}"
    print(
        f"the gallery equals one made without kills: {len(first)} entries, places and captions; of their embeddings ",
        end="",
    )
    print("all have equal bits" if not bits else f"{bits} differ, by at most {most:.1e}", flush=True)


def kill(process: int, notes: Path, kind: str, after: float) -> str | None:
    """Kill a process at its `after`-th part of this kind; returns its activity, None if it had ended."""
    begun, met = None, 0
    last = ""
    while True:
        if os.waitpid(process, os.WNOHANG)[0]:
            return None
        doing = (notes / "doing").read_text().strip() if (notes / "doing").exists() else ""
        begun = time.monotonic() if begun is None and doing else begun
        met += doing == kind != last
        last = doing
        if kind == "anywhere":
            due = begun is not None and time.monotonic() - begun > after
        else:
            due = doing == kind and (kind == "refresh" or met > 10 * after % 4)
        if due:
            if kind != "anywhere":
                time.sleep(after % 1 * (0.02 if kind == "commit" else 0.5))
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return (notes / "doing").read_text().strip()
        time.sleep(0.0002)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--images", type=int, default=240)
    parser.add_argument("--folder", type=Path, default=Path("runs/kill_gallery"))
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    photos, killed, notes = (options.folder.absolute() / name for name in ("photos", "killed", "notes"))
    for folder in (photos, notes, notes / "whole"):
        folder.mkdir(parents=True)
    for number in range(options.images):
        photo(photos / f"{number}.png", number)
    torch.manual_seed(0)
    model = build_image_text(load_config("configs/quickstart/stage1.yaml"))[0].eval()

    begun = time.monotonic()
    if not finished(forked(lambda: index(model, photos, options.folder / "first", notes / "whole"))):
        sys.exit("the undisturbed index failed")
    whole = time.monotonic() - begun
    print(f"undisturbed: {options.images} images in {whole:.1f} s", flush=True)
    draw, caught, updates, kills = random.Random(0), dict.fromkeys(("commit", "refresh"), 0), 0, 0
    while kills < options.kills:
        (notes / "doing").unlink(missing_ok=True)
        process = forked(lambda: index(model, photos, killed, notes))
        after = draw.uniform(0, whole if KINDS[kills % 3] == "anywhere" else 1)
        doing = kill(process, notes, KINDS[kills % 3], after)
        if doing is None:
            if (notes / "doing").read_text().strip() != "end":
                sys.exit(f"it does not resume after {kills} kills")
            alter(photos, draw)
            updates += 1
            continue
        kills += 1
        if not finished(forked(lambda: check(model, killed, notes))):
            sys.exit(f"kill {kills}, during '{doing}', did damage")
        if doing in caught:
            caught[doing] += 1
        print(f"kill {kills}: {doing}, {'first index' if not updates else f'update {updates}'}; all there", flush=True)
        if kills >= options.kills / 2 and not updates and kills % 3 == 0:  # continue with updates in any case
            finished(forked(lambda: index(model, photos, killed, notes)))
            alter(photos, draw)
            updates += 1
    ended = finished(forked(lambda: index(model, photos, killed, notes)))
    ended = ended and finished(forked(lambda: index(model, photos, options.folder / "again", notes / "whole")))
    if not ended or not finished(forked(lambda: compare(killed, options.folder / "again"))):
        sys.exit("the gallery differs from one made without kills")
    print(f"{kills} kills, {caught['commit']} in a commit, {caught['refresh']} during cleanup, {updates} updates")


if __name__ == "__main__":
    main()
