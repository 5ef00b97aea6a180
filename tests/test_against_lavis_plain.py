"""What needs no model, and the full-size state dicts, held against the original: LAVIS 1.0.2, from tests/golden."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qformer import vision
from qformer.checkpoints.names import POSITION_IDS, REPEATED
from qformer.data.texts import clean_caption, clean_question
from qformer.evaluation import vqa
from qformer.model.connectors import QFormerConnector
from qformer.model.image_text import ImageTextModel
from qformer.model.qformer import QFormer
from qformer.schema import QFormerConfig, TrainConfig
from qformer.stages.optim import learning_rate
from qformer.vision.base import resize_positions
from tests.golden.golden import HERE, close, our_names

PLAIN: dict[str, list[dict[str, Any]]] = json.loads((HERE / "plain.json").read_text(encoding="utf-8"))


def test_cleaning() -> None:
    for row in PLAIN["cleaned"]:
        ours = {"text": row["text"], "caption": clean_caption(row["text"]), "question": clean_question(row["text"])}
        assert ours == row


def test_vqa_answers() -> None:
    for row in PLAIN["vqa"]:
        assert vqa.normalise_answer(row["answer"]) == row["normalised"], row
        assert 100 * vqa.accuracy(row["answer"], row["accepted"], "vqav2") == pytest.approx(
            row["accuracy"], abs=1e-5
        ), row


def test_vqa_spellings() -> None:
    """Every contraction that the original knows, its misspellings, and every punctuation mark in every place."""
    for row in PLAIN["spelled"]:
        assert {"answer": row["answer"], "normalised": vqa.normalise_answer(row["answer"])} == row


@pytest.mark.parametrize("table", PLAIN["schedules"], ids=lambda table: f"{table['max_epoch']} epochs")
def test_learning_rates(table: dict[str, Any]) -> None:
    """The same warm-up and the same cosine; the original moves along the cosine once per epoch, from epoch 1 on.

    Without warm-up the original still takes its very first step at the rate from which it would have warmed up.
    """
    rates = {"lr": table["init_lr"], "min_lr": table["min_lr"], "warmup_lr": table["warmup_start_lr"]}
    warming = TrainConfig(steps=10**9, warmup=table["warmup_steps"], **rates)
    first = 0 if table["warmup_steps"] else 1
    ours = [learning_rate(step, warming) for step in range(first, len(table["warmup"]))]
    assert ours == pytest.approx(table["warmup"][first:], rel=1e-9)
    falling = TrainConfig(steps=table["max_epoch"] + 1, warmup=0, **rates)
    ours = [learning_rate(step, falling) for step in range(1, table["max_epoch"] + 1)]
    assert ours == pytest.approx(table["epochs"], rel=1e-9)


def test_position_tables() -> None:
    tables = load_file(HERE / "positions.safetensors")
    for name, side in (("up", 7), ("down", 3)):
        close(resize_positions(tables[f"{name}/before"], 1, (side, side)), tables[f"{name}/after"], 1e-6)


def full_size(name: str) -> dict[str, list[Any]]:
    """dtype, shape and whether it is trained, by LAVIS's name."""
    return json.loads(gzip.decompress((HERE / "keys.json.gz").read_bytes()))[name]


@pytest.mark.parametrize(("name", "count"), [("stage1", 857), ("opt2.7b", 1288), ("flant5xl", 1331)])
def test_full_size_models_have_the_tensors_of_the_original(name: str, count: int) -> None:
    """Names, shapes, dtypes and which are trained, of all but the language model, which is not ours."""
    keys = full_size(name)
    assert len(keys) == count
    with torch.device("meta"):
        encoder = vision.build("eva").freeze()
        model: torch.nn.Module
        if name == "stage1":
            model = ImageTextModel(encoder, QFormer(QFormerConfig()), tokenizer=None)
        else:
            stage_one = ImageTextModel(encoder, QFormer(QFormerConfig()).drop_text(), tokenizer=None)
            width = {"opt2.7b": 2560, "flant5xl": 2048}[name]
            model = torch.nn.ModuleDict(
                {"frontend": stage_one.frontend, "connector": QFormerConnector(stage_one.qformer, width)}
            )
    frozen = {key for key, parameter in model.named_parameters() if not parameter.requires_grad}
    ours = {
        key: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), key not in frozen]
        for key, tensor in model.state_dict().items()
    }
    family = {"opt2.7b": "opt", "flant5xl": "t5"}.get(name)
    names = our_names(QFormerConfig(), "stage2" if family else "stage1", family, 39)
    assert ours == {names[key]: value for key, value in keys.items() if key in names}
    assert names.keys() <= keys.keys()
    others = {key for key in keys if key not in names and not key.startswith(f"{family}_model.")}
    assert others == {POSITION_IDS} | ({*REPEATED} if name == "stage1" else set())
