"""Tiny BLIP-2 models of transformers, random but such that every weight tells, saved as folders with a processor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    BlipImageProcessor,
)

from qformer.types import Tiles
from qformer.vision.base import CLIP_MEAN, CLIP_STD
from tests.tiny import tiny_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

#: Kind of language model, or `itr`: no two agree in how often there is cross-attention, nor in another size.
SIZES: dict[str, dict[str, int]] = {
    "opt": {"every": 2, "layers": 4, "queries": 4, "width": 24, "side": 2, "patch": 14, "heads": 2, "depth": 3},
    "t5": {"every": 1, "layers": 2, "queries": 3, "width": 18, "side": 3, "patch": 14, "heads": 3, "depth": 2},
    "flan-t5": {"every": 3, "layers": 5, "queries": 5, "width": 30, "side": 5, "patch": 6, "heads": 5, "depth": 1},
    "itr": {"every": 2, "layers": 3, "queries": 6, "width": 20, "side": 3, "patch": 10, "heads": 4, "depth": 2},
}
KINDS = ("opt", "t5", "flan-t5")
PROMPTS = ["Question: what colour is the bus? Answer:", "a photo of"]
TEXTS = ["a man is holding a small umbrella in the rain", "a red bus"]
LLM_WIDTH = {"opt": 16, "t5": 20, "flan-t5": 12}


def make(kind: str, folder: Path, **options: Any) -> Any:
    """The model, in eval mode, after it was saved with its processor; `options` are those of `save_pretrained`."""
    tokenizer, config = tiny_tokenizer({"itr": "bert", "flan-t5": "t5"}.get(kind, kind)), _config(kind)
    sizes = SIZES[kind]
    side = sizes["side"] * sizes["patch"]
    images = BlipImageProcessor(
        size={"height": side, "width": side}, image_mean=list(CLIP_MEAN), image_std=list(CLIP_STD)
    )
    model: Any
    if kind == "itr":  # as the released one: nothing stands for the image in its texts
        tokenizer.save_pretrained(folder)
        images.save_pretrained(folder)
        model = Blip2ForImageTextRetrieval(config)
    else:
        processor = Blip2Processor(images, tokenizer, sizes["queries"])
        config.image_token_index = tokenizer.convert_tokens_to_ids("<image>")
        processor.save_pretrained(folder)
        model = Blip2ForConditionalGeneration(config)
    fill(model)
    if kind == "flan-t5":
        head = model.language_model.lm_head
        head.weight = nn.Parameter(0.3 * torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(7)))
    if dtype := options.pop("dtype", None):
        model.to(dtype)
    model.save_pretrained(folder, **options)
    return model.eval()


def _config(kind: str) -> Blip2Config:
    sizes, text = SIZES[kind], None
    vocabulary = len(tiny_tokenizer({"itr": "bert", "flan-t5": "t5"}.get(kind, kind))) + 5
    if kind == "opt":
        text = {"model_type": "opt", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        text |= {"ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 96, "vocab_size": vocabulary}
        text |= {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2}
    elif kind != "itr":
        text = {"model_type": "t5", "d_model": LLM_WIDTH[kind], "d_kv": 6, "d_ff": 24, "num_layers": 2, "num_heads": 2}
        text |= {"vocab_size": vocabulary, "decoder_start_token_id": 0}
        if kind == "flan-t5":
            text |= {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    return Blip2Config(
        vision_config={
            "hidden_size": sizes["width"],
            "intermediate_size": 2 * sizes["width"] + 1,
            "num_hidden_layers": sizes["depth"],
            "num_attention_heads": sizes["heads"],
            "image_size": sizes["side"] * sizes["patch"],
            "patch_size": sizes["patch"],
        },
        qformer_config={
            "vocab_size": vocabulary,
            "hidden_size": 8 * sizes["heads"],
            "num_hidden_layers": sizes["layers"],
            "num_attention_heads": sizes["heads"],
            "intermediate_size": 12 * sizes["heads"],
            "max_position_embeddings": 40,
            "cross_attention_frequency": sizes["every"],
            "use_qformer_text_input": kind == "itr",
        },
        text_config=text,
        num_query_tokens=sizes["queries"],
        image_text_hidden_size=10,
    )


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Random weights, always the same: no norm is one, no bias zero but that of EVA's keys, which has none."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_norm = "norm" in name.lower() and name.endswith("weight")
        scale = 1.0 if name.startswith(("language_projection", "language_model.shared")) else 0.3
        parameter.copy_(1 + 0.2 * noise if is_norm else scale * noise)
        if name.endswith("qkv.bias"):
            parameter.chunk(3)[1].zero_()


def pixels(kind: str, count: int = 2) -> Tensor:
    side = SIZES[kind]["side"] * SIZES[kind]["patch"]
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(2))


def both(kind: str, count: int = 2) -> tuple[Tiles, Tensor]:
    """The same images as ours and as theirs are given."""
    image = pixels(kind, count)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return Tiles.from_pixels(image), (image - mean) / std
