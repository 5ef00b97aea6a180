"""Embedders of pictures and texts in one space: our stage-one models, CLIP-like ones of transformers and open_clip."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, BlipForImageTextRetrieval
from transformers.image_processing_base import ImageProcessingMixin

from qformer.checkpoints import folder as checkpoint
from qformer.checkpoints.loading import load
from qformer.files import pretrained, releases
from qformer.files.pretrained import configuration
from qformer.model.image_text import ImageTextModel
from qformer.types import Tokens, UsageError

STRIP = 32  # times longer than wide; CLIP resizes the shorter side, and then cuts the middle out
MAX_TOKENS = 35  # the original reads texts longer here than in training (32); never shorter, or their ends are unread
OPEN_CLIP = "open_clip:"
SAMPLED = 64  # numbers of each tensor that make the fingerprint of a model


def load_embedder(path: str, device: str | torch.device, trust: bool = False) -> Embedder:
    """A checkpoint of stage one, or any model of transformers that embeds images and texts: CLIP, SigLIP, BLIP.

    A model of open_clip is named `open_clip:ViT-B-32/laion2b_s34b_b79k`, the shipped one `mini:clip`. For `trust` see
    `qformer.load`.

    Raises:
        UsageError: neither.
    """
    if path.startswith(OPEN_CLIP):
        return OpenClipEmbedder(path.removeprefix(OPEN_CLIP), device)
    path = pretrained.tower(path)
    kind = model_type_of(path)
    if kind == "blip" and BlipForImageTextRetrieval.__name__ in (configuration(path).architectures or []):
        return BlipEmbedder(path, device)
    if kind not in (None, "blip-2"):
        return ClipEmbedder(path, device)
    model = load(path, device, trust=trust)
    if not isinstance(model, ImageTextModel):
        raise UsageError(
            f"'{path}' is a checkpoint of stage two; a ranker is one of stage one, or a CLIP of transformers"
        )
    return StageOneEmbedder(model)


class Embedder(ABC):
    """Images and texts in one space, where the similarity is the largest cosine over the rows of an image.

    Attributes:
        rows: of an image, or of each of its tiles. width: P, of a row.
        limit: tokens of a text; more are cut off, as CLIP does. 0: it embeds no texts.
        matcher: the model whose ITM can re-rank what the cosines find; None where there is none.
        scale: by which the model multiplies cosines for its loss.
        model: the module that holds all weights.
    """

    model: Any
    tokenizer: Any
    rows: int
    width: int
    limit: int
    matcher: ImageTextModel | None = None
    scale: float = 1.0

    @abstractmethod
    def embed_images(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """float[B, V, P] of unit length, and which of the V rows exist, bool[B, V]."""

    @abstractmethod
    def embed_texts(self, texts: list[str]) -> Tensor:
        """float[n, P] of unit length."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Fingerprint of the weights and of how images are read; it does not depend on the dtype."""

    def match(self, images: Sequence[Tensor], texts: list[str]) -> Tensor | None:
        """Log-odds that each of B images and each of n texts match, float[B, n]; None without a head for it."""
        return None

    def count(self, text: str) -> int:
        """The tokens of a text, uncut."""
        return len(self.tokenizer(text, verbose=False)["input_ids"])

    @torch.no_grad()
    def __call__(self, images: Sequence[Tensor], texts: Sequence[list[str]]) -> list[list[float]]:
        """The similarity of each of B images with each of its texts: the largest cosine over the image's rows."""
        image, valid = self.embed_images(images)
        of = torch.tensor([i for i, own in enumerate(texts) for _ in own], device=image.device)
        text = self.embed_texts([one for own in texts for one in own]).to(image.dtype)
        with torch.autocast(image.device.type, enabled=False):  # half of the digits would make ties
            cosines = torch.einsum("nvp,np->nv", image[of].float(), text.float())  # (n, V)
        scores = iter(cosines.masked_fill(~valid[of], -torch.inf).amax(dim=1).float().tolist())
        return [[next(scores) for _ in own] for own in texts]

    def too_long(self, texts: list[str]) -> int:
        """Number of texts that are cut."""
        return sum(len(ids) > self.limit for ids in self.tokenizer(texts, verbose=False)["input_ids"])


class StageOneEmbedder(Embedder):
    """The ITC of a stage-one model."""

    def __init__(self, model: ImageTextModel) -> None:
        self.model, self.tokenizer = model, model.tokenizer
        self.matcher = model
        self.rows, self.width = model.qformer.config.queries, model.config.embed_width
        self.limit = text_limit(model)
        self.scale = 1 / float(model.temp.detach())

    @torch.no_grad()
    def match(self, images: Sequence[Tensor], texts: list[str]) -> Tensor | None:
        """Log-odds of ITM, or None where that was left untrained."""
        if not self.model.can_match:
            return None
        pairs = torch.cartesian_prod(torch.arange(len(images)), torch.arange(len(texts))).to(self.model.device)
        seen = self.model.encode_images(self.model.frontend.tiles(images))
        logits = self.model.match_logits(seen, self.model.tokenize(texts, self.limit), pairs).float()
        return (logits[:, 1] - logits[:, 0]).unflatten(0, (len(images), len(texts))).cpu()

    def embed_images(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return self.model.embed_images(self.model.frontend.tiles(images))

    def embed_texts(self, texts: list[str]) -> Tensor:
        return self.model.embed_texts(self.model.tokenize(texts, self.limit))

    def fingerprint(self) -> str:
        return fingerprint(self.model)


class ClipEmbedder(Embedder):
    """A model of transformers with `get_image_features` and `get_text_features`."""

    rows = 1

    def __init__(self, path: str, device: str | torch.device) -> None:
        self.model = read_clip(path, device, "give a CLIP-like model or a checkpoint of stage one")
        processor = pretrained.read(AutoProcessor, path)
        self.tokenizer, self.processor = pretrained.as_words(processor.tokenizer), processor.image_processor
        text = getattr(self.model.config, "text_config", self.model.config)
        self.is_siglip = self.model.config.model_type.startswith("siglip")
        self.limit = min(self.tokenizer.model_max_length, text.max_position_embeddings)
        self.width = self.embed_texts(["a cat"]).shape[1]  # the families call it by different names
        scale = getattr(self.model, "logit_scale", None)
        self.scale = 1.0 if scale is None else float(scale.detach().exp())

    def embed_images(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        features = embed_pictures(self.model, self.processor, images)[:, None]  # (B, 1, P)
        return features, torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> Tensor:
        padding = "max_length" if self.is_siglip else "longest"
        tokens = self.tokenizer(texts, padding=padding, truncation=True, max_length=self.limit, return_tensors="pt")
        if self.is_siglip:  # was trained to read the padding
            tokens = {"input_ids": tokens["input_ids"]}
        inputs = {name: rows.to(self.model.device) for name, rows in tokens.items()}
        return _unit(self.model.get_text_features(**inputs))

    def fingerprint(self) -> str:
        return digest_weights(self.model, f"{self.model.config.model_type} {reading_of(self.processor)}")


class BlipEmbedder(Embedder):
    """BLIP's model of image-text retrieval in transformers: cosines of both `[CLS]` rows, and a head of matching."""

    rows = 1

    def __init__(self, path: str, device: str | torch.device) -> None:
        self.model = read_model(BlipForImageTextRetrieval, path, "give a BLIP for image-text retrieval")
        self.model.to(device).eval()
        processor = pretrained.read(AutoProcessor, path)
        self.tokenizer, self.processor = pretrained.as_words(processor.tokenizer), processor.image_processor
        self.limit = min(self.tokenizer.model_max_length, self.model.config.text_config.max_position_embeddings)
        self.width = self.model.config.image_text_hidden_size

    @torch.no_grad()
    def embed_images(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        pixels = pixels_of(self.processor, images).to(self.model.device)
        first = self.model.vision_model(pixel_values=pixels).last_hidden_state[:, 0]
        features = _unit(self.model.vision_proj(first))[:, None]  # (B, 1, P)
        return features, torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> Tensor:
        return _unit(self.model.text_proj(self.model.text_encoder(**self._tokens(texts)).last_hidden_state[:, 0]))

    @torch.no_grad()
    def match(self, images: Sequence[Tensor], texts: list[str]) -> Tensor:
        """Log-odds of the head of matching, each image with all texts."""
        pixels = pixels_of(self.processor, images).to(self.model.device)
        tokens = self._tokens(texts)
        rows = [self.model(pixel_values=one.expand(len(texts), -1, -1, -1), **tokens).itm_score for one in pixels]
        logits = torch.stack(rows).float()  # (B, n, 2)
        return (logits[..., 1] - logits[..., 0]).cpu()

    def _tokens(self, texts: list[str]) -> dict[str, Tensor]:
        read = self.tokenizer(texts, padding="longest", truncation=True, max_length=self.limit, return_tensors="pt")
        return {name: read[name].to(self.model.device) for name in ("input_ids", "attention_mask")}

    def fingerprint(self) -> str:
        return digest_weights(self.model, "blip")


class OpenClipEmbedder(Embedder):
    """A model and its weights, `ViT-B-32/laion2b_s34b_b79k`; the weights may also be a file.

    Raises:
        UsageError: open_clip is not installed, or does not have them.
    """

    rows = 1

    def __init__(self, name: str, device: str | torch.device) -> None:
        try:
            import open_clip
        except ImportError as error:
            raise UsageError(
                f"'open_clip:{name}' needs open_clip, which is not installed; run: pip install open_clip_torch"
            ) from error
        model, _, weights = name.partition("/")
        if not weights:
            raise UsageError(f"'open_clip:{name}' names no weights; give open_clip:MODEL/WEIGHTS")
        try:
            self.model, _, self.prepare = open_clip.create_model_and_transforms(model, pretrained=weights)
            self.tokenizer = open_clip.get_tokenizer(model)
        except (RuntimeError, OSError, ValueError) as error:
            raise UsageError(f"open_clip cannot load '{name}' ({error}); see open_clip.list_pretrained()") from error
        self.model.to(device).eval()
        self.device = device
        self.limit = int(self.tokenizer.context_length)
        self.width = self.embed_texts(["a cat"]).shape[1]
        self.scale = float(self.model.logit_scale.detach().exp())

    @torch.no_grad()
    def embed_images(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        shown = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        pixels = torch.stack([self.prepare(image) for image in shown]).to(self.device)
        features = F.normalize(self.model.encode_image(pixels).float(), dim=-1)[:, None]  # (B, 1, P)
        return features, torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> Tensor:
        return F.normalize(self.model.encode_text(self.tokenizer(texts).to(self.device)).float(), dim=-1)

    def count(self, text: str) -> int:
        """The tokens of a text, at most `limit`."""
        return int(self.tokenizer([text]).ne(0).sum())

    def too_long(self, texts: list[str]) -> int:
        """Number of texts that fill all places; open_clip cuts without telling."""
        return int(self.tokenizer(texts).ne(0).all(dim=1).sum())

    def fingerprint(self) -> str:
        return digest_weights(self.model, "open_clip")


def as_embedder(model: Embedder | ImageTextModel) -> Embedder:
    """The embedder, or that of a stage-one model."""
    return model if isinstance(model, Embedder) else StageOneEmbedder(model)


def fingerprint(model: ImageTextModel) -> str:
    """The same for the same weights whatever their dtype: of the shapes and some numbers of all tensors, as fp16."""
    return digest_weights(model, repr(model.frontend.strategy))


def digest_weights(model: nn.Module, about: str) -> str:
    """Digest of the shapes and some numbers of all tensors, as fp16, and of a text about how images are read."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(about.encode())
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().flatten()
        count = min(SAMPLED, len(flat))  # whole numbers: a float32 cannot tell the last of 2**24 numbers from none
        some = flat[torch.arange(count, device=flat.device) * (len(flat) - 1) // max(count - 1, 1)]
        digest.update(f"{name}{list(tensor.shape)}".encode() + some.half().cpu().numpy().tobytes())
    return digest.hexdigest()


def model_type_of(path: str) -> str | None:
    """Read the model type of a folder or hub id of transformers; None for checkpoints of ours and of LAVIS."""
    if not checkpoint.is_foreign(path) or Path(path).is_file() or path in releases.RELEASES:
        return None
    return configuration(path).model_type


def read_model(auto: Any, path: str, hint: str, needs: Sequence[str] = ()) -> Any:
    """A model with all of its weights and these methods.

    Raises:
        UsageError: it cannot be read or has not the methods; or weights are missing, which transformers would fill with
            random numbers.
    """
    model, report = pretrained.read(
        auto, path, f"'{{path}}' cannot be loaded ({{reason}}); {hint}", output_loading_info=True
    )
    if not all(hasattr(model, name) for name in needs):
        raise UsageError(f"'{path}' holds a {model.config.model_type} model; {hint}")
    if report["missing_keys"]:
        raise UsageError(f"'{path}' lacks weights, {min(report['missing_keys'])} for one; {hint}")
    return model


def read_clip(path: str, device: str | torch.device, hint: str) -> Any:
    """A model of transformers that embeds images and texts, in eval mode; for errors see `read_model`."""
    model = read_model(AutoModel, path, hint, needs=("get_image_features", "get_text_features"))
    return model.to(device).eval()


@torch.no_grad()
def embed_pictures(model: Any, processor: Any, images: Sequence[Tensor]) -> Tensor:
    """Projected embeddings of images uint8[3, h, w] by a CLIP-like model, float[B, P] of unit length."""
    pixels = pixels_of(processor, images).to(model.device)
    return _unit(model.get_image_features(pixel_values=pixels))


def read_image_processor(path: str) -> Any | None:
    """Read the image processor of a folder or hub id; None if it names none, as the towers of this package do.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        values, _ = ImageProcessingMixin.get_image_processor_dict(pretrained.tower(path))
    except OSError:
        return None
    named = values.keys() & {"image_processor_type", "feature_extractor_type"}
    return pretrained.read(AutoImageProcessor, path) if named else None


def reading_of(processor: Any) -> list[Any]:
    """Settings of an image processor on which its pixels depend."""
    return [getattr(processor, name, None) for name in ("size", "crop_size", "image_mean", "image_std")]


def pixels_of(processor: Any, images: Sequence[Tensor]) -> Tensor:
    """Process images uint8[3, h, w] with the model's own image processor: float[B, 3, S, S]."""
    if "shortest_edge" in processor.size:
        images = [_middle(image) for image in images]
    return processor(images=list(images), input_data_format="channels_first", return_tensors="pt")["pixel_values"]


def _middle(image: Tensor) -> Tensor:
    """Cut the middle out of a strip, since the model sees no more and its full size would fill the memory."""
    height, width = image.shape[1:]
    longest = STRIP * min(height, width)
    top, left = max(0, height - longest) // 2, max(0, width - longest) // 2
    return image[:, top : top + longest, left : left + longest]


def _unit(output: Any) -> Tensor:
    """Projected features, which some models wrap, at unit length."""
    return F.normalize((output if isinstance(output, Tensor) else output.pooler_output).float(), dim=-1)


def text_limit(model: ImageTextModel) -> int:
    """Tokens at which retrieval cuts a text: more than training does, never fewer."""
    return max(MAX_TOKENS, model.max_tokens)


def read_texts(model: ImageTextModel, texts: Sequence[str]) -> Tokens:
    """Texts as retrieval reads them, cut at `text_limit`."""
    return model.tokenize(list(texts), text_limit(model))
