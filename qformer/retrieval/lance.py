"""A gallery on disk: embedded LanceDB, with one commit per batch of images.

The table `images` holds the entries with all their rows in fp16. A search of fewer than `INDEXED` entries reads them
all. For more, a second table holds the key rows of each entry (`qformer.retrieval.keys`) under an IVF index, which
gives a shortlist that is scored with all rows. Entries added after the index was built are always read, and deleted
ones are skipped, so results never depend on the age of the index.
"""

from __future__ import annotations

import heapq
import json
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa
import torch
from lancedb.index import BTree, IvfRq, IvfSq
from torch import Tensor

from qformer.files.records import replace_text
from qformer.retrieval import keys
from qformer.retrieval.damage import raise_usage_errors
from qformer.retrieval.entries import Condition, Entry, EntrySummary
from qformer.retrieval.manifests import find_outside_places, find_truncated, written
from qformer.retrieval.places import parse_captions, parse_places, to_nfc
from qformer.types import UsageError

INDEXED = 5_000  # entries from which an index pays off: reading that many takes as long as a query of it
STALE = 0.2  # largest share of entries missing from the index, or deleted, before it is rebuilt
SAMPLE, TOP = 4_000, 100  # entries on which the key rows are chosen; recall is measured on the best TOP
ROWS_IN_RAM = 4_000_000  # above, rows are quantized to one bit per number instead of eight
FRAGMENTS = 100  # commits after which their fragments are compacted
READERS = timedelta(seconds=15)  # how long a search can go on reading fragments that have been compacted
PARTITION = 4_096  # rows in a partition of the index
RECALL = 0.98  # below it, the index searches more partitions and candidates
SCHEMA = pa.schema(
    [
        ("seq", pa.int64()),
        ("id", pa.string()),
        ("path", pa.string()),
        ("places", pa.string()),
        ("caption", pa.string()),
        *((name, pa.int64()) for name in ("bytes", "width", "height", "modified")),
        ("embeds", pa.list_(pa.float16())),
        ("caption_embeds", pa.list_(pa.float16())),
        ("features", pa.large_binary()),
        ("layout", pa.string()),
    ]
)
KEYS = "keys.json"


@dataclass(frozen=True)
class Index:
    """Description of the index that searches use.

    Attributes:
        table: its name. rows: indices of the queries that it holds of each tile.
        last: `seq` of its newest entry. entries: number of its entries.
        depth: candidates that are scored with all rows for the best TOP. partitions: number searched.
    """

    table: str
    rows: list[int]
    last: int
    entries: int
    depth: int
    partitions: int


@raise_usage_errors
class LanceStore:
    """A `Store` in a LanceDB folder, which `new` creates if there is none."""

    def __init__(self, folder: Path, queries: int, width: int, new: bool = True) -> None:
        self.queries, self.width, self.where = queries, width, f"the store in '{folder}'"
        self._keys, self.notes, self.suspect = folder / KEYS, list[str](), partial(find_truncated, folder)
        if elsewhere := find_outside_places(folder):
            raise UsageError(
                f"the store in '{folder}' has data at '{elsewhere[0]}', but a gallery of qformer keeps its data in "
                "its folder; index the images into another folder"
            )
        self._database = lancedb.connect(folder / "lance", read_consistency_interval=timedelta(0))
        try:
            self._images = self._database.open_table("images")
        except ValueError:  # it does not exist, or a kill interrupted its creation
            if not new or written(folder):
                raise
            self._images = self._database.create_table("images", schema=SCHEMA, exist_ok=True)
        if b"embedding_functions" in (self._images.schema.metadata or {}):
            raise UsageError(
                f"the store in '{folder}' names embedding functions, models that LanceDB would load and run whenever "
                "entries are added, but a gallery of qformer has none; index the images into another folder"
            )

    def __len__(self) -> int:
        return int(self._images.count_rows())

    def known(self) -> Iterator[EntrySummary]:
        for rows in self.read(["id", "seq", "places", "caption"]):
            for row in rows.to_pylist():
                yield EntrySummary(row["id"], row["seq"], parse_places(row["places"]), parse_captions(row["caption"]))

    def commit(self, new: Sequence[Entry], changed: Sequence[Entry], gone: Sequence[str]) -> None:
        """See `Store`; raises `UsageError` if the store cannot be written."""
        if not changed and not gone:
            self._images.add(_table(new))
        elif not new and not changed:
            self._images.delete(_one_of("id", gone))
        else:
            merge = self._images.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
            if gone:
                merge = merge.when_not_matched_by_source_delete(_one_of("id", gone))
            merge.execute(_table([*new, *changed]))

    def get(self, ids: Sequence[str], features: bool = False) -> dict[str, Entry]:
        columns = [name for name in SCHEMA.names if features or name not in ("features", "layout")]
        found: dict[str, Entry] = {}
        for batch in self.read(columns, _one_of("id", ids)) if ids else ():
            found |= {entry.id: entry for entry in _entries(batch, self.width)}
        return found

    def nearest(
        self, query: Tensor, k: int, where: Sequence[Condition] = (), exact: bool = False
    ) -> list[tuple[str, float]]:
        if not exact:
            try:
                return self._search_index(query, k, sql(where))
            except (RuntimeError, OSError, ValueError):
                pass  # the index is damaged, or an update has just replaced it
        return self._best(query, k, sql(where))

    def _search_index(self, query: Tensor, k: int, only: str) -> list[tuple[str, float]]:
        """Search by the index if there is one, else by reading all entries."""
        index = self._index()
        if index is None:
            return self._best(query, k, only)
        share = 1.0
        if only:
            share = self._images.count_rows(only) / max(len(self), 1)
            if share * index.entries <= max(INDEXED, 4 * index.depth):
                return self._best(query, k, only)  # few enough to read
        depth = int(max(k, TOP) * index.depth / TOP / share)
        if depth >= index.entries:
            return self._best(query, k, only)
        rows = query if len(query) == 1 else query[[r for r in range(len(query)) if r % self.queries in index.rows]]
        candidates = self._candidates(index, rows, depth)
        fresh = f"seq > {index.last}"
        found = self._best(query, k, _and(only, f"{_one_of('seq', candidates)} or {fresh}" if candidates else fresh))
        return found if len(found) >= min(k, len(self)) else self._best(query, k, only)

    def nearest_captions(self, query: Tensor, k: int, where: Sequence[Condition] = ()) -> list[tuple[str, int, float]]:
        best: list[tuple[float, str, int]] = []
        for rows in self.read(["id", "caption_embeds"], sql(where)):
            embeds, counts = _rows(rows["caption_embeds"], self.width)
            if len(embeds):
                scores = (embeds @ query.T).amax(dim=1).tolist()
                ids, numbers = (
                    np.repeat(rows["id"].to_numpy(False), counts),
                    np.concatenate(list(map(np.arange, counts))),
                )
                best = heapq.nlargest(k, [*best, *zip(scores, ids, numbers.tolist(), strict=True)])
        return [(name, number, score) for score, name, number in best]

    def refresh(self, probes: Tensor) -> dict[str, Any] | None:
        """Compact the table, and build the index if there is none or the old one is stale; see `Store`."""
        if len(self) and not self._images.list_indices():
            for column in ("id", "seq"):
                self._images.create_index(column, config=BTree())
        stats: Any = self._images.stats()
        if stats["fragment_stats"]["num_fragments"] >= FRAGMENTS:
            self._images.optimize(cleanup_older_than=READERS)
        index, count = self._index(), len(self)
        if count < INDEXED:
            return None
        if index is not None and index.table in self._database.table_names(limit=1000):
            covered = int(self._images.count_rows(f"seq <= {index.last}"))
            if max(count - covered, index.entries - covered) <= STALE * count:
                return None
        report = self._build(probes)
        if stats["fragment_stats"]["num_fragments"] >= FRAGMENTS:
            self._images.optimize(cleanup_older_than=READERS)  # the compacted fragments are old enough by now
        return report

    def read(self, columns: list[str], where: str = "") -> Iterator[pa.RecordBatch]:
        """Read columns of the entries that meet `where`, a batch at a time."""
        found = self._images.search().select(columns).limit(max(len(self), 1))
        yield from (found.where(where) if where else found).to_batches(1024)

    def _scores(self, queries: Sequence[Tensor], where: str) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Ids, and the MaxSim of each query with each id, float[queries, n], a batch of entries at a time."""
        stacked = torch.cat(list(queries))
        for batch in self.read(["id", "embeds"], where):
            rows, counts = _rows(batch["embeds"], self.width)
            if not len(rows):
                continue
            products = rows @ stacked.T  # (rows, query rows)
            if (counts == counts[0]).all():
                best = products.view(len(counts), counts[0], -1).amax(dim=1)  # (n, query rows)
            else:
                starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
                best = torch.from_numpy(np.maximum.reduceat(products.numpy(), starts, axis=0))
            parts = best.split([len(query) for query in queries], dim=1)
            yield batch["id"].to_numpy(False), torch.stack([part.mean(dim=1) for part in parts])

    def _best(self, query: Tensor, k: int, where: str = "") -> list[tuple[str, float]]:
        """The k best of the entries that meet `where`, scored with all their rows."""
        best: list[tuple[float, str]] = []
        for ids, scores in self._scores([query.float()], where):
            if not scores.isfinite().all():  # NaN would rank first, or nowhere
                raise ValueError("rows of an image are not finite")
            top = scores[0].topk(min(k, len(ids)))
            best = heapq.nlargest(k, [*best, *zip(top.values.tolist(), ids[top.indices.numpy()], strict=True)])
        return [(name, score) for score, name in best]

    def _index(self) -> Index | None:
        try:
            index = Index(**json.loads(self._keys.read_text(encoding="utf-8")))
            numbers = [*index.rows, index.last, index.entries, index.depth, index.partitions]
            if not isinstance(index.table, str) or not index.rows or not all(type(one) is int for one in numbers):
                raise TypeError(f"{vars(index)} does not describe an index")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, RecursionError) as error:
            again = "searches read every image until 'qformer index' has rebuilt it"
            self.notes = [f"'{self._keys}', which describes the index, is damaged ({error}); {again}"]
            return None
        return index

    def _candidates(self, index: Index, rows: Tensor, depth: int) -> list[int]:
        """`seq` of the entries with the best indexed rows, about `depth` for each row of a query."""
        table: Any = self._database.open_table(index.table)
        found: dict[int, None] = {}
        for row in rows.float().numpy():
            hits = (
                table.search(row, vector_column_name="vector")
                .distance_type("dot")
                .nprobes(index.partitions)
                .limit(depth * len(index.rows))
                .select(["seq", "_distance"])
                .to_arrow()
            )
            best = list(dict.fromkeys(hits["seq"].to_pylist()))[:depth]
            found |= dict.fromkeys(best)
        return list(found)

    def _build(self, probes: Tensor) -> dict[str, Any]:
        """Choose the key rows, write and index them, and tune the search of the index to `RECALL`."""
        start = time.perf_counter()
        count, last = len(self), max(row["seq"] for rows in self.read(["seq"]) for row in rows.to_pylist())
        chosen = keys.choose(self._sample(count), probes, max(10, TOP * SAMPLE // count))
        name = f"keys_{uuid.uuid4().hex[:12]}"
        schema = pa.schema([("seq", pa.int64()), ("vector", pa.list_(pa.float16(), self.width))])
        table = self._database.create_table(name, schema=schema)
        table.add(pa.RecordBatchReader.from_batches(schema, self._key_rows(schema, chosen, last)))
        total = count * len(chosen)
        partitions = max(1, total // PARTITION)
        kind = IvfSq if total <= ROWS_IN_RAM else IvfRq
        table.create_index("vector", config=kind(distance_type="dot", num_partitions=partitions))
        built = time.perf_counter() - start
        index, recall = self._tune(Index(name, chosen, last, count, 4 * TOP, 1), partitions, probes)
        replace_text(self._keys, json.dumps(vars(index)))
        for old in self._database.table_names(limit=1000):
            if old.startswith("keys_") and old != name:
                self._database.drop_table(old)
        return {
            "kind": kind.__name__,
            "entries": count,
            "queries": len(chosen),
            "partitions": partitions,
            "searched": index.partitions,
            "candidates": index.depth,
            "recall": recall,
            "seconds": built,
        }

    def _sample(self, count: int) -> Tensor:
        """Rows of the tiles of evenly spaced entries, float[n, Q, P]."""
        step = max(1, count // SAMPLE)
        batches = self.read(["embeds"], f"seq % {step} = 0")
        rows = torch.cat([_rows(batch["embeds"], self.width)[0] for batch in batches])
        return rows.view(-1, self.queries, self.width)[:SAMPLE]

    def _key_rows(self, schema: pa.Schema, chosen: list[int], last: int) -> Iterator[pa.RecordBatch]:
        for batch in self.read(["seq", "embeds"], f"seq <= {last}"):
            rows, counts = _halves(batch["embeds"], self.width)
            taken = np.isin(np.arange(len(rows)) % self.queries, chosen)
            owners = np.repeat(batch["seq"].to_numpy(), counts)[taken]
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(rows[taken].reshape(-1)), self.width)
            yield pa.record_batch([pa.array(owners), vectors], schema=schema)

    def _tune(self, index: Index, partitions: int, probes: Tensor) -> tuple[Index, float]:
        """Find the cheapest settings whose recall of the best TOP is `RECALL`, and that recall; else the dearest."""
        names = self.truth(list(probes[:, None]), TOP)
        wanted = sorted(set().union(*names))
        found = self.read(["id", "seq"], _one_of("id", wanted))
        seq = {row["id"]: row["seq"] for batch in found for row in batch.to_pylist()}
        truth = [{seq[name] for name in own} for own in names]
        for depth in (2 * TOP, 3 * TOP, 4 * TOP, 6 * TOP, 10 * TOP, 20 * TOP):
            recall = 0.0
            for searched in sorted({max(1, partitions // share) for share in (16, 8, 4, 2, 1)}):
                index = Index(**(vars(index) | {"depth": depth, "partitions": searched}))
                seqs = [set(self._candidates(index, probe[None], depth)) for probe in probes]
                before, recall = (
                    recall,
                    sum(len(a & b) for a, b in zip(seqs, truth, strict=True)) / sum(map(len, truth)),
                )
                if recall >= RECALL:
                    return index, recall
                if recall - before < 0.002:
                    break  # more partitions do not help; more candidates may
        return index, recall

    def truth(self, queries: Sequence[Tensor], k: int) -> list[set[str]]:
        """Ids of the true k best of each query, by reading all entries once for all queries."""
        best = [torch.zeros(0)] * len(queries)
        names: list[np.ndarray] = [np.zeros(0, object)] * len(queries)
        for ids, scores in self._scores(queries, ""):
            for number, own in enumerate(scores):
                values, places = torch.cat([best[number], own]), np.concatenate([names[number], ids])
                top = values.topk(min(k, len(values)))
                best[number], names[number] = top.values, places[top.indices.numpy()]
        return [set(own.tolist()) for own in names]


def sql(where: Sequence[Condition]) -> str:
    """SQL of LanceDB for all conditions together."""
    parts = []
    for column, operator, value in where:
        text = f"'{value.replace(chr(39), chr(39) * 2)}'" if isinstance(value, str) else str(value)
        parts.append(f"contains(lower({column}), lower({text}))" if operator == "~" else f"{column} {operator} {text}")
    return " and ".join(parts)


def _and(*parts: str) -> str:
    return " and ".join(f"({part})" for part in parts if part)


def _one_of(column: str, values: Sequence[Any]) -> str:
    return f"{column} in ({', '.join(repr(value) for value in values)})"


def _halves(column: pa.Array, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a column of lists, float16[rows, P], and the number of rows of each entry."""
    counts = np.diff(column.offsets.to_numpy()) // max(width, 1)
    return column.flatten().to_numpy(zero_copy_only=False).reshape(-1, width), counts


def _rows(column: pa.Array, width: int) -> tuple[Tensor, np.ndarray]:
    """The same as a tensor, float32[rows, P]; the array is copied because torch needs a writable one."""
    rows, counts = _halves(column, width)
    return torch.from_numpy(np.array(rows)).float(), counts


def _table(entries: Sequence[Entry]) -> pa.Table:
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    for entry in entries:
        features = entry.features or []
        values = {
            "seq": entry.seq,
            "id": entry.id,
            "path": to_nfc(entry.path),
            "places": json.dumps(entry.places),
            "caption": "\n".join(entry.captions),
            **{name: getattr(entry, name) for name in ("bytes", "width", "height", "modified")},
            "embeds": entry.embeds.reshape(-1),
            "caption_embeds": entry.caption_embeds.reshape(-1),
            "features": b"".join(rows.tobytes() for rows in features) if features else None,
            "layout": json.dumps([(str(rows.dtype), rows.shape) for rows in features]),
        }
        for name, value in values.items():
            columns[name].append(value)
    return pa.table({name: pa.array(columns[name], SCHEMA.field(name).type) for name in SCHEMA.names}, schema=SCHEMA)


def _entries(batch: pa.RecordBatch, width: int) -> Iterator[Entry]:
    rows = [_halves(batch[name], width) for name in ("embeds", "caption_embeds")]
    embeds, captions = (np.split(np.array(flat), np.cumsum(counts)[:-1]) for flat, counts in rows)
    plain = [name for name in batch.schema.names if name not in ("embeds", "caption_embeds")]
    for row, own, theirs in zip(batch.select(plain).to_pylist(), embeds, captions, strict=True):
        entry = Entry(row["id"], parse_places(row["places"]), row["bytes"], row["width"], row["height"], own)
        entry.captions, entry.caption_embeds, entry.seq = parse_captions(row["caption"]), theirs, row["seq"]
        if row.get("features") is not None:
            entry.features, start = [], 0
            for dtype, shape in json.loads(row["layout"]):
                stop = start + int(np.prod(shape)) * np.dtype(dtype).itemsize
                entry.features.append(np.frombuffer(row["features"][start:stop], dtype).reshape(shape))
                start = stop
        yield entry
