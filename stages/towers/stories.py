"""Training of language models from scratch on stories: text about scenes, with a description in place of an image.

They are trained through the `LanguageModel.loss` that stage two uses, so that the begin token, the prompt and the end
token are the same in both.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from qformer.data.loader import BatchRecord
from qformer.llm.base import CausalLM, LanguageModel, Seq2SeqLM
from qformer.model.vision_language import split_caption
from qformer.stages.towers.build import build_language_model, read_tokenizer, train_tokenizer
from qformer.stages.towers.places import Places
from qformer.types import Batch, Tiles

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from qformer.canvases.stories import CanvasStories
    from qformer.config import BackboneConfig
    from qformer.scenes.stories import Stories, Story

LONG = ("describe", "self-ask")  # kinds whose replies are sentences, with more than one right wording
BETWEEN_OBJECTS = re.compile(r", (?!\d)| and ")
PICTURE = re.compile(r"(first|second)( picture:) ")
BOX = re.compile(r"\[(\d+), (\d+), (\d+), (\d+)\]")
SIDEWAYS = re.compile(r"pointing (left|right)\b")
SAMPLE_FOR_TOKENIZER = 4000
ANSWER = 16  # tokens of an answer at most; a box has ten
CROWDED = 0.15  # share of unordered batches with hundreds of rows
ROWS = 768  # in front of texts and with them, for a model without an end of its positions
OFTEN = 20  # times that the tokenizer reads each word of a source that lists them, most of which are in stories too
DOUBLED = 0.5  # share of unordered stories with repeated objects, and of the objects that they repeat


class StoryTask(nn.Module):
    """A small OPT or T5 that reads a description and a prompt and writes the reply.

    In an unordered story the words about each object are summed into one vector, and in training some vectors are
    repeated. So the model learns from text alone to read vectors that are like visual tokens: each holds several facts,
    has no position in a sentence, and can describe the same object as another one.
    """

    def __init__(self, config: BackboneConfig, stories: Stories | CanvasStories, kept: Path | None = None) -> None:
        """Build a model, and train its tokenizer unless the folder `kept` holds the one of the run so far."""
        super().__init__()
        self.max_tokens = config.max_tokens
        tokenizer = read_tokenizer(kept) if kept is not None else _train_tokenizer(config, stories)
        model = build_language_model(config, tokenizer)
        for key in ("dropout", "attention_dropout", "activation_dropout", "dropout_rate"):
            if hasattr(model.config, key):
                setattr(model.config, key, 0.0)
        model.set_attn_implementation("eager")  # in bf16 on a CPU, fused attention takes twice as long backward
        kind = CausalLM if config.kind == "opt" else Seq2SeqLM
        self.llm: LanguageModel = kind(model, tokenizer)
        self.llm.model.requires_grad_(True)
        self.llm.autocast = True
        self.places = Places(model)
        if config.kind == "t5":
            for module in model.modules():
                if type(module).__name__ == "T5Attention":
                    parametrize.register_parametrization(module.q, "weight", Scaled(module.key_value_proj_dim**-0.5))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Compute `lm`, the cross-entropy per token of answers plus that of descriptions.

        With one mean over all tokens, descriptions of thirty words would outweigh answers of one word.
        """
        stories = cast("list[Story]", batch.text)
        is_crowded = self.training and stories[0].unordered and bool(torch.rand(()) < CROWDED)
        if is_crowded:
            stories = stories[: max(len(stories) // 8, 1)]  # of eight times as many rows
        losses = []
        for long in (False, True):
            some = [story for story in stories if (story.kind in LONG) == long]
            if some:
                pairs = [self._pair(story) for story in some]
                prompts, replies = [prompt for prompt, _ in pairs], [reply for _, reply in pairs]
                prefix, mask = self.read(some)
                if is_crowded:
                    prefix, mask = crowd(prefix, mask, (self.places.count or ROWS) - self.max_tokens)
                with self.places.at(self._draw(some, mask)):
                    total, count = self.llm.loss(prefix, mask, replies, prompts, self.max_tokens)
                losses.append(total / count)
        loss = torch.stack(losses).sum()
        return {"loss": loss, "lm": loss}

    def _draw(self, stories: Sequence[Story], mask: Tensor) -> Tensor | None:
        """Draw positions in training; in an unordered story, tokens can have gaps between them."""
        if not self.training:
            return None
        return self.places.draw(mask.sum(dim=1), torch.tensor([s.unordered for s in stories]), self.max_tokens)

    def _pair(self, story: Story) -> tuple[str, str]:
        """Get prompt and reply; in training an encoder-decoder often continues a caption, as it will in stage two."""
        is_split = self.training and story.kind == "describe" and self.llm.family == "seq2seq"
        if is_split and torch.rand(()) < 0.7:
            return split_caption(story.reply, torch.rand(()).item())
        return story.prompt, story.reply

    def read(self, stories: Sequence[Story]) -> tuple[Tensor, Tensor]:
        """Embed the descriptions as a prefix of the model: float[B, M, L] and bool[B, M]."""
        parts = [_parts(story, self.training) for story in stories]
        texts = [text for own in parts for phrase in own for text, _ in phrase]
        ids = iter(self.llm.tokenizer(texts, add_special_tokens=False)["input_ids"])
        words: list[int] = []
        turns: list[int] = []
        place: list[int] = []  # position of each word in the concatenated prefixes of all rows
        lengths: list[int] = []
        for story, own in zip(stories, parts, strict=True):
            start = sum(lengths)
            for number, phrase in enumerate(own):
                for _, turn in phrase:
                    row = next(ids)
                    words += row
                    turns += [turn] * len(row)
                    place += [start + number] * len(row) if story.unordered else range(start, start + len(row))
            lengths.append(len(own) if story.unordered else len(place) - start)
        device = self.llm.model.device
        embeds = self.llm.model.get_input_embeddings()(torch.tensor(words, device=device))
        embeds = turned(embeds, torch.tensor(turns, device=device))
        added = embeds.new_zeros(sum(lengths), self.llm.width).index_add(0, torch.tensor(place, device=device), embeds)
        prefix = pad_sequence(added.split(lengths), batch_first=True)
        columns = torch.arange(prefix.shape[1], device=device)
        return prefix, columns < torch.tensor(lengths, device=device)[:, None]

    def save_tokenizer(self, folder: Path) -> None:
        """Keep the tokenizer in a checkpoint, since other versions of this package may train another one."""
        self.llm.tokenizer.save_pretrained(folder)

    def save(self, folder: Path) -> None:
        for module in self.llm.model.modules():
            if parametrize.is_parametrized(module):
                parametrize.remove_parametrizations(module, "weight")
        self.llm.model.save_pretrained(folder)
        self.llm.tokenizer.save_pretrained(folder)


def _train_tokenizer(config: BackboneConfig, stories: Stories | CanvasStories) -> Any:
    some = [stories[i] for i in range(min(SAMPLE_FOR_TOKENIZER, len(stories)))]
    texts = [text for s in some for text in (s.description, s.prompt, s.reply, "\n")]
    texts += [f" {word}" for word in getattr(stories, "words", ()) for _ in range(OFTEN)]
    return train_tokenizer(config.kind, texts, config.vocab_size)


class Scaled(nn.Module):
    """A parametrization in which the learned weight is `1 / factor` times the one that is used.

    T5 does not scale attention scores and has small query weights instead. Adam's steps have the same size for all
    weights and would be too large for these (T5 was trained with Adafactor, whose steps scale with the weights).
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, learned: Tensor) -> Tensor:
        return learned * self.factor

    def right_inverse(self, used: Tensor) -> Tensor:
        return used / self.factor


@dataclass
class StoryBatches(Dataset[BatchRecord]):
    """Batches of stories, in order, since they are endless and already random."""

    stories: Stories | CanvasStories
    batch: int

    def __getitem__(self, number: int) -> BatchRecord:
        places = [i % len(self.stories) for i in range(number * self.batch, (number + 1) * self.batch)]
        batch = Batch(Tiles([], []), cast("Any", [self.stories[i] for i in places]))
        return BatchRecord(batch, [str(i) for i in places], [])


class StoryValidation:
    """The share of held-out replies that the model writes exactly: overall, by kind, and in other forms.

    `unordered` is the share of all stories read as unordered ones, and `late` that with the prefix as far behind as
    leaves room for the longest text, if the model's positions have an end.
    """

    def __init__(self, stories: Sequence[Story], batch: int) -> None:
        self.stories = stories
        self.batch = batch

    def __call__(self, model: nn.Module, step: int) -> dict[str, float]:
        task = cast("StoryTask", model)
        unordered = [replace(story, unordered=True) for story in self.stories]
        measured = answered(task, self.stories, self.batch)
        measured["unordered"] = answered(task, unordered, self.batch)["right"]
        if task.places.count is not None:
            start = max(task.places.count - 2 * task.max_tokens, 1)
            measured["late"] = answered(task, self.stories, self.batch, start)["right"]
        return measured


def answered(task: StoryTask, stories: Sequence[Story], batch: int, start: int = 0) -> dict[str, float]:
    """Compute the share of exact replies, among stories with one right reply: `right`, and `right_KIND` by kind.

    Args:
        start: position of the first token of each prefix.
    """
    right: dict[str, list[bool]] = {}
    single = [story for story in stories if story.kind not in LONG]
    for first in range(0, len(single), batch):
        part = single[first : first + batch]
        prompts = [story.prompt for story in part]
        with task.places.at(task.places.start_at(start, len(part)) if start else None):
            ids = task.llm.generate(*task.read(part), prompts, num_beams=1, max_new_tokens=ANSWER)
        for story, reply in zip(part, task.llm.decode(ids), strict=True):
            right.setdefault(story.kind, []).append(reply.strip() == story.reply)
    every = [value for values in right.values() for value in values]
    shares = {f"right_{kind}": sum(values) / len(values) for kind, values in sorted(right.items())}
    return {"right": sum(every) / len(every), **shares}


def _parts(story: Story, training: bool) -> list[list[tuple[str, int]]]:
    """Split an unordered description into the phrases about each object, shuffled, in training some of them twice.

    Phrases about the first of two pictures stay in front of those about the second, and events of a clip behind all.

    Returns:
        Phrases as texts with their turns, see `turned`.
    """
    if not story.unordered:
        return [[(story.description, 0)]]
    parts: list[list[tuple[str, int]]] = []
    is_doubled = training and bool(torch.rand(()) < DOUBLED)
    for picture in story.description.split("; "):
        head = PICTURE.match(picture)
        if head is not None:  # stands in front of what is in that picture
            parts += [[(head[1], 0)], [(head[2], 0)]]
        phrases = BETWEEN_OBJECTS.split(picture[head.end() if head else 0 :])
        if is_doubled:
            phrases += [phrase for phrase in phrases if torch.rand(()) < DOUBLED]
        parts += [_with_turns(phrases[i]) for i in torch.randperm(len(phrases))]
    return parts


def _with_turns(phrase: str) -> list[tuple[str, int]]:
    """Take out of a phrase what would be lost in the sum of its words, each with a turn of its own.

    These are the four numbers of a box, and where an object points if it stands at the other side: an arrow pointing
    left at the top right has the words of one pointing right at the top left.
    """
    taken: list[tuple[str, int]] = []
    if found := BOX.search(phrase):
        taken += [(f" {number}", turn) for turn, number in enumerate(found.groups(), start=1)]
        phrase = phrase[: found.start()].rstrip()
    found = SIDEWAYS.search(phrase)
    if found and {"left", "right"} <= set(phrase.split()):
        taken.append((f" {found[1]}", 1))
        phrase = phrase[: found.start(1)].rstrip() + phrase[found.end(1) :]
    return [(phrase, 0), *taken]


def crowd(prefix: Tensor, mask: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Repeat the rows of prefixes, each another number of times, in order.

    The visual tokens of tiles are hundreds, many of which say the same. A model that has only read few rows at a time
    attends to so many too evenly to find what is asked for.

    Args:
        prefix: float[B, M, L]. mask: bool[B, M].
        most: rows of the longest prefix afterwards, if that is more than it has.

    Returns:
        float[B, N, L] and bool[B, N].
    """
    chosen = []
    for length in mask.sum(dim=1).tolist():
        more = int(torch.randint(max(most - length, 0) + 1, ()))
        chosen.append(torch.cat([torch.arange(length), torch.randint(max(length, 1), (more,))]).sort().values)
    rows = pad_sequence([own.to(prefix.device) for own in chosen], batch_first=True)
    lengths = torch.tensor([len(own) for own in chosen], device=prefix.device)
    kept = torch.arange(rows.shape[1], device=prefix.device) < lengths[:, None]
    return prefix.take_along_dim(rows[..., None], dim=1) * kept[..., None], kept


def turned(embeds: Tensor, turns: Tensor) -> Tensor:
    """Shift the components of words around by a fifth of the width for each of their turns, long[W].

    In a sum of words nothing would tell the left of a box from its top; shifted, the same number is another vector in
    each of the four places (Plate 1995, holographic reduced representations, binds roles in this way).
    """
    for turn in turns[turns > 0].unique().tolist():
        embeds = torch.where((turns == turn)[:, None], embeds.roll(turn * embeds.shape[1] // 5, dims=1), embeds)
    return embeds
