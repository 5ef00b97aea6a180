"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="run the classes and commands, and call the addresses, that a checkpoint or gallery names: only if you "
        "trust whoever made it, who can then do on this machine what you can",
    ),
]
