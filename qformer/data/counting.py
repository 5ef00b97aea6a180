"""Quick counts of the samples of a source, without fetching, converting or writing anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qformer.data import sources
from qformer.data.fetching import PIPE, REMOTE, expand, expand_local, fetcher
from qformer.data.huggingface import SAVED, SPLITS
from qformer.types import UsageError

OPENED = 4  # shards to count; the total of more shards is extrapolated
OURS = "qformer."  # begins classes that are nobody else's code
SAVED_IN = (SAVED, SPLITS)


def count(name: str, options: dict[str, Any], where: str = "data.train") -> tuple[int | None, list[str]]:
    """Count the samples of a source; return the number, or None if it is unknown, and notes about it."""
    options = {key: value for key, value in options.items() if key not in ("cache", "prompt")}
    try:
        if name == "mix":
            return _count_mix(options, where)
        if name == "webdataset":
            return _count_shards(options, where)
        if name == "datasets":
            return _count_rows(options, where)
        if name in sources.SOURCES or name.startswith(OURS):
            return len(sources.build(name, **options)), []
    except UsageError as error:
        return None, [f"{where} is not counted: {error}"]
    what = "this model was trained elsewhere" if name == sources.ELSEWHERE else f"'{name}' is a custom class"
    return None, [f"{where} is not counted: {what}"]


def _count_mix(options: dict[str, Any], where: str) -> tuple[int | None, list[str]]:
    total: int | None = 0
    notes = []
    for number, entry in enumerate(options.get("sources") or []):
        if not isinstance(entry, dict):
            raise UsageError(f"sources.{number} is {entry!r}; give a source with its name and options")
        rest = {key: value for key, value in entry.items() if key not in ("name", "weight")}
        found, own_notes = count(str(entry.get("name")), rest, f"{where}.sources.{number}")
        total = None if found is None or total is None else total + found
        notes += own_notes
    return total, notes


def _count_shards(options: dict[str, Any], where: str) -> tuple[int | None, list[str]]:
    path = options.get("path", "")
    patterns = [path] if isinstance(path, str) else path
    far = next((p for p in patterns if p.startswith(PIPE) or (REMOTE.match(p) and not p.startswith("file:"))), None)
    if far is not None:
        return None, [f"{where} is not counted: '{far}' would have to be fetched"]
    names = expand(path)
    if any(fetcher(name) is not None for name in names):
        return None, [f"{where} is not counted: compressed tars would have to be decompressed"]
    if len(names) <= OPENED:
        return len(sources.build("webdataset", **options)), []
    some = names[:: len(names) // OPENED][:OPENED]
    mean = len(sources.build("webdataset", **(options | {"path": some}))) / OPENED
    return round(mean * len(names)), [f"{where}: extrapolated from {OPENED} of {len(names)} shards"]


def _count_rows(options: dict[str, Any], where: str) -> tuple[int | None, list[str]]:
    path, split = options.get("path", ""), str(options.get("split") or "train")
    if isinstance(path, str) and any((Path(path) / name).is_file() for name in SAVED_IN):
        return len(sources.build("datasets", **(options | {"streaming": False}))), []
    first = path if isinstance(path, str) else next(iter(path), "")
    if not first.endswith(".parquet") or REMOTE.match(first):
        return None, [f"{where} is not counted: '{path}' would have to be fetched or converted"]
    if "[" in split:
        return None, [f"{where} is not counted: split '{split}' is a part of it"]
    from pyarrow import parquet  # slow to import

    return sum(parquet.ParquetFile(file).metadata.num_rows for file in expand_local(path)), []
