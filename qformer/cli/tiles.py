"""The command `qformer tiles`, with its imports inside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def tiles(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="image file")],
    options: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="options of the strategy, such as max_tiles=6; or of CONFIG"),
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            help="fixed, pad_square, uhd, internvl, anyres, oryx, qwen2vl, overlap512, or your own as module:Class; "
            "by default all"
        ),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="all strategies side by side")] = False,
    config: Annotated[
        list[Path] | None,
        typer.Option(metavar="CONFIG", help="instead: the strategy and the costs of a configuration; repeat it"),
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help="estimate the time on this GPU, such as h200; by default here, measured")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="draw the tiles, numbered, as a PNG")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="print JSON, a list with an object for each strategy")
    ] = False,
) -> None:
    """Show how resolution strategies cut a picture: tiles, tokens, the share that is no padding, and cost.

    The time to the first token is an estimate: operations of image encoder, connector and language model, divided by
    the rate of matrix products, measured here, or by 0.4 of a GPU's peak. Without CONFIG all strategies have one model:
    ViT-g/14, an MLP, Qwen2-7B.
    """
    from qformer.commands.tiles import show
    from qformer.types import UsageError

    if every and strategy is not None:
        raise UsageError(f"--all and --strategy {strategy} exclude each other; give one of them")
    if config and (every or strategy is not None):
        raise UsageError("--config brings its own strategy; give it alone, or --all or --strategy")
    systems = machine = None
    if config or gpu is not None:
        from qformer.config import load_config
        from qformer.stages.plan import first_token

        machine = None if gpu is None else first_token.gpu(gpu)
        device = "cpu" if gpu is None else "cuda"
        if config:
            systems = {str(path): first_token.Reader(load_config(path, options), device) for path in config}
    show(image, strategy, options or [], output, as_json, systems, machine)
