"""Folders into which one process at a time may write."""

from __future__ import annotations

from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import ExitStack
    from pathlib import Path

LOCK = ".lock"


def claim(stack: ExitStack, folder: Path, is_own: Callable[[set[str]], bool], holds: str, doing: str) -> None:
    """Make a folder and keep other processes from writing into it, until the stack is left.

    Args:
        is_own: tells from the names in the folder, without the lock, if it may be written to.
        holds: what such a folder holds, such as `a gallery`.
        doing: what the other process does then, such as `indexes`.

    Raises:
        UsageError: it holds something else, cannot be written, or another process has claimed it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not is_own({one.name for one in folder.iterdir()} - {LOCK}):
            raise UsageError(f"'{folder}' holds something else than {holds}; give a new folder with -o")
        stack.enter_context(FileLock(folder / LOCK).acquire(timeout=0))
    except Timeout as error:
        raise UsageError(f"another process {doing} into '{folder}'; wait until it ends, or stop it") from error
    except NotImplementedError:  # some network file systems have no locks
        pass
    except OSError as error:
        raise UsageError(f"'{folder}' cannot be written ({error.strerror}); give another folder with -o") from error
