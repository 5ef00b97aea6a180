"""Whose word a name is: what the user typed may run, what was read from somebody else's file may not.

Typed are the configuration, the overrides and the options of this command line, and the arguments of a call in Python.
A checkpoint, a run, a gallery or a store is a file that anybody may have made. So what is read from it knows where it
comes from (`Choice.read_from`), and when it is built, inside `reading`, the few places that would import a class, start
a command or call an address ask `judge` first. What is never built is never judged.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

IMPORTED, COMMANDED, CALLED = "be imported and run", "be run as a command", "be called over the network"
WRITTEN = "be written into"
_origin: ContextVar[str] = ContextVar("origin", default="")


class Untrusted(UsageError):
    """A file of somebody else names code, a command or an address, and nobody has said to trust it."""


@contextmanager
def reading(origin: str) -> Iterator[None]:
    """Inside, names were read from `origin`, such as "the gallery 'g'"; empty: they were typed, or are trusted."""
    before = _origin.set(origin)
    try:
        yield
    finally:
        _origin.reset(before)


def judge(name: str, would: str) -> None:
    """Let a name pass that was typed, or whose origin is trusted; `would` is what would happen to it.

    Raises:
        Untrusted: any other.
    """
    if origin := _origin.get():
        raise Untrusted(
            f"{origin} names {name!r}, which would {would}; pass --trust (in Python trust=True) if you trust whoever "
            "made it"
        )
