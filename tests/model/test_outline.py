"""Models without weights have the sizes of the real ones, and nothing of them is read but configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AutoModel

from qformer.config import load_config
from qformer.model.assembly import build_image_text, build_vision_language
from qformer.schema import Config
from qformer.stages.plan.outline import outline, outline_language_model, read_sizes
from qformer.stages.plan.sizes import KNOWN
from qformer.types import UsageError
from tests.workspace import config, make_workspace

#: As the hub and the papers count them.
PARAMETERS = {
    "facebook/opt-125m": 125_239_296,
    "facebook/opt-350m": 331_196_416,
    "facebook/opt-1.3b": 1_315_758_080,
    "facebook/opt-2.7b": 2_651_596_800,
    "facebook/opt-6.7b": 6_658_473_984,
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "t5-large": 737_668_096,
    "google/flan-t5-small": 76_961_152,
    "google/flan-t5-base": 247_577_856,
    "google/flan-t5-large": 783_150_080,
    "google/flan-t5-xl": 2_849_757_184,
    "google/flan-t5-xxl": 11_135_332_352,
}
TRAINED = {
    "stage1_vitg": 186_705_470,
    "stage1_vitl": 183_165_758,
    "stage2_opt2.7b": 107_133_696,
    "stage2_opt6.7b": 108_314_880,
    "stage2_flant5xl": 106_739_968,
    "stage2_flant5xxl": 108_314_880,
}


def paper(name: str, *overrides: str) -> Config:
    return load_config(Path("configs") / f"{name}.yaml", [*overrides])


@pytest.mark.parametrize("name", PARAMETERS)
def test_language_models_of_the_table(name: str) -> None:
    with torch.device("meta"):
        llm = outline_language_model(paper("stage2_opt2.7b", f"llm.path={name}", "llm.dtype=auto"), "cuda")
    # T5 of today has its output table and its relative positions once; an embedding of T5 1.0 is its output, too
    assert sum(parameter.numel() for parameter in llm.parameters()) == PARAMETERS[name]
    assert llm.model.dtype == (torch.float16 if "opt" in name else torch.bfloat16)


def test_towers_of_the_table() -> None:
    with torch.device("meta"):
        bert = AutoModel.from_config(read_sizes("bert-base-uncased", "text.bert"))
        clip = AutoModel.from_config(read_sizes("openai/clip-vit-large-patch14", "vision.path"))
    assert bert.num_parameters() == 109_482_240
    assert clip.num_parameters() == 303_179_776


@pytest.mark.parametrize("name", TRAINED)
def test_the_papers_configurations_are_outlined_without_a_network(name: str) -> None:
    model, _ = outline(paper(name), "cuda")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == TRAINED[name]
    assert all(isinstance(p, FakeTensor) for p in model.parameters())


def test_questions_and_adapters_of_the_paper_s_size() -> None:
    """The text path of bert-base but for its last feed-forward, and rank 8 at queries and values of 32 layers."""
    words, positions, inner = 30_523 * 768, 512 * 768, 2 * 768 * 3072 + 3072 + 768 + 2 * 768
    text, adapters = words + positions + 11 * inner, 32 * 2 * 2 * 8 * 2560
    model, _ = outline(paper("finetune_vqa_lora_small"), "cuda")
    learn = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert sum(learn.values()) == TRAINED["stage2_opt2.7b"] + text + adapters
    assert sum(count for name, count in learn.items() if name.startswith("llm.")) == adapters


def described(model: Any) -> dict[str, Any]:
    return {name: (tuple(p.shape), p.dtype, p.requires_grad) for name, p in model.named_parameters()}


@pytest.mark.parametrize("llm", ["opt", "flan-t5"])
def test_an_outline_is_the_model_that_is_trained(tmp_path: Path, llm: str) -> None:
    """Of folders: every parameter, its shape, its dtype and whether it learns."""
    root = make_workspace(tmp_path / "space")
    first = config(root, "stage1", vision={"name": "hf", "path": str(root / "vit"), "precision": "fp16"})
    assert described(outline(first, "cpu")[0]) == described(build_image_text(first)[0])
    second = config(
        root, "stage2", llm={"path": str(root / llm)}, freeze_vision=False, vision=first.vision.model_dump()
    )
    assert described(outline(second, "cpu")[0]) == described(build_vision_language(second)[0])
    asks = config(
        root,
        "stage2",
        llm={"path": str(root / llm), "lora": {"rank": 2}},
        vision=first.vision.model_dump(),
        text={"bert": str(root / "bert")},
        question={},
    )
    assert described(outline(asks, "cpu")[0]) == described(build_vision_language(asks)[0])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["text.bert=nobody/nothing"], "the sizes of text.bert 'nobody/nothing' are not known here; give a folder"),
        (["text.bert=facebook/opt-125m"], "text.bert 'facebook/opt-125m' is a opt model; give a BERT"),
        (["vision={name: hf, path: no/folder}"], "the sizes of vision.path 'no/folder'"),
    ],
)
def test_towers_that_cannot_be_outlined(overrides: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        outline(paper("stage1_vitg", *overrides), "cuda")


def test_a_language_model_that_generates_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match=r"llm\.path 'openai/clip-vit-large-patch14' is a clip_vision_model"):
        outline(paper("stage2_opt2.7b", "llm.path=openai/clip-vit-large-patch14"), "cuda")


def test_small_towers_are_not_planned() -> None:
    with pytest.raises(UsageError, match="a run of stage 'language' is small and is not planned"):
        outline(load_config("configs/tower_opt.yaml"), "cuda")


def test_the_table_names_what_the_configurations_use() -> None:
    assert {"facebook/opt-2.7b", "google/flan-t5-xxl", "bert-base-uncased", "openai/clip-vit-large-patch14"} <= {*KNOWN}
