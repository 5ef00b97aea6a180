"""Who writes and who ranks captions in CapFilt (BLIP, arXiv:2201.12086; BLIP-2, section 3.4): our models, or others'.

A captioner reads B images (uint8[3, h, w]) with B * n rows of numbers in [0, 1), one for each token, and gives n texts
of each image by nucleus sampling. A ranker reads B images and a list of texts for each, and gives their similarities:
cosines, of which ITC takes the largest over the queries. BLIP writes and CLIP ranks through transformers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, AutoProcessor, BlipForConditionalGeneration, DynamicCache, EncoderDecoderCache

from qformer import checkpoint
from qformer.files import pretrained, releases
from qformer.files.pretrained import configuration
from qformer.model.decoding import GenerateConfig, write
from qformer.model.image_text import ImageTextModel
from qformer.model.loading import load
from qformer.model.steps import CausalStep
from qformer.model.vision_language import VisionLanguageModel
from qformer.types import UsageError

Captioner = Callable[[Sequence[Tensor], list[list[float]]], list[str]]

NEW_TOKENS = 30  # at most, of a caption
BLIP_PROMPT = "a picture of"  # the prompt that BLIP was trained to caption with
STRIP = 32  # times longer than wide; CLIP resizes the shorter side, and then cuts the middle out
ITC_TOKENS = 35  # as retrieval reads texts


def load_captioner(
    path: str, device: str | torch.device, prompt: str | None = None, top_p: float = 0.9, trust: bool = False
) -> Captioner:
    """A checkpoint of either stage (ours, LAVIS's, BLIP-2 of transformers), or a BLIP of transformers.

    Args:
        prompt: the caption goes on from here; by default that of training.
        trust: see `qformer.load`.

    Raises:
        UsageError: none of these, or a prompt for stage one, which has none.
    """
    kind = _model_type(path)
    if kind == "blip":
        return Blip(path, device, BLIP_PROMPT if prompt is None else prompt, top_p)
    if kind not in (None, "blip-2"):
        raise UsageError(
            f"'{path}' holds a {kind} model; a captioner is a checkpoint of either stage, a BLIP-2 or a BLIP"
        )
    model = load(path, device, trust=trust)
    if isinstance(model, VisionLanguageModel):
        bridge = model  # of the type that is known inside the function

        def generate(images: Sequence[Tensor], draws: list[list[float]]) -> list[str]:
            options = _sampling(draws, len(images), top_p)
            return bridge.generate(bridge.frontend.tiles(images), prompt, **options)

        return generate
    if prompt is not None:
        raise UsageError(f"'{path}' is a checkpoint of stage one, which captions without a prompt; leave --prompt out")
    stage_one = model
    return lambda images, draws: stage_one.sample_captions(
        stage_one.frontend.tiles(images), torch.tensor(draws), top_p, NEW_TOKENS
    )


def load_ranker(path: str, device: str | torch.device, trust: bool = False) -> Ranker:
    """A checkpoint of stage one, or any model of transformers that embeds images and texts: CLIP, SigLIP, AltCLIP.

    For `trust` see `qformer.load`.

    Raises:
        UsageError: neither.
    """
    kind = _model_type(path)
    if kind not in (None, "blip-2"):
        return ClipLike(path, device)
    model = load(path, device, trust=trust)
    if not isinstance(model, ImageTextModel):
        raise UsageError(
            f"'{path}' is a checkpoint of stage two; a ranker is one of stage one, or a CLIP of transformers"
        )
    return Contrastive(model)


class Ranker(ABC):
    """Similarity of images and texts. A text of more than `limit` tokens is cut there, as CLIP does."""

    tokenizer: Any
    limit: int

    @abstractmethod
    def embed_images(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """float[B, V, P] of unit length, and which of the V rows exist, bool[B, V]."""

    @abstractmethod
    def embed_texts(self, texts: list[str]) -> Tensor:
        """float[n, P] of unit length."""

    @torch.no_grad()
    def __call__(self, images: Sequence[Tensor], texts: Sequence[list[str]]) -> list[list[float]]:
        """The similarity of each of B images with each of its texts: the largest cosine over the image's rows."""
        image, valid = self.embed_images(images)
        of = torch.tensor([i for i, own in enumerate(texts) for _ in own], device=image.device)
        text = self.embed_texts([one for own in texts for one in own]).to(image.dtype)
        cosines = torch.einsum("nvp,np->nv", image[of], text)  # (n, V)
        scores = iter(cosines.masked_fill(~valid[of], -torch.inf).amax(dim=1).float().tolist())
        return [[next(scores) for _ in own] for own in texts]

    def too_long(self, texts: list[str]) -> int:
        """How many of them are cut."""
        return sum(len(ids) > self.limit for ids in self.tokenizer(texts, verbose=False)["input_ids"])


class Contrastive(Ranker):
    """The ITC of a stage-one model."""

    def __init__(self, model: ImageTextModel) -> None:
        self.model, self.tokenizer = model, model.tokenizer
        self.limit = max(ITC_TOKENS, model.max_tokens)

    def embed_images(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return self.model.embed_images(self.model.frontend.tiles(images))

    def embed_texts(self, texts: list[str]) -> Tensor:
        return self.model.embed_texts(self.model.tokenize(texts, self.limit))


class ClipLike(Ranker):
    """A model of transformers with `get_image_features` and `get_text_features`."""

    def __init__(self, path: str, device: str | torch.device) -> None:
        self.model = _read(
            AutoModel,
            path,
            "a ranker is a CLIP-like model or a checkpoint of stage one",
            needs=("get_image_features", "get_text_features"),
        )
        self.model.to(device).eval()
        processor = pretrained.read(AutoProcessor, path)
        self.tokenizer, self.processor = pretrained.as_words(processor.tokenizer), processor.image_processor
        text = getattr(self.model.config, "text_config", self.model.config)
        self.is_siglip = self.model.config.model_type.startswith("siglip")
        self.limit = min(self.tokenizer.model_max_length, text.max_position_embeddings)

    def embed_images(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        pixels = _pixels(self.processor, images).to(self.model.device)
        features = _unit(self.model.get_image_features(pixel_values=pixels))[:, None]  # (B, 1, P)
        return features, torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)

    def embed_texts(self, texts: list[str]) -> Tensor:
        padding = "max_length" if self.is_siglip else "longest"
        tokens = self.tokenizer(texts, padding=padding, truncation=True, max_length=self.limit, return_tensors="pt")
        if self.is_siglip:  # was trained to read the padding
            tokens = {"input_ids": tokens["input_ids"]}
        inputs = {name: rows.to(self.model.device) for name, rows in tokens.items()}
        return _unit(self.model.get_text_features(**inputs))


class Blip:
    """BLIP's captioner (`BlipForConditionalGeneration`)."""

    def __init__(self, path: str, device: str | torch.device, prompt: str, top_p: float) -> None:
        self.model = _read(BlipForConditionalGeneration, path, "a captioner needs all weights").to(device).eval()
        processor = pretrained.read(AutoProcessor, path)
        self.tokenizer, self.processor = pretrained.as_words(processor.tokenizer), processor.image_processor
        self.prompt, self.top_p = prompt, top_p

    @torch.no_grad()
    def __call__(self, images: Sequence[Tensor], draws: list[list[float]]) -> list[str]:
        pixels = _pixels(self.processor, images).to(self.model.device)
        seen = self.model.vision_model(pixel_values=pixels)[0]  # (B, S, D)
        ids = self.tokenizer([self.prompt] * len(images), return_tensors="pt")["input_ids"].to(self.model.device)
        text = self.model.config.text_config
        ids = torch.cat([torch.full_like(ids[:, :1], text.bos_token_id), ids[:, 1:-1]], dim=1)  # its end is not read
        config = GenerateConfig(**_sampling(draws, len(images), self.top_p))
        step = BlipStep(self.model.text_decoder, ids, seen)
        new = write(step, ids[:, :0], text.sep_token_id, text.pad_token_id, config)
        return [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]


class BlipStep(CausalStep):
    """Steps of BLIP's text decoder after a prompt long[B, T], which sees image tokens float[B, S, D] beside it."""

    def __init__(self, decoder: Any, prompt: Tensor, seen: Tensor) -> None:
        super().__init__(decoder, decoder.get_input_embeddings()(prompt), torch.ones_like(prompt))
        self.seen = seen

    def _new_cache(self) -> Any:
        return EncoderDecoderCache(DynamicCache(), DynamicCache())

    def _text_cache(self) -> Any:
        return self.cache.self_attention_cache

    def _repeat(self, rows: Tensor) -> None:
        super()._repeat(rows)
        self.seen = self.seen[rows]

    def _forward(self, **inputs: Any) -> Tensor:
        return super()._forward(encoder_hidden_states=self.seen, **inputs)


def _sampling(draws: list[list[float]], images: int, top_p: float) -> dict[str, Any]:
    return {
        "do_sample": True,
        "num_return_sequences": len(draws) // images,
        "max_new_tokens": NEW_TOKENS,
        "top_p": top_p,
        "draws": draws,
    }


def _model_type(path: str) -> str | None:
    """Of a folder or hub id of transformers; None for checkpoints of ours and of LAVIS."""
    if not checkpoint.is_foreign(path) or Path(path).is_file() or path in releases.RELEASES:
        return None
    return configuration(path).model_type


def _read(auto: Any, path: str, hint: str, needs: Sequence[str] = ()) -> Any:
    """A model with all of its weights and these methods.

    Raises:
        UsageError: it cannot be read or has not the methods; or weights are missing, which transformers would fill with
            random numbers.
    """
    try:
        model, report = pretrained.read(auto, path, output_loading_info=True)
    except UsageError:
        raise
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise UsageError(f"'{path}' cannot be loaded ({reason}); {hint}") from error
    if not all(hasattr(model, name) for name in needs):
        raise UsageError(f"'{path}' holds a {model.config.model_type} model; {hint}")
    if report["missing_keys"]:
        raise UsageError(f"'{path}' lacks weights, {min(report['missing_keys'])} for one; {hint}")
    return model


def _pixels(processor: Any, images: Sequence[Tensor]) -> Tensor:
    """What the model's own image processor makes of uint8[3, h, w]: float[B, 3, S, S]."""
    if "shortest_edge" in processor.size:
        images = [_middle(image) for image in images]
    return processor(images=list(images), input_data_format="channels_first", return_tensors="pt")["pixel_values"]


def _middle(image: Tensor) -> Tensor:
    """Of a strip the middle, which is all that is seen of it: its shorter side at full size would fill the memory."""
    height, width = image.shape[1:]
    longest = STRIP * min(height, width)
    top, left = max(0, height - longest) // 2, max(0, width - longest) // 2
    return image[:, top : top + longest, left : left + longest]


def _unit(output: Any) -> Tensor:
    """Projected features, which some models wrap, at unit length."""
    return F.normalize((output if isinstance(output, Tensor) else output.pooler_output).float(), dim=-1)
