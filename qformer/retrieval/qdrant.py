"""A gallery on a Qdrant server: one collection, an entry is a point with all its rows as one multivector.

MaxSim is the server's own (`MAX_SIM` of dot products); it sums over the rows of a query where ours is the mean. Rows
lie on its disk as fp16, and beside them in memory as int8, by which it searches before it scores with the rows
themselves. Its HNSW graph it builds by itself.

A commit is not whole here: Qdrant has no transaction over several points, though each point changes whole. So a commit
first takes away (entries that are gone, and places that another entry is about to get), and then gives. A kill in
between costs entries or places that the next `index` finds missing and adds again from the images; no place is ever in
two entries.
"""

from __future__ import annotations

import json
import os
from itertools import islice
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from uuid import NAMESPACE_OID, uuid5

import numpy as np
import torch
from qdrant_client import QdrantClient, models
from qdrant_client.common.client_exceptions import QdrantException
from qdrant_client.http.exceptions import ApiException, UnexpectedResponse

from qformer.retrieval.damage import told
from qformer.retrieval.entries import COLUMNS, Condition, Entry, EntrySummary, Place, modified
from qformer.retrieval.places import captions_of, composed, places_of
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor

PAGE = 1_000  # points read at once without their vectors
ROWS = 2_048  # rows in a request: some 11 MB of JSON, of the 32 MB that a server takes
OVERSAMPLING = 2.0  # candidates by int8 for each that is scored with its rows
TIMEOUT = 300  # seconds
RANGES = {">": "gt", ">=": "gte", "<": "lt", "<=": "lte"}


def connect(url: str) -> QdrantClient:
    """A client of `qdrant://host:port`; with `QDRANT_API_KEY` in the environment over https. Asks nothing yet.

    Raises:
        UsageError: no such address.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or 6333
    except ValueError:
        host = None
    if not host or parts.path.strip("/"):
        raise UsageError(f"'{url}' is no address of a Qdrant server; give qdrant://host:port, such as localhost:6333")
    key = os.environ.get("QDRANT_API_KEY")
    return QdrantClient(host=host, port=port, api_key=key, timeout=TIMEOUT, check_compatibility=False)


@told
class QdrantStore:
    """A `Store` in the collection `name`; `new` makes it where there is none."""

    def __init__(self, url: str, name: str, width: int, new: bool = False) -> None:
        """Raises UsageError: no server answers at `url`, or it has no such collection, or one for another width."""
        self.url, self.name, self.width = url, name, width
        self.notes: list[str] = []
        self.where = f"the collection '{name}' at '{url}'"
        self._client = connect(url)
        if not self._ask("collection_exists"):
            if not new:
                raise UsageError(
                    f"the Qdrant server at '{url}' has no collection '{name}', which this gallery is kept in; give "
                    "that server back what it had, or index the images into another folder"
                )
            self._create()
        config = self._ask("get_collection").config.params.vectors
        found = config["rows"].size if isinstance(config, dict) and "rows" in config else None
        if found != width:
            raise UsageError(
                f"the collection '{name}' at '{url}' holds rows of {found} numbers, and the model makes {width}; index "
                "the images into another folder"
            )

    def _create(self) -> None:
        vectors = models.VectorParams(
            size=self.width,
            distance=models.Distance.DOT,
            datatype=models.Datatype.FLOAT16,
            on_disk=True,
            multivector_config=models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM),
            quantization_config=models.ScalarQuantization(
                scalar=models.ScalarQuantizationConfig(type=models.ScalarType.INT8, always_ram=True)
            ),
        )
        self._ask("create_collection", vectors_config={"rows": vectors, "captions": vectors}, on_disk_payload=True)
        for column, kind in COLUMNS.items():
            if kind is int or column == "path":  # before there are points, so that the graph knows of conditions
                schema = models.PayloadSchemaType.INTEGER if kind is int else models.PayloadSchemaType.KEYWORD
                self._ask("create_payload_index", field_name=column, field_schema=schema)

    def __len__(self) -> int:
        return int(self._ask("count", exact=True).count)

    def known(self) -> Iterator[EntrySummary]:
        offset = None
        while True:
            columns = ["id", "seq", "places", "caption"]
            points, offset = self._ask("scroll", limit=PAGE, offset=offset, with_payload=columns)
            for point in points:
                said = point.payload
                yield EntrySummary(said["id"], said["seq"], places_of(said["places"]), captions_of(said["caption"]))
            if offset is None:
                return

    def commit(self, new: Sequence[Entry], changed: Sequence[Entry], gone: Sequence[str]) -> None:
        """See above for what holds when it is killed. Raises UsageError: the server does not answer, or refuses."""
        less, dropped = [], list(map(_point, gone))
        owner = {place[:2]: entry.id for entry in (*new, *changed) for place in entry.places}
        for point in self._retrieve([entry.id for entry in changed], with_payload=["id", "places"]):
            before, own = places_of(point.payload["places"]), point.payload["id"]
            kept = [place for place in before if owner.get(place[:2], own) == own]
            if not kept:
                dropped.append(point.id)
            elif len(kept) < len(before):
                change = models.SetPayload(payload=_placed(kept), points=[point.id])
                less.append(models.SetPayloadOperation(set_payload=change))
        for ids in _batched(dropped, PAGE):
            self._ask("delete", points_selector=ids, wait=True)
        for operations in _batched(less, PAGE):
            self._ask("batch_update_points", update_operations=operations, wait=True)
        for entries in _portions([*new, *changed]):
            self._ask("upsert", points=[_structure(entry) for entry in entries], wait=True)

    def get(self, ids: Sequence[str], features: bool = False) -> dict[str, Entry]:
        found: dict[str, Entry] = {}
        for point in self._retrieve(ids, 64, with_payload=True, with_vectors=True):
            entry = self._entry(point)
            found[entry.id] = entry
        return found

    def nearest(
        self, query: Tensor, k: int, where: Sequence[Condition] = (), exact: bool = False
    ) -> list[tuple[str, float]]:
        if k < 1:
            return []
        asked: dict[str, Any] = {
            "using": "rows",
            "limit": k,
            "query_filter": _filter(where),
            "search_params": _search(exact),
        }
        points = self._ask("query_points", query=query.float().tolist(), with_payload=["id"], **asked).points
        return [(point.payload["id"], point.score / len(query)) for point in points]

    def nearest_captions(self, query: Tensor, k: int, where: Sequence[Condition] = ()) -> list[tuple[str, int, float]]:
        """See `Store`. A caption among the k best is best for one row of the query, and for this row fewer than k
        entries have a better one: so the k best entries of every row hold them all."""
        if k < 1:
            return []
        asked: dict[str, Any] = {"using": "captions", "limit": k, "filter": _filter(where), "params": _search(True)}
        requests = [models.QueryRequest(query=[row], with_payload=["id"], **asked) for row in query.float().tolist()]
        answers = self._ask("query_batch_points", requests=requests)
        found = list(dict.fromkeys(point.payload["id"] for answer in answers for point in answer.points))
        scored = []
        for point in self._retrieve(found, with_payload=["id"], with_vectors=["captions"]):
            rows = torch.tensor(point.vector["captions"], dtype=torch.float32)
            best = (rows @ query.float().T).amax(dim=1).tolist()
            scored += [(score, point.payload["id"], number) for number, score in enumerate(best)]
        return [(id_, number, score) for score, id_, number in sorted(scored, reverse=True)[:k]]

    def refresh(self, probes: Tensor) -> dict[str, Any] | None:
        """Nothing is left to do: the server tidies up and indexes by itself, behind every commit."""
        return None

    def _retrieve(self, ids: Sequence[str], page: int = PAGE, **options: Any) -> Iterator[Any]:
        for some in _batched(ids, page):
            yield from self._ask("retrieve", ids=list(map(_point, some)), **options)

    def _ask(self, method: str, **options: Any) -> Any:
        try:
            return getattr(self._client, method)(collection_name=self.name, **options)
        except UnexpectedResponse as error:
            raise UsageError(
                f"what answers at '{self.url}' refuses '{method}' ({_reason(error)}); is it a Qdrant server of "
                "version 1.20 or later? see its log, and QDRANT_API_KEY"
            ) from error
        except (ApiException, QdrantException) as error:
            reason = str(getattr(error, "source", error)).partition("\n")[0]
            raise UsageError(
                f"no Qdrant server answers at '{self.url}' ({reason}); start it, or mend the address in --store or the "
                "gallery's gallery.json"
            ) from error

    def _entry(self, point: Any) -> Entry:
        said = point.payload
        rows = {name: np.array(value, np.float16) for name, value in point.vector.items()}
        return Entry(
            **{name: said[name] for name in ("id", "seq", "bytes", "width", "height")},
            places=places_of(said["places"]),
            embeds=rows["rows"],
            captions=captions_of(said["caption"]),
            caption_embeds=rows.get("captions", np.zeros((0, self.width), np.float16)),
        )


def _structure(entry: Entry) -> models.PointStruct:
    caption = "\n".join(entry.captions)
    payload = {
        **{name: getattr(entry, name) for name in ("id", "seq", "bytes", "width", "height")},
        **_placed(entry.places),
        "caption": caption,
        "caption_lower": caption.lower(),
    }
    vectors = {"rows": entry.embeds.tolist()}
    if entry.captions:
        vectors["captions"] = entry.caption_embeds.tolist()
    return models.PointStruct(id=_point(entry.id), vector=vectors, payload=payload)


def _placed(places: list[Place]) -> dict[str, Any]:
    """What depends on where an entry stands. `path_lower` is for `~`: the server tells capitals from small letters."""
    first = places[0]
    return {
        "places": json.dumps(places),
        "path": composed(first.name),
        "path_lower": composed(first.name).lower(),
        "modified": modified(first),
    }


def _filter(where: Sequence[Condition]) -> models.Filter | None:
    """All of the conditions. `MatchText` would compare words; `MatchSubstring` is 'contains'."""
    must: list[Any] = []
    must_not: list[Any] = []
    for column, operator, value in where:
        if operator == "~":
            if value:
                key = column if column == "id" else f"{column}_lower"
                match = models.MatchSubstring(substring=str(value).lower())
                must.append(models.FieldCondition(key=key, match=match))
        elif operator in RANGES:
            must.append(models.FieldCondition(key=column, range=models.Range(**{RANGES[operator]: float(value)})))
        else:
            equal = models.FieldCondition(key=column, match=models.MatchValue(value=value))
            (must if operator == "=" else must_not).append(equal)
    return models.Filter(must=must, must_not=must_not) if where else None


def _search(exact: bool) -> models.SearchParams:
    """How a search goes: over all rows as they are, or through the graph and int8, and the best scored again."""
    coded = models.QuantizationSearchParams(ignore=exact, rescore=True, oversampling=OVERSAMPLING)
    return models.SearchParams(exact=exact, quantization=coded)


def _point(id_: str) -> str:
    """The server's ids are UUIDs."""
    return str(uuid5(NAMESPACE_OID, id_))


def _portions(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    """Entries by the request: of at most `ROWS` rows where an entry has no more by itself."""
    portion: list[Entry] = []
    rows = 0
    for entry in entries:
        own = len(entry.embeds) + len(entry.caption_embeds)
        if portion and rows + own > ROWS:
            yield portion
            portion, rows = [], 0
        portion.append(entry)
        rows += own
    if portion:
        yield portion


def _batched(things: Iterable[Any], size: int) -> Iterator[list[Any]]:
    left = iter(things)
    while some := list(islice(left, size)):
        yield some


def _reason(error: UnexpectedResponse) -> str:
    """What the server says, in one line."""
    try:
        return str(error.structured()["status"]["error"])
    except (ValueError, KeyError, TypeError):
        return f"{error.status_code} {error.reason_phrase}".strip()
