"""The command `qformer demo`, with its imports inside."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from qformer.cli.options import NoVerify, Trust

RUN = Path("runs/quickstart/opt")
REAL, REAL_GALLERY = Path("runs/real/stage2"), Path("runs/real/photos")  # of `qformer quickstart --real`
EXAMPLES = 120  # drawn scenes in the gallery of a page without a checkpoint
PASSWORD = "QFORMER_PASSWORD"

Port: TypeAlias = Annotated[
    int | None, typer.Option(help="by default the first free one from 7860 on", min=1, max=65535)
]
Host: TypeAlias = Annotated[
    str, typer.Option(help="address or name to listen at; 0.0.0.0 for all addresses of this machine")
]
RootPath: TypeAlias = Annotated[
    str, typer.Option(help="where a proxy serves the page: a path (/demo), or the whole address (https://.../demo)")
]
AllowHost: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="a name under which visitors reach the page; repeatable"),
]
Share: TypeAlias = Annotated[bool, typer.Option("--share", help="also a public address, through servers of Gradio")]
Auth: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="USER[:PASS]",
        help=f"require this name and password; better omit PASS here and set ${PASSWORD}",
    ),
]
Feedback: TypeAlias = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="let visitors judge answers, and append their verdicts to this JSONL file"),
]


class Bits(Enum):
    """Quantization of the language model's weights."""

    int8 = "int8"
    nf4 = "nf4"


def demo(
    path: Annotated[
        str | None,
        typer.Argument(
            metavar="[CKPT]",
            help=f"checkpoint of either stage, as for other commands; by default {REAL} or {RUN}, or else the latter's "
            "bridge, trained in minutes and kept",
        ),
    ] = None,
    stage1: Annotated[
        str | None,
        typer.Option(help="stage-one checkpoint to match and search with; by default the one that CKPT started from"),
    ] = None,
    index: Annotated[Path | None, typer.Option(help="gallery to search, a folder written by `qformer index`")] = None,
    port: Port = None,
    host: Host = "127.0.0.1",
    root_path: RootPath = "",
    allow_host: AllowHost = None,
    share: Share = False,
    auth: Auth = None,
    queue: Annotated[int, typer.Option(help="requests that can wait; more are asked to try again", min=1)] = 64,
    quantize: Annotated[
        Bits | None, typer.Option(help="load the language model in 8 or 4 bits; by default as it was trained")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; by default the GPU if there is one")] = None,
    log: Annotated[
        Path | None,
        typer.Option(
            help="write errors and refused requests to this file instead of the terminal; it never grows large"
        ),
    ] = None,
    feedback: Feedback = None,
    trust: Trust = False,
    _verify: NoVerify = False,
) -> None:
    """Serve a page in the browser: ask about pictures, caption, match, search, look inside. Ctrl-C ends it."""
    from importlib.util import find_spec

    from qformer.types import UsageError

    if find_spec("gradio") is None:
        raise UsageError("the page needs gradio, which is not installed; run: pip install -e '.[demo]'")
    credentials = None if auth is None else _parse_auth(auth)
    if path is None:
        path, drawn = find_default()
        index = index or drawn
    from contextlib import nullcontext

    from qformer.files.logs import logging_to

    given: dict[str, Any] = {"stage1": stage1, "index": index, "port": port, "host": host, "root_path": root_path}
    given |= {"allow_hosts": allow_host or [], "auth": credentials, "device": device}
    given |= {"quantize": quantize and quantize.value}
    with nullcontext() if log is None else logging_to(log):
        from qformer.demo.app import serve

        serve(path, queue=queue, share=share, trust=trust, feedback=feedback, **given)


def _parse_auth(auth: str) -> tuple[str, str]:
    """Name and password of `--auth`."""
    from qformer.types import UsageError

    user, colon, password = auth.partition(":")
    if colon:
        print(
            f"qformer: a password on the command line can be read by everybody on this machine; set {PASSWORD} instead"
        )
    else:
        password = os.environ.get(PASSWORD, "")
    if not (user.strip() and password):
        raise UsageError(
            f"--auth needs a user and a password; give --auth user:password, or --auth user and {PASSWORD} in the "
            "environment"
        )
    return user, password


def find_default() -> tuple[str, Path | None]:
    """Find a quickstart's bridge in the working folder, or in the user's cache, training it if there is none yet.

    One on photos comes before one on drawn scenes, and with the user's photos, if they were indexed. The other comes
    with a gallery of scenes, if LanceDB is installed.
    """
    from importlib.util import find_spec

    from qformer.checkpoints import folder as checkpoint
    from qformer.files import real_towers
    from qformer.types import UsageError

    cache = real_towers.cache() / "quickstart"
    if checkpoint.newest(REAL):
        print(f"qformer: serving the bridge on photos in '{REAL}'")
        has_gallery = (REAL_GALLERY / "gallery.json").is_file() and find_spec("lancedb") is not None
        return str(REAL), REAL_GALLERY if has_gallery else None
    try:
        checkpoint.find(RUN)
        run = RUN
    except UsageError:
        from qformer.stages.quickstart.run import bridge

        if not (cache / "ready").exists():
            print(f"qformer: there is no checkpoint yet; training one on drawn scenes, once, in '{cache}'")
            bridge(cache)
            (cache / "ready").touch()
        run = cache / "opt"
    start = checkpoint.read(run).config.init
    if find_spec("lancedb") is None or start is None:
        return str(run), None
    made = (checkpoint.find(start) / checkpoint.WEIGHTS).stat().st_mtime_ns
    gallery = cache / f"gallery-{made:x}"  # named by the training: a gallery of another one would be refused
    if not (gallery / "ready").exists():
        from qformer.commands.searching import index

        print(f"qformer: indexing {EXAMPLES} drawn scenes to search")
        index(start, ["name=scenes", "split=test", f"count={EXAMPLES}"], gallery)
        (gallery / "ready").touch()
    return str(run), gallery
