"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer


def _take_unchecked(context: typer.Context, given: bool) -> None:
    """For as long as the command runs."""
    if given:
        from qformer.files.soundness import unchecked

        context.with_resource(unchecked())


#: Not handed to the command, whose parameter of this kind keeps its default.
NoVerify = Annotated[
    bool,
    typer.Option(
        "--no-verify",
        callback=_take_unchecked,
        expose_value=False,
        help="do not compare files of ours with their checksums, nor refuse weights that are not finite",
    ),
]

Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="run the classes and commands, and call the addresses, that a checkpoint or gallery names: only if you "
        "trust whoever made it, who can then do on this machine what you can",
    ),
]
