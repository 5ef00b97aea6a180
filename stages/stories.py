"""Language models from scratch on stories: text about scenes whose description stands where a picture will stand.

They are trained through the same `LanguageModel.loss` that stage two uses, so that what surrounds a reply (the begin
token, the prompt, the end) is the same in both.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from qformer.data.loader import Loaded
from qformer.mini import build_language_model, train_tokenizer
from qformer.model.llm import CausalLM, LanguageModel, Seq2SeqLM
from qformer.types import Batch, Tiles

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from qformer.config import BackboneConfig
    from qformer.data.stories import Stories, Story

LONG = ("describe", "self-ask")  # kinds whose replies are sentences, of which several would be right
BETWEEN_OBJECTS = re.compile(r", | and (?=an? )")
SAMPLE_FOR_TOKENIZER = 4000


class StoryTask(nn.Module):
    """A small OPT or T5 that reads a description and a prompt and writes the reply.

    In half of the rows the words about each object are added up to one vector, and objects stand in any order. A visual
    token tells several things at once and has no place in a sentence; text alone teaches the model to read such.
    """

    def __init__(self, config: BackboneConfig, stories: Stories) -> None:
        super().__init__()
        self.max_tokens = config.max_tokens
        some = [stories[i] for i in range(min(SAMPLE_FOR_TOKENIZER, len(stories)))]
        texts = [text for s in some for text in (s.description, s.prompt, s.reply, "\n")]
        tokenizer = train_tokenizer(config.kind, texts, config.vocab_size)
        model = build_language_model(config, tokenizer)
        for key in ("dropout", "attention_dropout", "activation_dropout", "dropout_rate"):
            if hasattr(model.config, key):
                setattr(model.config, key, 0.0)
        kind = CausalLM if config.kind == "opt" else Seq2SeqLM
        self.llm: LanguageModel = kind(model, tokenizer)
        self.llm.model.requires_grad_(True)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`lm`: the cross-entropy per token of answers plus that of descriptions.

        Were all tokens equal, descriptions of thirty words would leave next to nothing to answers of one.
        """
        stories = cast("list[Story]", batch.text)
        losses = []
        for long in (False, True):
            some = [story for story in stories if (story.kind in LONG) == long]
            if some:
                prefix, mask = self.read([story.description for story in some])
                replies, prompts = [story.reply for story in some], [story.prompt for story in some]
                total, count = self.llm.loss(prefix, mask, replies, prompts, self.max_tokens)
                losses.append(total / count)
        loss = torch.stack(losses).sum()
        return {"loss": loss, "lm": loss}

    def read(self, descriptions: Sequence[str], added: float | None = None) -> tuple[Tensor, Tensor]:
        """Descriptions as a prefix of the model: float[B, M, L] and bool[B, M].

        Args:
            added: probability that words are added up in a row; by default one half in training, else none.
        """
        added = (0.5 if self.training else 0.0) if added is None else added
        table = self.llm.model.get_input_embeddings()
        rows = []
        for text in descriptions:
            if torch.rand(()) < added:
                phrases = [self._words(phrase) for phrase in BETWEEN_OBJECTS.split(text)]
                embeds = torch.stack([table(ids).sum(dim=0) for ids in phrases])[torch.randperm(len(phrases))]
            else:
                embeds = table(self._words(text))  # (T, L)
            rows.append(embeds)
        prefix = pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows], device=prefix.device)
        return prefix, torch.arange(prefix.shape[1], device=prefix.device) < lengths[:, None]

    def _words(self, text: str) -> Tensor:
        ids = self.llm.tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.tensor(ids, device=self.llm.model.device)

    def save(self, folder: Path) -> None:
        self.llm.model.save_pretrained(folder)
        self.llm.tokenizer.save_pretrained(folder)


@dataclass
class StoryBatches(Dataset[Loaded]):
    """Batch i of the stories, in order: they are endless and already random."""

    stories: Stories
    batch: int

    def __getitem__(self, number: int) -> Loaded:
        places = [i % len(self.stories) for i in range(number * self.batch, (number + 1) * self.batch)]
        batch = Batch(Tiles([], []), cast("Any", [self.stories[i] for i in places]))
        return Loaded(batch, [str(i) for i in places], [])


class StoryValidation:
    """Loss, and the share of held-out replies that the model writes exactly, for each kind of story."""

    def __init__(self, stories: Sequence[Story], batch: int) -> None:
        self.stories = stories
        self.batch = batch

    def __call__(self, model: nn.Module, step: int) -> dict[str, float]:
        return answered(cast("StoryTask", model), self.stories, self.batch)


def answered(task: StoryTask, stories: Sequence[Story], batch: int, added: float = 0.0) -> dict[str, float]:
    """Share of replies written exactly: `right` over all that have one right reply, and `right_KIND` for each kind."""
    right: dict[str, list[bool]] = {}
    single = [story for story in stories if story.kind not in LONG]
    for start in range(0, len(single), batch):
        part = single[start : start + batch]
        prefix, mask = task.read([story.description for story in part], added)
        ids = task.llm.generate(prefix, mask, [story.prompt for story in part], num_beams=1, max_new_tokens=8)
        for story, reply in zip(part, task.llm.decode(ids), strict=True):
            right.setdefault(story.kind, []).append(reply.strip() == story.reply)
    every = [value for values in right.values() for value in values]
    shares = {f"right_{kind}": sum(values) / len(values) for kind, values in sorted(right.items())}
    return {"right": sum(every) / len(every), **shares}
