"""Tar shards with random access: an index of the position of each sample, and a cache of fetched shards.

A shard is a tar in webdataset's format: consecutive members that share their name up to the first dot are one sample
(`000/17.jpg`, `000/17.txt`; `qformer.data.members` handles names with dots). Local tars are read in place. Others (a
URL, `pipe:command`, a compressed tar) are fetched once into a folder that all workers share, and are deleted when the
folder grows too large.

The index of a shard is made on first use and kept in that folder. From then on it determines the number of samples of
the shard, so a resumed run counts like the interrupted one, even if a shard has been lost since. A missing shard or a
damaged part of a tar counts as one bad sample.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from filelock import FileLock

from qformer.data.members import Member, sample_in, samples_of, split
from qformer.files.records import replacing
from qformer.types import BadSample

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

OPEN = 256  # indices and files kept open
LOST = np.array([[-1, -1], [0, 0]], dtype=np.int64)  # index of a shard that cannot be read at all


@dataclass
class Shards:
    """Tars by name, in a fixed order.

    Attributes:
        names: paths, or names that `fetch` understands.
        folder: folder for indices and fetched tars, created when needed.
        keep: maximum bytes of fetched tars in it.
        fetch: returns the function that writes the tar of a name to a file, or None for a tar that is read in place.
            The function raises FileNotFoundError if there is no such tar.
        owned: temporary `folder`, which is deleted with this object.
    """

    names: list[str]
    folder: Path
    keep: float
    fetch: Callable[[str], Callable[[Path], None] | None]
    owned: TemporaryDirectory[str] | None = None
    _rows: OrderedDict[int, np.ndarray] = field(default_factory=OrderedDict)
    _files: OrderedDict[int, BinaryIO] = field(default_factory=OrderedDict)
    _counts: dict[int, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def count(self, shard: int) -> int:
        if shard not in self._counts:
            self._counts[shard] = len(self._index(shard)) - 1
        return self._counts[shard]

    def prepare(self, shards: Sequence[int]) -> None:
        """Fetch the shards that will be needed next, in the background."""
        far = [shard for shard in shards if self.fetch(self.names[shard]) is not None]
        if far:
            threading.Thread(target=self._prepare, args=(far,), daemon=True).start()

    def _prepare(self, shards: list[int]) -> None:
        for shard in shards:
            try:
                self._path(shard)
            except Exception:  # the reader of the shard will get and report the same error
                return

    def read(self, shard: int, place: int) -> tuple[str, dict[str, bytes]]:
        """Read the key of a sample and its members by extension.

        Raises:
            BadSample: kinds `missing shard`, `broken shard` (nothing in it can be read), `changed shard` (since it was
                counted), `broken tar` (a damaged part of it).
        """
        name, rows = self.names[shard], self._index(shard)
        start, stop = rows[place + 1].tolist()
        if stop == 0:
            path = Path(name)
            raise BadSample("broken shard" if self.fetch(name) is None and path.exists() else "missing shard", name)
        try:
            file = self._open(shard)
            size = os.fstat(file.fileno()).st_size
            block = os.pread(file.fileno(), stop - start, start)
        except FileNotFoundError as error:
            raise BadSample("missing shard", name) from error
        except OSError as error:
            raise BadSample("broken shard", f"{name}: {error.strerror}") from error
        if size != rows[0, 0]:
            raise BadSample("changed shard", name)
        return _read_members(block, f"{name}, byte {start}")

    def _index(self, shard: int) -> np.ndarray:
        """Get the index of a shard, int64[1 + n, 2]: size of the tar, then start and end of each sample, in bytes."""
        if shard not in self._rows:
            path = self._cache_path(shard, ".npy")
            if not path.is_file():
                with FileLock(path.with_suffix(".lock")):
                    if not path.is_file():  # another worker may have been faster
                        self._count(shard, path)
            self._rows[shard] = np.load(path)
            if len(self._rows) > OPEN:
                self._rows.popitem(last=False)
        return self._rows[shard]

    def _count(self, shard: int, path: Path) -> None:
        try:
            rows = index(self._path(shard))
        except OSError:
            rows = LOST
        with replacing(path) as partial, partial.open("wb") as file:
            np.save(file, rows)

    def _open(self, shard: int) -> BinaryIO:
        if shard not in self._files:
            path = self._path(shard)
            for other, file in list(self._files.items()):
                if os.fstat(file.fileno()).st_nlink == 0:  # deleted, but on the disk as long as it is open
                    self._files.pop(other).close()
            self._files[shard] = path.open("rb")
            if len(self._files) > OPEN:
                self._files.popitem(last=False)[1].close()
        return self._files[shard]

    def _path(self, shard: int) -> Path:
        """Get the local path of a tar, fetching it if necessary."""
        fetch = self.fetch(self.names[shard])
        if fetch is None:
            return Path(self.names[shard])
        path = self._cache_path(shard, ".tar")
        if not path.is_file():
            with FileLock(path.with_suffix(".fetch")):
                if not path.is_file():
                    with replacing(path) as partial:
                        fetch(partial)
                    self._evict(path)
        return path

    def _evict(self, newest: Path) -> None:
        """Delete the oldest fetched tars. Open files stay readable, and a tar that is needed is fetched again."""
        own = {
            self._cache_path(shard, ".tar").name for shard in range(len(self))
        }  # another source may use the same folder
        tars = [
            (tar.stat().st_mtime_ns, tar.stat().st_size, tar) for tar in self.folder.glob("*.tar") if tar.name in own
        ]
        total = 0
        for _, size, tar in sorted(tars, reverse=True):
            total += size
            if total > self.keep and tar != newest:
                tar.unlink(missing_ok=True)

    def _cache_path(self, shard: int, suffix: str) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        name = self.names[shard]
        local = os.path.abspath(name) if self.fetch(name) is None else name
        stem = "".join(c if c.isalnum() else "-" for c in name[-24:])
        return self.folder / f"{stem}-{hashlib.sha1(local.encode()).hexdigest()[:12]}{suffix}"


def index(path: Path) -> np.ndarray:
    """Index the samples of a tar, int64[1 + n, 2]: the size of the file, then (start, end) of each sample in bytes.

    A damaged part in the middle or at the end is listed like a sample.

    Raises:
        OSError: the file cannot be read, or is empty.
    """
    if path.exists() and not path.is_file():  # reading from a pipe could block forever
        raise OSError(f"'{path}' is not a file")
    size = path.stat().st_size
    rows, run, endings, end = [(size, 0)], list[Member](), set[str](), 0
    with path.open("rb") as file:
        try:
            # Damaged headers are skipped like zeros, up to the next valid one.
            tar = tarfile.TarFile(fileobj=file, ignore_zeros=True)
            while (member := tar.next()) is not None:
                if _holds_data(file, end, member.offset):
                    rows += [*samples_of(run), (end, member.offset)]
                    run = []
                if tar.offset <= member.offset:
                    break  # a negative size, with which tarfile would loop forever
                end = min(tar.offset, size)
                named = _name_of(member)
                if named is None:
                    continue
                if run and (named[0] != run[0].key or named[1] in endings):
                    rows += samples_of(run)
                    run = []
                if not run:
                    endings = set()
                endings.add(named[1])
                run.append(Member(*named, member.offset, end))
        except OSError:
            raise
        except Exception as error:  # damage can raise nearly anything; or the last member is cut off
            if not size:
                raise OSError(f"'{path}' is empty") from error
        rows += samples_of(run)
        if _holds_data(file, end, size):
            rows.append((end, size))
    return np.array(rows, dtype=np.int64)


def _name_of(file: tarfile.TarInfo) -> tuple[str, str] | None:
    """Split the name of a member as in `split`; links are kept, so that their samples lack an image or a caption."""
    return None if file.isdir() else split(file.name)


def _holds_data(file: BinaryIO, start: int, stop: int) -> bool:
    """Check if any byte between two offsets of a file is not zero."""
    if start >= stop:
        return False
    place = file.tell()
    file.seek(start)
    found = False
    while start < stop and not found and (block := file.read(min(1 << 20, stop - start))):
        found = any(block)
        start += len(block)
    file.seek(place)
    return found


def _read_members(block: bytes, where: str) -> tuple[str, dict[str, bytes]]:
    found: list[tuple[Member, bytes | None]] = []
    try:
        with tarfile.open(fileobj=io.BytesIO(block), mode="r:") as tar:
            for member in tar:
                if tar.offset <= member.offset:
                    break
                named = _name_of(member)
                if named is not None:
                    opened = tar.extractfile(member) if member.isfile() else None
                    found.append((Member(*named), None if opened is None else opened.read()))
    except Exception as error:  # damage can raise nearly anything
        raise BadSample("broken tar", f"{where}: {error}") from error
    if not found:
        raise BadSample("broken tar", f"{where}: no member")
    key, endings = sample_in([member for member, _ in found])
    return key, {ending: data for place, ending in endings.items() if (data := found[place][1]) is not None}


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a file with this content, without times or owners, so that equal contents give equal tars."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
