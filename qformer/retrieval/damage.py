"""What a store raises, in one sentence that names it: LanceDB and a server's client tell of damage in words of theirs.

One place, so that no method of a store can forget it.
"""

from __future__ import annotations

import errno
import os
import re
from contextlib import contextmanager
from functools import wraps
from inspect import isgeneratorfunction
from typing import TYPE_CHECKING, Any

from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

METHODS = ("__init__", "__len__", "known", "commit", "get", "nearest", "nearest_captions", "refresh")
PANIC = "PanicException"  # what an error in LanceDB's own code comes as; it is no `Exception`
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)  # told by their own words
LONGEST = 300  # letters of a reason
FILE = re.compile(r"[^\s'\"(),:]*\.(?:lance|manifest|idx|txn|arrow|bin)\b")
SOURCE = re.compile(r",?\s*(?:\S*/)?(?:\.cargo|rust|src)/\S*\.rs\S*")  # where in the library it happened


def told(store: type[Any]) -> type[Any]:
    """A class of stores whose methods raise only `UsageError`.

    `where` of an object says what it is, for people, and `suspect()`, if it has that, which file looks damaged.
    """
    for name in METHODS:
        setattr(store, name, _telling(getattr(store, name)))
    return store


def _telling(method: Callable[..., Any]) -> Callable[..., Any]:
    if isgeneratorfunction(method):

        @wraps(method)
        def each(self: Any, *given: Any, **named: Any) -> Iterator[Any]:
            with _sentence(self):
                yield from method(self, *given, **named)

        return each

    @wraps(method)
    def one(self: Any, *given: Any, **named: Any) -> Any:
        with _sentence(self):
            return method(self, *given, **named)

    return one


@contextmanager
def _sentence(store: Any) -> Iterator[None]:
    try:
        yield
    except UsageError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != PANIC:
            raise
        raise UsageError(_words(store, error)) from error


def _words(store: Any, error: BaseException) -> str:
    where = getattr(store, "where", "the store")
    text = str(error)
    for number in FULL:
        if os.strerror(number) in text or getattr(error, "errno", None) == number:
            return (
                f"{where} cannot be read or written ({os.strerror(number)}); make room, or mend that, and give the "
                "same command: what was committed is kept"
            )
    file = FILE.search(text)
    named = _suspect(store) or (file[0] if file else "")
    reason = SOURCE.sub("", " ".join(text.split()))[:LONGEST] or type(error).__name__
    return (
        f"{where} is damaged or gone ({named}{': ' if named else ''}{type(error).__name__}: {reason}); give it back "
        "what it had, or index the images into another folder"
    )


def _suspect(store: Any) -> str:
    try:
        return str(store.suspect())
    except (AttributeError, OSError):
        return ""
