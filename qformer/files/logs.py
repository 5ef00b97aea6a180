"""A log of bounded size for a process that is left running: its errors, warnings, and what our loggers say.

And texts of others as they may stand in a log or on a terminal.
"""

from __future__ import annotations

import logging
import re
from contextlib import contextmanager, redirect_stderr, suppress
from io import TextIOBase
from logging.handlers import RotatingFileHandler
from typing import TYPE_CHECKING

from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: Control characters, other ends of lines, reversed writing, and halves of surrogate pairs but for bytes of file names.
COMMANDS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udc7f\udd00-\udfff]")
MAX_BYTES = 10_000_000  # of a file
FILES = 5  # the current one, and the older ones beside it: FILE.1, FILE.2 ...
MAX_LINE = 10_000  # characters


def printable(text: str, kept: str = "") -> str:
    """A text of somebody else with "?" for what would command a terminal or turn its lines round, but for `kept`."""
    return COMMANDS.sub(lambda found: found[0] if found[0] in kept else "?", text)


class _Rotating(RotatingFileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """Lose a line that cannot be written, as on a full disk: its message would be written here, too."""

    def close(self) -> None:
        with suppress(OSError):
            super().close()


class _Lines(TextIOBase):
    """Stream whose lines go to a log."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger, self._rest = logger, ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._logger.warning("%s", line[:MAX_LINE])
        self._rest = self._rest[:MAX_LINE]
        return len(text)


@contextmanager
def logging_to(file: Path) -> Iterator[None]:
    """Write everything that goes to a logger or to the standard error into a file that only its owner can read.

    At `MAX_BYTES` it is renamed to FILE.1, the one before to FILE.2, and the oldest is removed.

    Raises:
        UsageError: the file cannot be written.
    """
    try:
        file.touch(0o600)
        handler = _Rotating(
            file, maxBytes=MAX_BYTES, backupCount=FILES - 1, encoding="utf-8", errors="backslashreplace"
        )
    except OSError as error:
        raise UsageError(f"the log '{file}' cannot be written ({error.strerror}); give --log another file") from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root, ours = logging.getLogger(), logging.getLogger("qformer")
    before = ours.level
    root.addHandler(handler)
    ours.setLevel(logging.INFO)
    try:
        with redirect_stderr(_Lines(logging.getLogger("qformer.stderr"))):
            yield
    finally:
        ours.setLevel(before)
        root.removeHandler(handler)
        handler.close()
