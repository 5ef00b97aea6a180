"""Models on this machine that answer questions about pictures: our checkpoints, and those of transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from qformer import devices
from qformer.checkpoints.loading import load_vision_language
from qformer.files import pretrained
from qformer.retrieval.embedders import digest_weights, read_model
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

    from qformer.resolution.base import ResolutionStrategy

HINT = "give an image-text-to-text model of transformers, or a checkpoint of qformer without --model"
#: Prompts of models that were published without a chat template, by their type.
PROMPTS = {
    "llava": "USER: {image}\n{question} ASSISTANT:",
    "blip-2": "Question: {question} Answer:",
    "instructblip": "{question}",
}
NEW_TOKENS = 64
UNFIT = (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, NotImplementedError)


class Checkpoint:
    """A stage-two checkpoint, asked as `qformer ask` does.

    Attributes:
        model: a `VisionLanguageModel`. tile: side of its image encoder's own picture, in pixels.
    """

    def __init__(
        self,
        path: str,
        device: str | None = None,
        strategy: ResolutionStrategy | None = None,
        quantize: str | None = None,
        trust: bool = False,
    ) -> None:
        """Load the checkpoint.

        Args:
            strategy: cuts pictures in place of the one that it was trained with, to see what that does.

        Raises:
            UsageError: no checkpoint of stage two, or a strategy that puts markers around tiles which it never learned.
        """
        self.model = load_vision_language(path, device, quantize, trust)
        self.tile = self.model.frontend.encoder.image_size
        if strategy is not None:
            known = set(self.model.frontend.strategy.markers())
            if foreign := [text for text in strategy.markers() if text not in known]:
                raise UsageError(
                    f"the strategy puts {foreign[0]!r} around tiles, which '{path}' has not learned to read; choose "
                    "one without markers, or the one that it was trained with"
                )
            self.model.frontend.strategy = strategy

    @property
    def strategy(self) -> ResolutionStrategy:
        return self.model.frontend.strategy

    @property
    def identity(self) -> dict[str, str]:
        return {"weights": digest_weights(self.model, repr(self.strategy))}

    def __call__(self, images: Sequence[Image.Image], questions: Sequence[str]) -> list[str]:
        """Answers to B questions, each about its own image."""
        return self.model.answer(self.model.frontend.tiles(images), list(questions))


class TransformersModel:
    """An image-text-to-text model of transformers, by name or folder; its processor says how pictures are cut.

    Without torchvision only models whose processors can do without it are read, such as LLaVA-1.5's and BLIP-2's.
    """

    def __init__(self, path: str, device: str | None = None) -> None:
        """Load model and processor; no code of theirs is run.

        Raises:
            UsageError: they cannot be read, or weights are missing.
        """
        self.path = path
        self.model = read_model(AutoModelForImageTextToText, path, HINT, needs=("generate",))
        self.model.to(devices.choose(device)).eval()
        sentence = (
            "the processor of '{path}' cannot be loaded ({reason}); put its files there, or install what it needs"
        )
        self.processor = pretrained.read(AutoProcessor, path, sentence)
        if not (hasattr(self.processor, "tokenizer") and hasattr(self.processor, "image_processor")):
            raise UsageError(f"the processor of '{path}' does not read pictures with texts; {HINT}")

    @property
    def identity(self) -> dict[str, str]:
        return {"weights": digest_weights(self.model, f"{self.processor.image_processor} {self._prompt('')}")}

    def __call__(self, images: Sequence[Image.Image], questions: Sequence[str]) -> list[str]:
        """Answers to B questions, each about its own image, one by one, the likeliest word each time.

        Raises:
            UsageError: the model does not take a picture and a question.
        """
        try:
            return [self._answer(image, question) for image, question in zip(images, questions, strict=True)]
        except torch.OutOfMemoryError:
            raise
        except UNFIT as error:
            reason = str(error).strip().partition("\n")[0].rstrip(".")[:200] or type(error).__name__
            raise UsageError(f"'{self.path}' does not answer a question about a picture ({reason}); {HINT}") from error

    @torch.no_grad()
    def _answer(self, image: Image.Image, question: str) -> str:
        inputs = self.processor(images=image, text=self._prompt(question), return_tensors="pt")
        inputs = inputs.to(self.model.device, self.model.dtype)
        with pretrained.quiet():
            written = self.model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)[0]
        read = inputs["input_ids"][0]
        if torch.equal(written[: len(read)], read):  # some give the prompt back, some do not
            written = written[len(read) :]
        said: str = self.processor.tokenizer.decode(written, skip_special_tokens=True)
        return said.strip()

    def _prompt(self, question: str) -> str:
        if getattr(self.processor, "chat_template", None):
            turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
            text: str = self.processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
            return text
        token: Any = getattr(self.processor, "image_token", None)
        image = "" if token is None else str(token)
        return PROMPTS.get(self.model.config.model_type, "{image}\n{question}").format(image=image, question=question)
