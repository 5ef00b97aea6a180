"""Expansion of patterns to names of shards, and fetching of shards to plain local tars."""

from __future__ import annotations

import bz2
import glob
import gzip
import lzma
import os
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
import zlib
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from qformer import trust
from qformer.files.records import replacing
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

PIPE = "pipe:"
REMOTE = re.compile(r"[a-z][a-z0-9+.-]+://")
BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")  # other braces may belong to a command
MAGIC = re.compile(r"[*?\[]")
PACKED = {".gz", ".tgz", ".bz2", ".xz"}
STARTS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
CHAIN = "::"  # separator of chained addresses in fsspec
MOST = 1_000_000  # names from one pattern
TRIES = 3
FULL = 1 << 20  # a disk with fewer free bytes is full
WAIT = 2.0  # seconds before the second try; twice as long before the third


def expand(patterns: str | list[str]) -> list[str]:
    """Expand patterns to names of shards: `{000..331}`, `{a,b}`, and `*`, `?`, `[...]` where files can be listed.

    Raises:
        UsageError: there is no shard, or `*` is in a place that cannot be listed; or (`Untrusted`) a command or an
            address comes from somebody else's file.
    """
    names = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for name in _expand_braces(pattern.removeprefix("file://").removeprefix("file:")):
            _check_trust(name)
            names += _list_matches(name) if MAGIC.search(name) and not name.startswith(PIPE) else [name]
    if names and all(os.path.isdir(name) for name in names):
        raise UsageError(f"'{names[0]}' is a folder; name the tars in it, such as '{names[0].rstrip('/')}/*.tar'")
    if not any(fetcher(name) is not None or Path(name).exists() for name in names):
        raise UsageError(
            f"no shard at '{patterns}'; data.shards must be tars: paths or URLs with {{000..331}} or *, or pipe:command"
        )
    return list(dict.fromkeys(names))


def expand_local(patterns: str | list[str]) -> list[str]:
    """Expand patterns to existing files.

    Raises:
        UsageError: a file does not exist; or (`Untrusted`) an address comes from somebody else's file.
    """
    names = [patterns] if isinstance(patterns, str) else patterns
    wanted = [name for pattern in names for name in _expand_braces(pattern)]
    for name in wanted:
        if REMOTE.match(name) or CHAIN in name:
            trust.judge(name, trust.CALLED)
    files = [file for name in wanted for file in (_list_matches(name) if MAGIC.search(name) else [name])]
    missing = next((file for file in files if not REMOTE.match(file) and not Path(file).is_file()), None)
    if missing is not None and Path(missing).is_dir():
        raise UsageError(f"'{missing}' is a folder; data.path must name files, such as '{missing}/*.json'")
    if missing is not None or not files:
        raise UsageError(f"no file at '{missing or patterns}'; data.path must name files that exist")
    return files


def _expand_braces(pattern: str) -> list[str]:
    """Expand braces, unless there is a file of exactly that name."""
    own = not pattern.startswith(PIPE) and not REMOTE.match(pattern) and os.path.exists(pattern)
    return [pattern] if own else braces(pattern)


def braces(pattern: str) -> list[str]:
    """Expand `a{0..2}.tar` to a0.tar a1.tar a2.tar, keeping leading zeros, and `{a,b}` to a b; several multiply."""
    found = BRACES.search(pattern)
    if found is None:
        return [pattern]
    first, last, listed = found.groups()
    if first is not None:
        if int(last) - int(first) > MOST:
            raise UsageError(f"'{pattern}' is more than {MOST:,} shards; give fewer")
        inner = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    else:
        inner = listed.split(",")
    parts = [pattern[: found.start()] + part + pattern[found.end() :] for part in inner]
    found_all: dict[str, None] = {}
    for part in parts:
        found_all |= dict.fromkeys(braces(part))
        if len(found_all) > MOST:
            raise UsageError(f"'{pattern}' is more than {MOST:,} shards; give fewer")
    return list(found_all)


def _check_trust(name: str) -> None:
    """Check commands and addresses after braces are expanded, which can hide them, and before anything is listed."""
    if name.startswith(PIPE):
        trust.judge(name, trust.COMMANDED)
    elif REMOTE.match(name) or CHAIN in name:
        trust.judge(name, trust.CALLED)


def _list_matches(pattern: str) -> list[str]:
    if not REMOTE.match(pattern):
        found = sorted(glob.glob(_escape_existing(pattern), recursive=True))
        return [f"./{name}" if name.startswith(PIPE) else name for name in found]  # a file of that name is no command
    if pattern.startswith(("http://", "https://")):  # HTTP cannot list *, and ? starts a query
        if "*" in pattern:
            raise UsageError(f"'{pattern}' cannot be listed over HTTP; write the numbers as in {{00000..00331}}.tar")
        return [pattern]
    files, path = _file_system(pattern)
    return sorted(files.unstrip_protocol(name) for name in files.glob(path))


def _escape_existing(pattern: str) -> str:
    """Escape the leading part of a pattern that exists literally, such as a folder `photos [2024]`."""
    parts = pattern.split("/")
    there = takewhile(lambda count: os.path.exists("/".join(parts[:count]) or "/"), range(1, len(parts) + 1))
    count = max(there, default=0)
    return "/".join([*map(glob.escape, parts[:count]), *parts[count:]])


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec  # slow to import, and only needed here

    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UsageError(f"'{url}' cannot be opened ({error}); install what it needs, or use pipe:command") from error


def fetcher(name: str) -> Callable[[Path], None] | None:
    """Get the function that fetches a tar into a file; None for a plain local tar."""
    if name.startswith(PIPE) or REMOTE.match(name) or Path(name).suffix in PACKED:
        return partial(_fetch, name)
    return None


def _fetch(name: str, path: Path) -> None:
    """Fetch a shard, with three tries unless it does not exist.

    Raises:
        FileNotFoundError: there is no such file, the server refuses, or the command fails.
        UsageError: the network fails, or the disk is full.
    """
    for attempt in range(TRIES):
        try:
            with path.open("wb") as file:
                _copy(name, file)
            _unpack(path)
            return
        except FileNotFoundError:
            raise
        except urllib.error.HTTPError as error:
            if 400 <= error.code < 500 and error.code != 429:
                raise FileNotFoundError(f"{name}: {error}") from error
            last: Exception = error
        except subprocess.CalledProcessError as error:
            last = FileNotFoundError(f"{name}: exit code {error.returncode}")
        except (OSError, EOFError) as error:
            last = error
        if shutil.disk_usage(path.parent).free < FULL:
            raise UsageError(
                f"no room for '{name}' in '{path.parent}'; lower data.keep_gb, or set data.cache elsewhere"
            )
        if attempt < TRIES - 1:
            time.sleep(WAIT * (attempt + 1))
    if isinstance(last, FileNotFoundError) or not REMOTE.match(name):
        raise FileNotFoundError(str(last))
    raise UsageError(
        f"'{name}' could not be fetched in {TRIES} tries ({last}); run the command again when the network is back"
    )


def _copy(name: str, file: BinaryIO) -> None:
    if name.startswith(PIPE):
        subprocess.run(name.removeprefix(PIPE), shell=True, stdout=file, check=True)
    elif name.startswith(("http://", "https://")):
        with urllib.request.urlopen(name, timeout=60) as response:
            shutil.copyfileobj(response, file)
            if response.length:  # bytes that have not arrived: the connection was lost
                raise OSError(f"{response.length} bytes are missing")
    elif REMOTE.match(name):
        files, path = _file_system(name)
        with files.open(path, "rb") as source:
            shutil.copyfileobj(source, file)
    elif Path(name).exists() and not Path(name).is_file():  # reading from a pipe could block forever
        raise FileNotFoundError(f"{name}: not a file")
    else:
        with Path(name).open("rb") as local:
            shutil.copyfileobj(local, file)


def _unpack(path: Path) -> None:
    """Decompress a compressed tar in place; a damaged one as far as it can be read."""
    with path.open("rb") as file:
        start = file.read(6)
    opener = next((opener for magic, opener in STARTS.items() if start.startswith(magic)), None)
    if opener is None:
        return
    with replacing(path) as plain, opener(path, "rb") as packed, plain.open("wb") as file:
        try:
            while block := packed.read1(1 << 16):  # `read` would lose the data before the damage
                file.write(block)
        except (OSError, EOFError, lzma.LZMAError, zlib.error):
            file.write(b"damaged")  # so that the index counts the lost end as a bad sample
