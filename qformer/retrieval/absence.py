"""Reasons why an update did not find a picture: its source no longer lists it, it is gone, or it could not be checked.

A disk that is not mounted leaves no trace of its pictures: its folder does not exist, or is empty. So a picture counts
as gone only if its folder exists and is not empty; otherwise it may be back tomorrow.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qformer.formats import UNREAD

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from qformer.retrieval.entries import Place

    #: `stands`: its folder or tar was read, but its source no longer lists it. `missing`: its file is gone from a
    #: folder that holds others. `away`: the folder is gone too, or empty, or the file is a dangling link. `shut`: it
    #: could not be checked, because permission is missing or reading failed.
    Reason = Literal["stands", "missing", "away", "shut"]

LEFT = ("lost+found",)  # an empty disk holds it; it does not count, and neither do names that begin with a dot
TARS = (".tar", ".tgz")


class Absence:
    """Reasons why an update did not find places of a source.

    Args:
        faults: records of the samples that could not be read.
        choice: configuration of the source.

    Attributes:
        roots: absolute paths of the folders that the source lists, with everything below them.
    """

    def __init__(self, faults: Sequence[Mapping[str, str]], choice: Mapping[str, Any]) -> None:
        self.roots = {os.path.abspath(path) for path in _paths(choice)}
        self._unreadable = {fault["path"] for fault in faults if fault["kind"] == "unreadable"}
        uncaptioned = (fault["path"] for fault in faults if fault["kind"] == "no caption")
        self._uncaptioned = {os.path.abspath(os.path.splitext(path)[0]) for path in uncaptioned}
        self._whole = not any(fault["kind"].endswith(("shard", "tar")) for fault in faults)
        self._read = not any(fault["kind"] == "not json" for fault in faults)  # such a line may have named a picture
        self._listable = cache(_listable)

    def explain(self, place: Place) -> Reason:
        """Explain why a place was not found."""
        if place.size < 0:
            return self._check_record(place.name)
        absent = check_file(place.name)
        if absent != "stands":
            return absent
        if Path(place.name).suffix.lower() in UNREAD:  # another machine may read it
            return "shut"
        unread = place.name in self._unreadable or os.path.splitext(place.name)[0] in self._uncaptioned
        return "shut" if unread or not self._read or not self._listed(place.name) else "stands"

    def _check_record(self, name: str) -> Reason:
        tar = find_tar(name)
        absent = "stands" if tar is None else check_file(tar)
        if absent == "stands":
            return "stands" if self._whole else "shut"
        return absent if self._whole or absent == "shut" else "away"  # the source names the tar but cannot find it

    def _listed(self, name: str) -> bool:
        """Check that the folders above a file can be listed, up to the folder that its source lists."""
        above = []
        for folder in map(str, Path(name).parents):
            above.append(folder)
            if folder in self.roots:
                return all(map(self._listable, above))
        return self._listable(above[0])


def check_file(name: str) -> Reason:
    """Explain why a file does not exist; `stands` if it does."""
    try:
        os.stat(name)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError):
        return "shut"
    else:
        return "stands"
    if os.path.lexists(name):
        return "away"
    try:
        with os.scandir(os.path.dirname(name)) as found:
            held = any(not one.name.startswith(".") and one.name not in LEFT for one in found)
    except (FileNotFoundError, NotADirectoryError):
        return "away"
    except OSError:
        return "shut"
    return "missing" if held else "away"


def _listable(folder: str) -> bool:
    try:
        with os.scandir(folder) as found:
            next(found, None)
    except OSError:
        return False
    return os.access(folder, os.X_OK)


def find_tar(name: str) -> str | None:
    """Find the tar on this machine that holds the named record; None if no tar does."""
    if not os.path.isabs(name):
        return None
    parts = Path(name).parts
    ends = (number for number, part in enumerate(parts, 1) if any(end in part.lower() for end in TARS))
    return next((str(Path(*parts[:number])) for number in ends), None)


def _paths(choice: Mapping[str, Any]) -> Iterator[str]:
    """Yield the folders that a source names, including those of the parts of a mix."""
    for value in (choice.get("path"), choice.get("images")):
        if isinstance(value, str):
            yield value
    for part in choice.get("sources") or ():
        yield from _paths(part)
