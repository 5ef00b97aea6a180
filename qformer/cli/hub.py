"""The command `qformer push`, with its imports inside."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from qformer.cli.options import NoVerify, Trust


class Target(Enum):
    """Form of the uploaded files."""

    qformer = "qformer"
    transformers = "transformers"


def push(
    source: Annotated[str, typer.Argument(metavar="CKPT", help="run, checkpoint, or anything `qformer convert` takes")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="user/name on the hub")],
    to: Annotated[
        Target, typer.Option(help="form to upload; that of transformers includes the towers")
    ] = Target.qformer,
    private: Annotated[
        bool, typer.Option("--private", help="create the repository, if it is new, as a private one")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only write the folder; needs -o")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="keep the folder here; must not exist")] = None,
    trust: Trust = False,
    _verify: NoVerify = False,
) -> None:
    """Put a checkpoint on the Hugging Face hub, with a card written from its run. `qformer.load` takes REPO."""
    from qformer.commands.pushing import push as run

    print(run(source, repo, to.value, private=private, dry_run=dry_run, to=output, trust=trust))
