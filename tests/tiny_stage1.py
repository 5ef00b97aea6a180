"""A stage-one model of a few thousand weights over images of unequal tiles, for what must hold of whole steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qformer.config import LossConfig
from qformer.model.image_text import ImageTextModel
from qformer.model.qformer import QFormer
from qformer.resolution.base import ResolutionStrategy, cut_all
from qformer.schema import QFormerConfig
from qformer.types import Batch, Plan, Tile
from qformer.vision.base import VisionEncoder
from tests.tiny import CAPTIONS, tiny_tokenizer

QUERIES, WIDTH = 4, 12


class Patches(VisionEncoder):
    """A Linear over patches of 14, in front of them a token that saw all of them; with dropout of its own."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(width=WIDTH, patch_size=14, image_size=28, extra=1)
        self.project = nn.Linear(3 * 14 * 14, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def encode(self, pixels: Tensor) -> Tensor:
        rows = F.unfold(pixels, 14, stride=14).transpose(1, 2)  # (N, patches, 588)
        tokens = self.dropout(self.project(rows))
        summary = tokens.mean(dim=1, keepdim=True)
        return torch.cat([summary, tokens + summary], dim=1)


@dataclass
class Tower:
    """Options of `Patches`, as the section `vision` takes them."""

    seed: int = 0

    def build(self) -> Patches:
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return Patches()


@dataclass(frozen=True)
class Views(ResolutionStrategy):
    """An overview of 28 x 28; beside it half of a wide image, or both halves of a very wide one, 28 x 42 each."""

    def plan(self, width: int, height: int) -> Plan:
        tiles = [Tile((28, 28), (28, 28), (0, 0), (0, 0, 28, 28))]
        if width > height:
            tiles.append(Tile((56, 42), (56, 42), (0, 0), (0, 0, 28, 42)))
        if width > 2 * height:
            tiles.append(Tile((56, 42), (56, 42), (0, 0), (28, 0, 56, 42)))
        return Plan((width, height), tuple(tiles), (len(tiles) - 1 or 1, 1), 0, QUERIES * len(tiles))


def tiny_model(dropout: float = 0.0, frozen: bool = True, linked: bool = False, **loss: Any) -> ImageTextModel:
    """In train mode, with large weights, so that everything matters."""
    tokenizer = tiny_tokenizer("bert")
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    sizes = {"hidden_size": 16, "layers": 2, "heads": 2, "intermediate_size": 24, "queries": QUERIES}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = Patches(dropout)
        config = QFormerConfig(
            encoder_width=WIDTH, vocab_size=len(tokenizer), max_positions=40, dropout=dropout, **sizes
        )
        model = ImageTextModel(
            encoder.freeze() if frozen else encoder,
            QFormer(config).link(each=False) if linked else QFormer(config),
            tokenizer,
            LossConfig(**{"embed_width": 8, "temperature": 0.2} | loss),
        )
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name != "temp" and not name.startswith("frontend.encoder"):
                    weight.copy_(0.3 * torch.randn(weight.shape) + name.endswith("norm.weight"))
    return model.train()


def tiny_batch(count: int, start: int = 0, of: int | None = None, tiles: str = "uneven", first: int = 0) -> Batch:
    """Rows `start` to `start + count` of a global batch of `of`; `first` shifts what is in it.

    Images of one to three tiles, captions of unequal length, the first and the last image the same. Hard negatives are
    forced: images from all over the global batch, some of them twice.
    """
    of = of or count
    sizes = [(40, 30), (30, 40), (90, 30), (50, 40), (30, 30)] if tiles == "uneven" else [(28, 28)]
    generator = torch.Generator().manual_seed(4 + first)
    pixels = [
        torch.randint(0, 256, (3, *sizes[(i + first) % len(sizes)][::-1]), generator=generator, dtype=torch.uint8)
        for i in range(of)
    ]
    texts = [f"{CAPTIONS[(i + first) % 5]} {'of a cat ' * (i % 3)}" for i in range(of)]
    ids: list[str | int] = [f"image {i}" for i in range(of)]
    ids[-1] = ids[0]
    image_for_text = torch.tensor([(3 * i + 2) % of if i % 4 else of - 2 for i in range(of)])
    text_for_image = torch.tensor([(i + of // 2) % of for i in range(of)])
    own = slice(start, start + count)
    return Batch(
        cut_all(pixels, Views())[own], texts[own], ids[own], negatives=(image_for_text[own], text_for_image[own])
    )
