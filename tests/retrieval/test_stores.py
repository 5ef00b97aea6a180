"""Every store behaves alike: LanceDB on disk, and Qdrant (its client's local mode, which is no server)."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
import torch
from qdrant_client import QdrantClient
from qdrant_client.http.api_client import ApiClient
from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

from qformer.retrieval import gallery, qdrant
from qformer.retrieval.entries import Entry, Place, conditions, maxsim
from qformer.retrieval.gallery import Gallery, open_store
from qformer.retrieval.lance import LanceStore
from qformer.retrieval.qdrant import QdrantStore
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from qformer.retrieval.entries import Store

pytestmark = [  # what the local mode says
    pytest.mark.filterwarnings("ignore:Payload indexes have no effect"),
    pytest.mark.filterwarnings("ignore:Local mode performs exact"),
]

QUERIES, WIDTH = 4, 8
URL = "qdrant://localhost:6333"
WORDS = ("red dog", "Blue Bird's nest", "a MAN", "straße 7", '100% \\ "sure"', "ÉTÉ")


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float16)


def entry(number: int, captions: int | None = None, content: str = "") -> Entry:
    """One of 1 or 2 tiles; every third stands in two places, and some have captions."""
    rng = np.random.default_rng(number)
    texts = [f"{WORDS[(number + n) % 6]} {number}" for n in range(number % 4 if captions is None else captions)]
    places = [Place(0, f"/Photos/{WORDS[number % 6]}/{number}.JPG", -1, 100 + number, (1_700_000_000 + number) * 10**9)]
    if number % 3 == 0:
        places.append(Place(1, f"/copies/{number}.jpg", -1, 100 + number, 5))
    return Entry(
        hashlib.blake2b(f"{number}{content}".encode(), digest_size=16).hexdigest(),
        places,
        100 + number,
        640 + number % 5,
        480,
        unit(rng.normal(size=(QUERIES * (1 + number % 2), WIDTH))),
        texts,
        unit(rng.normal(size=(len(texts), WIDTH))) if texts else np.zeros((0, WIDTH), np.float16),
        seq=number,
    )


def test_times_before_1970(make: Callable[[], Store]) -> None:
    """Below zero, so that a condition finds them; of a record in a tar it is 0, whatever its place says."""
    store = make()
    times = {0: -(10**9) * 86_400 * 365, 1: -1, 2: 10**9, 3: 0}
    entries = [
        replace(entry(number), places=[Place(0, f"{number}.jpg", -1, 9, time)]) for number, time in times.items()
    ]
    entries.append(replace(entry(4), places=[Place(0, "4", 7)]))
    store.commit(entries, [], [])
    assert [one.modified for one in entries] == [-31_536_000, -1, 1, 0, 0]
    for texts, numbers in (
        (["modified<1970-01-01"], {0, 1}),
        (["modified<=1969-01-01"], {0}),
        (["modified=0"], {3, 4}),
    ):
        found = store.nearest(torch.eye(WIDTH)[:1], 9, conditions(texts))
        assert {id_ for id_, _ in found} == {entries[number].id for number in numbers}


@pytest.fixture(params=["lance", "qdrant", "qdrant on disk"])
def make(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Store]:
    """Opens the same store, anew each time."""
    if request.param == "lance":
        (tmp_path / "store").mkdir()
        return lambda: LanceStore(tmp_path / "store", QUERIES, WIDTH)
    where: dict[str, Any] = {"location": ":memory:"} if request.param == "qdrant" else {"path": str(tmp_path / "q")}
    client = QdrantClient(**where)
    monkeypatch.setattr(qdrant, "connect", lambda _: client)
    return lambda: QdrantStore(URL, "pictures", WIDTH, True)


@pytest.fixture
def store(make: Callable[[], Store]) -> Store:
    found = make()
    found.commit([entry(number) for number in range(40)], [], [])
    return found


def query(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(unit(np.random.default_rng(1000 + seed).normal(size=(rows, WIDTH)))).float()


def same(found: Entry, expected: Entry) -> bool:
    plain = [(e.id, e.places, e.bytes, e.width, e.height, e.captions, e.seq, e.features) for e in (found, expected)]
    rows = [
        (e.embeds.dtype, e.embeds.tolist(), e.caption_embeds.shape, e.caption_embeds.tolist())
        for e in (found, expected)
    ]
    return plain[0] == plain[1] and rows[0] == rows[1]


@pytest.mark.canary
def test_what_was_committed_is_there_bit_for_bit(store: Store, make: Callable[[], Store]) -> None:
    for opened in (store, make()):
        assert len(opened) == 40
        found = opened.get([entry(number).id for number in range(40)])
        assert all(same(found[entry(number).id], entry(number)) for number in range(40))
        known = {one.id: one for one in opened.known()}
        assert known.keys() == found.keys()
        expected = [(e.id, e.seq, e.places, e.captions) for e in map(entry, range(40))]
        assert [tuple(known[one[0]]) for one in expected] == expected
    assert list(store.get([entry(3).id, "f" * 32, entry(5).id]).keys() ^ {entry(3).id, entry(5).id}) == []
    assert store.get([]) == {}


def test_known_reads_page_by_page(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qdrant, "PAGE", 7)
    assert sorted(one.seq for one in store.known()) == list(range(40))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_nearest_is_the_mean_over_query_rows_of_the_best_row(store: Store, rows: int, exact: bool) -> None:
    asked = query(rows)
    scores = {e.id: float(maxsim(asked, torch.from_numpy(e.embeds).float())) for e in map(entry, range(40))}
    expected = sorted(scores.items(), key=lambda one: -one[1])
    found = store.nearest(asked, 9, (), exact)
    assert [id_ for id_, _ in found] == [id_ for id_, _ in expected[:9]]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected[:9]], abs=1e-5)
    assert len(store.nearest(asked, 100)) == 40
    assert store.nearest(asked, 0) == []


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("k", [1, 6, 50])
def test_nearest_captions_is_exact(store: Store, rows: int, k: int) -> None:
    asked = query(rows, 1)
    scored = [
        (float((torch.from_numpy(e.caption_embeds).float()[number] @ asked.T).max()), e.id, number)
        for e in map(entry, range(40))
        for number in range(len(e.captions))
    ]
    expected = sorted(scored, reverse=True)[:k]
    found = store.nearest_captions(asked, k)
    assert [(id_, number) for id_, number, _ in found] == [(id_, number) for _, id_, number in expected]
    assert [score for _, _, score in found] == pytest.approx([score for score, _, _ in expected], abs=1e-5)


def test_captions_of_one_entry_do_not_hide_those_of_another(make: Callable[[], Store]) -> None:
    """The two best captions belong to one entry, for one of the rows; the third best is best for the other row."""
    rows = torch.eye(WIDTH)[:2]
    first, second = (replace(entry(number, 3), caption_embeds=np.zeros((3, WIDTH), np.float16)) for number in (0, 1))
    first.caption_embeds[:, 0] = 0.9, 0.8, 0.1
    second.caption_embeds[:, 1] = 0.2, 0.7, 0.3
    found = make()
    found.commit([first, second], [], [])
    expected = [(first.id, 0), (first.id, 1), (second.id, 1), (second.id, 2)]
    assert [(id_, number) for id_, number, _ in found.nearest_captions(rows, 4)] == expected


@pytest.mark.parametrize(
    ("texts", "passes"),
    [
        (["width>642"], lambda e: e.width > 642),
        (["width>=642", "width<=643"], lambda e: 642 <= e.width <= 643),
        (["bytes<110"], lambda e: e.bytes < 110),
        (["height=480"], lambda e: True),
        (["height!=480"], lambda e: False),
        (["bytes=117"], lambda e: e.bytes == 117),
        (["modified>=2023-11-14", "modified<1700000005"], lambda e: e.modified < 1_700_000_005),
        (["width>-5", f"bytes<{2**63 - 1}"], lambda e: True),
        (["path~photos/RED"], lambda e: "/red dog/" in e.path),
        (["path~bird's"], lambda e: "Bird's" in e.path),
        (["path~og/1"], lambda e: "og/1" in e.path),
        (["caption~A man"], lambda e: any("a MAN" in text for text in e.captions)),
        (["caption~été"], lambda e: any("ÉTÉ" in text for text in e.captions)),
        (['caption~% \\ "'], lambda e: any("100%" in text for text in e.captions)),
        (["caption~"], lambda e: True),
        (["caption="], lambda e: not e.captions),
        (["caption!="], lambda e: bool(e.captions)),
        ([f"caption={WORDS[1]} 1"], lambda e: e.id == entry(1).id),
        ([f"path=/Photos/{WORDS[3]}/3.JPG"], lambda e: e.seq == 3),
        ([f"path=/photos/{WORDS[3]}/3.jpg"], lambda e: False),
        ([f"path!=/Photos/{WORDS[3]}/3.JPG"], lambda e: e.seq != 3),
        ([f"id={entry(4).id}"], lambda e: e.seq == 4),
        ([f"id~{entry(4).id[3:20].upper()}"], lambda e: e.seq == 4),
        (["path~copies"], lambda e: False),  # the first place is the path
    ],
    ids=lambda value: " and ".join(value) if isinstance(value, list) else "",
)
def test_conditions_mean_the_same(store: Store, texts: list[str], passes: Callable[[Entry], bool]) -> None:
    expected = {e.id for e in map(entry, range(40)) if passes(e)}
    where = conditions(texts)
    assert {id_ for id_, _ in store.nearest(query(1), 40, where)} == expected
    assert {id_ for id_, _ in store.nearest(query(2), 40, where, True)} == expected
    told = {e.id for e in map(entry, range(40)) if e.captions} & expected
    assert {id_ for id_, _, _ in store.nearest_captions(query(2), 200, where)} == told


def test_changes_and_deletions(store: Store, make: Callable[[], Store]) -> None:
    moved = replace(entry(1), places=[Place(2, "/new/name.png", 7)], captions=[], caption_embeds=np.zeros((0, WIDTH)))
    told = replace(entry(4), captions=["new"], caption_embeds=unit(np.ones((1, WIDTH))))
    store.commit([entry(50)], [moved, told], [entry(2).id, entry(3).id])
    found = make().get([entry(number).id for number in range(60)])
    assert len(store) == len(found) == 39
    assert entry(2).id not in found
    assert found[moved.id].places == moved.places
    assert found[moved.id].captions == []
    assert found[moved.id].caption_embeds.shape == (0, WIDTH)
    assert same(found[told.id], told)
    assert same(found[entry(50).id], entry(50))
    assert all(same(found[entry(number).id], entry(number)) for number in range(5, 40))
    assert entry(2).id not in {id_ for id_, _ in store.nearest(query(1), 60)}
    assert {id_ for id_, _ in store.nearest(query(1), 60, conditions(["path~NEW/name"]))} == {moved.id}
    assert moved.id not in {id_ for id_, _, _ in store.nearest_captions(query(1), 200)}
    store.commit([], [], [one.id for one in store.known()])
    assert len(store) == 0
    assert store.nearest(query(1), 5) == store.nearest_captions(query(1), 5) == list(store.known()) == []


def test_the_largest_entries_go_by_themselves(make: Callable[[], Store], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qdrant, "ROWS", 5)
    portions = list(qdrant._portions([entry(number, 0) for number in range(6)]))
    assert [len(portion) for portion in portions] == [1] * 6
    monkeypatch.setattr(qdrant, "ROWS", 12)
    assert [len(p) for p in qdrant._portions([entry(number, 0) for number in range(6)])] == [2, 2, 2]
    found = make()
    found.commit([entry(number) for number in range(6)], [], [])
    assert len(found) == 6


class Killed(BaseException):
    """Stands for `kill -9`."""


class Dying:
    """A client that dies before its n-th write."""

    def __init__(self, client: QdrantClient, writes: int) -> None:
        self.client, self.left = client, writes

    def __getattr__(self, name: str) -> Any:
        if name in ("upsert", "delete", "batch_update_points"):
            self.left -= 1
            if self.left < 0:
                raise Killed
        return getattr(self.client, name)


def test_a_place_is_never_in_two_entries_wherever_qdrant_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two files swap their contents, a third gets another one, a fourth is overwritten by a new image."""
    a, b, c, d = (replace(entry(n), places=[Place(0, name, -1, 1, 1)]) for n, name in enumerate("abcd"))
    d.places.append(Place(0, "e", -1, 1, 1))
    changed = [
        replace(a, places=[Place(0, "b", -1, 2, 2)]),
        replace(b, places=[Place(0, "a", -1, 2, 2), Place(0, "c", -1, 2, 2)]),
        replace(d, places=[Place(0, "d", -1, 1, 1)]),
    ]
    new = [replace(entry(9), places=[Place(0, "e", -1, 3, 3)])]
    monkeypatch.setattr(qdrant, "ROWS", 1)  # each entry is a request
    for writes in range(20):
        client = QdrantClient(":memory:")
        monkeypatch.setattr(qdrant, "connect", lambda _, client=client: client)
        store = QdrantStore(URL, "pictures", WIDTH, True)
        store.commit([a, b, c, d], [], [])
        store._client = Dying(client, writes)
        try:
            store.commit(new, changed, [c.id])
        except Killed:
            done = False
        else:
            done = True
        store._client = client
        names = [place.name for known in store.known() for place in known.places]
        assert len(names) == len(set(names))
        assert all(known.places for known in store.known())
        paths = {id_: one.path for id_, one in store.get([one.id for one in store.known()]).items()}
        for id_, path in paths.items():
            assert [hit for hit, _ in store.nearest(query(1), 9, conditions([f"path={path}"]))] == [id_]
            assert [hit for hit, _ in store.nearest(query(1), 9, conditions([f"path~{path.upper()}"]))] == [id_]
        if done:
            break
    assert writes > 4
    assert sorted(names) == list("abcde")
    assert {one.id for one in store.known()} == {a.id, b.id, d.id, new[0].id}


def test_a_server_that_does_not_answer_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    about = {"store": URL, "name": "pictures", "queries": QUERIES, "width": WIDTH, "sources": []}

    class Silent:
        fault: Exception = ResponseHandlingException(httpx.ConnectError("[Errno 111] Connection refused"))

        def collection_exists(self, **_: Any) -> Any:
            raise self.fault

    monkeypatch.setattr(qdrant, "connect", lambda _: Silent())
    with pytest.raises(UsageError, match=r"no Qdrant server answers at 'qdrant://localhost:6333' .*refused.*start it"):
        open_store(tmp_path, about)
    Silent.fault = UnexpectedResponse(401, "Unauthorized", b'{"status": {"error": "no key"}}', httpx.Headers())
    with pytest.raises(UsageError, match=r"refuses 'collection_exists' \(no key\).*QDRANT_API_KEY"):
        open_store(tmp_path, about)
    Silent.fault = UnexpectedResponse(404, "Not Found", b"<html>", httpx.Headers())
    with pytest.raises(UsageError, match=r"refuses 'collection_exists' \(404 Not Found\)"):
        open_store(tmp_path, about)


def test_a_collection_that_is_missing_or_of_another_width(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    client = QdrantClient(":memory:")
    monkeypatch.setattr(qdrant, "connect", lambda _: client)
    about = {"fingerprint": "x", "checkpoint": "y", "queries": QUERIES, "width": WIDTH}
    made = Gallery.create(tmp_path, URL, **about)
    made.store.commit([entry(1)], [], [])
    assert len(Gallery.open(tmp_path, trust=True).store) == 1
    made.about["sources"].append({"name": "folder", "path": "photos"})
    made.save()
    with pytest.raises(UsageError, match=r"holds rows of 8 numbers, but the model makes 16"):
        QdrantStore(URL, made.about["name"], 16)
    client.delete_collection(made.about["name"])
    with pytest.raises(UsageError, match=r"has no collection 'gallery-\w+', which holds this gallery"):
        Gallery.open(tmp_path, trust=True)
    assert not client.collection_exists(made.about["name"])


def test_image_tokens_are_refused_by_qdrant(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"too large for a Qdrant server.*--features"):
        Gallery.create(tmp_path, URL, queries=QUERIES, width=WIDTH, features="int8")
    assert not (tmp_path / gallery.MANIFEST).exists()


@pytest.mark.parametrize("url", ["qdrant://", "qdrant://host:port", "qdrant://host:99999", "qdrant://host:1/path"])
def test_no_address(url: str) -> None:
    with pytest.raises(UsageError, match=r"is not the address of a Qdrant server"):
        qdrant.connect(url)


def test_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QDRANT_API_KEY", raising=False)
    assert qdrant.connect("qdrant://search.local")._client.rest_uri == "http://search.local:6333"
    assert qdrant.connect("qdrant://10.0.0.1:7000")._client.rest_uri == "http://10.0.0.1:7000"
    monkeypatch.setenv("QDRANT_API_KEY", "secret")
    assert qdrant.connect("qdrant://cloud:443")._client.rest_uri == "https://cloud:443"


@pytest.mark.parametrize(("kind", "package"), [("lance", "lancedb"), (URL, "qdrant_client")])
def test_a_missing_package_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, package: str
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package or name.startswith("qformer.retrieval")]:
        if name not in ("qformer.retrieval", "qformer.retrieval.gallery"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=rf"needs the package '{package}'.*pip install -e '\.\[search\]'"):
        open_store(tmp_path, {"store": kind, "name": "x", "queries": QUERIES, "width": WIDTH, "sources": []})


def test_what_a_server_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The local mode ignores how vectors are kept and searched, so the requests themselves are looked at."""
    asked: list[tuple[str, str, Any]] = []

    def send(_: Any, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content) if request.content else None
        asked.append((request.method, request.url.path, body))
        done: Any = {"status": "acknowledged", "operation_id": 1}
        if request.url.path.endswith("/exists"):
            done = {"exists": False}
        elif request.method == "PUT" and request.url.path == "/collections/pictures":
            done = True
        elif request.url.path.endswith("/query"):
            done = {"points": [{"id": 1, "version": 1, "score": 1.5, "payload": {"id": "aa"}}]}
        elif request.method == "GET":
            raise httpx.ConnectError("gone")
        return httpx.Response(200, json={"result": done, "status": "ok", "time": 0.0})

    monkeypatch.setattr(ApiClient, "send_inner", send)
    with pytest.raises(UsageError, match="gone"):
        QdrantStore(URL, "pictures", WIDTH, True)
    (made,) = (body for method, path, body in asked if (method, path) == ("PUT", "/collections/pictures"))
    rows = {
        "size": WIDTH,
        "distance": "Dot",
        "datatype": "float16",
        "on_disk": True,
        "multivector_config": {"comparator": "max_sim"},
        "quantization_config": {"scalar": {"type": "int8", "always_ram": True}},
    }
    assert made == {"vectors": {"rows": rows, "captions": rows}, "on_disk_payload": True}
    indexed = {body["field_name"]: body["field_schema"] for _, path, body in asked if path.endswith("/index")}
    assert indexed == dict.fromkeys(("bytes", "width", "height", "modified"), "integer") | {"path": "keyword"}
    store = object.__new__(QdrantStore)
    store.url, store.name, store.width, store._client = URL, "pictures", WIDTH, qdrant.connect(URL)
    for exact in (False, True):
        assert store.nearest(torch.eye(WIDTH)[:3], 5, conditions(["path~X"]), exact) == [("aa", 0.5)]
        body = asked[-1][2]
        assert body["params"] == {
            "exact": exact,
            "quantization": {"ignore": exact, "rescore": True, "oversampling": 2.0},
        }
        assert body["query"] == {"nearest": torch.eye(WIDTH)[:3].tolist()}
        assert (body["using"], body["limit"]) == ("rows", 5)
        assert body["filter"]["must"] == [{"key": "path_lower", "match": {"substring": "x"}}]
    store.commit([entry(1)], [], [entry(2).id])
    assert [path for _, path, _ in asked[-2:]] == [f"/collections/pictures/points{end}" for end in ("/delete", "")]
    assert len(json.dumps(asked[-1][2]["points"][0]["vector"]["rows"])) < 22 * 8 * WIDTH
