"""Keeping a gallery in step with its images: what is new is embedded, what was moved is known again, what is gone goes.

Samples of a source are read a round at a time: every process takes some, passes over files whose size and time are
those it knows, and embeds what it has not seen; the first process commits what all of them found. A commit is whole or
not there, so after `kill -9` the same command goes on behind the last one. What counts is the content: a file that was
renamed or copied is not embedded again.

What was not met is taken out only if somebody could look for it (`qformer.retrieval.absence`), and never much at once.
"""

from __future__ import annotations

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from qformer import distributed
from qformer.data.base import indices
from qformer.files.records import replace_records
from qformer.retrieval.absence import Absence, of_file
from qformer.retrieval.entries import EntrySummary, Place
from qformer.retrieval.places import composed
from qformer.retrieval.reading import Reader, embed_captions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    import numpy as np

    from qformer.data.base import Source
    from qformer.model.image_text import ImageTextModel
    from qformer.retrieval.absence import Why
    from qformer.retrieval.embedders import Embedder
    from qformer.retrieval.entries import Entry, Store
    from qformer.retrieval.gallery import Gallery
    from qformer.retrieval.reading import ReadSample

SKIPPED = "skipped.jsonl"
COMMIT = 1000  # entries that are changed at once
KEPT: dict[Why, str] = {
    "missing": "gone, with more than a fifth of the gallery",
    "away": "could not be looked at: its folder is not there, or is empty",
    "shut": "could not be looked at: it, or a folder above it, cannot be read",
}
AT_ONCE = 0.2  # share of a gallery of which an update that finds it gone believes that it was deleted


@dataclass
class Tally:
    """What an update did: samples seen, images embedded, places that moved, entries removed, faults by kind.

    Attributes:
        away: places that could not be looked at, and are kept. missing: those that are gone, but are too many at once,
            and are kept as well. kept: one of them.
    """

    seen: int = 0
    added: int = 0
    changed: int = 0
    removed: int = 0
    copies: int = 0
    away: int = 0
    missing: int = 0
    kept: str = ""
    skipped: Counter[str] = field(default_factory=Counter)


class Updater:
    """What the first process knows of a gallery while it is updated.

    Attributes:
        entries: by id. places: id and place of each name in this source. met: the captions of each name that this
                update has come by. fresh: places in which it met a content for the first time, by id. changed: ids of
            entries that were there and are not as they were. whole: images and places of the gallery before it.
    """

    def __init__(self, store: Store, number: int, embed: Callable[[list[str]], np.ndarray]) -> None:
        self.store, self.number, self.embed, self.tally = store, number, embed, Tally()
        self.entries: dict[str, EntrySummary] = {known.id: known for known in store.known()}
        self.places: dict[str, tuple[str, Place]] = {}
        self.met: dict[str, list[str]] = {}
        self.fresh: dict[str, list[Place]] = {}
        self.changed: set[str] = set()
        self.whole = len(self.entries), sum(len(known.places) for known in self.entries.values())
        self.next = 1 + max((known.seq for known in self.entries.values()), default=-1)
        for known in self.entries.values():
            self.places |= {place.name: (known.id, place) for place in known.places if place.source == number}

    def take(self, found: Sequence[ReadSample]) -> list[Any]:
        """Commit what was read; returns indices to read again: their content was known, but has gone meanwhile."""
        new: dict[str, Entry] = {}
        places: dict[str, list[Place]] = {}
        captions: dict[str, list[str]] = {}
        again = []
        for seen in found:
            name = seen.place.name
            id_ = seen.id or self.places[name][0]
            if id_ not in self.entries and id_ not in new:
                if seen.entry is None:
                    again.append(seen.index)
                    continue
                seen.entry.seq, self.next = self.next, self.next + 1
                new[id_], places[id_], captions[id_] = seen.entry, [], []
            before, _ = self.places.get(name, (None, None))
            if before != id_:
                self.fresh.setdefault(id_, []).append(seen.place)
                if before is not None:  # the file holds something else now
                    self._forget(before, name, places)
            if self.places.get(name) != (id_, seen.place):
                self._forget(id_, name, places).append(seen.place)
            self.places[name] = id_, seen.place
            self.met.setdefault(name, []).extend(seen.captions)
            stored = captions.get(id_) or (self.entries[id_].captions if id_ in self.entries else [])
            if more := [text for text in dict.fromkeys(seen.captions) if text not in stored]:
                captions[id_] = [*stored, *more]
        self._commit(new, places, captions)
        self.tally.seen += len(found) - len(again)
        return again

    def finish(self, why: Callable[[Place], Why], remove: bool = False) -> list[dict[str, str]]:
        """Take out the places that this source no longer has, and captions that no place has.

        Args:
            why: says of a place of this source why it was not met. remove: take out whatever is not there.

        Returns:
            What is kept though it was not met, as records of faults.
        """
        lost, kept = self._unmet(why, remove)
        for some in _batched(lost, COMMIT):
            places: dict[str, list[Place]] = {}
            for id_, place in some:
                self._forget(id_, place.name, places, place.source)
                if place.source == self.number:
                    del self.places[place.name]
            self._commit({}, places, {})
        told = {}
        for id_, known in self.entries.items():
            if all(place.source == self.number and place.name in self.met for place in known.places):
                texts = list(dict.fromkeys(text for place in known.places for text in self.met[place.name]))
                if set(texts) != set(known.captions):
                    told[id_] = texts
        for chunk in _batched(told, COMMIT):
            self._commit({}, {}, {id_: told[id_] for id_ in chunk})
        self.tally.missing = sum(state == "missing" for state in kept.values())
        self.tally.away, self.tally.kept = len(kept) - self.tally.missing, next((place.name for place in kept), "")
        return [{"path": place.name, "kind": "kept", "detail": KEPT[state]} for place, state in kept.items()]

    def _unmet(self, why: Callable[[Place], Why], remove: bool) -> tuple[list[tuple[str, Place]], dict[Place, Why]]:
        """The places to take out, with their ids, and those to keep, with the reason why they were not met."""
        lost: list[tuple[str, Place]] = []
        missing: list[tuple[str, Place]] = []
        kept: dict[Place, Why] = {}
        met = {composed(name) for name in self.met}
        for id_, place in [self.places[name] for name in self.places if name not in self.met]:
            state = why(place)
            respelled = composed(place.name) in met and not os.path.lexists(place.name)
            if respelled or (remove and state != "shut") or self._moved(id_, place, state):
                lost.append((id_, place))
            elif state == "missing" and self.met:
                missing.append((id_, place))
            elif state == "stands" and self.met:
                lost.append((id_, place))
            else:
                kept[place] = "away" if state in ("missing", "stands") else state
        if self._too_many(lost, missing):
            kept |= {place: "missing" for _, place in missing}
        else:
            lost += missing
        for id_ in {self.places[name][0] for name in self.met}:  # moved into this source from another
            others = [place for place in self.entries[id_].places if place.source != self.number and place.size >= 0]
            lost += [(id_, place) for place in others if self._moved(id_, place, of_file(place.name))]
        return lost, kept

    def _moved(self, id_: str, place: Place, state: Why) -> bool:
        """Whether a content has come from a place that is not there to one where it was not before.

        Of a place that could not be looked at only if size and time are the same: a copy has another time, and the
        first may be back.
        """
        fresh = self.fresh.get(id_, ())
        return (state == "missing" and bool(fresh)) or (
            state == "away" and place.size >= 0 and any(one[3:] == place[3:] for one in fresh)
        )

    def _too_many(self, lost: list[tuple[str, Place]], missing: list[tuple[str, Place]]) -> bool:
        """Whether more than a fifth of the gallery's images, or places, is missing at once."""
        taken = {place[:2] for _, place in (*lost, *missing)}
        ids = {id_ for id_, _ in missing}
        images = sum(all(place[:2] in taken for place in self.entries[id_].places) for id_ in ids)
        return images > AT_ONCE * self.whole[0] or len(missing) > AT_ONCE * self.whole[1]

    def _forget(self, id_: str, name: str, places: dict[str, list[Place]], source: int | None = None) -> list[Place]:
        """The places of an entry, to be edited: without this one, of this source by default."""
        own = places.get(id_) if id_ in places else self.entries[id_].places
        place = (self.number if source is None else source, name)
        places[id_] = [other for other in own or () if other[:2] != place]
        return places[id_]

    def _commit(self, new: dict[str, Entry], places: dict[str, list[Place]], captions: dict[str, list[str]]) -> None:
        gone = [id_ for id_, own in places.items() if not own and id_ not in new]
        touched = [id_ for id_ in dict.fromkeys([*places, *captions]) if id_ not in new and id_ not in gone]
        told = list(dict.fromkeys(text for texts in captions.values() for text in texts))
        rows, number = self.embed(told), {text: row for row, text in enumerate(told)}
        ready = []
        for entry in [*(new[id_] for id_ in new if places[id_]), *self.store.get(touched, features=True).values()]:
            entry = replace(entry, places=places.get(entry.id, entry.places))
            if entry.id in captions:
                texts = captions[entry.id]
                entry = replace(entry, captions=texts, caption_embeds=rows[[number[text] for text in texts]])
            ready.append(entry)
        added = [entry for entry in ready if entry.id in new]
        changed = [entry for entry in ready if entry.id not in new]
        if ready or gone:
            self.store.commit(added, changed, gone)
        self.entries |= {entry.id: EntrySummary(entry.id, entry.seq, entry.places, entry.captions) for entry in ready}
        for id_ in gone:
            del self.entries[id_]
        self.changed |= {entry.id for entry in changed}
        self.changed -= set(gone)
        self.tally.added, self.tally.changed = self.tally.added + len(added), len(self.changed)
        self.tally.removed += len(gone)


def update(
    gallery: Gallery,
    model: Embedder | ImageTextModel,
    source: Source,
    number: int,
    batch: int = 64,
    tell: Callable[[Tally], None] = lambda _: None,
    remove: bool = False,
) -> Tally:
    """Bring a gallery in step with a source; of several processes each reads its share, and the first one writes.

    Args:
        number: of the source in `gallery.json`.
        batch: images that are read, embedded and committed at once by each process.
        tell: is called behind each commit.
        remove: take out what is not there, however much it is, and though nobody could look for it.

    Raises:
        UsageError: the store is damaged, or cannot be written. OSError: the list of what was skipped cannot. What was
            committed stays.
    """
    first, world = distributed.rank() == 0, distributed.world()
    updater = Updater(gallery.store, number, lambda texts: embed_captions(model, texts)) if first else None
    places, ids = distributed.gather_objects((updater.places, list(updater.entries)) if updater else None)[0]
    reader = Reader(model, number, dict(places), ids, gallery.about.get("features"))
    faults: list[dict[str, str]] = []
    with ThreadPoolExecutor(1) as ahead:  # reads the next round while the model embeds this one
        shares = _shares(source, batch, distributed.rank(), world)
        coming = ahead.submit(reader.look, source, next(shares, []))
        while True:
            found, coming = coming.result(), ahead.submit(reader.look, source, next(shares, []))
            if not any(distributed.gather_objects(bool(found.seen or found.faults))):
                break
            rounds = distributed.collect_objects(reader.embed(found))
            if updater is not None:
                again = updater.take([seen for one in rounds for seen in one.seen])
                if again:
                    reader.ids = set(updater.entries)
                    updater.take(reader.embed(reader.look(source, again)).seen)
                faults += [fault for one in rounds for fault in one.faults]
                updater.tally.skipped = Counter(fault["kind"] for fault in faults)
                tell(updater.tally)
    tally = Tally()
    if updater is not None:
        kept = updater.finish(Absence(faults, gallery.about["sources"][number]).why, remove)
        replace_records(gallery.folder / SKIPPED, [*faults, *kept])
        tally = updater.tally
        tally.copies = sum(len(known.places) - 1 for known in updater.entries.values())
    return distributed.gather_objects(tally)[0]


def _shares(source: Source, batch: int, rank: int, world: int) -> Iterator[list[Any]]:
    """The indices of each round of one process; all processes have equally many rounds, the last of them empty."""
    members = indices(source)
    while whole := list(islice(members, batch * world)):
        yield whole[rank * batch : (rank + 1) * batch]


def _batched(things: Iterable[Any], size: int) -> Iterator[list[Any]]:
    left = iter(things)
    while some := list(islice(left, size)):
        yield some
