"""Golden values of the original that need no model: read by `make_golden.py`, written to `plain.json`."""

from __future__ import annotations

import io
import json
import random
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file

SENTENCES = [
    "A Photo of a CAT.",
    "  two   people, riding (a) red bus!! ",
    "What's the colour of the bus? #1",
    'she said: "hello";  then left...',
    "tabs\tand\n\nnewlines \n",
    "~*tilde*~ and -dash- and 3:45",
    "trailing newline\n",
    "\nleading newline",
    "?",
    "...",
    "",
    "   ",
    "don't touch: it's hot",
    "Ünïcödé ﬁgures — and “quotes”",
    "non breaking space \u00a0 here",
    " ".join(f"word{n}" for n in range(60)),
    " ".join("a! b" for _ in range(40)),
    "word  " * 70,
]
ANSWERS = [
    "Two.",
    "the red bus",
    "a man, and a woman",
    "none",
    "10,000",
    "10,000 people; more",
    "3.5 metres",
    "no. 5",
    "well-known/known",
    "dont know",
    "couldntve",
    "couldnt've",
    "somebody'd",
    "ow'sat 'ow'sat",
    "yall'd've",
    "She's An American",
    "U.S.A.",
    "on  the\ttable\nnow",
    "yes!",
    "yes !",
    "what? why?",
    "[brackets] {braces}",
    "$5 & 50%",
    "its  the one-way sign",
    "Ten o'clock",
    "im here",
    "",
    "a",
    "1,2,3 go",
    "e-mail @ home",
    ">50",
    "half-pipe, skateboard",
]
SCHEDULES = [
    {"max_epoch": 10, "init_lr": 1e-4, "min_lr": 1e-5, "warmup_start_lr": 1e-6, "warmup_steps": 7},
    {"max_epoch": 4, "init_lr": 1e-4, "min_lr": 5e-5, "warmup_start_lr": 1e-8, "warmup_steps": 20},
    {"max_epoch": 5, "init_lr": 1e-5, "min_lr": 0, "warmup_start_lr": 1e-8, "warmup_steps": 0},
]


def make(lavis: SimpleNamespace, folder: Path) -> None:
    values = {
        "schedules": schedules(lavis),
        "cleaned": cleaned(lavis),
        "vqa": vqa(lavis),
        "spelled": spelled(lavis),
    }
    lists = ",\n".join(f'"{name}": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]" for name, rows in values.items())
    (folder / "plain.json").write_text(f"{{\n{lists}\n}}\n", encoding="utf-8")  # a row a line
    save_file(positions(lavis), folder / "positions.safetensors")
    print("plain: ", {name: len(rows) for name, rows in values.items()})


def schedules(lavis: SimpleNamespace) -> list[dict[str, Any]]:
    """Learning rates of the steps of epoch 0, in which it warms up, and of every later epoch."""
    made = []
    for options in SCHEDULES:
        group: dict[str, Any] = {}
        scheduler = lavis.schedule.LinearWarmupCosineLRScheduler(SimpleNamespace(param_groups=[group]), **options)
        rates: dict[str, list[float]] = {"warmup": [], "epochs": []}
        for step in range(options["warmup_steps"] + 5):
            scheduler.step(cur_epoch=0, cur_step=step)
            rates["warmup"].append(group["lr"])
        for epoch in range(1, options["max_epoch"] + 1):
            scheduler.step(cur_epoch=epoch, cur_step=0)
            rates["epochs"].append(group["lr"])
        made.append(options | rates)
    return made


def cleaned(lavis: SimpleNamespace) -> list[dict[str, str]]:
    caption, question = lavis.text.BlipCaptionProcessor(), lavis.text.BlipQuestionProcessor()
    texts = [*SENTENCES, *noise(60, seed=1)]
    return [{"text": text, "caption": caption(text), "question": question(text)} for text in texts]


def noise(count: int, seed: int) -> list[str]:
    """Short strings of letters, digits, blanks and every sign that means something to somebody."""
    draw = random.Random(seed)
    alphabet = "aB1. ,  \n\t" + r""";/[]"{}()=+\_-><@`?!*#:~'&"""
    return ["".join(draw.choice(alphabet) for _ in range(draw.randint(1, 14))) for _ in range(count)]


def vqa(lavis: SimpleNamespace) -> list[dict[str, Any]]:
    """Normalised answers, and the accuracy in percent of each among ten answers of people."""
    draw = random.Random(0)
    rows = []
    for number, answer in enumerate(ANSWERS):
        known = ["two", "Two.", "red bus", "10000", "yes", "yes!", "skateboard", "no", answer, answer]
        accepted = [draw.choice(known) for _ in range(10)]
        rows.append(one_question(lavis, number, answer, accepted))
    rows.append(one_question(lavis, 90, "yes", ["yes"] * 10))
    rows.append(one_question(lavis, 91, "The Yes!", ["the yes!"] * 10))
    rows.append(one_question(lavis, 92, "red", ["red"] * 3 + ["blue"] * 7))
    rows.append(one_question(lavis, 93, "red", ["red"] + ["blue"] * 9))
    return rows


def spelled(lavis: SimpleNamespace) -> list[dict[str, str]]:
    """Normalised forms of single words and of noise."""
    scorer = lavis.vqa.VQAEval()
    words = [*scorer.contractions, *scorer.contractions.values(), *scorer.manualMap, *scorer.articles]
    answers = [*dict.fromkeys(words), *noise(120, seed=2)]
    return [{"answer": answer, "normalised": normalised(scorer, answer)} for answer in answers]


def normalised(scorer: Any, answer: str) -> str:
    line = answer.replace("\n", " ").replace("\t", " ").strip()  # as `evaluate` does in front of the two
    return scorer.processDigitArticle(scorer.processPunctuation(line))


def one_question(lavis: SimpleNamespace, number: int, answer: str, accepted: list[str]) -> dict[str, Any]:
    annotation = {
        "answers": [{"answer": text, "answer_id": place} for place, text in enumerate(accepted)],
        "question_type": "none",
        "answer_type": "other",
    }
    truth = SimpleNamespace(qa={number: annotation}, getQuesIds=lambda: [number])
    scorer = lavis.vqa.VQAEval(truth, SimpleNamespace(qa={number: {"answer": answer}}), n=6)
    with redirect_stdout(io.StringIO()):  # it reports its progress
        scorer.evaluate()
    found = {"normalised": normalised(scorer, answer), "accuracy": scorer.accuracy["overall"]}
    return {"answer": answer, "accepted": accepted} | found


def positions(lavis: SimpleNamespace) -> dict[str, torch.Tensor]:
    """Tables for one grid, resized to others."""
    tables = {}
    for name, (side, target) in {"up": (4, 7), "down": (5, 3)}.items():
        generator = torch.Generator().manual_seed(side)
        tables[f"{name}/before"] = torch.randn(1, 1 + side * side, 6, generator=generator)
        checkpoint = {"pos_embed": tables[f"{name}/before"]}
        patches = SimpleNamespace(num_patches=target * target)
        model = SimpleNamespace(patch_embed=patches, pos_embed=torch.zeros(1, 1 + target * target, 6))
        lavis.eva.interpolate_pos_embed(model, checkpoint)
        tables[f"{name}/after"] = checkpoint["pos_embed"].contiguous()
    return tables
