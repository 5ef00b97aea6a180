"""The store of `data.features`: created or checked, filled by all running processes, and passed to training.

Each process locks the next missing shard and fills it; the system drops the lock if the process dies. So processes of
`torchrun`, or on machines that share the folder, divide the work without knowing about each other, and the shard of a
killed process is filled by another one or by the next start. Finished shards stay.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from filelock import FileLock, Timeout
from rich.filesize import decimal

from qformer import distributed, resolution, vision
from qformer.checkpoints import folder as checkpoint
from qformer.data import sources
from qformer.data.features import MANIFEST, CropDataset, FeatureStore, ShardWriter, mark
from qformer.data.held_out import HeldOut, held_out
from qformer.data.loader import read_ahead
from qformer.files import soundness
from qformer.files.records import replace_records, replace_text
from qformer.model.assembly import build_encoder
from qformer.model.frontend import FrontEnd
from qformer.progress import Bar, console
from qformer.resolution.base import ResolutionStrategy
from qformer.types import Sample, Tiles, UsageError
from qformer.vision.base import Absent
from qformer.vision.mof import MofConfig

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

    from qformer.data.base import Source
    from qformer.data.features import StoredSample
    from qformer.schema import Config
    from qformer.vision.base import VisionEncoder

SHARD_BYTES, SHARD_SAMPLES = 128 << 20, 1000  # at most; a kill loses one shard
PROBES = 4  # samples that are encoded to estimate the size of the store
POLL = 0.5  # seconds between checks of the shards that other processes fill
PLACES = ("path", "weights")  # encoder options left out of the manifest: the hash identifies the weights


def prepare(
    config: Config, source: Source, strategy: ResolutionStrategy, held: HeldOut | None
) -> tuple[VisionEncoder | None, FeatureStore | None, HeldOut | None]:
    """Prepare the image encoder, the feature store and the held-out data of a run.

    With `data.features` the store is checked, and filled if shards are missing. Another one in its folder is for the
    held-out images.

    Returns:
        The image encoder, None to build it from the configuration; the store to train from, None if there is none; and
        the held-out data, with stored tokens in place of pixels if there is a store.

    Raises:
        UsageError: the store was made with other settings, does not fit on the disk, or the data cannot be stored.
        OSError: a shard could not be written; the shards that are complete stay.
    """
    if config.data.features is None:
        return None, None, held
    encoder = build_encoder(config)
    store = fill(config, source, strategy, encoder)
    if held is not None:
        held = store_held_out(config, held, strategy, encoder)
    return Absent(**store.about["encoder"]), store, held


def fill_alone(config: Config, trust: bool = False) -> Path:
    """Fill the store of a configuration without training and return its folder.

    Args:
        trust: see `stages.train`.

    Raises:
        UsageError: `data.features` is not set; otherwise see `prepare`.
    """
    from qformer.stages.inherit import inherit

    if config.data.features is None:
        raise UsageError("the configuration has no store to fill; give data.features a folder")
    if config.stage == "stage2" and config.init is not None:
        config = inherit(config, checkpoint.read_config(config.init, trust))
    source = sources.for_run(config.data.train, config.run)
    held, strategy = validation_data(config), resolution.chosen(config.resolution, config.limits)
    encoder = build_encoder(config)
    store = fill(config, source, strategy, encoder)
    if held is not None:
        store_held_out(config, held, strategy, encoder)
    return store.folder


def validation_data(config: Config) -> HeldOut | None:
    """Load the first `validation_size` usable samples of `data.validation`; None if it is not set."""
    if config.data.validation is None:
        return None
    source = sources.for_run(config.data.validation, config.run)
    strategy = resolution.chosen(config.resolution, config.limits)
    return held_out(source, strategy, config.data.validation_size, config.data.batch)


@dataclasses.dataclass
class StoredGroups(Sequence[Tiles]):
    """Groups of `batch` held-out images each, whose tokens are read from a store when they are asked for.

    `numbers` are those of the samples in the store.
    """

    store: FeatureStore
    samples: list[Sample]
    strategy: ResolutionStrategy
    batch: int
    numbers: Sequence[int]

    def __len__(self) -> int:
        return -(-len(self.samples) // self.batch)

    @overload
    def __getitem__(self, group: int) -> Tiles: ...
    @overload
    def __getitem__(self, group: slice) -> list[Tiles]: ...
    def __getitem__(self, group: int | slice) -> Tiles | list[Tiles]:
        if isinstance(group, slice):
            return [self[number] for number in range(*group.indices(len(self)))]
        if not 0 <= group < len(self):
            raise IndexError(group)
        some = slice(group * self.batch, (group + 1) * self.batch)
        rows = zip(self.numbers[some], self.samples[some], strict=True)
        return Tiles.join([self.store.read(number, 0, sample, self.strategy) for number, sample in rows])


def store_held_out(config: Config, held: HeldOut, strategy: ResolutionStrategy, encoder: VisionEncoder) -> HeldOut:
    """Fill a store with the tokens of the held-out images, whole, unless it is there; return the data that reads it.

    It is a folder in that of `data.features`, named after the images, so that runs with other ones do not meet.

    Raises:
        UsageError, OSError: see `prepare`.
    """
    features = config.data.features
    assert features is not None
    marks = hashlib.blake2b(repr([mark(sample) for sample in held.samples]).encode(), digest_size=6).hexdigest()
    own = features.model_copy(update={"path": str(Path(features.path) / f"validation-{marks}"), "crops": 1})
    data = config.data.model_copy(update={"features": own, "crop": (1.0, 1.0), "flip": 0.0})
    store = fill(config.model_copy(update={"data": data}), held.samples, strategy, encoder)
    groups = StoredGroups(store, held.samples, strategy, config.data.batch, range(len(held)))
    return dataclasses.replace(held, groups=groups)


@torch.no_grad()
def fill(config: Config, source: Source, strategy: ResolutionStrategy, encoder: VisionEncoder) -> FeatureStore:
    """Open the store of `data.features` and fill what is missing; raises like `prepare`."""
    assert config.data.features is not None
    console.quiet = os.environ.get("RANK", "0") != "0"  # the process group does not exist yet
    made = describe_contents(config, len(source), strategy, encoder)
    filler = Filler(config, CropDataset(source, strategy, config.data), FrontEnd(encoder))
    store = _open(Path(config.data.features.path), made, filler)
    if missing := store.missing():
        for damaged in filter(Path.exists, map(store.path, missing)):
            console.print(f"'{damaged}' is cut off or is not a shard; it will be filled again", soft_wrap=True)
        _announce(store, missing)
        filler.fill(store)
        _summarize(store)
    encoder.cpu()
    return store


def _describe_encoder(options: Any) -> dict[str, Any]:
    """Collect the options of an image encoder that say what it computes, not where its weights are."""
    if isinstance(options, MofConfig):
        first, second = map(_describe_encoder, options.parts)
        return {"first": first, "second": second, "mode": options.mode, "alpha": options.alpha}
    kept = {key: value for key, value in dataclasses.asdict(options).items() if key not in PLACES}
    for key, usual in (("layers", None), ("final_norm", True)):  # left out, as in older stores
        if kept.get(key, ()) is usual:
            del kept[key]
    return kept


def describe_contents(
    config: Config, samples: int, strategy: ResolutionStrategy, encoder: VisionEncoder
) -> dict[str, dict[str, Any]]:
    """Collect everything that the stored tokens depend on, by section of the configuration."""
    features, data = config.data.features, config.data
    assert features is not None
    kept = _describe_encoder(vision.options_of(config.vision))
    rule = dict(vars(strategy.rule))
    options_of_rule: Any = dataclasses.fields(strategy.rule) if dataclasses.is_dataclass(strategy.rule) else ()
    for option in options_of_rule:
        if not option.repr and rule[option.name] == option.default:  # came later: left out, as in older stores
            del rule[option.name]
    made = {
        "vision": {"name": config.vision.name, "hash of the weights": hash_weights(encoder), **kept},
        "resolution": {"name": config.resolution.name, **rule},
        "data": {
            "crop": data.crop,
            "flip": data.flip,
            "crops": features.crops,
            "dtype": features.dtype,
            "samples": samples,
        },
    }
    return json.loads(json.dumps(made, default=str))  # in the form it is read back: tuples become lists


def hash_weights(encoder: VisionEncoder) -> str:
    """Hash the names, dtypes, shapes and bytes of all tensors of an encoder."""
    return soundness.digest_weights(dict([*encoder.named_parameters(), *encoder.named_buffers()]))


def _open(folder: Path, made: dict[str, dict[str, Any]], filler: Filler) -> FeatureStore:
    """Open the store in a folder, or create it."""
    if not (folder / MANIFEST).is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / "store.lock"):
                if not (folder / MANIFEST).is_file():  # another process may have created it
                    about = soundness.seal({"made": made, **filler.sizes(made["data"]["samples"])})
                    replace_text(folder / MANIFEST, json.dumps(about, indent=1))
                (folder / "store.lock").unlink(missing_ok=True)
        except OSError as error:
            raise UsageError(f"cannot write to '{folder}' ({error}); give data.features another folder") from error
    store = FeatureStore.read_manifest(folder)
    store.check(made)
    return store


def _announce(store: FeatureStore, missing: list[int]) -> None:
    """Print how much will be written; raise UsageError if the disk cannot hold it."""
    each = store.about["bytes_per_sample"]
    needed = each * sum(len(store.numbers(shard)) for shard in missing)
    free = shutil.disk_usage(store.folder).free
    crops = f" x {store.crops} crops" if store.crops > 1 else ""
    message = f"{store.samples:,} images{crops} as {store.about['made']['data']['dtype']} take about"
    message = f"{message} {decimal(each * store.samples)} in '{store.folder}'"
    if needed > free:
        raise UsageError(
            f"{message}, but only {decimal(free)} are free; give data.features a folder on another disk, fewer crops "
            "or dtype int8, or train without it"
        )
    console.print(f"storing the image encoder's tokens: {message} ({decimal(free)} free)", soft_wrap=True)


def _summarize(store: FeatureStore) -> None:
    """Print the size of the complete store, and list the samples that it lacks."""
    faults = store.faults()
    used = sum(store.path(shard).stat().st_size for shard in range(len(store)))
    message = f"'{store.folder}' holds {store.samples - len(faults):,} images in {decimal(used)}"
    if faults:
        kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(kind for _, kind, _ in faults).most_common())
        listed = store.folder / "skipped.jsonl"
        if not console.quiet:
            replace_records(listed, ({"index": n, "kind": kind, "detail": detail} for n, kind, detail in faults))
        message = f"{message}; without a usable image: {kinds}, listed in {listed}"
    console.print(message, soft_wrap=True)


class Claims:
    """Samples of the missing shards that no other process fills; each shard is locked when its turn comes."""

    def __init__(self, store: FeatureStore) -> None:
        self.store = store
        self.locks: dict[int, FileLock] = {}

    def __iter__(self) -> Iterator[int]:
        for shard in self.store.missing():
            lock = FileLock(self.store.path(shard).with_suffix(".lock"))
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            self.locks[shard] = lock
            if self.store.has(shard):
                self.release(shard)
            else:
                yield from self.store.numbers(shard)

    def release(self, shard: int) -> None:
        """Release the lock of a complete shard and remove its file."""
        lock = self.locks.pop(shard)
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()

    def close(self) -> None:
        """Release the remaining locks, so that other processes can fill these shards."""
        while self.locks:
            self.locks.popitem()[1].release()


@dataclasses.dataclass
class Filler:
    """Encoder of the crops of samples."""

    config: Config
    crops: CropDataset
    frontend: FrontEnd

    def fill(self, store: FeatureStore) -> None:
        """Fill the missing shards, and wait for those that other processes fill.

        Raises:
            OSError: a shard could not be written.
        """
        with Bar(console=console, disable=console.quiet) as bar:
            task = bar.add_task("storing tokens", total=store.samples)
            while missing := store.missing():
                bar.update(task, completed=store.samples - sum(len(store.numbers(shard)) for shard in missing))
                with ExitStack() as stack:
                    claims = Claims(store)
                    stack.callback(claims.close)
                    stream = read_ahead(self.crops, self.config.data.workers, claims)
                    filled = 0
                    for shard, views in groupby(stream, key=lambda some: some.number // store.about["per_shard"]):
                        self._write(store, shard, _counted(views, bar, task))
                        claims.release(shard)
                        filled += 1
                if not filled:
                    time.sleep(POLL)
            bar.update(task, completed=store.samples)

    def _write(self, store: FeatureStore, shard: int, views: Iterable[StoredSample]) -> None:
        try:
            self._encode_all(iter(views)).write(store.path(shard))
        except OSError as error:
            there = len(store) - len(store.missing())
            raise OSError(
                f"'{store.folder}' could not be filled ({error}): {there} of {len(store)} shards are complete and "
                "stay; free some disk space and run the same command again"
            ) from error

    def _encode_all(self, views: Iterator[StoredSample]) -> ShardWriter:
        features = self.config.data.features
        assert features is not None
        filling = ShardWriter(features.dtype)
        while some := list(islice(views, max(self.config.data.batch // features.crops, 1))):
            tiles = [seen.tiles for seen in some if seen.tiles is not None]
            tokens = iter(self._encode(Tiles.join(tiles)) if tiles else [])
            for seen in some:
                filling.add(seen, features.crops, tokens)
        return filling

    @torch.no_grad()
    def _encode(self, tiles: Tiles) -> list[Tensor]:
        """Compute the tokens of each tile, float[S, D] on the CPU, in the encoder's own precision.

        With the precision of the training run, tokens would depend on which run filled the store.
        """
        device = f"cuda:{distributed.local_rank()}" if torch.cuda.is_available() else "cpu"
        self.frontend.to(device)
        encoded = self.frontend.encode_tiles(tiles)
        return encoded.repack(encoded.packed.cpu()).rows

    def sizes(self, samples: int) -> dict[str, Any]:
        """Compute the remaining entries of `store.json`; a few samples are encoded to measure their size.

        Raises:
            UsageError: none of these samples can be read.
        """
        tried = [self.crops[number] for number in sorted({samples * i // PROBES for i in range(PROBES)})]
        usable = [views for views in tried if views.fault is None]
        if not usable:
            raise UsageError(
                f"none of {len(tried)} samples spread over data.train has an image that can be read "
                f"({': '.join(tried[0].fault or ())}); check data.train"
            )
        each = -(-self._encode_all(iter(usable)).nbytes // len(usable))
        encoder = self.frontend.encoder
        names = ("width", "patch_size", "image_size", "extra")
        usual = {"per_patch": 1, "floors": False}  # left out, as in older stores
        unusual = {name: value for name in usual if (value := getattr(encoder, name)) != usual[name]}
        return {
            "encoder": {name: getattr(encoder, name) for name in names} | unusual,
            "per_shard": min(max(SHARD_BYTES // each, 1), SHARD_SAMPLES),
            "bytes_per_sample": each,
        }


def _counted(views: Iterable[StoredSample], bar: Bar, task: Any) -> Iterator[StoredSample]:
    for some in views:
        yield some
        bar.advance(task)
