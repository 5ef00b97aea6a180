"""The command line. Commands import what they need when they run, so that `--help` is quick and needs no torch.

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

from qformer.cli import compare, evaluate, gallery, hub, language, mining, page, probe, tiles, towers, train

LINES = "\n\t"  # signs of a message that stay as they are
NO_ROOM = "DefaultCPUAllocator: can't allocate memory"  # torch raises a RuntimeError
INTERRUPTED = 130  # exit code of typer on Ctrl-C

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
app.add_typer(towers.app, name="towers")
app.command("eval")(evaluate.evaluate)
app.command()(compare.compare)
app.command()(gallery.index)
app.command()(gallery.search)
app.command("mine-pairs")(mining.mine_pairs)
app.command()(hub.push)
app.command()(language.caption)
app.command()(language.ask)
app.command()(train.capfilt)
app.command()(tiles.tiles)
app.command()(probe.probe)
app.command()(train.convert)
app.command()(page.demo)


def main() -> None:
    """Run the `qformer` command."""
    debug = "--debug" in sys.argv
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # print names that are not UTF-8 as bytes
    failed: list[int] = []
    if os.environ.get("WORLD_SIZE", "1") != "1":
        atexit.register(_exit_if_failed, failed)  # registered first, so that it runs last
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it reports every unused tensor of a truncated tower
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        from qformer.memory import keep_freed_memory
        from qformer.types import LeftOut

        keep_freed_memory()

        with warnings.catch_warnings():
            warnings.simplefilter("default", LeftOut)
            warnings.showwarning = _show_warning
            app(arguments)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            print("qformer: interrupted; run the same command again to resume what can be resumed", file=sys.stderr)
        raise
    except Exception as error:
        if debug:
            raise
        from qformer.files.logs import printable

        usage = any(kind.__name__ == "UsageError" for kind in type(error).__mro__)
        told = str(error) if usage else f"{type(error).__name__}: {error} (--debug shows where)"
        if isinstance(error, MemoryError) or NO_ROOM in told:
            usage, told = True, "this needs more memory than the machine has; give smaller sizes, such as data.batch"
        print(f"qformer: {printable(told, kept=LINES)}", file=sys.stderr)
        failed.append(2 if usage else 1)
        sys.exit(failed[0])


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print data that are left out as one line, in the first of several processes; other warnings as usual."""
    if category.__name__ != "LeftOut":
        (file or sys.stderr).write(warnings.formatwarning(message, category, filename, lineno, line))
    elif os.environ.get("RANK", "0") == "0":
        print(f"qformer: {message}", file=sys.stderr)


def _exit_if_failed(failed: list[int]) -> None:
    """Exit at once in a failed one of several processes, since gloo's threads abort later when a peer has died."""
    if failed:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(failed[0])
