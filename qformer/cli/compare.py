"""The command `qformer compare`, with its imports inside."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from qformer.cli.options import NoVerify


class Mode(Enum):
    """Budget that systems have in common besides data, seeds and steps."""

    published = "published"
    tokens = "tokens"
    flops = "flops"


class Metric(Enum):
    """Rule by which an answer is worth something: VQA accuracy, ANLS of documents, 5 % tolerance of charts."""

    accuracy = "accuracy"
    anls = "anls"
    relaxed = "relaxed"


Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="CONFIG... [KEY=VALUE]...",
        help="YAML files or names of shipped ones, of stage2; and keys for all of them, or axes as of --over",
    ),
]
Over = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=A,B", help="cross every CONFIG with these values, such as connector.name=mlp,avg_pool; repeat it"
    ),
]
Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="FOLDER", help="folder of everything; the same command resumes")
]
Report = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="instead: renew the table and the page of a comparison, without training"),
]


def compare(
    words: Words = None,
    over: Over = None,
    mode: Annotated[Mode, typer.Option(help="as configured, or at equal visual tokens, or FLOPs")] = Mode.published,
    tokens: Annotated[
        float | None, typer.Option(help="with --mode tokens: how many; by default those of the reference", min=1)
    ] = None,
    seeds: Annotated[str, typer.Option(help="one run of every system for each of them")] = "0,1,2",
    steps: Annotated[
        int | None, typer.Option(help="in place of train.steps; the warm-up keeps its share", min=1)
    ] = None,
    questions: Annotated[
        int | None, typer.Option(help="of data.validation; by default data.validation_size", min=1)
    ] = None,
    reference: Annotated[str | None, typer.Option(help="system to compare with; by default the first")] = None,
    blind: Annotated[bool, typer.Option("--blind", help="also ask with gray pictures")] = False,
    choose: Annotated[
        bool, typer.Option("--choose", help="take the likeliest of the choices that a question brings")
    ] = False,
    metric: Annotated[Metric, typer.Option(help="what an answer is worth")] = Metric.accuracy,
    processes: Annotated[int, typer.Option(help="runs at a time, each with one thread", min=1)] = 1,
    output: Output = Path("runs/compare"),
    report: Report = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the table as JSON")] = False,
    _verify: NoVerify = False,
) -> None:
    """Train systems on the same data, ask them the same questions, and say which is better, with intervals and costs.

    Finished runs are never trained again. Every CONFIG needs data.validation with questions.
    """
    from qformer.stages.compare import command

    if report is not None:
        command.renew(report, reference, as_json, [*(words or []), *(over or [])])
        return
    command.run(
        as_json,
        words=tuple(words or []),
        over=tuple(over or []),
        mode=mode.value,
        tokens=tokens,
        seeds=command.read_seeds(seeds),
        steps=steps,
        questions=questions,
        reference=reference,
        blind=blind,
        choose=choose,
        metric=metric.value,
        processes=processes,
        folder=output,
    )
