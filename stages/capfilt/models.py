"""Who writes and who ranks captions in CapFilt (BLIP, arXiv:2201.12086; BLIP-2, section 3.4): our models, or others'.

A captioner reads B images (uint8[3, h, w]) with B * n rows of numbers in [0, 1), one for each token, and gives n texts
of each image by nucleus sampling. A ranker reads B images and a list of texts for each, and gives their similarities:
cosines, of which ITC takes the largest over the queries. BLIP writes and CLIP ranks through transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoProcessor, BlipForConditionalGeneration, DynamicCache, EncoderDecoderCache

from qformer.checkpoints.loading import load
from qformer.files import pretrained
from qformer.llm.decoding import GenerateConfig, write
from qformer.llm.steps import CausalStep
from qformer.model.vision_language import VisionLanguageModel
from qformer.retrieval.embedders import model_type_of, pixels_of, read_model
from qformer.types import UsageError

Captioner = Callable[[Sequence[Tensor], list[list[float]]], list[str]]

NEW_TOKENS = 30  # at most, of a caption
BLIP_PROMPT = "a picture of"  # the prompt that BLIP was trained to caption with


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
    kind = model_type_of(path)
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


class Blip:
    """BLIP's captioner (`BlipForConditionalGeneration`)."""

    def __init__(self, path: str, device: str | torch.device, prompt: str, top_p: float) -> None:
        self.model = read_model(BlipForConditionalGeneration, path, "a captioner needs all weights").to(device).eval()
        processor = pretrained.read(AutoProcessor, path)
        self.tokenizer, self.processor = pretrained.as_words(processor.tokenizer), processor.image_processor
        self.prompt, self.top_p = prompt, top_p

    @torch.no_grad()
    def __call__(self, images: Sequence[Tensor], draws: list[list[float]]) -> list[str]:
        pixels = pixels_of(self.processor, images).to(self.model.device)
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
