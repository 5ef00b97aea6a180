"""A gallery on a Qdrant server: one collection, where an entry is a point with all its rows as one multivector.

The server computes MaxSim itself (`MAX_SIM` of dot products), as the sum over the rows of a query where ours is the
mean. It keeps rows as fp16 on disk and as int8 in memory; it searches by int8 and scores the candidates by fp16. It
builds its HNSW graph by itself.

A commit is not atomic here: Qdrant changes each point atomically, but has no transaction over several points. So a
commit first removes (deleted entries, and places that another entry is about to get), and then adds. A kill in between
loses entries or places that the next `index` finds missing and adds again from the images; no place is ever in two
entries.
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

from qformer.retrieval.damage import raise_usage_errors
from qformer.retrieval.entries import COLUMNS, Condition, Entry, EntrySummary, Place, modified
from qformer.retrieval.places import parse_captions, parse_places, to_nfc
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor

PAGE = 1_000  # points per request without vectors
ROWS = 2_048  # rows per request: about 11 MB of JSON, where a server accepts 32 MB
OVERSAMPLING = 2.0  # candidates by int8 per point scored by fp16
TIMEOUT = 300  # seconds
RANGES = {">": "gt", ">=": "gte", "<": "lt", "<=": "lte"}


def connect(url: str) -> QdrantClient:
    """Create a client of `qdrant://host:port`, over https if the environment has `QDRANT_API_KEY`; sends nothing yet.

    Raises:
        UsageError: malformed address.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or 6333
    except ValueError:
        host = None
    if not host or parts.path.strip("/"):
        raise UsageError(f"'{url}' is not the address of a Qdrant server; give one such as qdrant://localhost:6333")
    key = os.environ.get("QDRANT_API_KEY")
    return QdrantClient(host=host, port=port, api_key=key, timeout=TIMEOUT, check_compatibility=False)


@raise_usage_errors
class QdrantStore:
    """A `Store` in the collection `name`, which `new` creates if there is none."""

    def __init__(self, url: str, name: str, width: int, new: bool = False) -> None:
        """Connect to the server.

        Raises:
            UsageError: no server answers at `url`, or it has no such collection, or one of another width.
        """
        self.url, self.name, self.width = url, name, width
        self.notes: list[str] = []
        self.where = f"the collection '{name}' at '{url}'"
        self._client = connect(url)
        if not self._ask("collection_exists"):
            if not new:
                raise UsageError(
                    f"the Qdrant server at '{url}' has no collection '{name}', which holds this gallery; restore it "
                    "from a backup, or index the images into another folder"
                )
            self._create()
        config = self._ask("get_collection").config.params.vectors
        found = config["rows"].size if isinstance(config, dict) and "rows" in config else None
        if found != width:
            raise UsageError(
                f"the collection '{name}' at '{url}' holds rows of {found} numbers, but the model makes {width}; index "
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
            if kind is int or column == "path":  # before there are points, for the graph to use it
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
                row = point.payload
                yield EntrySummary(row["id"], row["seq"], parse_places(row["places"]), parse_captions(row["caption"]))
            if offset is None:
                return

    def commit(self, new: Sequence[Entry], changed: Sequence[Entry], gone: Sequence[str]) -> None:
        """See `Store`, and the top of this module for the state after a kill.

        Raises:
            UsageError: the server does not answer, or refuses.
        """
        less, dropped = [], list(map(_point, gone))
        owner = {place[:2]: entry.id for entry in (*new, *changed) for place in entry.places}
        for point in self._retrieve([entry.id for entry in changed], with_payload=["id", "places"]):
            before, own = parse_places(point.payload["places"]), point.payload["id"]
            kept = [place for place in before if owner.get(place[:2], own) == own]
            if not kept:
                dropped.append(point.id)
            elif len(kept) < len(before):
                change = models.SetPayload(payload=_place_payload(kept), points=[point.id])
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
        """See `Store`.

        A caption among the k best is best for some row of the query, and fewer than k entries have a better one for
        that row. So the k best entries of every row contain all of them.
        """
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
        """Do nothing: the server cleans up and indexes by itself after every commit."""
        return None

    def _retrieve(self, ids: Sequence[str], page: int = PAGE, **options: Any) -> Iterator[Any]:
        for some in _batched(ids, page):
            yield from self._ask("retrieve", ids=list(map(_point, some)), **options)

    def _ask(self, method: str, **options: Any) -> Any:
        try:
            return getattr(self._client, method)(collection_name=self.name, **options)
        except UnexpectedResponse as error:
            raise UsageError(
                f"the server at '{self.url}' refuses '{method}' ({_reason(error)}); check that it is Qdrant 1.20 or "
                "later, its log, and QDRANT_API_KEY"
            ) from error
        except (ApiException, QdrantException) as error:
            reason = str(getattr(error, "source", error)).partition("\n")[0]
            raise UsageError(
                f"no Qdrant server answers at '{self.url}' ({reason}); start it, or correct the address in --store or "
                "in the gallery's gallery.json"
            ) from error

    def _entry(self, point: Any) -> Entry:
        said = point.payload
        rows = {name: np.array(value, np.float16) for name, value in point.vector.items()}
        return Entry(
            **{name: said[name] for name in ("id", "seq", "bytes", "width", "height")},
            places=parse_places(said["places"]),
            embeds=rows["rows"],
            captions=parse_captions(said["caption"]),
            caption_embeds=rows.get("captions", np.zeros((0, self.width), np.float16)),
        )


def _structure(entry: Entry) -> models.PointStruct:
    caption = "\n".join(entry.captions)
    payload = {
        **{name: getattr(entry, name) for name in ("id", "seq", "bytes", "width", "height")},
        **_place_payload(entry.places),
        "caption": caption,
        "caption_lower": caption.lower(),
    }
    vectors = {"rows": entry.embeds.tolist()}
    if entry.captions:
        vectors["captions"] = entry.caption_embeds.tolist()
    return models.PointStruct(id=_point(entry.id), vector=vectors, payload=payload)


def _place_payload(places: list[Place]) -> dict[str, Any]:
    """Fields that depend on the places of an entry; `path_lower` serves `~`, since the server is case-sensitive."""
    first = places[0]
    return {
        "places": json.dumps(places),
        "path": to_nfc(first.name),
        "path_lower": to_nfc(first.name).lower(),
        "modified": modified(first),
    }


def _filter(where: Sequence[Condition]) -> models.Filter | None:
    """Filter for all conditions together; `MatchText` would compare words, `MatchSubstring` is 'contains'."""
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
    """Parameters of a search: exact over all rows, or through the graph and int8 with the best rescored."""
    coded = models.QuantizationSearchParams(ignore=exact, rescore=True, oversampling=OVERSAMPLING)
    return models.SearchParams(exact=exact, quantization=coded)


def _point(id_: str) -> str:
    """UUID for an id, as the server requires."""
    return str(uuid5(NAMESPACE_OID, id_))


def _portions(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    """Entries of each request: at most `ROWS` rows, unless a single entry has more."""
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
    """The server's message in one line."""
    try:
        return str(error.structured()["status"]["error"])
    except (ValueError, KeyError, TypeError):
        return f"{error.status_code} {error.reason_phrase}".strip()
