"""The command `qformer eval`, with its imports inside."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from qformer.cli.language import Quantize
from qformer.cli.options import NoVerify, Trust


class Precision(Enum):
    """Dtype of autocast."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


Checkpoint = Annotated[
    str,
    typer.Argument(
        metavar="CKPT",
        help="run (its newest checkpoint), checkpoint, .pth of LAVIS, name of a release, folder or hub id",
    ),
]


def evaluate(
    path: Checkpoint,
    bench: Annotated[
        str,
        typer.Option(help="benchmark: retrieval (stage one); caption, vqa, gqa, choice, statement (stage two)"),
    ],
    data: Annotated[
        list[str], typer.Option(help="key=value of the data source, such as name=jsonl path=FILE; repeatable")
    ],
    k: Annotated[int, typer.Option("--k", "-k", help="retrieval: ITC candidates that ITM re-ranks", min=0)] = 128,
    prompt: Annotated[
        str | None, typer.Option(help="start of each caption; for questions the whole prompt, with {} for the question")
    ] = None,
    preset: Annotated[str, typer.Option(help="prompt and decoding of answers: paper or lavis")] = "paper",
    beams: Annotated[
        int | None,
        typer.Option(help="caption, vqa, gqa: number of beams (1 is greedy); by default that of the task", min=1),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="use the first N images", min=1)] = None,
    batch: Annotated[int, typer.Option(help="images (or questions) at once", min=1)] = 64,
    precision: Annotated[
        Precision, typer.Option(help="dtype of the model; scores are compared in fp32")
    ] = Precision.fp32,
    by: Annotated[str | None, typer.Option(help="column of the data by which results are also grouped")] = None,
    lemmatize: Annotated[bool, typer.Option("--lemmatize", help="vqa, gqa: lemmatize nouns and verbs (spaCy)")] = False,
    predictions: Annotated[
        Path | None,
        typer.Option(help="keep predictions here and resume from them; OUTPUT.predictions.jsonl by default"),
    ] = None,
    submission: Annotated[
        Path | None, typer.Option(help="write the answers in the form of the benchmark's server")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="write the numbers as JSON")] = None,
    html: Annotated[Path | None, typer.Option(help="write an HTML page of samples with pictures")] = None,
    quantize: Quantize = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; by default the GPU if there is one")] = None,
    trust: Trust = False,
    _verify: NoVerify = False,
) -> None:
    """Measure a checkpoint on held-out data. The same command again resumes; processes of torchrun share the work."""
    from qformer.evaluation.benchmarks import BENCHMARKS
    from qformer.stages.evaluate.language import evaluate_language
    from qformer.stages.evaluate.retrieval import evaluate_retrieval
    from qformer.stages.evaluate.settings import Settings

    chosen = (path, bench, data, k, limit, batch, precision.value, output, html, device)
    worded = (preset, prompt, predictions, submission, by, lemmatize, quantize and quantize.value, beams)
    settings = Settings(*chosen, *worded, trust)
    if bench in BENCHMARKS:
        evaluate_language(settings)
    else:
        evaluate_retrieval(settings)
