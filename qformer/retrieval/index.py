"""Keeping a gallery in step with its images: what is new is embedded, what was moved is known again, what is gone goes.

Samples of a source are read a round at a time: every process takes some, passes over files whose size and time are
those it knows, and embeds what it has not seen; the first process commits what all of them found. A commit is whole or
not there, so after `kill -9` the same command goes on behind the last one. What counts is the content: a file that was
renamed or copied is not embedded again.
"""

from __future__ import annotations

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qformer import distributed
from qformer.data.orders import indices
from qformer.formats import UNREAD
from qformer.records import replace_records
from qformer.retrieval.gallery import Known, Place
from qformer.retrieval.reading import Reader, embed_captions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    import numpy as np

    from qformer.data.sources import Source
    from qformer.model.image_text import ImageTextModel
    from qformer.retrieval.gallery import Entry, Gallery, Store
    from qformer.retrieval.reading import Seen

SKIPPED = "skipped.jsonl"
COMMIT = 1000  # entries that are changed at once


@dataclass
class Tally:
    """What an update did: samples seen, images embedded, places that moved, entries removed, faults by kind."""

    seen: int = 0
    added: int = 0
    changed: int = 0
    removed: int = 0
    copies: int = 0
    skipped: Counter[str] = field(default_factory=Counter)


class Updater:
    """What the first process knows of a gallery while it is updated.

    Attributes:
        entries: by id. places: id and place of each name in this source. met: the captions of each name that this
            update has come by. changed: ids of entries that were there and are not as they were.
    """

    def __init__(self, store: Store, number: int, embed: Callable[[list[str]], np.ndarray]) -> None:
        self.store, self.number, self.embed, self.tally = store, number, embed, Tally()
        self.entries: dict[str, Known] = {known.id: known for known in store.known()}
        self.places: dict[str, tuple[str, Place]] = {}
        self.met: dict[str, list[str]] = {}
        self.changed: set[str] = set()
        self.next = 1 + max((known.seq for known in self.entries.values()), default=-1)
        for known in self.entries.values():
            self.places |= {place.name: (known.id, place) for place in known.places if place.source == number}

    def take(self, found: Sequence[Seen]) -> list[Any]:
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
            before, _ = self.places.get(name, (id_, None))
            if before != id_:  # the file holds something else now
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

    def finish(self, gone: Callable[[Place], bool]) -> None:
        """Take out the places that this source no longer has, and captions that no place has.

        Where a content was met that another source has in a file that is gone, the file was moved into this one.
        """
        lost = [(id_, place) for name, (id_, place) in self.places.items() if name not in self.met and gone(place)]
        for id_ in {self.places[name][0] for name in self.met}:
            others = [place for place in self.entries[id_].places if place.source != self.number and place.size >= 0]
            lost += [(id_, place) for place in others if not os.path.lexists(place.name)]
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
        self.entries |= {entry.id: Known(entry.id, entry.seq, entry.places, entry.captions) for entry in ready}
        for id_ in gone:
            del self.entries[id_]
        self.changed |= {entry.id for entry in changed}
        self.changed -= set(gone)
        self.tally.added, self.tally.changed = self.tally.added + len(added), len(self.changed)
        self.tally.removed += len(gone)


def update(
    gallery: Gallery,
    model: ImageTextModel,
    source: Source,
    number: int,
    batch: int = 64,
    tell: Callable[[Tally], None] = lambda _: None,
) -> Tally:
    """Bring a gallery in step with a source; of several processes each reads its share, and the first one writes.

    Args:
        number: of the source in `gallery.json`.
        batch: images that are read, embedded and committed at once by each process.
        tell: is called behind each commit.

    Raises:
        OSError: the store cannot be written; what was committed stays.
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
        updater.finish(_gone(faults))
        replace_records(gallery.folder / SKIPPED, faults)
        tally = updater.tally
        tally.copies = sum(len(known.places) - 1 for known in updater.entries.values())
    return distributed.gather_objects(tally)[0]


def _shares(source: Source, batch: int, rank: int, world: int) -> Iterator[list[Any]]:
    """The indices of each round of one process; all processes have equally many rounds, the last of them empty."""
    members = indices(source)
    while whole := list(islice(members, batch * world)):
        yield whole[rank * batch : (rank + 1) * batch]


def _gone(faults: list[dict[str, str]]) -> Callable[[Place], bool]:
    """Whether a place that was not met is gone.

    What cannot be looked at is not: a disk may be back tomorrow; nor is a format that only another machine reads.
    """
    unreadable = {fault["path"] for fault in faults if fault["kind"] == "unreadable"}
    untold = {os.path.abspath(os.path.splitext(fault["path"])[0]) for fault in faults if fault["kind"] == "no caption"}
    whole = not any(fault["kind"].endswith(("shard", "tar")) for fault in faults)

    def gone(place: Place) -> bool:
        if place.size < 0:
            return whole
        try:
            os.stat(place.name)
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError:
            return False
        unread = Path(place.name).suffix.lower() in UNREAD
        unknown = unread or place.name in unreadable or os.path.splitext(place.name)[0] in untold
        return not unknown and os.access(Path(place.name).parent, os.R_OK | os.X_OK)

    return gone


def _batched(things: Iterable[Any], size: int) -> Iterator[list[Any]]:
    left = iter(things)
    while some := list(islice(left, size)):
        yield some
