"""Speed of one text, and of ten answers about one image, compared with BLIP-2 of transformers with the same weights.

    python benchmarks/generate.py [--kind opt|t5] [--rounds 5] [--threads 2] [--quick]

Both sides read one folder: random weights in the proportions of ViT-g, the Q-Former of the paper and OPT-2.7B or
Flan-T5-XL, with about a thirtieth of their parameters. Both run end to end, from a picture and strings to strings:
resizing, tokenizing, encoding, generating the same number of tokens, decoding. Rounds of both alternate, in fp32.
transformers answers ten questions as its documentation shows, one call each, and again in one batch of ten. `--quick`
checks in a minute that it works.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoProcessor, Blip2Config, Blip2ForConditionalGeneration, Blip2Processor, BlipImageProcessor
from transformers.utils import logging

import qformer
from qformer.model.vision_language import VisionLanguageModel
from qformer.vision.base import CLIP_MEAN, CLIP_STD
from tests.tiny import tiny_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE = 224
#: Widths and depths; heads are 88 wide in the ViT, as in ViT-g, and 64 elsewhere.
FULL = {"vit": (440, 12), "qformer": (256, 6), "opt": (768, 12), "t5": (512, 8)}
QUICK = {"vit": (176, 2), "qformer": (128, 2), "opt": (128, 2), "t5": (128, 2)}
OBJECTS = ("bus", "man", "umbrella", "dog", "cat", "ball", "tree", "car", "boat", "bird")
QUESTIONS = [f"Question: what colour is the {name}? Answer:" for name in OBJECTS]


def write_model(folder: Path, kind: str, sizes: dict[str, tuple[int, int]]) -> None:
    """Write a folder of transformers with its processor; the vocabulary is as large as OPT's or T5's."""
    tokenizer = tiny_tokenizer(kind)
    words = {"opt": 50272, "t5": 32128}[kind]
    tokenizer.add_tokens([f"w{number}" for number in range(words - len(tokenizer) - 1)])
    images = BlipImageProcessor(
        size={"height": SIZE, "width": SIZE}, image_mean=list(CLIP_MEAN), image_std=list(CLIP_STD)
    )
    processor = Blip2Processor(images, tokenizer, 32)
    width, depth = sizes[kind]
    heads = width // 64
    text: dict[str, Any] = {"model_type": kind, "vocab_size": words}
    if kind == "opt":
        text |= {"hidden_size": width, "word_embed_proj_dim": width, "ffn_dim": 4 * width, "num_hidden_layers": depth}
        text |= {"num_attention_heads": heads, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2}
    else:
        text |= {"d_model": width, "d_kv": 64, "d_ff": 5 * width // 2, "num_layers": depth, "num_heads": heads}
        text |= {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0}
    vit, deep = sizes["vit"]
    bert, layers = sizes["qformer"]
    config = Blip2Config(
        vision_config={
            "hidden_size": vit,
            "intermediate_size": int(4.3637 * vit),
            "num_hidden_layers": deep,
            "num_attention_heads": vit // 88,
            "image_size": SIZE,
            "initializer_range": 0.02,
        },
        qformer_config={
            "hidden_size": bert,
            "num_hidden_layers": layers,
            "num_attention_heads": bert // 64,
            "intermediate_size": 4 * bert,
            "use_qformer_text_input": False,
        },
        text_config=text,
        num_query_tokens=32,
    )
    config.image_token_index = tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    model = Blip2ForConditionalGeneration(config)
    model.query_tokens.data.normal_(0, 0.02)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


class Theirs:
    """BLIP-2 of transformers, called as in its documentation."""

    def __init__(self, folder: Path, end: int) -> None:
        self.model = Blip2ForConditionalGeneration.from_pretrained(folder).eval()
        self.processor = AutoProcessor.from_pretrained(folder)
        self.processor.tokenizer.padding_side = "left" if self.model.config.text_config.model_type == "opt" else "right"
        self.end = {"eos_token_id": end, "pad_token_id": end}

    @torch.no_grad()
    def __call__(self, image: np.ndarray, prompts: list[str], options: dict[str, Any]) -> list[str]:
        inputs = self.processor(images=[image] * len(prompts), text=prompts, padding=True, return_tensors="pt")
        ids = self.model.generate(**inputs, **options, **self.end)
        if not self.model.config.text_config.is_encoder_decoder:
            ids = ids[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(ids, skip_special_tokens=True)]

    def one_by_one(self, image: np.ndarray, prompts: list[str], options: dict[str, Any]) -> list[str]:
        return [self(image, [prompt], options)[0] for prompt in prompts]


class Ours:
    def __init__(self, folder: Path) -> None:
        self.model = qformer.load(folder, device="cpu")
        assert isinstance(self.model, VisionLanguageModel)

    def __call__(self, image: np.ndarray, prompts: list[str], options: dict[str, Any]) -> list[str]:
        return self.model.generate(self.model.frontend.tiles([image]), prompts[0], **options)

    def answers(self, image: np.ndarray, prompts: list[str], options: dict[str, Any]) -> list[str]:
        """Answer questions; OPT's template for them is that of `prompts`."""
        asked = [prompt.removeprefix("Question: ").removesuffix(" Answer:") for prompt in prompts]
        return self.model.answer(self.model.frontend.tiles([image]), [asked], **options)[0]


def timed(call: Callable[[], list[str]]) -> tuple[float, float, list[str]]:
    """Wall seconds, CPU seconds of this process, and the result of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    said = call()
    return time.perf_counter() - wall, time.process_time() - cpu, said


def race(
    sides: dict[str, Callable[[], list[str]]], rounds: int
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, list[str]]]:
    """Run all sides in turn, in another order each round; the first round is a warm-up and not counted."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    said: dict[str, list[str]] = {}
    names = list(sides)
    for number in range(rounds + 1):
        names = names[1:] + names[:1]
        for name in names:
            wall, cpu, said[name] = timed(sides[name])
            if number:
                seconds[name].append((wall, cpu))
    return seconds, said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("opt", "t5"), default="opt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    rounds = 1 if options.quick else options.rounds
    image = np.random.default_rng(0).integers(0, 255, (375, 500, 3), dtype=np.uint8)
    console = Console(width=120)
    title = f"{options.kind}, {options.threads} threads"
    table = Table("task", "side", "wall s", "CPU s", "theirs / ours", title=title)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder, options.kind, QUICK if options.quick else FULL)
        ours = Ours(folder)
        theirs = Theirs(folder, ours.model.llm.end)
        for task, told in tasks(ours, theirs, image).items():
            seconds, said = race(told, rounds)
            report(table, task, seconds, said)
            console.print(f"{task}: done")
    console.print(table)


def tasks(ours: Ours, theirs: Theirs, image: np.ndarray) -> dict[str, dict[str, Callable[[], list[str]]]]:
    caption, few = ["a photo of"], {"max_new_tokens": 10, "min_new_tokens": 10, "num_beams": 1}
    long = {"max_new_tokens": 30, "min_new_tokens": 30}
    found: dict[str, dict[str, Callable[[], list[str]]]] = {}
    for task, beams in (("caption, greedy, 30 tokens", 1), ("caption, 5 beams, 30 tokens", 5)):
        settings = {**long, "num_beams": beams}
        found[task] = {
            "ours": lambda s=settings: ours(image, caption, s),
            "theirs": lambda s=settings: theirs(image, caption, s),
        }
    for task, settings in (
        ("10 questions, greedy, 10 tokens", few),
        ("10 questions, 5 beams, 10 tokens", {**few, "num_beams": 5}),
    ):
        found[task] = {
            "ours": lambda s=settings: ours.answers(image, QUESTIONS, s),
            "theirs": lambda s=settings: theirs.one_by_one(image, QUESTIONS, s),
            "theirs in one batch": lambda s=settings: theirs(image, QUESTIONS, s),
        }
    return found


def report(table: Table, task: str, seconds: dict[str, list[tuple[float, float]]], said: dict[str, list[str]]) -> None:
    own = [statistics.median(column) for column in zip(*seconds["ours"], strict=True)]
    for side, rounds in seconds.items():
        middle = [statistics.median(column) for column in zip(*rounds, strict=True)]
        ratio = "" if side == "ours" else f"{middle[0] / own[0]:.2f} (CPU {middle[1] / own[1]:.2f})"
        same = sum(a == b for a, b in zip(said[side], said["ours"], strict=True))
        name = side if side == "ours" else f"{side} ({same} of {len(said[side])} texts equal)"
        table.add_row(task, name, f"{middle[0]:.2f}", f"{middle[1]:.2f}", ratio)


if __name__ == "__main__":
    main()
