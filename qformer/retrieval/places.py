"""Whether a place still holds the picture that was indexed there: by size and time, and where these differ by content.

Names compare in NFC: a Mac writes an accent as a letter of its own, and files that were copied from one often change
from the one spelling to the other.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unicodedata import normalize

from qformer.images import read_file
from qformer.retrieval.absence import tar_of
from qformer.retrieval.entries import Place
from qformer.trust import Untrusted
from qformer.types import BadSample

if TYPE_CHECKING:
    from collections.abc import Callable

    from qformer.retrieval.entries import Entry

WORDS = {"missing": "not where it was indexed", "changed": "changed since it was indexed"}  # of kinds of faults
KINDS = (int, str, int, int, int)  # of the fields of a place


def in_words(kind: str) -> str:
    """What is wrong with a picture, for people; of a kind that is none of `WORDS` that it cannot be read."""
    return WORDS.get(kind, "cannot be read")


def digest(data: bytes) -> str:
    """The id of a content."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def plain_bytes(image: Any) -> bytes:
    """What the id of a picture is made of, in bytes or pixels."""
    return image if isinstance(image, bytes) else image.tobytes()


def composed(name: str) -> str:
    """A name in NFC, in which names are compared."""
    return normalize("NFC", name)


def spelled(name: str) -> str:
    """A path as the disk spells it, where only the way in which accents are written is another; else as it is."""
    if name.isascii() or os.path.lexists(name):
        return name
    found = Path(Path(name).anchor)
    for part in Path(name).relative_to(found).parts:
        spellings = [found / one for one in (part, normalize("NFC", part), normalize("NFD", part))]
        there = next((one for one in spellings if os.path.lexists(one)), None)
        if there is None:
            return name
        found = there
    return str(found)


def status(name: str) -> tuple[int, int]:
    """Bytes and time of a file, by which it is known to be as it was.

    Raises:
        BadSample: kinds `missing`, `unreadable`, `not utf-8` (its name, which the store could not keep).
    """
    try:
        name.encode()
        found = os.stat(name)
    except UnicodeEncodeError as error:
        raise BadSample("not utf-8", ascii(name)) from error
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise BadSample("missing", name) from error
    except OSError as error:
        raise BadSample("unreadable", f"{name}: {error.strerror}") from error
    return found.st_size, found.st_mtime_ns


def tar_time(name: str) -> int:
    """Nanoseconds of the tar that holds a record of this name; -1 where that is no file here."""
    try:
        return -1 if (tar := tar_of(name)) is None else status(tar)[1]
    except BadSample:
        return -1


def find(entry: Entry, record: Callable[[Place], Any]) -> tuple[str, str]:
    """Where an entry stands today: the name of the first place that holds its content, and an empty fault.

    Where there is none, the first place, and what is wrong with it: `missing`, `changed`, `unreadable`. A file of
    another size or time is read, and by `record` a record whose tar has another time; records that are no part of a tar
    on this machine are taken to be there, which shows when they are opened.
    """
    faults = []
    for place in entry.places:
        name = spelled(place.name) if place.size >= 0 else place.name
        fault = _fault(name, place, entry.id) if place.size >= 0 else _record_fault(place, entry.id, record)
        if not fault:
            return name, ""
        faults.append(fault)
    return entry.path, faults[0]


def _fault(name: str, place: Place, id_: str) -> str:
    try:
        if status(name) == (place.size, place.modified) or digest(read_file(Path(name))) == id_:
            return ""
    except BadSample as bad:
        return bad.kind
    return "changed"


def _record_fault(place: Place, id_: str, record: Callable[[Place], Any]) -> str:
    tar = tar_of(place.name)
    if tar is None:
        return ""
    try:
        if status(tar)[1] == place.modified or digest(plain_bytes(record(place))) == id_:
            return ""
    except BadSample as bad:
        return bad.kind
    except Untrusted:  # nobody may look
        pass
    return "changed"


def places_of(text: str) -> list[Place]:
    """Places as a store keeps them.

    Raises:
        ValueError: they are none, as in a store that is damaged.
    """
    said = json.loads(text)
    if not isinstance(said, list) or not all(isinstance(one, list) and tuple(map(type, one)) == KINDS for one in said):
        raise ValueError(f"{text[:80]!r} are no places of a picture")
    return [Place(*one) for one in said]


def captions_of(text: str) -> list[str]:
    """Captions as a store keeps them, a line each."""
    return text.split("\n") if text else []
