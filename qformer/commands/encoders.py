"""Encoders that `qformer mine-pairs` compares: one vector of each whole picture, by anything that embeds pictures.

CLIP-like folder of transformers   its projected embedding, with its own image processor
other image encoder, mini:NAME     CLS or the mean of its patches, with its own image processor if it names one
YAML with a section `vision`       the same of that encoder, which sees the whole picture at its own size
checkpoint of stage one            the mean of its ITC rows
checkpoint of stage two            as the YAML, of its image encoder
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from qformer import load, vision
from qformer.checkpoints.systems import SYSTEMS
from qformer.config import read_values
from qformer.fields import Choice
from qformer.files import pretrained
from qformer.files.pretrained import configuration
from qformer.model.frontend import FrontEnd
from qformer.model.image_text import ImageTextModel
from qformer.retrieval.embedders import (
    Embedder,
    StageOneEmbedder,
    digest_weights,
    embed_pictures,
    model_type_of,
    pixels_of,
    read_clip,
    read_image_processor,
    reading_of,
)
from qformer.types import UsageError

if TYPE_CHECKING:
    from qformer.vision.base import VisionEncoder

POOLINGS = ("cls", "mean")
KINDS = "a CLIP or an image encoder of transformers, mini:NAME, a YAML with a section vision, or a checkpoint"
GREY = torch.full((3, 32, 32), 128, dtype=torch.uint8)


@dataclass
class PictureEncoder:
    """An encoder of whole pictures.

    Attributes:
        name: as it was given. pooling: `cls`, `mean`, or `own` for one with an embedding of its own.
        embed: pictures uint8[3, h, w] -> float[B, D]. about: digest of its weights and of how it reads pictures.
    """

    name: str
    pooling: str
    embed: Callable[[Sequence[Tensor]], Tensor]
    about: str

    def __post_init__(self) -> None:
        self.width = self.embed([GREY]).shape[1]


class TwoEncoders(Embedder):
    """A near and a far encoder as one embedder: their vectors, each of unit length, in one row of a gallery."""

    rows, limit = 1, 0

    def __init__(self, near: PictureEncoder, far: PictureEncoder) -> None:
        self.both = near, far
        self.width = near.width + far.width

    @torch.no_grad()
    def embed_images(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Embed pictures: float[B, 1, D + D'] and bool[B, 1].

        Raises:
            UsageError: a vector that is zero or not finite.
        """
        found = []
        for encoder in self.both:
            vectors = encoder.embed(images).float()
            lengths = vectors.norm(dim=1)
            if not bool((lengths.isfinite() & (lengths > 0)).all()):
                raise UsageError(
                    f"'{encoder.name}' gives a picture a vector that is zero or not finite, which has no cosine; give "
                    "another encoder, or weights that are whole"
                )
            found.append(F.normalize(vectors, dim=1).cpu())
        row = torch.cat(found, dim=1)[:, None]
        return row, torch.ones(row.shape[:2], dtype=torch.bool)

    def embed_texts(self, texts: list[str]) -> Tensor:
        return torch.zeros(len(texts), self.width)

    def fingerprint(self) -> str:
        parts = [f"{encoder.about} {encoder.pooling}" for encoder in self.both]
        return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()


def load_encoder(given: str, pooling: str | None, device: torch.device, trust: bool = False) -> PictureEncoder:
    """Load an encoder of pictures by what the command line says.

    Args:
        given: see the top of this module.
        pooling: of an encoder of patches, `cls` or `mean`; by default CLS if it has one.
        trust: see `qformer.load`.

    Raises:
        UsageError: nothing that embeds pictures there, or a pooling that it does not have.
    """
    if pooling not in (None, *POOLINGS):
        raise UsageError(f"the pooling of '{given}' is '{pooling}'; give {' or '.join(POOLINGS)}")
    if given.lower().endswith((".yaml", ".yml")):
        choice = _section_of(given)
        encoder = vision.options_of(choice).build()
        return _pooled(given, encoder, pooling, device, about=f"{choice.name} {choice.options}")
    path = pretrained.tower(given)
    kind = model_type_of(path)
    if kind is None or kind == "blip-2" or kind in SYSTEMS:
        model = load(path, device, trust=trust)
        if not isinstance(model, ImageTextModel):
            return _pooled(given, model.frontend.encoder, pooling, device)
        one = StageOneEmbedder(model)
        return PictureEncoder(given, _own(given, pooling), lambda images: _mean_row(one, images), one.fingerprint())
    sections = configuration(path)
    if hasattr(sections, "vision_config") and hasattr(sections, "text_config"):
        return _clip(given, path, pooling, device)
    encoder = vision.build("hf", path=path)
    return _pooled(given, encoder, pooling, device, read_image_processor(path))


def _section_of(file: str) -> Choice:
    """Read the section `vision` of a YAML file, which may hold nothing else.

    Raises:
        UsageError: no such section.
    """
    try:
        return Choice.model_validate(read_values(file).get("vision"))
    except ValidationError as error:
        raise UsageError(
            f"'{file}' has no section vision with the name of an image encoder; write one, such as "
            "vision: {name: hf, path: FOLDER}"
        ) from error


def _own(given: str, pooling: str | None) -> str:
    if pooling is not None:
        raise UsageError(f"'{given}' has an embedding of its own; leave its pooling, {pooling}, out")
    return "own"


def _mean_row(one: StageOneEmbedder, images: Sequence[Tensor]) -> Tensor:
    rows, there = one.embed_images(images)
    return (rows * there[..., None]).sum(dim=1) / there.sum(dim=1, keepdim=True)  # (B, P)


def _clip(given: str, path: str, pooling: str | None, device: torch.device) -> PictureEncoder:
    processor = read_image_processor(path)
    if processor is None:
        raise UsageError(f"'{given}' says nothing about how it reads pictures; put its preprocessor_config.json there")
    model = read_clip(path, device, f"give {KINDS}")
    about = digest_weights(model, f"{model.config.model_type} {reading_of(processor)}")
    return PictureEncoder(given, _own(given, pooling), lambda images: embed_pictures(model, processor, images), about)


def _pooled(
    given: str,
    encoder: VisionEncoder,
    pooling: str | None,
    device: torch.device,
    processor: Any = None,
    about: str = "",
) -> PictureEncoder:
    """Pool the tokens of an image encoder, which sees what its processor makes of a picture, or else the whole of it.

    Raises:
        UsageError: there is no CLS token to take.
    """
    pooling = pooling or ("cls" if encoder.extra else "mean")
    if pooling == "cls" and not encoder.extra:
        raise UsageError(f"'{given}' has no CLS token; give mean as its pooling")
    frontend = FrontEnd(encoder.eval().to(device).freeze())

    @torch.no_grad()
    def embed(images: Sequence[Tensor]) -> Tensor:
        if processor is None:
            tokens = torch.stack(list(frontend.encode_tiles(frontend.tiles(images)).rows))
        else:
            tokens = encoder.encode(pixels_of(processor, images).to(device))  # (B, S, D)
        return tokens[:, 0] if pooling == "cls" else tokens[:, encoder.extra :].mean(dim=1)

    reads = f"{about} {encoder.mean.flatten().tolist()} {processor and reading_of(processor)}"
    return PictureEncoder(given, pooling, embed, digest_weights(encoder, reads))
