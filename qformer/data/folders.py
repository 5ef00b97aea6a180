"""Folders of images: the choice of files, and a report of all others before anything is read.

A file in an unsupported format is not a bad sample but is left out; such files are counted by suffix and reported once.
"""

from __future__ import annotations

import os
import stat
import unicodedata
import warnings
from collections import Counter
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from qformer.data.encodings import decode_text, lines_of
from qformer.formats import SUFFIXES, UNREAD, is_system_file
from qformer.images import read_file
from qformer.types import BadSample, LeftOut, Sample, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

TEXT = ".txt"
#: Suffixes of files that often lie next to images and are not worth a report.
BESIDE = frozenset({TEXT, ".json", ".jsonl", ".csv", ".tsv", ".md", ".html", ".xml", ".yaml", ".yml", ".parquet"})
SHOWN = 8  # suffixes to report
HEIC = frozenset({".heic", ".heif", ".hif"})


@dataclass
class Listing:
    """Images below a folder, in the order of their paths, and a count of everything that was left out.

    Attributes:
        images: images in supported formats, by suffix; they have not been opened yet.
        unread: images in other formats.
        captions: text file of an image, if its name is not that of the image with `.txt`, but has `.TXT` or another
            Unicode form of accents.
        others: number of other files by suffix.
        system: number of system files and folders of macOS, Windows and drives.
        special: number of pipes, sockets and devices without the suffix of an image.
        closed: folders that cannot be opened.
        alone: number of text files without an image.
        unused: patterns of `exclude` that match nothing.
    """

    images: list[Path] = field(default_factory=list)
    unread: list[Path] = field(default_factory=list)
    captions: dict[Path, Path] = field(default_factory=dict)
    others: Counter[str] = field(default_factory=Counter)
    system: int = 0
    special: int = 0
    closed: list[str] = field(default_factory=list)
    alone: int = 0
    unused: list[str] = field(default_factory=list)

    @property
    def left_out(self) -> str:
        """Report of what was left out; empty if there is nothing to report."""
        endings = Counter(file.suffix.lower() for file in self.unread)
        heic = ", or install pillow-heif" if HEIC & endings.keys() else ""
        counts = {
            f"formats that are not supported (convert them{heic})": _format_counts(endings),
            "not images by their names": _format_counts(self.others),
            "files and folders of macOS, Windows or a drive (such as ._*)": f"{self.system:,}",
            "pipes, sockets and devices": f"{self.special:,}",
            f"{TEXT} without an image": f"{self.alone:,}",
            "folders that cannot be opened": f"{len(self.closed):,} ({', '.join(self.closed[:SHOWN])})",
        }
        return "; ".join(f"{what}: {count}" for what, count in counts.items() if count and not count.startswith("0"))


def _format_counts(endings: Counter[str]) -> str:
    shown = [f"{count:,} {ending or 'without an ending'}" for ending, count in endings.most_common(SHOWN)]
    rest = endings.total() - sum(count for _, count in endings.most_common(SHOWN))
    return ", ".join([*shown, f"{rest:,} others"] if rest else shown)


def list_images(root: Path, exclude: Sequence[str] = ()) -> Listing:
    """List the images anywhere below a folder; linked folders are followed, each once, and no file is opened.

    Args:
        exclude: patterns (`*`, `?`, `[...]`) of files and folders to skip, by name or by path below `root`.
    """
    found = Listing(unused=list(exclude))
    waiting, seen = [root], set()
    while waiting:
        place = waiting.pop()
        try:
            status = os.stat(place)
            with os.scandir(place) as inside:
                entries = sorted(inside, key=lambda entry: entry.name)
        except OSError:
            found.closed.append(str(place))
            continue
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        folders: list[Path] = []
        files: list[os.DirEntry[str]] = []
        for entry in _filter_entries(entries, root, place, exclude, found):
            below = _is_folder(entry)
            if below:
                folders.append(place / entry.name)
            if not below or os.path.splitext(entry.name)[1].lower() in SUFFIXES:  # reported when it is read
                files.append(entry)
        waiting += reversed(folders)
        _sort_files(place, files, found)
    found.images.sort()
    found.unread.sort()
    return found


def _filter_entries(
    entries: list[os.DirEntry[str]], root: Path, place: Path, exclude: Sequence[str], found: Listing
) -> Iterator[os.DirEntry[str]]:
    for entry in entries:
        below = (place / entry.name).relative_to(root).as_posix() if exclude else ""
        names = (entry.name, below, f"/{below}")  # the last for a leading `**/`, which may match no folder
        matching = [one for one in exclude if any(fnmatchcase(name, _strip_pattern(one)) for name in names)]
        if matching:
            found.unused = [one for one in found.unused if one not in matching]
        elif is_system_file([entry.name]):
            found.system += 1
        else:
            yield entry


def _strip_pattern(pattern: str) -> str:
    return pattern.removeprefix("./").rstrip("/")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links
        return False


def _sort_files(place: Path, entries: list[os.DirEntry[str]], found: Listing) -> None:
    """Sort the files of one folder into images and others."""
    texts = {}
    stems = set()
    images = []
    for entry in entries:
        stem, ending = os.path.splitext(entry.name)
        ending = ending.lower()
        if ending in SUFFIXES:
            images.append(place / entry.name)
            stems.add(_normalize(stem))
        elif not _is_file(entry):
            found.special += 1
        elif ending in UNREAD:
            found.unread.append(place / entry.name)
            stems.add(_normalize(stem))
        elif ending == TEXT:
            texts[_normalize(stem)] = entry.name
        elif ending not in BESIDE:
            found.others[ending] += 1
    found.images += images
    found.alone += len(texts.keys() - stems)
    for image in images:
        text = texts.get(_normalize(image.stem))
        if text is not None and text != image.stem + TEXT:
            found.captions[image] = place / text


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Check if an entry is a regular file or a broken link, which counts as an image that cannot be read."""
    try:
        return stat.S_ISREG(entry.stat().st_mode)
    except OSError:
        return True


def _normalize(stem: str) -> str:
    return unicodedata.normalize("NFC", stem)


@dataclass(frozen=True)
class Folder:
    """Image files anywhere below `path`, each with a .txt file of the same name that has one caption per line.

    Linked folders are followed, each once. A warning reports the files that are left out.

    Attributes:
        path: the folder.
        exclude: one pattern or several (`*`, `?`, `[...]`) of files and folders to leave out, by name or by path below
            `path`.
    """

    path: str
    exclude: str | list[str] = field(default_factory=list)
    _files: list[Path] = field(init=False, repr=False, compare=False)
    _captions: dict[Path, Path] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        root = Path(self.path)
        if not root.is_dir():
            raise UsageError(
                f"no folder at '{root}'; data.path of a folder source must hold images, with .txt files next to them"
            )
        found = list_images(root, [self.exclude] if isinstance(self.exclude, str) else self.exclude)
        left = f"'{root}': left out: {found.left_out}" if found.left_out else ""
        if not found.images:
            excluded = " that is not excluded" if self.exclude else ""
            raise UsageError(
                f"no image below '{root}' in a supported format{excluded}{left and f', left out: {found.left_out}'}; "
                f"put {', '.join(sorted(SUFFIXES))} files there"
            )
        for message in [left, *(f"'{root}': exclude '{one}' matches nothing" for one in found.unused)]:
            if message:
                warnings.warn(message, LeftOut, stacklevel=1)
        object.__setattr__(self, "_files", found.images)
        object.__setattr__(self, "_captions", found.captions)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Sample:
        image = self._files[index]
        text = self._captions.get(image, image.with_suffix(TEXT))
        try:
            captions = [line for line in lines_of(decode_text(read_file(text))) if line.strip()]
        except BadSample as bad:
            if bad.kind != "missing":  # an image without captions is useless for training only
                raise BadSample("no caption", bad.detail) from bad
            captions = []
        return Sample(image=image, key=str(image), captions=captions)
