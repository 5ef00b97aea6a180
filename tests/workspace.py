"""A folder with everything a run needs, tiny: photos with captions, a BERT, a ViT, language models."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from qformer.config import parse_config
from qformer.schema import Config
from tests.tiny import CAPTIONS, save_tiny_llm, tiny_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

PHOTOS = 12
SIZE = 28


def make_workspace(root: Path) -> Path:
    """Photos (`captions.jsonl`), `bert`, `vit`, `opt` and `flan-t5` below `root`."""
    (root / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    records = []
    for index in range(PHOTOS):
        pixels = rng.integers(0, 255, (30 + index, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{index}.png")
        captions = [CAPTIONS[index % 5], f"{CAPTIONS[(index + 1) % 5]} {index}"]
        records.append(
            {"image": f"images/{index}.png", "captions": captions, "split": "dev" if index % 3 == 2 else "train"}
        )
    (root / "captions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    save_tiny_bert(root / "bert")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
        vit = ViTModel(
            ViTConfig(image_size=SIZE, patch_size=14, initializer_range=0.3, **sizes), add_pooling_layer=False
        )
    vit.save_pretrained(root / "vit")
    for kind in ("opt", "flan-t5"):
        save_tiny_llm(root / kind, kind)
    return root


def save_tiny_bert(path: Path) -> Path:
    """A random BERT of two layers with its tokeniser."""
    tokenizer = tiny_tokenizer("bert")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    with torch.random.fork_rng():
        torch.manual_seed(2)
        bert = BertModel(
            BertConfig(vocab_size=len(tokenizer), max_position_embeddings=40, initializer_range=0.2, **sizes)
        )
    bert.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def config(root: Path, stage: str, **changes: Any) -> Config:
    """A run of four steps over the photos of a workspace; `changes` replace sections or update those that are dicts."""
    source = {"name": "jsonl", "path": str(root / "captions.jsonl")}
    values: dict[str, Any] = {
        "stage": stage,
        "run": str(root / "runs" / stage),
        "resolution": {"name": "fixed", "size": SIZE},
        "data": {
            "train": source | {"where": {"split": "train"}},
            "validation": source | {"where": {"split": "dev"}},
            "batch": 4,
        },
        "train": {"steps": 4, "warmup": 1, "lr": 1e-3, "save_every": 2, "log_every": 1},
    }
    if stage == "stage1":
        values |= {
            "vision": {"name": "hf", "path": str(root / "vit")},
            "text": {"bert": str(root / "bert")},
            "qformer": {"queries": 3},
            "loss": {"embed_width": 8},
        }
    if stage == "stage2":
        values |= {"init": str(root / "runs" / "stage1"), "llm": {"path": str(root / "opt")}}
    for key, change in changes.items():
        values[key] = values[key] | change if isinstance(change, dict) and key in values else change
    return parse_config(values)
