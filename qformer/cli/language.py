"""The commands of a stage-two model, `qformer caption` and `qformer ask`, with their imports inside."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from qformer.cli.options import Device, NoVerify, Trust


class Quantization(Enum):
    """Quantization of a language model's weights."""

    none = "none"
    int8 = "int8"
    nf4 = "nf4"


Checkpoint = Annotated[
    str, typer.Argument(metavar="CKPT", help="stage-two checkpoint: run, .pth, release, folder or hub id")
]
Json = Annotated[bool, typer.Option("--json", help="print JSON, one object on each line")]
Beams = Annotated[int | None, typer.Option(help="number of beams; 1 is greedy", min=1)]
MostTokens = Annotated[int | None, typer.Option(help="longest text in tokens, including the end token", min=1)]
LeastTokens = Annotated[int | None, typer.Option(help="shortest text in tokens", min=0)]
Sample = Annotated[bool, typer.Option("--sample", help="sample words (nucleus sampling) instead of beam search")]
TopP = Annotated[
    float | None, typer.Option(help="with --sample: draw from the likeliest tokens with this total probability")
]
Temperature = Annotated[float | None, typer.Option(help="with --sample: below 1, unlikely words are rarer")]
Repetition = Annotated[float | None, typer.Option(help="above 1, words already written become less likely")]
Length = Annotated[float | None, typer.Option(help="with beams: below 0 favors short texts, above 0 long ones")]
Batch = Annotated[int, typer.Option(help="texts written at once", min=1)]
Quantize = Annotated[
    Quantization | None, typer.Option(help="load the language model in 8 or 4 bits; by default as it was trained")
]
ImagesAndQuestion = Annotated[
    list[str],
    typer.Argument(
        metavar="IMAGE... [QUESTION]", help="images or videos, and a question in quotes, or - to read one per line"
    ),
]
Task = Annotated[
    str,
    typer.Option(
        help="kind of prompt: vqa, context, dialogue, knowledge, reasoning, writing; without QUESTION: caption, ask"
    ),
]
Together = Annotated[bool, typer.Option("--together", help="show all images at once, for one answer about all of them")]
Seed = Annotated[int | None, typer.Option(help="with --sample: equal seeds give equal texts", min=0)]


def caption(
    path: Checkpoint,
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="images, videos or folders of images")],
    prompt: Annotated[str | None, typer.Option(help="start of the caption; by default the prompt of training")] = None,
    captions: Annotated[int, typer.Option(help="with --sample: captions per image", min=1)] = 1,
    beams: Beams = None,
    max_new_tokens: MostTokens = None,
    min_new_tokens: LeastTokens = None,
    sample: Sample = False,
    top_p: TopP = None,
    temperature: Temperature = None,
    repetition_penalty: Repetition = None,
    length_penalty: Length = None,
    together: Together = False,
    batch: Batch = 16,
    seed: Seed = None,
    as_json: Json = False,
    quantize: Quantize = None,
    device: Device = None,
    trust: Trust = False,
    _verify: NoVerify = False,
) -> None:
    """Describe each image with a stage-two checkpoint. Files that are not images are skipped and reported."""
    from qformer.commands import asking

    decoding = asking.options(
        sample,
        captions,
        num_beams=beams,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        top_p=top_p,
        temperature=temperature,
        repetition_penalty=repetition_penalty,
        length_penalty=length_penalty,
    )
    asking.caption(
        path,
        images,
        prompt=prompt,
        decoding=decoding,
        batch=batch,
        seed=seed,
        as_json=as_json,
        device=device,
        quantize=quantize and quantize.value,
        trust=trust,
        together=together,
    )


def ask(
    path: Checkpoint,
    words: ImagesAndQuestion,
    question: Annotated[list[str] | None, typer.Option("--question", "-q", help="a question; repeatable")] = None,
    context: Annotated[str | None, typer.Option(help="text before the question")] = None,
    preset: Annotated[str, typer.Option(help="prompt and decoding: paper or lavis")] = "paper",
    task: Task = "vqa",
    self_ask: Annotated[
        bool, typer.Option("--self-ask", help="let the model ask itself a question and answer it")
    ] = False,
    show_prompt: Annotated[bool, typer.Option("--show-prompt", help="also print the exact prompt")] = False,
    beams: Beams = None,
    max_new_tokens: MostTokens = None,
    min_new_tokens: LeastTokens = None,
    sample: Sample = False,
    top_p: TopP = None,
    temperature: Temperature = None,
    repetition_penalty: Repetition = None,
    length_penalty: Length = None,
    together: Together = False,
    batch: Batch = 16,
    seed: Seed = None,
    as_json: Json = False,
    quantize: Quantize = None,
    device: Device = None,
    trust: Trust = False,
    _verify: NoVerify = False,
) -> None:
    """Ask a stage-two checkpoint about images. In a terminal, without a QUESTION, it asks for one after another."""
    from qformer.commands import asking

    decoding = asking.options(
        sample,
        num_beams=beams,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        top_p=top_p,
        temperature=temperature,
        repetition_penalty=repetition_penalty,
        length_penalty=length_penalty,
    )
    how = asking.Asking(context, preset, task, self_ask, show_prompt, as_json, together)
    asking.ask(
        path,
        words,
        question or [],
        how,
        decoding=decoding,
        batch=batch,
        seed=seed,
        device=device,
        quantize=quantize and quantize.value,
        trust=trust,
    )
