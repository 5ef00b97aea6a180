"""Identity of images: which records show the same image, and if an image has changed since it was seen.

Every `Sample` follows one rule: the identity is the id from its source; without one, the normalized path of its file;
without a file, a digest of the bytes.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

FOLDERS = 4096  # cached folders with resolved links
MISSING = "missing"


def of_picture(image: Any, given: Any = None, name: str = "") -> str | int:
    """Identity of an image, equal for all records that show it.

    Args:
        image: the field of a `Sample`; several pictures are the same image if each of them is, in the same order.
        given: the id from its source, if there is one.
        name: name of the record, used if `image` is neither a path nor data.
    """
    known = plain_id(given)
    if known is not None:
        return known
    if isinstance(image, list):
        return " + ".join(str(of_picture(one, name=name)) for one in image)
    if isinstance(image, str | os.PathLike):
        return of_path(image)
    return f"bytes {digest(image)}" if holds_bytes(image) else name


def plain_id(value: Any) -> str | int | None:
    """Normalize an id to a text or an integer; None for a value that identifies nothing, such as NaN or empty text.

    Tables with gaps have 42.0 for 42.
    """
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str):
        return value if value.strip() else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def of_path(path: str | os.PathLike[str]) -> str:
    """Absolute path of a file in NFC, with links, `.` and `..` resolved. The file need not exist."""
    given = os.fspath(path)
    folder, name = os.path.split(given)
    try:
        folder = _resolve(folder if os.path.isabs(folder) else os.path.join(os.getcwd(), folder))
        whole = os.path.join(folder, name)
        if name in ("", ".", "..") or os.path.islink(whole):
            whole = os.path.realpath(whole)
    except (OSError, ValueError):  # a null byte in the name, or the working directory was deleted
        whole = given
    return unicodedata.normalize("NFC", whole)


@lru_cache(maxsize=FOLDERS)
def _resolve(folder: str) -> str:
    return os.path.realpath(folder)


def holds_bytes(image: Any) -> bool:
    """Check if an image is encoded bytes or an array."""
    return isinstance(image, bytes | bytearray) or hasattr(image, "tobytes")


def digest(image: Any) -> str:
    """Hash encoded bytes, or an array with its shape and dtype, to 32 hexadecimal digits."""
    if isinstance(image, bytes | bytearray):
        return hashlib.blake2b(image, digest_size=16).hexdigest()
    known = hashlib.blake2b(f"{getattr(image, 'shape', '')} {getattr(image, 'dtype', '')}".encode(), digest_size=16)
    known.update(image.tobytes())
    return known.hexdigest()


def stamp(image: Any) -> str:
    """Fingerprint that changes with an image: size and modification time of its file, or the digest of its bytes."""
    if isinstance(image, list):
        return " + ".join(map(stamp, image))
    if isinstance(image, str | os.PathLike):
        found = look(image)
        return MISSING if found is None else "{} {}".format(*found)
    return digest(image) if holds_bytes(image) else ""


def look(path: str | os.PathLike[str] | list[Path]) -> tuple[int, int] | None:
    """Size in bytes and modification time in ns of a file, or of a list of them together; None if one is not there."""
    if isinstance(path, list):
        seen = [found for found in map(look, path) if found is not None]
        return (sum(size for size, _ in seen), max(time for _, time in seen)) if len(seen) == len(path) else None
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_size, found.st_mtime_ns


def is_same(path: Path | list[Path], size: int, time: int, known: str) -> bool:
    """Check if a file is unchanged, by its size and time, or by its bytes if only the time differs; or a list of files.

    A file that cannot be accessed counts as unchanged.

    Args:
        size: earlier size in bytes; -1 if the file did not exist.
        time: earlier modification time in ns.
        known: earlier `digest`, or the beginning of it.
    """
    found = look(path)
    if found is None or found == (size, time):
        return True
    if found[0] != size:
        return False
    try:
        paths = path if isinstance(path, list) else [path]
        return digest(b"".join(one.read_bytes() for one in paths)).startswith(known)
    except OSError:
        return True
