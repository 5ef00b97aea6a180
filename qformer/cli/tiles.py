"""The command `qformer tiles`, with its imports inside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def tiles(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="image file")],
    options: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="options of the strategy, such as max_tiles=6"),
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            help="fixed, pad_square, uhd, internvl, anyres, oryx, qwen2vl, or your own as module:Class; by default all"
        ),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="all strategies side by side")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="draw the tiles, numbered, as a PNG")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="print JSON, a list with an object for each strategy")
    ] = False,
) -> None:
    """Show how resolution strategies cut a picture: tiles, tokens, the share that is no padding, and cost."""
    from qformer.commands.tiles import show
    from qformer.types import UsageError

    if every and strategy is not None:
        raise UsageError(f"--all and --strategy {strategy} exclude each other; give one of them")
    show(image, strategy, options or [], output, as_json)
