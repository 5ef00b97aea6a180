"""The commands of a gallery, `qformer index` and `qformer search`, with their imports inside."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from qformer.cli.options import Device, NoVerify, Trust


class Packing(Enum):
    """Stored form of the image encoder's tokens."""

    fp16 = "fp16"
    int8 = "int8"


Checkpoint = Annotated[
    str,
    typer.Argument(metavar="CKPT", help="stage-one checkpoint: run, .pth, release or folder; or the folder of a CLIP"),
]


def index(
    path: Checkpoint,
    data: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGES...", help="folder, JSON lines, tars, a CONFIG (its data.train), or key=value ..."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="INDEX", help="folder of the gallery")],
    store: Annotated[
        str | None, typer.Option(help="lance (in that folder; the default), or qdrant://host:port for a server")
    ] = None,
    features: Annotated[
        Packing | None, typer.Option(help="store the image encoder's tokens, so that re-ranking does not read images")
    ] = None,
    batch: Annotated[int, typer.Option(help="images embedded and committed at once", min=1)] = 64,
    device: Device = None,
    trust: Trust = False,
    remove: Annotated[
        bool,
        typer.Option(
            "--remove", help="remove every absent image, even too many at once or those of a disk not mounted"
        ),
    ] = False,
    _verify: NoVerify = False,
) -> None:
    """Embed images into a gallery to search. The same command again updates it: new, changed, moved, deleted images.

    Several processes share the work: `torchrun --nproc-per-node N -m qformer index ...`.
    """
    from qformer.commands.searching import index as run

    kept = None if features is None else features.value
    run(path, data, output, store=store, features=kept, batch=batch, device=device, trust=trust, remove=remove)


def search(
    path: Checkpoint,
    folder: Annotated[Path, typer.Argument(metavar="INDEX", help="folder that `qformer index` wrote")],
    text: Annotated[str | None, typer.Argument(metavar="[TEXT]", help="what to look for, in quotes")] = None,
    image: Annotated[Path | None, typer.Option(help="search for images like this one; with TEXT, by both")] = None,
    k: Annotated[int, typer.Option("--k", "-k", help="hits to show", min=1)] = 10,
    shortlist: Annotated[int, typer.Option(help="candidates by cosine that ITM re-ranks; 0 for none", min=0)] = 64,
    where: Annotated[
        list[str] | None,
        typer.Option(help="only images that meet a condition, such as width>1000 or path~holiday; repeatable"),
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="read every image's embeddings, not the index")] = False,
    html: Annotated[Path | None, typer.Option(help="write an HTML page of thumbnails")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the hits as JSON")] = False,
    device: Device = None,
    trust: Trust = False,
    _verify: NoVerify = False,
) -> None:
    """Search a gallery by text, by image, or by both."""
    from qformer.commands.searching import search as run

    run(
        path,
        folder,
        text,
        image,
        k=k,
        shortlist=shortlist,
        where=where or [],
        exact=exact,
        html=html,
        as_json=as_json,
        device=device,
        trust=trust,
    )
