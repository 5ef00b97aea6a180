"""Updates of a gallery: new images are embedded, moved ones are recognized, and deleted ones are removed.

Samples of a source are read in rounds: every process takes some, skips files whose size and time are known, and embeds
new contents; the first process commits the results of all. A commit is atomic, so after `kill -9` the same command
continues after the last one. Only content counts: a renamed or copied file is not embedded again.

Entries that were not found are removed only if their absence could be checked (`qformer.retrieval.absence`), and never
too many at once.
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
from qformer.retrieval.absence import Absence, check_file
from qformer.retrieval.entries import EntrySummary, Place
from qformer.retrieval.places import to_nfc
from qformer.retrieval.reading import Reader, embed_captions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    import numpy as np

    from qformer.data.base import Source
    from qformer.model.image_text import ImageTextModel
    from qformer.retrieval.absence import Reason
    from qformer.retrieval.embedders import Embedder
    from qformer.retrieval.entries import Entry, Store
    from qformer.retrieval.gallery import Gallery
    from qformer.retrieval.reading import ReadSample

SKIPPED = "skipped.jsonl"
COMMIT = 1000  # entries changed in one commit
KEPT: dict[Reason, str] = {
    "missing": "gone, with more than a fifth of the gallery",
    "away": "could not be checked: its folder does not exist, or is empty",
    "shut": "could not be checked: it, or a folder above it, cannot be read",
}
AT_ONCE = 0.2  # largest share of a gallery that an update removes at once; beyond it, a disk is probably missing


@dataclass
class Tally:
    """Counts of an update: samples seen, images embedded, places moved, entries removed, faults by kind.

    Attributes:
        away: places that could not be checked, and are kept.
        missing: places that are gone, but are kept because they are too many at once.
        kept: name of one of these places.
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
    """State of a gallery during an update, in the first process.

    Attributes:
        entries: summaries by id.
        places: id and place of each name in this source.
        met: captions of each name that this update has found.
        fresh: by id, places where it found a content for the first time.
        changed: ids of earlier entries that it has changed.
        whole: numbers of images and of places in the gallery before the update.
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
        """Commit samples; returns the indices to read again, whose contents were known but have been removed since."""
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
                if before is not None:  # the file now holds another content
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

    def finish(self, explain: Callable[[Place], Reason], remove: bool = False) -> list[dict[str, str]]:
        """Remove the places that this source no longer has, and captions that no place has.

        Args:
            explain: returns why a place of this source was not found.
            remove: remove every place that is absent, however many.

        Returns:
            Fault records of the places that are kept although they were not found.
        """
        lost, kept = self._sort_unmet(explain, remove)
        for some in _batched(lost, COMMIT):
            places: dict[str, list[Place]] = {}
            for id_, place in some:
                self._forget(id_, place.name, places, place.source)
                if place.source == self.number:
                    del self.places[place.name]
            self._commit({}, places, {})
        captions = {}
        for id_, known in self.entries.items():
            if all(place.source == self.number and place.name in self.met for place in known.places):
                texts = list(dict.fromkeys(text for place in known.places for text in self.met[place.name]))
                if set(texts) != set(known.captions):
                    captions[id_] = texts
        for chunk in _batched(captions, COMMIT):
            self._commit({}, {}, {id_: captions[id_] for id_ in chunk})
        self.tally.missing = sum(state == "missing" for state in kept.values())
        self.tally.away, self.tally.kept = len(kept) - self.tally.missing, next((place.name for place in kept), "")
        return [{"path": place.name, "kind": "kept", "detail": KEPT[state]} for place, state in kept.items()]

    def _sort_unmet(
        self, explain: Callable[[Place], Reason], remove: bool
    ) -> tuple[list[tuple[str, Place]], dict[Place, Reason]]:
        """Places that were not found: those to remove, with their ids, and those to keep, with the reason."""
        lost: list[tuple[str, Place]] = []
        missing: list[tuple[str, Place]] = []
        kept: dict[Place, Reason] = {}
        met = {to_nfc(name) for name in self.met}
        for id_, place in [self.places[name] for name in self.places if name not in self.met]:
            state = explain(place)
            respelled = to_nfc(place.name) in met and not os.path.lexists(place.name)
            if respelled or (remove and state != "shut") or self._has_moved(id_, place, state):
                lost.append((id_, place))
            elif state == "missing" and self.met:
                missing.append((id_, place))
            elif state == "stands" and self.met:
                lost.append((id_, place))
            else:
                kept[place] = "away" if state in ("missing", "stands") else state
        if self._is_too_many(lost, missing):
            kept |= {place: "missing" for _, place in missing}
        else:
            lost += missing
        for id_ in {self.places[name][0] for name in self.met}:  # moved into this source from another
            others = [place for place in self.entries[id_].places if place.source != self.number and place.size >= 0]
            lost += [(id_, place) for place in others if self._has_moved(id_, place, check_file(place.name))]
        return lost, kept

    def _has_moved(self, id_: str, place: Place, state: Reason) -> bool:
        """Check whether a content has moved from an absent place to one where it was not before.

        If the old place could not be checked, size and time must be equal: a copy has another time, and the original
        may come back.
        """
        fresh = self.fresh.get(id_, ())
        return (state == "missing" and bool(fresh)) or (
            state == "away" and place.size >= 0 and any(one[3:] == place[3:] for one in fresh)
        )

    def _is_too_many(self, lost: list[tuple[str, Place]], missing: list[tuple[str, Place]]) -> bool:
        """Check whether more than a fifth of the gallery's images or places is missing at once."""
        taken = {place[:2] for _, place in (*lost, *missing)}
        ids = {id_ for id_, _ in missing}
        images = sum(all(place[:2] in taken for place in self.entries[id_].places) for id_ in ids)
        return images > AT_ONCE * self.whole[0] or len(missing) > AT_ONCE * self.whole[1]

    def _forget(self, id_: str, name: str, places: dict[str, list[Place]], source: int | None = None) -> list[Place]:
        """Remove a place (of this source by default) from an entry; returns its places, to be edited further."""
        own = places.get(id_) if id_ in places else self.entries[id_].places
        place = (self.number if source is None else source, name)
        places[id_] = [other for other in own or () if other[:2] != place]
        return places[id_]

    def _commit(self, new: dict[str, Entry], places: dict[str, list[Place]], captions: dict[str, list[str]]) -> None:
        gone = [id_ for id_, own in places.items() if not own and id_ not in new]
        touched = [id_ for id_ in dict.fromkeys([*places, *captions]) if id_ not in new and id_ not in gone]
        unique = list(dict.fromkeys(text for texts in captions.values() for text in texts))
        rows, number = self.embed(unique), {text: row for row, text in enumerate(unique)}
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
    report: Callable[[Tally], None] = lambda _: None,
    remove: bool = False,
) -> Tally:
    """Bring a gallery up to date with a source; each of several processes reads its share, and the first one writes.

    Args:
        number: index of the source in `gallery.json`.
        batch: images that each process reads, embeds and commits at once.
        report: called after each commit.
        remove: remove every absent image, even if too many are gone or their absence could not be checked.

    Raises:
        UsageError: the store is damaged or cannot be written.
        OSError: the list of skipped files cannot be written. In both cases, earlier commits stay.
    """
    first, world = distributed.rank() == 0, distributed.world()
    updater = Updater(gallery.store, number, lambda texts: embed_captions(model, texts)) if first else None
    places, ids = distributed.gather_objects((updater.places, list(updater.entries)) if updater else None)[0]
    reader = Reader(model, number, dict(places), ids, gallery.about.get("features"))
    faults: list[dict[str, str]] = []
    with ThreadPoolExecutor(1) as ahead:  # reads the next round while the model embeds the current one
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
                report(updater.tally)
    tally = Tally()
    if updater is not None:
        kept = updater.finish(Absence(faults, gallery.about["sources"][number]).explain, remove)
        replace_records(gallery.folder / SKIPPED, [*faults, *kept])
        tally = updater.tally
        tally.copies = sum(len(known.places) - 1 for known in updater.entries.values())
    return distributed.gather_objects(tally)[0]


def _shares(source: Source, batch: int, rank: int, world: int) -> Iterator[list[Any]]:
    """Indices of each round of one process; all processes have the same number of rounds, the last ones maybe empty."""
    members = indices(source)
    while whole := list(islice(members, batch * world)):
        yield whole[rank * batch : (rank + 1) * batch]


def _batched(things: Iterable[Any], size: int) -> Iterator[list[Any]]:
    left = iter(things)
    while some := list(islice(left, size)):
        yield some
