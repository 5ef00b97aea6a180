"""The `qformer` command in this process, for fixtures and tests that want what it prints."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from unittest import mock

from qformer import cli


def outcome(*words: object) -> tuple[int, str, str]:
    """`outcome("config", "x.yaml")` -> exit code, standard output and standard error."""
    code: object = 0
    out, err = io.StringIO(), io.StringIO()
    arguments = mock.patch.object(sys, "argv", ["qformer", *map(str, words)])
    with arguments, redirect_stdout(out), redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
    assert isinstance(code, int)
    return code, out.getvalue(), err.getvalue()


def command(*words: object) -> str:
    """Standard output; an exit code other than 0 fails."""
    code, out, err = outcome(*words)
    assert code == 0, err
    return out
