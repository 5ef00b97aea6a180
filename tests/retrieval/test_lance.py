"""The index of a large gallery: what it finds, and that the answer never depends on how fresh or how whole it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from qformer.retrieval import lance
from qformer.retrieval.entries import conditions
from qformer.retrieval.lance import LanceStore
from tests.retrieval.photos import entry

COUNT, QUERIES, WIDTH = 3000, 4, 16


def rows_of(count: int, seed: int = 0) -> torch.Tensor:
    """float[n, Q, P]: as of a trained Q-Former, the queries of an image say nearly the same; images form clusters."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(30, WIDTH, generator=torch.Generator().manual_seed(99))
    own = centres[torch.randint(30, (count,), generator=generator)] + torch.randn(count, WIDTH, generator=generator)
    return F.normalize(own[:, None] + 0.2 * torch.randn(count, QUERIES, WIDTH, generator=generator), dim=-1)


PROBES = rows_of(15, seed=7)[:, 0]


class Bench:
    """A store of `COUNT` entries with an index, and how often it was asked."""

    def __init__(self, folder: Path, built: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.built, self.asked = folder, built, 0
        self.store = LanceStore(folder, QUERIES, WIDTH)
        small(monkeypatch)
        candidates = LanceStore._candidates

        def counted(*given: Any) -> list[int]:
            self.asked += 1
            return candidates(*given)

        monkeypatch.setattr(LanceStore, "_candidates", counted)

    def add(self, start: int, count: int, seed: int = 0) -> None:
        rows = rows_of(count, seed)
        self.store.commit([entry(start + n, own) for n, own in enumerate(rows)], [], [])

    def recall(self, k: int = 20) -> float:
        """Of texts that the index has not been tuned on."""
        queries = rows_of(15, seed=8)[:, :1]
        right = 0
        for query in queries:
            found, true = (self.store.nearest(query, k, exact=exact) for exact in (False, True))
            assert len({id_ for id_, _ in found}) == len(found) == k
            right += len({id_ for id_, _ in found} & {id_ for id_, _ in true})
        return right / (k * len(queries))


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """An index already of 300 entries, in several partitions."""
    monkeypatch.setattr(lance, "INDEXED", 300)
    monkeypatch.setattr(lance, "PARTITION", 500)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A gallery with an index, and what was said when it was built."""
    folder = tmp_path_factory.mktemp("gallery")
    store = LanceStore(folder, QUERIES, WIDTH)
    store.commit([entry(n, own) for n, own in enumerate(rows_of(COUNT))], [], [])
    with pytest.MonkeyPatch.context() as monkeypatch:
        small(monkeypatch)
        built = store.refresh(PROBES)
    assert built is not None
    return folder, built


@pytest.fixture
def bench(tmp_path: Path, template: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> Bench:
    folder, built = template
    return Bench(Path(shutil.copytree(folder, tmp_path / "gallery")), built, monkeypatch)


def same(mine: list[tuple[str, float]], theirs: list[tuple[str, float]]) -> bool:
    return [id_ for id_, _ in mine] == [id_ for id_, _ in theirs]


def test_it_finds_what_reading_everything_finds(bench: Bench) -> None:
    assert bench.built["recall"] >= 0.98
    assert bench.built["entries"] == COUNT
    assert bench.built["queries"] < QUERIES
    assert bench.recall() > 0.95
    assert bench.asked == 15  # not the exact searches
    query = rows_of(1, seed=9)[0]  # of an image, all of its rows
    found, true = (bench.store.nearest(query, 20, exact=exact) for exact in (False, True))
    assert len({id_ for id_, _ in found} & {id_ for id_, _ in true}) >= 18
    assert bench.asked > 15


def test_exact_is_exact(bench: Bench) -> None:
    rows = rows_of(COUNT).half().float()
    query = rows_of(1, seed=11)[0, :1]
    scores = (rows @ query[0]).amax(dim=1)
    best = scores.topk(50)
    found = bench.store.nearest(query, 50, exact=True)
    assert [int(id_, 16) for id_, _ in found] == best.indices.tolist()
    assert torch.allclose(torch.tensor([score for _, score in found]), best.values, atol=1e-5)
    assert bench.store.nearest(query, 0) == []
    assert len(bench.store.nearest(query, COUNT + 500)) == COUNT


def test_entries_that_came_later_are_found(bench: Bench) -> None:
    query = F.normalize(torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(3)), dim=-1)
    rows = torch.randn(QUERIES, WIDTH, generator=torch.Generator().manual_seed(4)) * 0.01
    rows[3] = query
    bench.store.commit([entry(COUNT, rows)], [], [])
    found = bench.store.nearest(query, 5)
    assert int(found[0][0], 16) == COUNT
    assert len(found) == 5
    assert bench.asked == 1


def test_deleted_entries_are_not(bench: Bench) -> None:
    query = rows_of(1, seed=12)[0, :1]
    first = bench.store.nearest(query, 300, exact=True)
    bench.store.commit([], [], [id_ for id_, _ in first[:150]])
    found = bench.store.nearest(query, 100)
    assert not {id_ for id_, _ in found} & {id_ for id_, _ in first[:150]}
    assert same(found[:50], first[150:200])
    assert len(found) == 100


def test_changed_entries_keep_their_place(bench: Bench) -> None:
    query = rows_of(1, seed=12)[0, :1]
    found = bench.store.nearest(query, 3)
    changed = list(bench.store.get([id_ for id_, _ in found]).values())
    changed[0].captions = ["now it has one"]
    changed[0].caption_embeds = torch.zeros(1, WIDTH).half().numpy()
    bench.store.commit([], changed, [])
    assert same(bench.store.nearest(query, 3), found)
    assert [id_ for id_, _, _ in bench.store.nearest_captions(query, 3)] == [changed[0].id]


@pytest.mark.parametrize(("where", "asked"), [("width=641", 1), ("bytes>=3000", 0), ("bytes=150", 0), ("bytes<0", 0)])
def test_conditions_with_an_index(bench: Bench, where: str, asked: int) -> None:
    query, only = rows_of(1, seed=12)[0, :1], conditions([where])
    found = bench.store.nearest(query, 10, only)
    true = bench.store.nearest(query, 10, only, exact=True)
    assert len(found) == len(true)
    assert len({id_ for id_, _ in found} & {id_ for id_, _ in true}) >= 0.9 * len(true)
    assert bench.asked == asked


def test_it_is_built_anew_when_it_is_stale(bench: Bench) -> None:
    before = bench.folder.joinpath("keys.json").read_text()
    assert bench.store.refresh(PROBES) is None
    bench.add(COUNT, 300, seed=1)
    assert bench.store.refresh(PROBES) is None
    assert bench.folder.joinpath("keys.json").read_text() == before
    bench.add(COUNT + 300, 600, seed=2)
    again = bench.store.refresh(PROBES)
    assert again is not None
    assert again["entries"] == COUNT + 900
    assert bench.recall() > 0.95
    bench.store.commit([], [], [f"{n:032x}" for n in range(1200)])
    assert bench.store.refresh(PROBES)["entries"] == COUNT - 300  # type: ignore[index]
    assert len(tables(bench)) == 1


def tables(bench: Bench) -> list[str]:
    return sorted(path.name for path in (bench.folder / "lance").glob("keys_*"))


@pytest.mark.parametrize("damage", ["missing", "cut off", "a list", "no table", "another table", "half a table"])
def test_without_an_index_everything_is_read(bench: Bench, damage: str) -> None:
    query, file = rows_of(1, seed=12)[0, :1], bench.folder / "keys.json"
    true, whole = bench.store.nearest(query, 20, exact=True), json.loads(file.read_text())
    table = bench.folder / "lance" / f"{whole['table']}.lance"
    if damage == "missing":
        file.unlink()
    elif damage == "no table":
        table.rename(bench.folder / "away")
    elif damage == "half a table":
        for part in (table / "data").iterdir():
            part.unlink()
        for part in (table / "_indices").glob("*/*"):
            part.unlink()
    else:
        shown = {"cut off": file.read_text()[:20], "a list": "[1]", "another table": json.dumps(whole | {"table": "x"})}
        file.write_text(shown[damage])
    opened = LanceStore(bench.folder, QUERIES, WIDTH)
    assert same(opened.nearest(query, 20), true)
    if damage != "half a table":
        assert opened.refresh(PROBES) is not None  # which makes it whole again
        assert bench.recall() > 0.95


def test_an_interrupted_build_leaves_the_old_one(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    before = bench.folder.joinpath("keys.json").read_text()
    bench.add(COUNT, 900, seed=1)

    def stops(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(LanceStore, "_tune", stops)
        with pytest.raises(KeyboardInterrupt):
            bench.store.refresh(PROBES)
    assert bench.folder.joinpath("keys.json").read_text() == before
    assert len(tables(bench)) == 2
    assert bench.recall() > 0.95
    assert bench.store.refresh(PROBES) is not None
    assert len(tables(bench)) == 1
    assert bench.recall() > 0.95


def test_a_search_while_another_process_builds(bench: Bench) -> None:
    """Another opened store writes, tidies up, and drops the index that this one has used."""
    query = rows_of(1, seed=12)[0, :1]
    bench.store.nearest(query, 5)
    other = LanceStore(bench.folder, QUERIES, WIDTH)
    rows = query.repeat(QUERIES, 1)  # near whichever row the index takes
    other.commit([entry(COUNT + 5000, rows)], [], [f"{n:032x}" for n in range(900)])
    assert int(bench.store.nearest(query, 5)[0][0], 16) == COUNT + 5000
    assert other.refresh(PROBES) is not None
    assert int(bench.store.nearest(query, 5)[0][0], 16) == COUNT + 5000
    assert len(bench.store) == COUNT - 899


def test_a_search_while_another_process_tidies_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a search has begun to read is there until it has read it, though the same rows stand elsewhere by now."""
    monkeypatch.setattr(lance, "FRAGMENTS", 2)
    store, other = (LanceStore(tmp_path, QUERIES, WIDTH) for _ in range(2))
    for start in range(0, COUNT, 500):
        store.commit([entry(start + n, own) for n, own in enumerate(rows_of(500, start))], [], [])
    batches = store.read(["id", "embeds"])
    read = len(next(batches))
    other.refresh(PROBES)
    assert read + sum(map(len, batches)) == COUNT
    assert len(store.nearest(PROBES[:1], 20)) == 20


def test_a_small_store_has_no_index(tmp_path: Path) -> None:
    store = LanceStore(tmp_path, QUERIES, WIDTH)
    assert store.refresh(PROBES) is None
    store.commit([entry(n, own) for n, own in enumerate(rows_of(20))], [], [])
    assert store.refresh(PROBES) is None
    assert len(store.nearest(PROBES[:1], 30)) == 20


def test_a_store_that_was_half_made(tmp_path: Path) -> None:
    """A kill while the table is made leaves its folder."""
    (tmp_path / "lance" / "images.lance" / "data").mkdir(parents=True)
    store = LanceStore(tmp_path, QUERIES, WIDTH)
    store.commit([entry(0, rows_of(1)[0])], [], [])
    assert len(LanceStore(tmp_path, QUERIES, WIDTH)) == 1


def test_one_commit_adds_changes_and_removes(tmp_path: Path) -> None:
    store = LanceStore(tmp_path, QUERIES, WIDTH)
    some = [entry(n, own) for n, own in enumerate(rows_of(6))]
    store.commit(some[:4], [], [])
    version = store._images.version
    some[1].captions = ["a caption", "it's another"]
    some[1].caption_embeds = torch.randn(2, WIDTH).half().numpy()
    some[5].features = [torch.randn(3, 5).half().numpy(), torch.ones(2, 7, dtype=torch.int8).numpy()]
    store.commit(some[4:], [some[1]], [some[0].id, some[3].id])
    assert store._images.version == version + 1
    found = store.get([one.id for one in some], features=True)
    assert set(found) == {some[n].id for n in (1, 2, 4, 5)}
    assert found[some[1].id].captions == ["a caption", "it's another"]
    assert (found[some[1].id].caption_embeds == some[1].caption_embeds).all()
    for mine, theirs in zip(found[some[5].id].features or [], some[5].features, strict=True):
        assert mine.dtype == theirs.dtype
        assert (mine == theirs).all()
    assert (found[some[2].id].embeds == some[2].embeds).all()
    assert found[some[2].id].places == some[2].places
    assert store.get([]) == {}
