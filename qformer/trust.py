"""Trust in names: names that the user typed may run code, names from somebody else's file may not.

The user types the configuration, the overrides and options of a command line, and the arguments of a call in Python. A
checkpoint, a run, a gallery or a store may have been made by anybody. So a `Choice` read from one records its origin
(`Choice.read_from`) and is built inside `reading`, where the few places that import a class, run a command or call an
address ask `judge` first. Choices that are never built are never judged.
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
    """Somebody else's file names code, a command or an address, and the user has not chosen to trust it."""


@contextmanager
def reading(origin: str) -> Iterator[None]:
    """Context in which names come from `origin`, such as "the gallery 'g'"; empty if they were typed or are trusted."""
    before = _origin.set(origin)
    try:
        yield
    finally:
        _origin.reset(before)


def judge(name: str, would: str) -> None:
    """Accept a name that was typed or whose origin is trusted.

    Args:
        would: what would happen to the name, for the message: `IMPORTED`, `COMMANDED`, `CALLED` or `WRITTEN`.

    Raises:
        Untrusted: a name of any other origin.
    """
    if origin := _origin.get():
        raise Untrusted(
            f"{origin} names {name!r}, which would {would}; pass --trust (in Python trust=True) if you trust whoever "
            "made it"
        )
