"""What a version of a Lance table says of files outside its own folder, as one that was cloned without its data does.

LanceDB follows such a place, an address too, before anybody can ask, and shows it nowhere. So the one field is read
from the manifest itself: `base_paths` of `Manifest` in Lance's table.proto, a protobuf message in front of the file's
end.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

MANIFESTS = "lance/**/*.manifest"
ENDS = {".lance": b"LANC", ".manifest": b"LANC", ".arrow": b"ARROW1"}
BASE_PATHS, PATH = 18, 4  # numbers of fields
SIZES = {1: 8, 5: 4}  # of numbers of fixed length, by wire type


def places_elsewhere(folder: Path) -> list[str]:
    """Folders and addresses outside the gallery's `folder` that its tables name; a manifest that is damaged names none.

    Whoever opens the table says what is wrong with a damaged one.
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
    """Whether the gallery's `folder` holds anything that a table of ours committed, be it damaged.

    LanceDB 0.34 has a table of its own there, `__manifest`, from the first connection on.
    """
    return any(not file.relative_to(folder / "lance").parts[0].startswith("__") for file in folder.glob(MANIFESTS))


def cut_off(folder: Path) -> str:
    """The first of a gallery's files of LanceDB's that does not end as such a file does; empty if all do."""
    for file in sorted((folder / "lance").rglob("*")):
        end = ENDS.get(file.suffix)
        if end is not None and file.is_file():
            with file.open("rb") as opened:
                opened.seek(max(file.stat().st_size - len(end), 0))
                if opened.read() != end:
                    return str(file)
    return ""


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of each field of a protobuf message that has a length.

    Raises:
        IndexError, KeyError: it is no such message.
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
    """A number of variable length, and where it ends."""
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
