"""Stage two: the Q-Former's outputs become soft prompts of a frozen language model (BLIP-2, section 3.3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast, overload

import torch
from torch import Tensor, nn

from qformer import distributed
from qformer.model.frontend import FrontEnd
from qformer.model.llm import LanguageModel, Seq2SeqLM
from qformer.model.prompts import vqa_preset, vqa_prompt
from qformer.types import Batch, Plan, Tiles, Tokens, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qformer.model.connectors import QFormerConnector
    from qformer.vision.base import VisionEncoder

    Turn = tuple[str, str]


class VisionLanguageModel(nn.Module):
    """Frozen encoder, connector, frozen LLM. Only the front end's LayerNorm and the connector are trained.

    `prompt` is put in front of every caption in training and when captioning (`a photo of`).
    """

    def __init__(
        self,
        encoder: VisionEncoder,
        connector: QFormerConnector,
        llm: LanguageModel,
        prompt: str = "",
        max_tokens: int = 32,
    ) -> None:
        super().__init__()
        self.frontend = FrontEnd(encoder)
        self.connector = connector
        self.llm = llm
        self.prompt = prompt
        self.max_tokens = max_tokens

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """One step: `lm`, the mean cross-entropy over target tokens, which is also the `loss`; float scalars.

        A causal LLM writes the caption behind its prompt; an encoder-decoder reads a random first part of it and
        writes the rest. Question data is asked with the VQA prompt; the target is the answer that was drawn for
        this step, or else the first accepted one.
        """
        prefix, mask = self.prefix(batch.tiles, batch.question)
        prompts, targets = self._prompts_and_targets(batch)
        total, count = self.llm.loss(prefix, mask, targets, prompts, self.max_tokens)
        if batch.targets is not None:
            count = batch.targets.to(total.device)
        elif distributed.world() > 1:
            count = distributed.total(count) / distributed.world()
        loss = total / count.clamp(min=1)
        return {"loss": loss, "lm": loss}

    def count_targets(self, batch: Batch) -> int:
        """Number of tokens that a step on this batch predicts. Captions cut at random are cut now, for good."""
        batch.halves = self._halves(batch)
        prompts, targets = self._prompts_and_targets(batch)
        return self.llm.count_targets(targets, prompts, self.max_tokens)

    def prefix(
        self, tiles: Tiles, questions: Sequence[str] | Sequence[Sequence[str]] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The visual prefix of B images: float[B, M, L] and bool[B, M].

        With `questions` (one string per image, or a list of strings per image) there is a row for each of them, in
        their order. A Q-Former that reads questions makes each its own; the image is encoded once all the same.
        """
        asked = None if questions is None else [[q] if isinstance(q, str) else list(q) for q in questions]
        return self.connector(self.frontend(tiles), asked)

    def count_tokens(self, plan: Plan) -> int:
        """Length of the prefix that an image of this plan really produces."""
        return self.connector.count_tokens(plan)

    @torch.no_grad()
    def generate(
        self, tiles: Tiles, prompt: str | Sequence[str] | None = None, return_ids: bool = False, **options: Any
    ) -> Any:
        """Text for each of B images.

        Args:
            prompt: one for all images, one per image, or None for the prompt of training.
            return_ids: give the new tokens, long[B, new], instead of strings.
            options: fields of `GenerateConfig`; the defaults are the paper's for captions. With `num_return_sequences`
                the texts of an image come one after the other.

        Raises:
            UsageError: another number of prompts than of images, or an unknown option.
        """
        prompt = self.prompt if prompt is None else prompt
        prompts = [prompt] * len(tiles) if isinstance(prompt, str) else list(prompt)
        if len(prompts) != len(tiles):
            raise UsageError(f"got {len(prompts)} prompts for {len(tiles)} images; give one for all, or one for each")
        ids = self.llm.generate(*self.prefix(tiles), prompts, **options)
        return ids if return_ids else self.llm.decode(ids)

    @overload
    def answer(self, tiles: Tiles, questions: Sequence[str], *args: Any, **kwargs: Any) -> list[str]: ...
    @overload
    def answer(
        self, tiles: Tiles, questions: Sequence[Sequence[str]], *args: Any, **kwargs: Any
    ) -> list[list[str]]: ...
    @torch.no_grad()
    def answer(
        self,
        tiles: Tiles,
        questions: Sequence[Any],
        context: Sequence[str | None] | str | None = None,
        history: Sequence[Sequence[Turn]] | None = None,
        preset: str = "paper",
        **options: Any,
    ) -> Any:
        """Answers to questions about B images; each image is encoded once, however many questions it has.

        Args:
            questions: one string per image, or a list of strings per image.
            context: free text in front of the questions, for all images or one per image.
            history: earlier (question, answer) turns of each image.
            preset: `paper` or `lavis`: templates and length penalty.
            options: fields of `GenerateConfig` that differ from the preset.

        Returns:
            list[str], or a list per image where `questions` holds lists.

        Raises:
            UsageError: numbers of images, questions, contexts or histories that differ, or an unknown preset or option.
        """
        nested = [[q] if isinstance(q, str) else list(q) for q in questions]
        contexts = [context] * len(tiles) if context is None or isinstance(context, str) else list(context)
        histories = [()] * len(tiles) if history is None else list(history)
        for name, given in (("questions", nested), ("contexts", contexts), ("histories", histories)):
            if len(given) != len(tiles):
                raise UsageError(f"got {len(given)} {name} for {len(tiles)} images; give one for each image")
        prompts = [
            vqa_prompt(question, preset, self.llm.family, contexts[image], histories[image])
            for image, asked in enumerate(nested)
            for question in asked
        ]
        prefix, mask = self.prefix(tiles, nested)  # a row for each question
        settings = vqa_preset(preset, self.llm.family).generate | options
        answers = iter(self.llm.decode(self.llm.generate(prefix, mask, prompts, **settings)) if prompts else [])
        grouped = [[next(answers) for _ in asked] for asked in nested]
        flat = all(isinstance(question, str) for question in questions)
        return [group[0] for group in grouped] if flat else grouped

    def _prompts_and_targets(self, batch: Batch) -> tuple[list[str], list[str]]:
        if isinstance(batch.text, Tokens):
            raise TypeError(
                "stage two takes captions as strings: they are tokenised for the language model, not for BERT"
            )
        if batch.question is not None:
            answers = batch.answer or [accepted[0] for accepted in batch.answers or []]
            return [vqa_prompt(question, "paper", self.llm.family) for question in batch.question], answers
        if isinstance(self.llm, Seq2SeqLM):
            halves = self._halves(batch)
            return [_spaced(self.prompt) + prefix for prefix, _ in halves], [suffix for _, suffix in halves]
        return [self.prompt] * len(batch), list(batch.text)

    def _halves(self, batch: Batch) -> list[tuple[str, str]]:
        """Each caption cut in two, as an encoder-decoder needs it; those of the batch where it has been cut before."""
        if batch.halves is not None or batch.question is not None or not isinstance(self.llm, Seq2SeqLM):
            return batch.halves or []
        # The random split is part of the objective; held-out losses are compared over time, so theirs is fixed.
        generator = None if self.training else torch.Generator().manual_seed(0)
        return [split_caption(text, generator) for text in cast("list[str]", batch.text)]


def _spaced(prompt: str) -> str:
    return f"{prompt.rstrip()} " if prompt.strip() else ""


def split_caption(text: str, generator: torch.Generator | None = None) -> tuple[str, str]:
    """Cut a caption between two words, drawn uniformly: the prefix that is read and the suffix that is predicted.

    (BLIP-2, section 3.3.) Both are non-empty for two words or more; a single word is all suffix.
    """
    words = text.split()
    if len(words) < 2:
        return "", " ".join(words)
    cut = int(torch.randint(1, len(words), (), generator=generator))
    return " ".join(words[:cut]), " ".join(words[cut:])
