"""Checks that a place still holds the picture indexed there: by size and time, and if these differ, by content.

Names are compared in NFC: macOS may store an accent as a separate character, and copying a file often changes its name
from one form to the other.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unicodedata import normalize

from qformer.images import read_file
from qformer.retrieval.absence import find_tar
from qformer.retrieval.entries import Place
from qformer.trust import Untrusted
from qformer.types import BadSample

if TYPE_CHECKING:
    from collections.abc import Callable

    from qformer.retrieval.entries import Entry

WORDS = {  # by kind of fault
    "missing": "not where it was indexed",
    "changed": "changed since it was indexed",
    "damaged": "damaged, and cannot be read",
}
KINDS = (int, str, int, int, int)  # types of the fields of a place


def in_words(kind: str) -> str:
    """Describe the fault of a picture; kinds without an entry in `WORDS` read 'cannot be read'."""
    return WORDS.get(kind, "cannot be read")


def digest(data: bytes) -> str:
    """Compute the id of a content."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def plain_bytes(image: Any) -> bytes:
    """Bytes from which the id of a picture is computed: the file's, or those of its pixels."""
    return image if isinstance(image, bytes) else image.tobytes()


def to_nfc(name: str) -> str:
    """Normalize a name to NFC, the form in which names are compared."""
    return normalize("NFC", name)


def find_spelling(name: str) -> str:
    """Find a path as the disk spells it, which can differ in the form of accents; else return it unchanged."""
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
    """Size in bytes and modification time in nanoseconds; equal ones mean that a file has not changed.

    Raises:
        BadSample: kinds `missing`, `unreadable`, `not utf-8` (a name that the store cannot keep).
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
    """Modification time in nanoseconds of the tar that holds the named record; -1 if there is no such file here."""
    try:
        return -1 if (tar := find_tar(name)) is None else status(tar)[1]
    except BadSample:
        return -1


def find(entry: Entry, record: Callable[[Place], Any]) -> tuple[str, str]:
    """Find an entry today: the name of the first place that still holds its content, and an empty fault.

    If no place does: the name of the first place, and its fault, `missing`, `changed` or `unreadable`. A file with
    another size or time is read again, and so is (by `record`) a record whose tar has another time. A record outside
    the tars of this machine is assumed to exist; opening it shows whether it does.
    """
    faults = []
    for place in entry.places:
        name = find_spelling(place.name) if place.size >= 0 else place.name
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
    tar = find_tar(place.name)
    if tar is None:
        return ""
    try:
        if status(tar)[1] == place.modified or digest(plain_bytes(record(place))) == id_:
            return ""
    except BadSample as bad:
        return bad.kind
    except Untrusted:  # reading it is not allowed
        pass
    return "changed"


def parse_places(text: str) -> list[Place]:
    """Parse places from the text that a store keeps.

    Raises:
        ValueError: the text is something else, as in a damaged store.
    """
    rows = json.loads(text)
    if not isinstance(rows, list) or not all(isinstance(row, list) and tuple(map(type, row)) == KINDS for row in rows):
        raise ValueError(f"{text[:80]!r} is not a list of places of a picture")
    return [Place(*row) for row in rows]


def parse_captions(text: str) -> list[str]:
    """Parse captions from the text that a store keeps, one per line."""
    return text.split("\n") if text else []
