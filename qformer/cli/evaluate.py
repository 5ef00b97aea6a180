"""The command `qformer eval`, with its imports inside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qformer.cli.language import Quantize
from qformer.cli.options import NoVerify, Precision, Trust

Checkpoints = Annotated[
    list[str],
    typer.Argument(
        metavar="CKPT...",
        help="run (its newest checkpoint), checkpoint, .pth of LAVIS, name of a release, folder or hub id; mmvp-vlm "
        "takes several",
    ),
]

Bench = Annotated[
    str,
    typer.Option(
        help="what to measure: retrieval (stage one); caption, vqa, gqa, choice, statement, mmvp, naturalbench, "
        "cvbench, blindtest, hallusionbench, docvqa, chartqa, ocrbench (stage two); mmvp-vlm (any CLIP); or your own "
        "as module:Class"
    ),
]
Judge = Annotated[
    str | None,
    typer.Option(metavar="URL", help="hallusionbench: a language model behind this server judges the answers as well"),
]
JudgeName = Annotated[str | None, typer.Option(help="name of the judge there; by default the only one")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="write the numbers as JSON")]
Page = Annotated[Path | None, typer.Option(help="write an HTML page of samples with pictures")]
Kept = Annotated[
    Path | None,
    typer.Option(help="keep predictions here and resume from them; OUTPUT.predictions.jsonl by default"),
]
Submission = Annotated[Path | None, typer.Option(help="write the answers in the form of the benchmark's server")]
Data = Annotated[list[str], typer.Option(help="key=value of the data source, such as name=jsonl path=FILE; repeat it")]


def evaluate(
    paths: Checkpoints,
    bench: Bench,
    data: Data,
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
    predictions: Kept = None,
    submission: Submission = None,
    output: Output = None,
    html: Page = None,
    server: Judge = None,
    model: JudgeName = None,
    quantize: Quantize = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; by default the GPU if there is one")] = None,
    trust: Trust = False,
    _verify: NoVerify = False,
) -> None:
    """Measure a checkpoint on held-out data. The same command again resumes; processes of torchrun share the work."""
    from qformer.stages.evaluate import run
    from qformer.stages.evaluate.settings import Settings

    settings = Settings(
        checkpoint=paths[0],
        others=tuple(paths[1:]),
        bench=bench,
        data=data,
        k=k,
        limit=limit,
        batch=batch,
        precision=precision.value,
        output=output,
        html=html,
        device=device,
        preset=preset,
        prompt=prompt,
        predictions=predictions,
        submission=submission,
        by=by,
        lemmatize=lemmatize,
        quantize=quantize and quantize.value,
        beams=beams,
        trust=trust,
        server=server,
        model=model,
    )
    run.evaluate(settings)
