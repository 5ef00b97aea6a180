"""Identity of a picture: which records show the same one, and whether it is still the one that was seen before.

There is one rule, which every `Sample` follows: the id that its source has for it; without one the path of its file,
however that is spelled; and where there is no file, the bytes.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

FOLDERS = 4096  # whose links are looked up once
MISSING = "missing"


def of_picture(image: Any, given: Any = None, name: str = "") -> str | int:
    """What equals for records of the same picture.

    Args:
        image: as of a `Sample`. given: the id of its source, if that has one.
        name: of the record, which is all there is where `image` is of another kind.
    """
    known = plain_id(given)
    if known is not None:
        return known
    if isinstance(image, str | os.PathLike):
        return of_path(image)
    return f"bytes {digest(image)}" if holds_bytes(image) else name


def plain_id(value: Any) -> str | int | None:
    """An id as a text or a whole number; None for what names nothing, such as NaN or an empty text.

    Tables with gaps have 42.0 where 42 is meant.
    """
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str):
        return value if value.strip() else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def of_path(path: str | os.PathLike[str]) -> str:
    """The absolute path of a file: links, `.` and `..` resolved, in NFC. It need not exist."""
    given = os.fspath(path)
    folder, name = os.path.split(given)
    try:
        folder = _resolve(folder if os.path.isabs(folder) else os.path.join(os.getcwd(), folder))
        whole = os.path.join(folder, name)
        if name in ("", ".", "..") or os.path.islink(whole):
            whole = os.path.realpath(whole)
    except (OSError, ValueError):  # a zero byte in the name, or the working folder is gone
        whole = given
    return unicodedata.normalize("NFC", whole)


@lru_cache(maxsize=FOLDERS)
def _resolve(folder: str) -> str:
    return os.path.realpath(folder)


def holds_bytes(image: Any) -> bool:
    """Whether it is encoded bytes or an array."""
    return isinstance(image, bytes | bytearray) or hasattr(image, "tobytes")


def digest(image: Any) -> str:
    """Of encoded bytes, or of an array with its shape and type."""
    if isinstance(image, bytes | bytearray):
        return hashlib.blake2b(image, digest_size=16).hexdigest()
    known = hashlib.blake2b(f"{getattr(image, 'shape', '')} {getattr(image, 'dtype', '')}".encode(), digest_size=16)
    known.update(image.tobytes())
    return known.hexdigest()


def stamp(image: Any) -> str:
    """What differs once a picture is another one: the size and the time of its file, or the digest of its bytes."""
    if isinstance(image, str | os.PathLike):
        found = look(image)
        return MISSING if found is None else "{} {}".format(*found)
    return digest(image) if holds_bytes(image) else ""


def look(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """Bytes of a file and when they were written, in ns; None if it cannot be looked at."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_size, found.st_mtime_ns


def is_same(path: Path, size: int, time: int, known: str) -> bool:
    """Whether a file is what it was, by its size and time; where the time alone differs, by its bytes.

    One that cannot be looked at is not another one. `size` is -1 of one that was not there.

    Args:
        known: `digest` of what it was, or the beginning of it.
    """
    found = look(path)
    if found is None or found == (size, time):
        return True
    if found[0] != size:
        return False
    try:
        return digest(path.read_bytes()).startswith(known)
    except OSError:
        return True
