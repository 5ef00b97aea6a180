"""Errors of stores as one sentence that names the store, in place of the messages of LanceDB or a server's client.

One decorator wraps every method of a store, so that none can be forgotten.
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
PANIC = "PanicException"  # type of an error in LanceDB's Rust code; not a subclass of `Exception`
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)  # the text is the system's
LONGEST = 300  # characters of a reason
FILE = re.compile(r"[^\s'\"(),:]*\.(?:lance|manifest|idx|txn|arrow|bin)\b")
SOURCE = re.compile(r",?\s*(?:\S*/)?(?:\.cargo|rust|src)/\S*\.rs\S*")  # source location in the library


def raise_usage_errors(store: type[Any]) -> type[Any]:
    """Make every method of a class of stores raise only `UsageError`.

    An object's `where` describes it in messages; its `suspect()`, if it has one, returns the file that looks damaged.
    """
    for name in METHODS:
        setattr(store, name, _wrap(getattr(store, name)))
    return store


def _wrap(method: Callable[..., Any]) -> Callable[..., Any]:
    if isgeneratorfunction(method):

        @wraps(method)
        def each(self: Any, *given: Any, **named: Any) -> Iterator[Any]:
            with _usage_errors(self):
                yield from method(self, *given, **named)

        return each

    @wraps(method)
    def one(self: Any, *given: Any, **named: Any) -> Any:
        with _usage_errors(self):
            return method(self, *given, **named)

    return one


@contextmanager
def _usage_errors(store: Any) -> Iterator[None]:
    try:
        yield
    except UsageError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != PANIC:
            raise
        raise UsageError(_message(store, error)) from error


def _message(store: Any, error: BaseException) -> str:
    where = getattr(store, "where", "the store")
    text = str(error)
    for number in FULL:
        if os.strerror(number) in text or getattr(error, "errno", None) == number:
            return (
                f"{where} cannot be read or written ({os.strerror(number)}); free space or fix permissions, then run "
                "the same command again: what was committed is kept"
            )
    file = FILE.search(text)
    named = _find_suspect(store) or (file[0] if file else "")
    reason = SOURCE.sub("", " ".join(text.split()))[:LONGEST] or type(error).__name__
    return (
        f"{where} is damaged or gone ({named}{': ' if named else ''}{type(error).__name__}: {reason}); restore it "
        "from a backup, or index the images into another folder"
    )


def _find_suspect(store: Any) -> str:
    try:
        return str(store.suspect())
    except (AttributeError, OSError):
        return ""
