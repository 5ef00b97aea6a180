"""A CLIP from scratch: one embedding of each picture and of each caption (Radford et al. 2021)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from qformer.stages.towers.build import sine_positions, train_tokenizer
from qformer.vision.base import CLIP_MEAN, CLIP_STD

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from qformer.config import BackboneConfig

WIDTH = 128  # of the embeddings that pictures and captions share
TEXT_LAYERS = 2


class GlobalClip(nn.Module):
    """A CLIP of transformers, with a tokenizer trained on captions; its text tower is as wide as that of the images."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: BackboneConfig, captions: Iterable[str]) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = train_tokenizer("clip", captions, config.vocab_size)
        self.tokenizer.model_input_names = ["input_ids", "attention_mask"]
        self.tokenizer.model_max_length = config.max_tokens
        self.model = build_clip(config, self.tokenizer)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(self, pictures: Sequence[Tensor], text: list[str]) -> Tensor:
        """Compute the symmetric contrastive loss of pictures uint8[3, h, w] of one size and their captions.

        Equal captions share the target.
        """
        tokens = self.tokenizer(text, padding=True, truncation=True, split_special_tokens=True, return_tensors="pt")
        found = self.model(pixel_values=self._normalized(pictures), **tokens.to(self.model.device))
        codes = torch.tensor([text.index(one) for one in text], device=self.model.device)
        same = (codes[:, None] == codes).float()
        targets = same / same.sum(dim=1, keepdim=True)
        logits = found.logits_per_image.float()
        return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2

    def patches(self, pictures: Sequence[Tensor]) -> list[Tensor]:
        """Encode pictures uint8[3, h, w] of one size; the tokens of each, float[patches, width], without CLS."""
        return list(self.model.vision_model(pixel_values=self._normalized(pictures)).last_hidden_state[:, 1:])

    def save(self, folder: Path) -> None:
        """Write the model with its tokenizer, and that pictures are squashed into its square, as any CLIP."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        reading = {
            "processor_class": "CLIPProcessor",
            "image_processor_type": "CLIPImageProcessor",
            "do_resize": True,
            "size": {"height": self.config.image_size, "width": self.config.image_size},
            "resample": 3,  # bicubic
            "do_center_crop": False,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": CLIP_MEAN,
            "image_std": CLIP_STD,
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(reading, indent=1), encoding="utf-8")

    def _normalized(self, pictures: Sequence[Tensor]) -> Tensor:
        pixels = torch.stack(list(pictures)).to(self.model.device).float() / 255
        return (pixels - self.mean) / self.std


def build_clip(config: BackboneConfig, tokenizer: Any) -> CLIPModel:
    """Build a CLIP with random weights; places of patches start as sines, see `build_vit`."""
    sizes: dict[str, Any] = {
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "intermediate_size": config.intermediate or 4 * config.width,
        "projection_dim": WIDTH,
    }
    ids: dict[str, Any] = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=config.max_tokens,
        num_hidden_layers=TEXT_LAYERS,
        **sizes,
        **ids,
    )
    vision = CLIPVisionConfig(
        image_size=config.image_size, patch_size=config.patch_size, num_hidden_layers=config.layers, **sizes
    )
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH))
    embeddings = model.vision_model.embeddings
    with torch.no_grad():
        side = config.image_size // config.patch_size
        embeddings.position_embedding.weight[1:] = 0.5 * sine_positions(side, config.width)
        nn.init.xavier_uniform_(embeddings.patch_embedding.weight.flatten(1))
    return model
