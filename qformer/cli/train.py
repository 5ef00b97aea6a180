"""The commands that train, plan and convert, with their imports inside, so that `--help` is quick."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from qformer.cli.options import ConfigFile, Device, Form, NoVerify, Overrides, Precision, Trust


def train(config: ConfigFile, overrides: Overrides = None, trust: Trust = False, _verify: NoVerify = False) -> None:
    """Train the `stage` of a configuration. The same command again resumes an interrupted run.

    Several processes: `torchrun --nproc-per-node N -m qformer train CONFIG`, or `accelerate launch -m qformer train`.
    """
    from qformer import stages
    from qformer.config import load_config

    trained = stages.train(load_config(config, overrides), trust)
    if os.environ.get("RANK", "0") == "0":  # only one of several processes prints
        print(trained)


def features(config: ConfigFile, overrides: Overrides = None, trust: Trust = False, _verify: NoVerify = False) -> None:
    """Fill the store of `data.features` before training. The same command resumes; several processes share the work."""
    from qformer import stages
    from qformer.config import load_config

    folder = stages.fill_features(load_config(config, overrides), trust)
    if os.environ.get("RANK", "0") == "0":
        print(folder)


def show_config(
    config: ConfigFile,
    overrides: Overrides = None,
    data: Annotated[bool, typer.Option("--data", help="also open the data, and print the first samples")] = False,
) -> None:
    """Check a configuration and print all of it, including defaults and the sizes that will be trained."""
    from qformer.config import dump_config, load_config
    from qformer.stages.checking import check
    from qformer.stages.sizes import with_sizes

    checked, notes = with_sizes(check(load_config(config, overrides)))
    lines = [f"# {line}\n" for line in notes]
    if data:
        from qformer.data import sources
        from qformer.data.preview import preview

        for name, choice in (("train", checked.data.train), ("validation", checked.data.validation)):
            if choice is not None:
                lines += [f"# data.{name}: {line}\n" for line in preview(sources.for_run(choice, checked.run))]
    print(dump_config(checked) + "".join(lines), end="")


def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    gpu: Annotated[str, typer.Option(help="such as A100-40GB, h200, 4090; cpu for this machine")] = "A100-80GB",
    gpus: Annotated[int, typer.Option(help="processes, one GPU each", min=1, max=1_000_000)] = 1,
    memory: Annotated[str | None, typer.Option(help="memory of one GPU, such as 80GB; by default its own")] = None,
    precision: Annotated[Precision | None, typer.Option(help="by default that of the configuration")] = None,
    efficiency: Annotated[float, typer.Option(help="share of the peak that training reaches", min=0.01, max=1)] = 0.4,
    picture: Annotated[str, typer.Option(help="width x height of a picture before it is cut, in pixels")] = "640x480",
    beside: Annotated[
        Path | None, typer.Option(metavar="CONFIG", help="another configuration to compare with, overrides included")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print everything as JSON")] = False,
    trust: Trust = False,
) -> None:
    """Estimate memory, time and traffic of a training, without weights and before anything is downloaded."""
    from dataclasses import replace

    from qformer.checkpoints.folder import with_own_towers
    from qformer.config import load_config
    from qformer.stages.plan import beside as comparison
    from qformer.stages.plan.forecast import plan as forecast
    from qformer.stages.plan.forecast import show
    from qformer.stages.plan.outline import configuration_file

    config = configuration_file(config)
    size = comparison.parse_picture(picture)
    chosen = [*(overrides or []), *([] if precision is None else [f"train.precision={precision.value}"])]
    checked = with_own_towers(load_config(config, chosen), config.parent)
    other = None if beside is None else load_config(beside, chosen)
    found = forecast(checked, gpu, gpus, memory, efficiency, trust, size)
    if other is not None:
        theirs = forecast(other, gpu, gpus, memory, efficiency, trust, size)
        costs = comparison.compare(found.flops, theirs.flops) | comparison.published(checked, other)
        found = replace(found, beside={"config": str(beside)} | costs)
    show(found, as_json)


def quickstart(
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="folder of the runs and of the report; runs/quickstart by default, or runs/real"
        ),
    ] = None,
    real: Annotated[
        bool, typer.Option("--real", help="photos and small pre-trained towers (qformer towers fetch real) instead")
    ] = False,
    data: Annotated[
        list[str] | None,
        typer.Option(help="with --real: captioned photos, as key=value of a source; repeat it. Public ones by default"),
    ] = None,
    photos: Annotated[
        Path | None, typer.Option(help="with --real: folder of your own photos to caption and make searchable")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[STAGE.KEY=VALUE]...", help="such as stage1.train.steps=100")
    ] = None,
) -> None:
    """Train both stages in minutes and write a report: on drawn scenes, offline, or with --real on photos."""
    from qformer.types import UsageError

    if real:
        from qformer.stages.quickstart.real import run as run_real

        run_real(output or Path("runs/real"), data or [], photos, overrides or [])
        return
    for name, given in (("--data", data), ("--photos", photos)):
        if given:
            raise UsageError(f"{name} is for photos, and this quickstart draws scenes; add --real, or leave it out")
    from qformer.stages.quickstart.run import run

    run(output or Path("runs/quickstart"), overrides or [])


def backbones(
    output: Annotated[Path, typer.Option("--output", "-o", help="folder of the runs and of the towers")] = Path(
        "runs/mini"
    ),
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KIND.KEY=VALUE]...", help="such as opt.train.steps=100")
    ] = None,
) -> None:
    """Train the mini towers (BERT, OPT, T5 and five image encoders) from scratch. The same command again resumes."""
    from qformer.stages.towers.ship import make

    print(make(output, overrides or []))


def capfilt(
    data: Annotated[
        list[str],
        typer.Argument(metavar="DATA...", help="folder, JSON lines, tars, a CONFIG (its data.train), or key=value ..."),
    ],
    captioner: Annotated[str, typer.Option(help="checkpoint of either stage, BLIP-2, or a BLIP of transformers")],
    ranker: Annotated[str, typer.Option(help="a CLIP-like model of transformers, or a checkpoint of stage one")],
    output: Annotated[Path, typer.Option("--output", "-o", help="folder to write; the same command again resumes")],
    captions: Annotated[int, typer.Option(help="captions written for each image", min=1)] = 10,
    keep: Annotated[int, typer.Option(help="captions kept, of these and the original ones", min=1)] = 2,
    top_p: Annotated[float, typer.Option(help="total probability for nucleus sampling", min=0.01, max=1)] = 0.9,
    prompt: Annotated[str | None, typer.Option(help="start of each caption; by default the prompt of training")] = None,
    batch: Annotated[int, typer.Option(help="images captioned at once", min=1)] = 16,
    part: Annotated[int, typer.Option(help="images per file of the result; tars keep theirs", min=1)] = 1000,
    form: Annotated[
        str | None, typer.Option("--format", help="jsonl or webdataset; by default jsonl if the images are files")
    ] = None,
    shard: Annotated[
        str | None, typer.Option(help="i/n: this is process i, from 0, of n; by default from torchrun")
    ] = None,
    precision: Annotated[Precision, typer.Option(help="dtype of the models")] = Precision.fp32,
    seed: Annotated[int, typer.Option(help="other seeds give other captions", min=0)] = 0,
    device: Device = None,
    trust: Trust = False,
    _verify: NoVerify = False,
) -> None:
    """Caption web images, rank new and original captions by similarity, and keep the best as training data."""
    from qformer.stages.capfilt.run import Settings
    from qformer.stages.capfilt.run import capfilt as run

    wanted = Settings(
        data=data,
        captioner=captioner,
        ranker=ranker,
        captions=captions,
        keep=keep,
        top_p=top_p,
        prompt=prompt,
        seed=seed,
        batch=batch,
        part=part,
        form=form,
        precision=precision.value,
    )
    run(wanted, output, shard=shard, device=device, trust=trust)


def convert(
    source: Annotated[
        str,
        typer.Argument(metavar="SRC", help="run, checkpoint, .pth of LAVIS, name of a release, folder or hub id"),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="file (lavis) or folder to write; must not exist")],
    to: Annotated[Form, typer.Option(help="form to write")] = Form.qformer,
    heads: Annotated[int | None, typer.Option(help="heads of the Q-Former; by default width / 64", min=1)] = None,
    vision_heads: Annotated[
        int | None, typer.Option(help="heads of the image encoder; by default width / 88 (EVA) or 64 (CLIP)", min=1)
    ] = None,
    vision: Annotated[str | None, typer.Option(help="file or release of the image encoder, if SRC lacks it")] = None,
    llm: Annotated[str | None, typer.Option(help="folder or hub id of the language model, if SRC lacks it")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="folder or hub id of the tokenizer, if SRC lacks it")] = None,
    trust: Trust = False,
    _verify: NoVerify = False,
) -> None:
    """Rewrite a checkpoint of qformer, LAVIS or transformers in another form; tensors keep their bits."""
    from qformer.checkpoints.convert import convert_checkpoint
    from qformer.checkpoints.parts import LoadOptions

    given = LoadOptions(heads=heads, vision_heads=vision_heads, vision=vision, llm=llm, tokenizer=tokenizer)
    print(convert_checkpoint(source, output, to.value, given, trust))
