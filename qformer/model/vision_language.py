"""Stage two: the Q-Former's outputs become soft prompts of a frozen language model (BLIP-2, section 3.3)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

from qformer import distributed
from qformer.connectors.base import owners
from qformer.connectors.markers import Markers
from qformer.llm import mrope
from qformer.llm.base import LanguageModel, Seq2SeqLM
from qformer.llm.decoding import GenerateConfig
from qformer.llm.prompts import compose, vqa_prompt, wording
from qformer.llm.streaming import stream
from qformer.model import answers
from qformer.model.frontend import FrontEnd
from qformer.model.room import Room
from qformer.types import Batch, Plan, Tiles, Tokens, UsageError, VisualTokens

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from qformer.connectors.base import Connector, Prefix
    from qformer.model.answers import AnsweredExample, Example, Turn, WordedExample
    from qformer.vision.base import VisionEncoder


class VisionLanguageModel(nn.Module):
    """Frozen encoder, connector, frozen LLM. Only the connector and, before a Q-Former, a LayerNorm are trained.

    Markers that plans ask for around their tiles are tokens of the language model, or else trained too (`Markers`).

    An encoder alone sees whole images, as BLIP-2 does; a `FrontEnd` may cut them, or go without the LayerNorm. `prompt`
    is put in front of every caption in training and when captioning (`a photo of`).
    """

    def __init__(
        self,
        encoder: VisionEncoder | FrontEnd,
        connector: Connector,
        llm: LanguageModel,
        prompt: str = "",
        max_tokens: int = 32,
    ) -> None:
        super().__init__()
        whole = FrontEnd.for_qformer if connector.normalized else FrontEnd
        self.frontend = encoder if isinstance(encoder, FrontEnd) else whole(encoder)
        self.connector = connector
        if connector.patch is None:
            connector.patch = self.frontend.encoder.patch_size
        self.llm = llm
        self.markers = Markers(self.frontend.strategy, llm)
        self.prompt = prompt
        if any(special in prompt for special in llm.tokenizer.all_special_tokens):
            llm.template = prompt  # the configuration's, not typed by whoever asks
        self.max_tokens = max_tokens

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """One step: `lm`, the mean cross-entropy over target tokens, which is also the `loss`; float scalars.

        A causal LLM writes the caption behind its prompt; an encoder-decoder reads a random first part of it and
        writes the rest. Question data is asked with the VQA prompt; the target is the answer that was drawn for
        this step, or else the first accepted one.
        """
        seen = self.prefix(batch.tiles, batch.question)
        prompts, targets = self._prompts_and_targets(batch)
        total, count = self.llm.loss(*seen, targets, prompts, self.max_tokens, seen.places)
        if batch.targets is not None:
            count = batch.targets.to(total.device)
        elif distributed.world() > 1:
            count = distributed.total(count) / distributed.world()
        loss = total / count.clamp(min=1)
        return {"loss": loss, "lm": loss}

    def count_targets(self, batch: Batch) -> int:
        """Number of tokens that a step on this batch predicts. Where captions are cut is drawn now, if it was not."""
        if isinstance(self.llm, Seq2SeqLM):
            batch.cuts = self._cuts(batch)
        prompts, targets = self._prompts_and_targets(batch)
        return self.llm.count_targets(targets, prompts, self.max_tokens)

    def prefix(self, tiles: Tiles, questions: Sequence[str] | Sequence[Sequence[str]] | None = None) -> Prefix:
        """The visual prefix of B images: float[B, M, L] and bool[B, M].

        With `questions` (one string per image, or a list of strings per image) there is a row for each of them, in
        their order. A Q-Former that reads questions makes each its own; the image is encoded once all the same.
        """
        return self.prefix_of(self.frontend(tiles), None if questions is None else answers.nest(questions))

    def prefix_of(self, visual: VisualTokens, questions: Sequence[Sequence[str]] | None = None) -> Prefix:
        """`prefix` of what the front end has made of B images, each with its list of questions."""
        marked = any(plan.has_text for plan in visual.plans)
        extra = {"marker": partial(self.markers.vector, llm=self.llm)} if marked else {}
        prefix: Prefix = self.connector(visual, questions, **extra)
        if self.llm.has_places and self.connector.keeps_grid:
            images = range(len(visual)) if questions is None else owners(questions).tolist()
            plans = [visual.plans[image] for image in images]
            # from the plans alone: a plan of a training has no numbers in its tensors, and a GPU is not waited for
            placed = mrope.of_plans(plans, list(map(self.count_tokens, plans)), prefix.mask.shape[1])
            prefix.places = placed.to(prefix.mask.device)
        return prefix

    def count_tokens(self, plan: Plan) -> int:
        """Length of the prefix that an image of this plan really produces, text around its tiles included."""
        return self.connector.count_tokens(plan) + plan.markers + self.markers.count_leads(plan, self.llm)

    def require_positions(self, plan: Plan, new: int = 1) -> None:
        """Check that the language model has positions for a picture, row or clip of this plan and `new` tokens.

        Raises:
            UsageError: it has not; a bad sample of a data set (`Refused`).
        """
        self.room(len(self.llm.start) + self._behind(new), new)(plan)

    def room(self, taken: int, text: int | None = None) -> Room:
        """Room for what is shown, see `Room.of`."""
        return Room.of(self.connector, self.llm, self.frontend.strategy.rule.reduced_by, taken, text)

    def longest_text(self, question: str | None = None) -> int:
        """Most tokens that stand behind a sample: a text of training, or the usual prompt and what is written to it.

        Args:
            question: of the sample; None: it has captions.
        """
        if question is None:
            prompt, options = self.prompt, self._usual()
        else:
            prompt = vqa_prompt(question, "paper", self.llm.wording)
            options = wording("vqa", "paper", self.llm.wording).generate
        new = self._behind(GenerateConfig.of(options).max_new_tokens)
        return max(self.max_tokens, self.llm.count_tokens(prompt) + new)

    def _behind(self, new: int) -> int:
        """Positions that `new` tokens take behind a prompt: the decoder of an encoder-decoder has its own."""
        return 1 if isinstance(self.llm, Seq2SeqLM) else new

    @torch.no_grad()
    def generate(
        self,
        tiles: Tiles,
        prompt: str | Sequence[str] | None = None,
        return_ids: bool = False,
        examples: Sequence[Sequence[Example]] | None = None,
        **options: Any,
    ) -> Any:
        """Text for each of B images.

        Args:
            prompt: one for all images, one per image, or None for the prompt of training.
            return_ids: give the new tokens, long[B, new], instead of strings.
            examples: for each image other images with their texts, which are read in front of it; any number.
            options: fields of `GenerateConfig`; the defaults are the paper's for captions. With `num_return_sequences`
                the texts of an image come one after the other.

        Raises:
            UsageError: another number of prompts or examples than of images, an unknown option, or more than the
                positions of the language model.
        """
        prompt = self.prompt if prompt is None else prompt
        prompts = [prompt] * len(tiles) if isinstance(prompt, str) else list(prompt)
        if len(prompts) != len(tiles):
            raise UsageError(f"got {len(prompts)} prompts for {len(tiles)} images; give one for all, or one for each")
        shown = answers.without_questions(self.llm, examples, prompts)
        seen = self._see(tiles, None, shown)
        ids = self.llm.generate(*seen, prompts, **seen.placing | self._usual() | options)
        return ids if return_ids else self.llm.decode(ids)

    @torch.no_grad()
    def stream(
        self,
        tiles: Tiles,
        prompt: str | None = None,
        examples: Sequence[Sequence[Example]] | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """`generate` for one image, in pieces as they come: greedy or, with `do_sample`, drawn.

        Whoever stops reading ends the generation (when the iterator is closed or forgotten).

        Raises:
            UsageError: several images, beams or texts, or what `generate` refuses.
        """
        if len(tiles) != 1:
            raise UsageError(f"got {len(tiles)} images; the text of one image can be streamed")
        prompt = self.prompt if prompt is None else prompt
        seen = self._see(tiles, None, answers.without_questions(self.llm, examples, [prompt]))
        return stream(self.llm, *seen, prompt, self._usual() | {"num_beams": 1} | options, seen.places)

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
        task: str = "vqa",
        examples: Sequence[Sequence[AnsweredExample]] | None = None,
        **options: Any,
    ) -> Any:
        """Answers to questions about B images; each image is encoded once, however many questions it has.

        Args:
            questions: one string per image, or a list of strings per image.
            context: free text in front of the questions, for all images or one per image.
            history: earlier (question, answer) turns of each image.
            preset: `paper` or `lavis`: templates and length penalty.
            task: row of `qformer.llm.prompts.TASKS`: what the questions are, their wording and their decoding.
            examples: for each image other images with question and answer, which are read in front of it; any number.
            options: fields of `GenerateConfig` that differ from the task's.

        What exceeds the positions of the language model is left out, of each prompt by itself: words from the start of
        the context, then the oldest turns (a UserWarning tells how much), never anything of the question.

        Returns:
            list[str], or a list per image where `questions` holds lists.

        Raises:
            UsageError: numbers of images, questions, contexts, histories or examples that differ, an unknown preset,
                task or option, or a question that does not fit by itself.
        """
        nested, key = answers.nest(questions), (task, preset, self.llm.wording)
        prompts = answers.prompts_of_images(nested, len(tiles), context, history, key)
        visual = self._see(tiles, nested, answers.worded(examples, key))
        grouped = answers.reply(self.llm, visual, prompts, wording(*key).generate | options)
        flat = all(isinstance(question, str) for question in questions)
        return [group[0] for group in grouped] if flat else grouped

    def prompt_for(
        self,
        plan: Plan,
        question: str,
        context: str | None = None,
        history: Sequence[Turn] | None = None,
        preset: str = "paper",
        task: str = "vqa",
        **options: Any,
    ) -> str:
        """The prompt behind an image of this plan, as `answer` puts it: cut where it would not fit.

        Raises:
            UsageError: an unknown task, preset or option, or a question that alone is longer than fits.
        """
        config = GenerateConfig.of(wording(task, preset, self.llm.wording).generate | options)
        prompt = compose(question, task, preset, self.llm.wording, context, history)
        return answers.fit(self.llm, [prompt], [self.count_tokens(plan)], config.max_new_tokens)[0]

    @torch.no_grad()
    def stream_answer(
        self,
        tiles: Tiles,
        question: str,
        context: str | None = None,
        history: Sequence[Turn] | None = None,
        preset: str = "paper",
        task: str = "vqa",
        **options: Any,
    ) -> Iterator[str]:
        """`answer` to one question about one image, in pieces as they come; the rest is as in `stream`.

        Raises:
            UsageError: several images or beams, or what `answer` refuses.
        """
        if len(tiles) != 1:
            raise UsageError(f"got {len(tiles)} images; the answer about one image can be streamed")
        settings = wording(task, preset, self.llm.wording).generate | {"num_beams": 1} | options
        prompt = self.prompt_for(tiles.plans[0], question, context, history, preset, task, **settings)
        seen = self.prefix(tiles, [question])
        return stream(self.llm, *seen, prompt, settings, seen.places)

    @torch.no_grad()
    def self_ask(self, tiles: Tiles, context: str | None = None, preset: str = "paper", **options: Any) -> list[Turn]:
        """A question about each of B images that the model asks itself, and its own answer.

        Args:
            context: free text in front of both.
            options: fields of `GenerateConfig` for the question, such as `do_sample=True` for another one each time.
        """
        seen = self.frontend(tiles)

        def say(task: str, asked: list[str], **given: Any) -> list[str]:
            nested, key = [[one] for one in asked], (task, preset, self.llm.wording)
            prompts = answers.prompts_of_images(nested, len(tiles), context, None, key)
            visual = self.prefix_of(seen, nested)
            return [text for (text,) in answers.reply(self.llm, visual, prompts, wording(*key).generate | given)]

        questions = list(map(answers.first_question, say("ask", [""] * len(tiles), **options)))
        return list(zip(questions, say("vqa", questions), strict=True))

    def _usual(self) -> dict[str, Any]:
        """Options of captions that differ from the paper's, which a language model with a template needs."""
        return wording("caption", "paper", "chat").generate if self.llm.chat else {}

    def _see(
        self, tiles: Tiles, questions: list[list[str]] | None, examples: Sequence[Sequence[WordedExample]] | None
    ) -> Prefix:
        return answers.see(self.llm, self.prefix, tiles, questions, examples)

    def _prompts_and_targets(self, batch: Batch) -> tuple[list[str], list[str]]:
        if isinstance(batch.text, Tokens):
            raise TypeError(
                "stage two takes captions as strings: they are tokenised for the language model, not for BERT"
            )
        if batch.question is not None:
            targets = batch.answer or [accepted[0] for accepted in batch.answers or []]
            return [vqa_prompt(question, "paper", self.llm.wording) for question in batch.question], targets
        if isinstance(self.llm, Seq2SeqLM):
            cuts = self._cuts(batch)
            halves = [split_caption(*both) for both in zip(batch.text, cuts, strict=True)]
            return [_spaced(self.prompt) + prefix for prefix, _ in halves], [suffix for _, suffix in halves]
        return [self.prompt] * len(batch), list(batch.text)

    def _cuts(self, batch: Batch) -> list[float]:
        """Choose where captions are cut: as the batch says, which it does in training, or at random."""
        if batch.cuts is not None:
            return batch.cuts
        # Held-out losses are compared over time, so theirs are always the same.
        generator = None if self.training else torch.Generator().manual_seed(0)
        return torch.rand(len(batch), generator=generator).tolist()


def _spaced(prompt: str) -> str:
    return f"{prompt.rstrip()} " if prompt.strip() else ""


def split_caption(text: str, where: float) -> tuple[str, str]:
    """Cut a caption between two words: the prefix that is read and the suffix that is predicted.

    (BLIP-2, section 3.3.) Both are non-empty for two words or more; a single word is all suffix.

    Args:
        where: in [0, 1); a number drawn uniformly makes each place as likely as any other.
    """
    words = text.split()
    if len(words) < 2:
        return "", " ".join(words)
    cut = 1 + int(where * (len(words) - 1))
    return " ".join(words[:cut]), " ".join(words[cut:])
