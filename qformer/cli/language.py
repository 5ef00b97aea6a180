"""The commands of a stage-two model: `qformer caption` and `qformer ask`. Imports stand inside."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from qformer.cli.options import Device, NoVerify, Trust


class Quantization(Enum):
    """How a language model is kept."""

    none = "none"
    int8 = "int8"
    nf4 = "nf4"


Checkpoint = Annotated[
    str, typer.Argument(metavar="CKPT", help="stage-two checkpoint: run, .pth, release, folder or hub id")
]
Json = Annotated[bool, typer.Option("--json", help="print JSON, one object on each line")]
Beams = Annotated[int | None, typer.Option(help="beams of the search; 1 is greedy", min=1)]
MostTokens = Annotated[int | None, typer.Option(help="longest text, in tokens, its end counted", min=1)]
LeastTokens = Annotated[int | None, typer.Option(help="shortest text, in tokens", min=0)]
Sample = Annotated[bool, typer.Option("--sample", help="draw words (nucleus sampling) instead of searching")]
TopP = Annotated[float | None, typer.Option(help="with --sample: draw of the likeliest that make up so much")]
Temperature = Annotated[float | None, typer.Option(help="with --sample: below 1 bolder words are rarer")]
Repetition = Annotated[float | None, typer.Option(help="above 1, what was said already is said less")]
Length = Annotated[float | None, typer.Option(help="of beams: below 0 short texts win, above 0 long ones")]
Batch = Annotated[int, typer.Option(help="texts written at once", min=1)]
Quantize = Annotated[
    Quantization | None, typer.Option(help="keep the language model in 8 or 4 bits; as it was trained by default")
]
ImagesAndQuestion = Annotated[
    list[str],
    typer.Argument(
        metavar="IMAGE... [QUESTION]", help="image files, and in quotes a question, or - to read one on each line"
    ),
]
Task = Annotated[
    str,
    typer.Option(
        help="what is asked: vqa, context, dialogue, knowledge, reasoning, writing; without QUESTION: caption, ask"
    ),
]
Seed = Annotated[int | None, typer.Option(help="with --sample: the same one draws the same", min=0)]


def caption(
    path: Checkpoint,
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="image files, and folders of them")],
    prompt: Annotated[
        str | None, typer.Option(help="the caption goes on from here; the one of training by default")
    ] = None,
    captions: Annotated[int, typer.Option(help="captions of each image, with --sample", min=1)] = 1,
    beams: Beams = None,
    max_new_tokens: MostTokens = None,
    min_new_tokens: LeastTokens = None,
    sample: Sample = False,
    top_p: TopP = None,
    temperature: Temperature = None,
    repetition_penalty: Repetition = None,
    length_penalty: Length = None,
    batch: Batch = 16,
    seed: Seed = None,
    as_json: Json = False,
    quantize: Quantize = None,
    device: Device = None,
    trust: Trust = False,
    _verify: NoVerify = False,
) -> None:
    """Say what is in each image, with a stage-two checkpoint. Files that are no images are skipped and named."""
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
    )


def ask(
    path: Checkpoint,
    words: ImagesAndQuestion,
    question: Annotated[list[str] | None, typer.Option("--question", "-q", help="a question; repeat it")] = None,
    context: Annotated[str | None, typer.Option(help="text put in front of the question")] = None,
    preset: Annotated[str, typer.Option(help="prompt and decoding: paper or lavis")] = "paper",
    task: Task = "vqa",
    self_ask: Annotated[
        bool, typer.Option("--self-ask", help="let the model ask itself a question, and answer it")
    ] = False,
    show_prompt: Annotated[bool, typer.Option("--show-prompt", help="print what the model reads, too")] = False,
    beams: Beams = None,
    max_new_tokens: MostTokens = None,
    min_new_tokens: LeastTokens = None,
    sample: Sample = False,
    top_p: TopP = None,
    temperature: Temperature = None,
    repetition_penalty: Repetition = None,
    length_penalty: Length = None,
    batch: Batch = 16,
    seed: Seed = None,
    as_json: Json = False,
    quantize: Quantize = None,
    device: Device = None,
    trust: Trust = False,
    _verify: NoVerify = False,
) -> None:
    """Ask questions about images, with a stage-two checkpoint. In a terminal, without a QUESTION: ask one by one."""
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
    how = asking.Asking(
        context=context, preset=preset, task=task, self_ask=self_ask, show_prompt=show_prompt, as_json=as_json
    )
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
