"""Why an update did not come by a picture: nobody lists it any more, it is gone, or nobody could look.

A disk that is not mounted leaves no trace of its pictures: its folder is not there, or is empty. So a picture counts
as gone only where the folder that held it is there and holds something; everywhere else it may be back tomorrow.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qformer.images.formats import UNREAD

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from qformer.retrieval.entries import Place

    #: `stands`: what held it was read, and its source has it no more. `missing`: its file is gone from a folder that
    #: holds others. `away`: so is the folder, or it is empty, or the file is a link to nowhere. `shut`: there was no
    #: looking, for want of permission or because reading failed.
    Why = Literal["stands", "missing", "away", "shut"]

LEFT = ("lost+found",)  # what an empty disk holds; names that begin with a dot count as little
TARS = (".tar", ".tgz")


class Absence:
    """Says of places why they were not met.

    Attributes:
        faults: of the samples that could not be read. roots: folders that the source lists itself, with all below.
    """

    def __init__(self, faults: Sequence[Mapping[str, str]], choice: Mapping[str, Any]) -> None:
        self.roots = {os.path.abspath(path) for path in _paths(choice)}
        self._unreadable = {fault["path"] for fault in faults if fault["kind"] == "unreadable"}
        told = (fault["path"] for fault in faults if fault["kind"] == "no caption")
        self._untold = {os.path.abspath(os.path.splitext(path)[0]) for path in told}
        self._whole = not any(fault["kind"].endswith(("shard", "tar")) for fault in faults)
        self._read = not any(fault["kind"] == "not json" for fault in faults)  # or its line named a picture
        self._listable = cache(_listable)

    def why(self, place: Place) -> Why:
        """Of a place that was not met."""
        if place.size < 0:
            return self._of_record(place.name)
        absent = of_file(place.name)
        if absent != "stands":
            return absent
        if Path(place.name).suffix.lower() in UNREAD:  # another machine may read it
            return "shut"
        unread = place.name in self._unreadable or os.path.splitext(place.name)[0] in self._untold
        return "shut" if unread or not self._read or not self._listed(place.name) else "stands"

    def _of_record(self, name: str) -> Why:
        tar = tar_of(name)
        absent = "stands" if tar is None else of_file(tar)
        if absent == "stands":
            return "stands" if self._whole else "shut"
        return absent if self._whole or absent == "shut" else "away"  # its source names the tar, and misses it

    def _listed(self, name: str) -> bool:
        """Whether the folders above a file, as far as its source lists them, can be listed."""
        above = []
        for folder in map(str, Path(name).parents):
            above.append(folder)
            if folder in self.roots:
                return all(map(self._listable, above))
        return self._listable(above[0])


def of_file(name: str) -> Why:
    """Why there is no file of that name; `stands` if there is one."""
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


def tar_of(name: str) -> str | None:
    """The tar on this machine that holds a record of that name, if it is in one."""
    if not os.path.isabs(name):
        return None
    parts = Path(name).parts
    ends = (number for number, part in enumerate(parts, 1) if any(end in part.lower() for end in TARS))
    return next((str(Path(*parts[:number])) for number in ends), None)


def _paths(choice: Mapping[str, Any]) -> Iterator[str]:
    """Folders that a source names, those of a mix among them."""
    for value in (choice.get("path"), choice.get("images")):
        if isinstance(value, str):
            yield value
    for part in choice.get("sources") or ():
        yield from _paths(part)
