"""The command line. Every command imports what it needs itself, so that `--help` is quick and needs no torch.

Exit codes: 0 done, 1 failed, 2 wrong usage. Errors are one sentence; `--debug` shows the traceback.
"""

from __future__ import annotations

import atexit
import io
import os
import sys
import warnings
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from qformer import cli_demo, cli_eval, cli_gallery, cli_hub, cli_language
from qformer.cli_options import NoVerify, Trust

INTERRUPTED = 130  # what typer exits with on Ctrl-C

app = typer.Typer(
    help="BLIP-2's Q-Former bridge: train both stages, retrieve, caption, ask.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, such as one of the configs folder")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="such as train.steps=1000")]
Checkpoint = Annotated[
    str,
    typer.Argument(
        metavar="CKPT",
        help="run (its newest checkpoint), checkpoint, .pth of LAVIS, name of a release, folder or hub id",
    ),
]


class Form(Enum):
    """Whose checkpoints look how."""

    qformer = "qformer"
    lavis = "lavis"
    transformers = "transformers"


class Precision(Enum):
    """Of autocast."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; the GPU where there is one by default")]


@app.command()
def train(config: ConfigFile, overrides: Overrides = None, trust: Trust = False, _verify: NoVerify = False) -> None:
    """Train what the configuration's `stage` says. The same command again resumes an interrupted run.

    Several processes: `torchrun --nproc-per-node N -m qformer train CONFIG`, or `accelerate launch -m qformer train`.
    """
    from qformer.config import load_config

    stages = _sibling("stages")
    trained = stages.train(load_config(config, overrides), trust)
    if os.environ.get("RANK", "0") == "0":  # of several processes one speaks
        print(trained)


@app.command()
def features(config: ConfigFile, overrides: Overrides = None, trust: Trust = False, _verify: NoVerify = False) -> None:
    """Fill the store of `data.features` before training. The same command goes on; several processes share the work."""
    from qformer.config import load_config

    folder = _sibling("stages").fill_features(load_config(config, overrides), trust)
    if os.environ.get("RANK", "0") == "0":
        print(folder)


@app.command("config")
def show_config(
    config: ConfigFile,
    overrides: Overrides = None,
    data: Annotated[bool, typer.Option("--data", help="open the data too, and say what the first samples are")] = False,
) -> None:
    """Check a configuration and print it whole: defaults, and the sizes that will be trained, included."""
    from qformer.config import dump_config, load_config

    _sibling("stages")
    from stages.checking import check
    from stages.sizes import with_sizes

    checked, told = with_sizes(check(load_config(config, overrides)))
    lines = [f"# {line}\n" for line in told]
    if data:
        from qformer.data import sources
        from qformer.data.preview import preview

        for name, choice in (("train", checked.data.train), ("validation", checked.data.validation)):
            if choice is not None:
                lines += [f"# data.{name}: {line}\n" for line in preview(sources.for_run(choice, checked.run))]
    print(dump_config(checked) + "".join(lines), end="")


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    gpu: Annotated[str, typer.Option(help="such as A100-40GB, h200, 4090; cpu is this machine")] = "A100-80GB",
    gpus: Annotated[int, typer.Option(help="processes, one GPU each", min=1, max=1_000_000)] = 1,
    memory: Annotated[str | None, typer.Option(help="of one GPU, such as 80GB; its own by default")] = None,
    precision: Annotated[Precision | None, typer.Option(help="that of the configuration by default")] = None,
    efficiency: Annotated[float, typer.Option(help="share of the peak that training reaches", min=0.01, max=1)] = 0.4,
    as_json: Annotated[bool, typer.Option("--json", help="print everything as JSON")] = False,
    trust: Trust = False,
) -> None:
    """Will it fit, how long will it take, what will it send: before anything is downloaded, without weights."""
    from qformer.config import load_config

    _sibling("stages")
    from stages.plan import plan as forecast
    from stages.plan import show

    chosen = [] if precision is None else [f"train.precision={precision.value}"]
    checked = load_config(config, [*(overrides or []), *chosen])
    show(forecast(checked, gpu, gpus, memory, efficiency, trust), as_json)


@app.command()
def quickstart(
    output: Annotated[Path, typer.Option("--output", "-o", help="folder of the runs and of the report")] = Path(
        "runs/quickstart"
    ),
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[STAGE.KEY=VALUE]...", help="such as stage1.train.steps=100")
    ] = None,
) -> None:
    """Both stages on drawn scenes in minutes, offline: retrieval, captions, zero-shot answers and a report."""
    _sibling("stages")
    from stages.quickstart import run

    run(output, overrides or [])


@app.command()
def backbones(
    output: Annotated[Path, typer.Option("--output", "-o", help="folder of the runs and of the towers")] = Path(
        "runs/mini"
    ),
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KIND.KEY=VALUE]...", help="such as opt.train.steps=100")
    ] = None,
) -> None:
    """Train the mini towers (BERT, ViT, OPT, T5) from scratch. The same command again resumes."""
    _sibling("stages")
    from stages.towers import make

    print(make(output, overrides or []))


app.command("eval")(cli_eval.evaluate)
app.command()(cli_gallery.index)
app.command()(cli_gallery.search)
app.command()(cli_hub.push)


app.command()(cli_language.caption)
app.command()(cli_language.ask)


@app.command()
def capfilt(
    data: Annotated[
        list[str],
        typer.Argument(metavar="DATA...", help="folder, JSON lines, tars, a CONFIG (its data.train), or key=value ..."),
    ],
    captioner: Annotated[str, typer.Option(help="checkpoint of either stage, BLIP-2, or a BLIP of transformers")],
    ranker: Annotated[str, typer.Option(help="a CLIP-like model of transformers, or a checkpoint of stage one")],
    output: Annotated[Path, typer.Option("--output", "-o", help="folder to write; the same command again goes on")],
    captions: Annotated[int, typer.Option(help="captions written of each image", min=1)] = 10,
    keep: Annotated[int, typer.Option(help="captions kept of them and the original ones", min=1)] = 2,
    top_p: Annotated[float, typer.Option(help="of nucleus sampling", min=0.01, max=1)] = 0.9,
    prompt: Annotated[str | None, typer.Option(help="captions go on from here; that of training by default")] = None,
    batch: Annotated[int, typer.Option(help="images captioned at once", min=1)] = 16,
    part: Annotated[int, typer.Option(help="images in a file of the result; tars stay as they are", min=1)] = 1000,
    form: Annotated[
        str | None, typer.Option("--format", help="jsonl or webdataset; by default the first if the images are files")
    ] = None,
    shard: Annotated[str | None, typer.Option(help="i/n: this is process i, from 0, of n; as torchrun says")] = None,
    precision: Annotated[Precision, typer.Option(help="of the models")] = Precision.fp32,
    seed: Annotated[int, typer.Option(help="another one gives other captions", min=0)] = 0,
    device: Device = None,
    trust: Trust = False,
    _verify: NoVerify = False,
) -> None:
    """Caption web images, rank own and original captions by similarity, keep the best: data to train on."""
    _sibling("stages")
    from stages.capfilt import Settings
    from stages.capfilt import capfilt as run

    wanted = Settings(data, captioner, ranker, captions, keep, top_p, prompt, seed, batch, part, form, precision.value)
    run(wanted, output, shard, device, trust)


@app.command()
def convert(
    source: Annotated[
        str,
        typer.Argument(metavar="SRC", help="run, checkpoint, .pth of LAVIS, name of a release, folder or hub id"),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="file (lavis) or folder to write; must not exist")],
    to: Annotated[Form, typer.Option(help="form to write")] = Form.qformer,
    heads: Annotated[int | None, typer.Option(help="of the Q-Former; width / 64 by default", min=1)] = None,
    vision_heads: Annotated[
        int | None, typer.Option(help="of the image encoder; width / 88 (EVA) or 64 (CLIP) by default", min=1)
    ] = None,
    vision: Annotated[
        str | None, typer.Option(help="file or release of the image encoder, where SRC leaves it out")
    ] = None,
    llm: Annotated[str | None, typer.Option(help="folder or hub id of the language model, likewise")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="folder or hub id, where SRC has none")] = None,
    trust: Trust = False,
    _verify: NoVerify = False,
) -> None:
    """Rewrite a checkpoint of qformer, LAVIS or transformers in the form of another; tensors keep their bits."""
    from qformer.model.export import convert_checkpoint
    from qformer.model.foreign import Given

    given = Given(heads=heads, vision_heads=vision_heads, vision=vision, llm=llm, tokenizer=tokenizer)
    print(convert_checkpoint(source, output, to.value, given, trust))


app.command()(cli_demo.demo)


def _sibling(name: str) -> Any:
    """Import `stages` (or `demo`), which stands beside `qformer`, and make sure it is that one.

    `python -m qformer` puts the working directory first on the path, where another folder of that name may be.
    """
    import importlib

    from qformer.types import UsageError

    beside = Path(__file__).resolve().parent.parent
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise UsageError(
            f"the package '{name}' is not beside qformer in '{beside}'; install qformer-bridge again"
        ) from error
    where = Path(str(module.__path__[0])).resolve()
    if where.parent != beside:
        raise UsageError(f"the folder '{where}' hides qformer's own package '{name}'; run from another folder")
    return module


def main() -> None:
    """The `qformer` command."""
    debug = "--debug" in sys.argv
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # a name that is no UTF-8 is printed as the disk has it
    failed: list[int] = []
    if os.environ.get("WORLD_SIZE", "1") != "1":
        atexit.register(_end, failed)  # before all others, so that it is called after them
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it reports every tensor of a tower that is cut
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        from qformer.types import LeftOut

        with warnings.catch_warnings():
            warnings.simplefilter("default", LeftOut)
            warnings.showwarning = _tell
            app(arguments)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            print("qformer: interrupted; what can be resumed goes on by the same command", file=sys.stderr)
        raise
    except Exception as error:
        if debug:
            raise
        usage = any(kind.__name__ == "UsageError" for kind in type(error).__mro__)
        print(
            f"qformer: {error}" if usage else f"qformer: {type(error).__name__}: {error} (--debug shows where)",
            file=sys.stderr,
        )
        failed.append(2 if usage else 1)
        sys.exit(failed[0])


def _tell(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """What the data have that is left out, as one line, of several processes by the first; other warnings as ever."""
    if category.__name__ != "LeftOut":
        (file or sys.stderr).write(warnings.formatwarning(message, category, filename, lineno, line))
    elif os.environ.get("RANK", "0") == "0":
        print(f"qformer: {message}", file=sys.stderr)


def _end(failed: list[int]) -> None:
    """Of several processes, one that failed ends here: gloo's threads abort later on when a peer has died."""
    if failed:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(failed[0])
