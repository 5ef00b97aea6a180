"""CLIP, SigLIP and BLIP of a few thousand random weights with their processors, as folders of `save_pretrained`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    SiglipConfig,
    SiglipModel,
    SiglipProcessor,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tests.tiny import tiny_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

SIDE, LENGTH = 28, 20
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = SIZES | {"image_size": SIDE, "patch_size": 14}


def save_tiny_clip(path: Path, side: int = SIDE, width: int = 16) -> Path:
    """CLIP that reads 20 tokens, and pictures of this side with an encoder of this width."""
    tokenizer = tiny_tokenizer("gpt2")
    tokenizer.pad_token, tokenizer.model_max_length = tokenizer.eos_token, LENGTH
    text = _text(tokenizer) | {"bos_token_id": 0, "eos_token_id": tokenizer.eos_token_id}
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    vision = VISION | {"image_size": side, "hidden_size": width}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    return _save(path, CLIPModel, config, CLIPProcessor(processor, tokenizer))


def save_tiny_siglip(path: Path) -> Path:
    """SigLIP: texts padded to 20 tokens, pooled at the last one."""
    tokenizer = tiny_tokenizer("t5")
    tokenizer.model_max_length = LENGTH
    processor = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    config = SiglipConfig(text_config=_text(tokenizer) | {"projection_size": 16}, vision_config=VISION)
    return _save(path, SiglipModel, config, SiglipProcessor(processor, tokenizer))


def save_tiny_blip(path: Path) -> Path:
    """BLIP's captioner."""
    return _save_blip(path, BlipForConditionalGeneration)


def save_tiny_blip_retrieval(path: Path) -> Path:
    """BLIP's model of image-text retrieval."""
    return _save_blip(path, BlipForImageTextRetrieval)


def _save_blip(path: Path, kind: Any) -> Path:
    tokenizer = tiny_tokenizer("bert")
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    special = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}
    special |= dict.fromkeys(("sep_token_id", "eos_token_id"), tokenizer.sep_token_id)
    text = _text(tokenizer) | special | {"max_position_embeddings": 60, "encoder_hidden_size": 16, "projection_dim": 16}
    config = BlipConfig(text_config=text, vision_config=VISION, projection_dim=8, image_text_hidden_size=8)
    processor = BlipProcessor(BlipImageProcessorPil(size={"height": SIDE, "width": SIDE}), tokenizer)
    return _save(path, kind, config, processor)


def _text(tokenizer: Any) -> dict[str, Any]:
    return SIZES | {"vocab_size": len(tokenizer), "max_position_embeddings": LENGTH}


def _save(path: Path, kind: Any, config: Any, processor: Any) -> Path:
    """With large weights, so that everything matters."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = kind(config)
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "position" not in name:
                nn.init.normal_(weight, std=0.4)
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path
