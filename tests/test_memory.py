"""Freed memory stays with the process and those that it starts, with glibc alone, and only if a command asks for it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from qformer import memory

ROOT = Path(__file__).parent.parent
#: A block that glibc would give back each time, since a larger one has never been freed before.
TOUCH = """
import ctypes, resource
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
def faults():
    blocks = [libc.malloc(20 << 20) for _ in range(4)]
    for block in blocks: libc.memset(block, 1, 20 << 20)
    for block in blocks: libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = faults(), faults(), faults()
print(before[2] - before[1])
"""
KEPT = "from qformer.memory import keep_freed_memory; assert keep_freed_memory()\n"


def faults(begin: str, **changes: str) -> int:
    """Page faults of the third use of 80 MiB in a process of its own."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    run = [sys.executable, "-c", begin + TOUCH]
    done = subprocess.run(run, env=clean | changes, cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such options")
def test_freed_memory_is_touched_again_without_faults() -> None:
    pages = (80 << 20) // os.sysconf("SC_PAGE_SIZE")
    assert faults("import qformer.memory\n") > pages / 2
    assert faults(KEPT) < pages / 100
    started = {name: str(value) for _, value, name in memory.OPTIONS}  # what the processes that it starts inherit
    assert faults("", **started) < pages / 100


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("MALLOC_TRIM_THRESHOLD_", "131072"), ("GLIBC_TUNABLES", "glibc.malloc.arena_max=2")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            before = dict(os.environ)
            assert not memory.keep_freed_memory()
            assert dict(os.environ) == before


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(memory.ctypes, "CDLL", None)
    assert not memory.keep_freed_memory()
