"""`qformer mine-pairs`: pairs that one encoder takes for the same and another tells apart, to look at and to question.

`work/` of the output holds what a further run starts from: a gallery of both encoders' vectors (`qformer index`), the
same vectors as `near.npy` and `far.npy`, the stripes of the search that are done, and replies of a server.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from qformer import devices
from qformer.commands import pair_files
from qformer.commands.encoders import TwoEncoders, load_encoder
from qformer.commands.pair_files import PairFiles
from qformer.commands.searching import absolute, fill
from qformer.data.arguments import choose_data
from qformer.evaluation import mining
from qformer.evaluation.mining import BlindPair, Found, Part, Thresholds
from qformer.files.claims import claim
from qformer.files.records import append_record, read_records, replace_records, replacing, to_json, writing
from qformer.progress import Bar, console
from qformer.retrieval.gallery import MANIFEST, Gallery
from qformer.retrieval.index import SKIPPED
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qformer.retrieval.lance import LanceStore

WORK, SCAN = "work", "scan.jsonl"
MOST = 20_000  # pairs that are kept, those with the widest gaps


@dataclass
class MiningSettings:
    """Options of the command.

    Attributes:
        near, far: encoders as typed, see `qformer.commands.encoders`; `near_pooling`, `far_pooling` of each.
        above, below: thresholds. quantiles: in place of them, two shares of all pairs, such as "0.999,0.2".
        shown: pairs of the sheet and of the questions. once: no picture in two of these.
        server, model: an OpenAI-compatible server that names patterns, and the model there.
    """

    near: str
    far: str
    near_pooling: str | None = None
    far_pooling: str | None = None
    above: float = mining.ABOVE
    below: float = mining.BELOW
    quantiles: str | None = None
    shown: int = 150
    once: bool = False
    server: str | None = None
    model: str | None = None
    timeout: float = 60.0
    batch: int = 64
    device: str | None = None
    trust: bool = False
    as_json: bool = False


def mine(data: list[str], folder: Path, settings: MiningSettings) -> None:
    """Find blind pairs among pictures and write them to a folder; the same command again goes on where it was.

    Raises:
        UsageError: pictures, an encoder, a threshold or a folder that cannot be used; a full disk; or a server that
            does not answer, once everything else is written.
    """
    shares = _shares(settings.quantiles)
    Thresholds.of(settings.above, settings.below)
    if shares is not None and (settings.above, settings.below) != (mining.ABOVE, mining.BELOW):
        raise UsageError("--quantiles takes the place of --above and --below; give these or those")
    ask = pair_files.asker(settings.server, settings.model, settings.timeout)
    device = devices.choose(settings.device)
    if Path(data[0]).is_dir() and folder.resolve().is_relative_to(Path(data[0]).resolve()):
        raise UsageError(f"'{folder}' lies among the pictures in '{data[0]}'; give a folder outside with -o")
    choices = _choices(data, settings.trust)
    near, far = (
        load_encoder(given, pooling, device, settings.trust)
        for given, pooling in ((settings.near, settings.near_pooling), (settings.far, settings.far_pooling))
    )
    both = TwoEncoders(near, far)
    with ExitStack() as stack:
        claim(stack, folder, lambda names: WORK in names or not names, "mined pairs", "mines pairs")
        stack.enter_context(writing(folder))
        gallery = _embed(choices, data[0], folder, both, settings)
        skipped = read_records(folder / WORK / SKIPPED)
        if len(gallery.store) < 2:
            raise UsageError(
                f"{len(gallery.store)} pictures could be read, which makes no pair; see '{folder / WORK / SKIPPED}'"
            )
        ids, paths = _dump(gallery, folder / WORK, near.width)
        vectors = [np.load(folder / WORK / name, mmap_mode="r") for name in ("near.npy", "far.npy")]
        thresholds, words = _thresholds(vectors, settings, shares)
        key = [both.fingerprint(), hashlib.sha256("".join(ids).encode()).hexdigest(), thresholds, MOST, mining.BLOCK]
        found = _search(vectors, thresholds, folder / WORK / SCAN, json.dumps(key), device)
        record = {
            "near": {"encoder": near.name, "pooling": near.pooling, "above": thresholds.above},
            "far": {"encoder": far.name, "pooling": far.pooling, "below": thresholds.below},
            "quantiles": shares,
            "images": len(ids),
            "skipped": len(skipped),
            "pairs": found.counts[thresholds.nears.index(thresholds.above)][thresholds.fars.index(thresholds.below)],
            "kept": len(found.pairs),
            "counts": {"near_above": thresholds.nears, "far_below": thresholds.fars, "pairs": found.counts},
        }
        files = PairFiles(folder, gallery, both, found.pairs, ids, paths, record, words)
        files.write(settings.shown, settings.once, skipped)
        _report(files, settings)
        if ask is not None:
            files.tag(ask, " ".join(ask.identity.values()))


def _shares(text: str | None) -> list[float] | None:
    """Parse the two quantiles.

    Raises:
        UsageError: not two numbers from 0 to 1.
    """
    if text is None:
        return None
    try:
        near, far = map(float, text.split(","))
        if not (0 <= near <= 1 and 0 <= far <= 1):
            raise ValueError
    except ValueError:
        raise UsageError(
            f"--quantiles is '{text}'; give two numbers from 0 to 1, of the near and of the far cosines, such as "
            "0.999,0.2"
        ) from None
    return [near, far]


def _choices(data: list[str], trust: bool) -> list[dict[str, Any]]:
    """Sources of the pictures: what `qformer index` takes, or the sources of a gallery that it made.

    Raises:
        UsageError: none of these; or (`Untrusted`) a gallery whose sources name code or addresses.
    """
    if len(data) == 1 and (Path(data[0]) / MANIFEST).is_file():
        gallery = Gallery.open(data[0], trust)
        for number in range(len(gallery.sources())):
            gallery.source(number)  # refuses what must not run
        if not gallery.sources():
            raise UsageError(f"the gallery '{data[0]}' has no source of pictures; give a folder of pictures")
        return gallery.sources()
    return [choose_data(data).model_dump()]


def _embed(
    choices: list[dict[str, Any]], data: str, folder: Path, both: TwoEncoders, settings: MiningSettings
) -> Gallery:
    """Bring the gallery of vectors in step with the pictures.

    Raises:
        UsageError: it was made by other encoders or of other pictures, or there is no picture.
    """
    work = folder / WORK
    wanted = [absolute(choice) for choice in choices]
    if (work / MANIFEST).is_file():
        held = Gallery.open(work, settings.trust)
        fingerprint, sources = held.about["fingerprint"], held.sources()
        other = "encoders" if fingerprint != both.fingerprint() else "pictures"
        if fingerprint != both.fingerprint() or sources != wanted[: len(sources)]:
            raise UsageError(f"'{folder}' holds pairs of other {other}; give a new folder with -o")
    faults: list[dict[str, Any]] = []
    named = {
        "store": None,
        "features": None,
        "path": f"{settings.near} and {settings.far}",
        "trust": settings.trust,
    }
    for choice in choices:
        with ExitStack() as stack:
            gallery, _ = fill(stack, both, choice, data, work, named, settings.batch)
        faults += read_records(work / SKIPPED)
    replace_records(work / SKIPPED, faults)
    return gallery


def _dump(gallery: Gallery, work: Path, width: int) -> tuple[list[str], list[str]]:
    """Write the vectors to `near.npy`, float16[N, D], and `far.npy`, in the order in which pictures were indexed.

    Returns:
        Id and path of each row.
    """
    store = cast("LanceStore", gallery.store)
    known = sorted((seq, id_, path) for batch in store.read(["seq", "id", "path"]) for seq, id_, path in _rows(batch))
    order = np.array([seq for seq, _, _ in known])
    with replacing(work / "near.npy") as first, replacing(work / "far.npy") as second:
        widths = (width, store.width - width)
        near, far = (
            np.lib.format.open_memmap(file, "w+", np.float16, (len(known), own))
            for file, own in zip((first, second), widths, strict=True)
        )
        for batch in store.read(["seq", "embeds"]):
            places = np.searchsorted(order, batch["seq"].to_numpy())
            vectors = batch["embeds"].flatten().to_numpy(zero_copy_only=False).reshape(-1, store.width)
            near[places], far[places] = vectors[:, :width], vectors[:, width:]
        for rows in (near, far):
            rows.flush()
    return [id_ for _, id_, _ in known], [path for _, _, path in known]


def _rows(batch: Any) -> Any:
    return zip(*(batch[name].to_pylist() for name in ("seq", "id", "path")), strict=True)


def _thresholds(
    vectors: Sequence[np.ndarray], settings: MiningSettings, shares: Sequence[float] | None
) -> tuple[Thresholds, dict[float, str]]:
    """Thresholds as cosines, and those that are quantiles in words."""
    if shares is None:
        return Thresholds.of(settings.above, settings.below, *mining.GRID), {}
    words: dict[float, str] = {}
    cosines = []
    for rows, share, others in zip(vectors, shares, mining.GRID_OF_QUANTILES, strict=True):
        every = [share, *(one for one in others if one != share)]
        values = mining.quantiles(rows, every)
        words |= {value: f"{value:.3f} (quantile {one:g})" for value, one in zip(values, every, strict=True)}
        cosines.append(values)
    near, far = cosines
    return Thresholds.of(near[0], far[0], near[1:], far[1:]), words


def _search(vectors: Sequence[np.ndarray], thresholds: Thresholds, file: Path, key: str, device: Any) -> Found:
    """Search, and keep each stripe in a file; stripes that are there are not searched again."""
    done = _done(file, key, (len(thresholds.nears), len(thresholds.fars)), len(vectors[0]))
    replace_records(file, [{"key": key}, *(_record(part) for part in done)])
    count, block = len(vectors[0]), mining.BLOCK

    def compared(stripes: int) -> int:
        rows = min(stripes * block, count)
        return rows * (2 * count - rows - 1) // 2

    with Bar(console=console) as bar:
        task = bar.add_task(
            "pairs compared", total=compared(mining.count_stripes(count, block)), completed=compared(len(done))
        )

        def report(part: Part) -> None:
            append_record(file, _record(part))
            bar.update(task, completed=compared(part.stripe + 1))

        return mining.search(vectors[0], vectors[1], thresholds, MOST, block, device, done, report)


def _done(file: Path, key: str, sizes: tuple[int, int], count: int) -> list[Part]:
    """Stripes of an earlier search with the same key; none where the file has been changed.

    Args:
        sizes: numbers of near and far thresholds. count: pictures.
    """
    try:
        head, *records = read_records(file)
        if head["key"] != key:
            return []
        parts = [Part(one["stripe"], one["counts"], [BlindPair(*pair) for pair in one["pairs"]]) for one in records]
        tables = [np.array(part.counts) for part in parts]
        rows = [row for part in parts for pair in part.pairs for row in (pair.first, pair.second)]
        gaps = [pair.near - pair.far for part in parts for pair in part.pairs]
        if not all(table.shape == sizes and table.dtype == np.int64 for table in tables):
            return []
        if not all(type(row) is int and 0 <= row < count for row in rows) or not np.isfinite(gaps).all():
            return []
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return []
    return parts if [part.stripe for part in parts] == list(range(len(parts))) else []


def _report(files: PairFiles, settings: MiningSettings) -> None:
    record = files.record
    if settings.as_json:
        print(to_json(record, indent=1))
        return
    kept = (
        "" if record["kept"] == record["pairs"] else f", of which the {record['kept']:,} with the widest gaps are kept"
    )
    console.print(
        f"{files.folder}: {record['pairs']:,} pairs of {record['images']:,} pictures with near > "
        f"{record['near']['above']:.4g} and far < {record['far']['below']:.4g}{kept}; {len(files.shown):,} are in "
        f"{os.path.join(files.folder, pair_files.SHEET)}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    console.print(files.table())
    if record["skipped"]:
        file = files.folder / pair_files.SKIPPED
        print(f"qformer: pictures skipped: {record['skipped']:,}; see {file}", file=sys.stderr)


def _record(part: Part) -> dict[str, Any]:
    return {"stripe": part.stripe, "counts": part.counts, "pairs": part.pairs}
