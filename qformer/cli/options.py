"""Options that several commands share."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


def _take_unchecked(context: typer.Context, given: bool) -> None:
    """Skip the checks for as long as the command runs."""
    if given:
        from qformer.files.soundness import unchecked

        context.with_resource(unchecked())


#: Not passed to the command, whose parameter keeps its default.
NoVerify = Annotated[
    bool,
    typer.Option(
        "--no-verify",
        callback=_take_unchecked,
        expose_value=False,
        help="skip the checksums of our files, and accept weights that are not finite",
    ),
]

Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="run the classes and commands, and call the addresses, that a checkpoint or gallery names: only if you "
        "trust its author, who can then do on this machine what you can",
    ),
]

ConfigFile = Annotated[
    Path,
    typer.Argument(metavar="CONFIG", help="YAML file, or the name of a shipped one, such as quickstart/stage1.yaml"),
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="such as train.steps=1000")]


class Form(Enum):
    """Form of a checkpoint."""

    qformer = "qformer"
    lavis = "lavis"
    transformers = "transformers"


class Precision(Enum):
    """Dtype of autocast."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; by default the GPU if there is one")]
