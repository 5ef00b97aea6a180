"""The command `qformer probe`, with its imports inside."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from qformer.cli.language import Quantize
from qformer.cli.options import Device, NoVerify, Trust


class Probe(Enum):
    """One of the probes."""

    position = "counting-position"
    size = "counting-size"
    padding = "padding"
    geometry = "geometry"


Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CKPT] [KEY=VALUE]...",
        help="stage-two checkpoint: run, .pth, release, folder or hub id; and options of --strategy, such as size=120; "
        "or several folders that -o wrote, to compare them",
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        help="instead: an image-text-to-text model of transformers, by name or folder; with --server, its name there"
    ),
]
Server = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="instead: an OpenAI-compatible server, such as http://localhost:8000/v1; its key is read from the "
        "environment variable QFORMER_API_KEY",
    ),
]
Strategy = Annotated[
    str | None,
    typer.Option(help="measure this strategy without a model; with CKPT: cut pictures by it, not as in training"),
]
Every = Annotated[bool, typer.Option("--all", help="measure all strategies, without a model")]
Only = Annotated[Probe | None, typer.Option(help="one probe; by default all that can be made")]
Tile = Annotated[
    int | None,
    typer.Option(help="side of the tiles that pictures are made for; by default that of CKPT, or 512", min=32),
]
Repeats = Annotated[
    int | None, typer.Option(help="pictures of a kind; by default 15 by position, 30 by size, 5 of padding", min=1)
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="DIR", help="folder for numbers, pictures, the page and the answers"),
]


def probe(
    words: Words = None,
    model: Model = None,
    server: Server = None,
    strategy: Strategy = None,
    every: Every = False,
    only: Only = None,
    tile: Tile = None,
    repeats: Repeats = None,
    seed: Annotated[int, typer.Option(help="equal seeds draw equal pictures", min=0)] = 0,
    batch: Annotated[int, typer.Option(help="questions at once", min=1)] = 16,
    timeout: Annotated[float, typer.Option(help="seconds for a reply of the server", min=0.1)] = 120.0,
    output: Output = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, one object")] = False,
    device: Device = None,
    quantize: Quantize = None,
    trust: Trust = False,
    _verify: NoVerify = False,
) -> None:
    """Probe how a model sees: counting by position and by size, padding; and how strategies cut pictures.

    The pictures are drawn as in LLaVA-UHD, section 3. The same command again asks only what has no answer yet.
    """
    from qformer.commands import probe_comparison, probing
    from qformer.types import UsageError

    paths, options = probing.split_words(words or [])
    if results := probe_comparison.find_results(paths):
        if model or server or strategy or every or options:
            raise UsageError(f"'{paths[0]}' and others are results to compare, and nobody is asked; leave the rest out")
        probe_comparison.compare_results(results, output, as_json)
        return
    if len(paths) > 1:
        raise UsageError(
            f"'{paths[0]}' and '{paths[1]}' were given; give one checkpoint, or folders that -o wrote, to compare them"
        )
    settings = probing.Settings(
        checkpoint=paths[0] if paths else None,
        model=model,
        server=server,
        strategy=strategy,
        every=every,
        options=options,
        only=only and only.value,
        tile=tile,
        repeats=repeats,
        seed=seed,
        batch=batch,
        timeout=timeout,
        output=output,
        as_json=as_json,
        device=device,
        quantize=quantize and quantize.value,
        trust=trust,
    )
    probing.probe(settings)
