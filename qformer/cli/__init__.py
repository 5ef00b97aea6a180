"""The command line. Every command imports what it needs itself, so that `--help` is quick and needs no torch.

Exit codes: 0 done, 1 failed, 2 wrong usage. Errors are one sentence; `--debug` shows the traceback.
"""

from __future__ import annotations

import atexit
import io
import os
import sys
import warnings
from typing import TextIO

import typer

from qformer.cli import evaluate, gallery, hub, language, page, train

INTERRUPTED = 130  # what typer exits with on Ctrl-C

app = typer.Typer(
    help="BLIP-2's Q-Former bridge: train both stages, retrieve, caption, ask.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(train.train)
app.command()(train.features)
app.command("config")(train.show_config)
app.command()(train.plan)
app.command()(train.quickstart)
app.command()(train.backbones)
app.command("eval")(evaluate.evaluate)
app.command()(gallery.index)
app.command()(gallery.search)
app.command()(hub.push)
app.command()(language.caption)
app.command()(language.ask)
app.command()(train.capfilt)
app.command()(train.convert)
app.command()(page.demo)


def main() -> None:
    """The `qformer` command."""
    debug = "--debug" in sys.argv
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # a name that is no UTF-8 is printed as the disk has it
    failed: list[int] = []
    if os.environ.get("WORLD_SIZE", "1") != "1":
        atexit.register(_end, failed)  # before all others, so that it is called after them
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it reports every tensor of a tower that is cut
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        from qformer.types import LeftOut

        with warnings.catch_warnings():
            warnings.simplefilter("default", LeftOut)
            warnings.showwarning = _tell
            app(arguments)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            print("qformer: interrupted; what can be resumed goes on by the same command", file=sys.stderr)
        raise
    except Exception as error:
        if debug:
            raise
        usage = any(kind.__name__ == "UsageError" for kind in type(error).__mro__)
        print(
            f"qformer: {error}" if usage else f"qformer: {type(error).__name__}: {error} (--debug shows where)",
            file=sys.stderr,
        )
        failed.append(2 if usage else 1)
        sys.exit(failed[0])


def _tell(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """What the data have that is left out, as one line, of several processes by the first; other warnings as ever."""
    if category.__name__ != "LeftOut":
        (file or sys.stderr).write(warnings.formatwarning(message, category, filename, lineno, line))
    elif os.environ.get("RANK", "0") == "0":
        print(f"qformer: {message}", file=sys.stderr)


def _end(failed: list[int]) -> None:
    """Of several processes, one that failed ends here: gloo's threads abort later on when a peer has died."""
    if failed:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(failed[0])
