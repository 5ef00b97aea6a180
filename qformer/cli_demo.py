"""The command of the page: `qformer demo`. As in `qformer.cli`, imports stand inside."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from qformer.cli_options import Trust

RUN = Path("runs/quickstart/opt")
EXAMPLES = 120  # drawn scenes in the gallery that a page without a checkpoint has


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
    port: Annotated[
        int | None, typer.Option(help="the first free one from 7860 on by default", min=1, max=65535)
    ] = None,
    share: Annotated[
        bool, typer.Option("--share", help="a public address too, through machines of Gradio's makers")
    ] = False,
    auth: Annotated[str | None, typer.Option(metavar="USER:PASS", help="let in only who knows both")] = None,
    queue: Annotated[int, typer.Option(help="requests that may wait; more are told to come again", min=1)] = 64,
    quantize: Annotated[
        Bits | None, typer.Option(help="keep the language model in 8 or 4 bits; as it was trained by default")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; the GPU where there is one by default")] = None,
    trust: Trust = False,
) -> None:
    """A page in the browser: ask pictures, caption, match, search, look inside. Ctrl-C ends it."""
    from importlib.util import find_spec

    from qformer.cli import _sibling
    from qformer.types import UsageError

    if find_spec("gradio") is None:
        raise UsageError("the page needs gradio, which is not installed; run: pip install -e '.[demo]'")
    known = None
    if auth is not None:
        user, colon, password = auth.partition(":")
        if not (user and colon and password):
            raise UsageError("--auth needs a user and a password with a colon between; give --auth user:password")
        known = user, password
    if path is None:
        path, drawn = _default()
        index = index or drawn
    _sibling("demo")
    from demo.app import serve

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
        trust=trust,
    )


def _default() -> tuple[str, Path | None]:
    """The quickstart's bridge: of the working folder, or else the user's own, trained if it is not there yet.

    With it a gallery of drawn scenes, where there is a store to keep it.
    """
    from importlib.util import find_spec

    from qformer import checkpoint
    from qformer.cli import _sibling
    from qformer.types import UsageError

    _sibling("stages")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qformer" / "quickstart"
    try:
        checkpoint.find(RUN)
        run = RUN
    except UsageError:
        from stages.quickstart import bridge

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
        from stages.gallery import index

        print(f"qformer: {EXAMPLES} drawn scenes are indexed, to search")
        index(start, ["name=scenes", "split=test", f"count={EXAMPLES}"], gallery, None, None, 64, None)
        (gallery / "ready").touch()
    return str(run), gallery
