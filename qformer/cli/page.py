"""The command of the page: `qformer demo`. Imports stand inside."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from qformer.cli.options import NoVerify, Trust

RUN = Path("runs/quickstart/opt")
EXAMPLES = 120  # drawn scenes in the gallery that a page without a checkpoint has
PASSWORD = "QFORMER_PASSWORD"

Port: TypeAlias = Annotated[
    int | None, typer.Option(help="the first free one from 7860 on by default", min=1, max=65535)
]
Host: TypeAlias = Annotated[
    str, typer.Option(help="address or name at which to listen; 0.0.0.0 for all addresses of this machine")
]
RootPath: TypeAlias = Annotated[
    str, typer.Option(help="where a proxy serves the page: a path (/demo), or the whole address (https://.../demo)")
]
AllowHost: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="a name under which visitors reach the page; may be given again"),
]
Share: TypeAlias = Annotated[
    bool, typer.Option("--share", help="a public address too, through machines of Gradio's makers")
]
Auth: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="USER[:PASS]",
        help=f"let in only who knows both; PASS is better left out here and set as ${PASSWORD}",
    ),
]


class Bits(Enum):
    """How the language model is kept."""

    int8 = "int8"
    nf4 = "nf4"


def demo(
    path: Annotated[
        str | None,
        typer.Argument(
            metavar="[CKPT]",
            help=f"of either stage, whatever the other commands take; {RUN} by default, or else the same bridge, "
            "trained in minutes and kept",
        ),
    ] = None,
    stage1: Annotated[
        str | None,
        typer.Option(help="stage-one checkpoint, to match and to search; the one that CKPT started from by default"),
    ] = None,
    index: Annotated[Path | None, typer.Option(help="gallery to search, a folder that `qformer index` wrote")] = None,
    port: Port = None,
    host: Host = "127.0.0.1",
    root_path: RootPath = "",
    allow_host: AllowHost = None,
    share: Share = False,
    auth: Auth = None,
    queue: Annotated[int, typer.Option(help="requests that may wait; more are told to come again", min=1)] = 64,
    quantize: Annotated[
        Bits | None, typer.Option(help="keep the language model in 8 or 4 bits; as it was trained by default")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; the GPU where there is one by default")] = None,
    trust: Trust = False,
    _verify: NoVerify = False,
) -> None:
    """A page in the browser: ask pictures, caption, match, search, look inside. Ctrl-C ends it."""
    from importlib.util import find_spec

    from qformer.types import UsageError

    if find_spec("gradio") is None:
        raise UsageError("the page needs gradio, which is not installed; run: pip install -e '.[demo]'")
    known = None if auth is None else _known(auth)
    if path is None:
        path, drawn = _default()
        index = index or drawn
    from qformer.demo.app import serve

    serve(
        path,
        stage1=stage1,
        index=index,
        device=device,
        quantize=None if quantize is None else quantize.value,
        port=port,
        queue=queue,
        share=share,
        auth=known,
        host=host,
        root_path=root_path,
        allow_hosts=allow_host or [],
        trust=trust,
    )


def _known(auth: str) -> tuple[str, str]:
    """Name and password of `--auth`."""
    from qformer.types import UsageError

    user, colon, password = auth.partition(":")
    if not colon:
        password = os.environ.get(PASSWORD, "")
    if not (user.strip() and password):
        raise UsageError(
            f"--auth needs a user and a password; give --auth user:password, or --auth user and {PASSWORD} in the "
            "environment"
        )
    return user, password


def _default() -> tuple[str, Path | None]:
    """The quickstart's bridge: of the working folder, or else the user's own, trained if it is not there yet.

    With it a gallery of drawn scenes, where there is a store to keep it.
    """
    from importlib.util import find_spec

    from qformer.checkpoints import folder as checkpoint
    from qformer.types import UsageError

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qformer" / "quickstart"
    try:
        checkpoint.find(RUN)
        run = RUN
    except UsageError:
        from qformer.stages.quickstart.run import bridge

        if not (cache / "ready").exists():
            print(f"qformer: there is no checkpoint yet; one is trained on drawn scenes, once, in '{cache}'")
            bridge(cache)
            (cache / "ready").touch()
        run = cache / "opt"
    start = checkpoint.read(run).config.init
    if find_spec("lancedb") is None or start is None:
        return str(run), None
    made = (checkpoint.find(start) / checkpoint.WEIGHTS).stat().st_mtime_ns
    gallery = cache / f"gallery-{made:x}"  # of this training: another one would be refused
    if not (gallery / "ready").exists():
        from qformer.commands.searching import index

        print(f"qformer: {EXAMPLES} drawn scenes are indexed, to search")
        index(start, ["name=scenes", "split=test", f"count={EXAMPLES}"], gallery)
        (gallery / "ready").touch()
    return str(run), gallery
