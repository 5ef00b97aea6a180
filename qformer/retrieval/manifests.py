"""References of a Lance table to files outside its own folder, such as those of a table cloned without its data.

LanceDB follows such a reference, even to an address, before it can be inspected, and does not expose it. So one field
is read from the manifest directly: `base_paths` of `Manifest` in Lance's table.proto, a protobuf message just before
the end of the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

MANIFESTS = "lance/**/*.manifest"
ENDS = {".lance": b"LANC", ".manifest": b"LANC", ".arrow": b"ARROW1"}
BASE_PATHS, PATH = 18, 4  # numbers of fields
SIZES = {1: 8, 5: 4}  # bytes of fixed-length numbers by wire type


def find_outside_places(folder: Path) -> list[str]:
    """Find folders and addresses outside the gallery's `folder` that its tables name.

    Damaged manifests are skipped; opening the table reports them.
    """
    found = []
    for manifest in sorted(folder.glob(MANIFESTS)):
        data = manifest.read_bytes()
        start = int.from_bytes(data[-16:-8], "little")
        size = int.from_bytes(data[start : start + 4], "little")
        try:
            bases = [value for field, value in _fields(data[start + 4 : start + 4 + size]) if field == BASE_PATHS]
            paths = [value for base in bases for field, value in _fields(base) if field == PATH]
        except (IndexError, KeyError):
            continue
        found += [path.decode("utf-8", "replace") for path in paths]
    return found


def written(folder: Path) -> bool:
    """Check whether the gallery's `folder` holds a commit to one of our tables, damaged or not.

    LanceDB 0.34 creates a table of its own there, `__manifest`, at the first connection.
    """
    return any(not file.relative_to(folder / "lance").parts[0].startswith("__") for file in folder.glob(MANIFESTS))


def find_truncated(folder: Path) -> str:
    """Find the first LanceDB file of a gallery that lacks its end marker; empty if all files have theirs."""
    for file in sorted((folder / "lance").rglob("*")):
        end = ENDS.get(file.suffix)
        if end is not None and file.is_file():
            with file.open("rb") as opened:
                opened.seek(max(file.stat().st_size - len(end), 0))
                if opened.read() != end:
                    return str(file)
    return ""


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of each length-delimited field of a protobuf message.

    Raises:
        IndexError, KeyError: not such a message.
    """
    place = 0
    while place < len(data):
        tag, place = _number(data, place)
        size = SIZES.get(tag & 7, 0)
        if tag & 7 == 0:
            _, place = _number(data, place)
        elif tag & 7 == 2:
            size, place = _number(data, place)
            yield tag >> 3, data[place : place + size]
        elif not size:
            raise KeyError(tag)
        place += size


def _number(data: bytes, place: int) -> tuple[int, int]:
    """A number of variable length, and the position after it."""
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
