"""The command `qformer mine-pairs`, with its imports inside."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from qformer.cli.options import Device, NoVerify, Trust


class Pooling(Enum):
    """Ways to make one vector of an image encoder's tokens."""

    cls = "cls"
    mean = "mean"


ENCODER = "folder of a CLIP (projected embedding) or image encoder, mini:NAME, a YAML with a section vision, or a CKPT"
Images = Annotated[
    list[str],
    typer.Argument(
        metavar="IMAGES...", help="folder, JSON lines, tars, a gallery, a CONFIG (its data.train), or key=value ..."
    ),
]
Quantiles = Annotated[
    str | None,
    typer.Option(
        metavar="NEAR,FAR", help="instead: quantiles of the cosines of all pairs, such as 0.999,0.2, as thresholds"
    ),
]


def mine_pairs(
    data: Images,
    near: Annotated[str, typer.Option(metavar="ENCODER", help=f"takes a pair for the same: {ENCODER}")],
    far: Annotated[str, typer.Option(metavar="ENCODER", help="tells them apart: an encoder, given in the same ways")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="folder of what is found")],
    above: Annotated[float, typer.Option(help="near cosines are above it")] = 0.95,
    below: Annotated[float, typer.Option(help="far cosines are below it")] = 0.6,
    quantiles: Quantiles = None,
    near_pooling: Annotated[
        Pooling | None, typer.Option(help="vector of a near encoder of patches; by default cls if it has a CLS token")
    ] = None,
    far_pooling: Annotated[Pooling | None, typer.Option(help="the same of the far encoder")] = None,
    shown: Annotated[
        int, typer.Option("--pairs", help="pairs on the sheet and in Questions.csv; pairs.jsonl has more", min=1)
    ] = 150,
    once: Annotated[bool, typer.Option("--once", help="show no picture in two pairs")] = False,
    server: Annotated[
        str | None, typer.Option(metavar="URL", help="OpenAI-compatible server whose model names MMVP's patterns")
    ] = None,
    model: Annotated[str | None, typer.Option(help="model there, if it has several")] = None,
    timeout: Annotated[float, typer.Option(help="seconds for a reply of the server", min=0.1)] = 60.0,
    batch: Annotated[int, typer.Option(help="pictures embedded and committed at once", min=1)] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="print mined.json")] = False,
    device: Device = None,
    trust: Trust = False,
    _verify: NoVerify = False,
) -> None:
    """Find pictures that one encoder takes for the same and another tells apart, as MMVP was made.

    DIR gets pairs.jsonl, sheet.html to look at and to answer, Questions.csv to fill in and "MMVP Images", in MMVP's
    layout. The same command again goes on where it was interrupted, and keeps questions that are filled in.
    """
    from qformer.commands.mining import MiningSettings, mine

    settings = MiningSettings(
        near,
        far,
        near_pooling and near_pooling.value,
        far_pooling and far_pooling.value,
        above=above,
        below=below,
        quantiles=quantiles,
        shown=shown,
        once=once,
        server=server,
        model=model,
        timeout=timeout,
        batch=batch,
        device=device,
        trust=trust,
        as_json=as_json,
    )
    mine(data, output, settings)
