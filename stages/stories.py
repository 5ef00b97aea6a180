"""Language models from scratch on stories: text about scenes whose description stands where a picture will stand.

They are trained through the same `LanguageModel.loss` that stage two uses, so that what surrounds a reply (the begin
token, the prompt, the end) is the same in both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from qformer.cleaning import clean_caption
from qformer.data.loader import Loaded
from qformer.mini import build_language_model, train_tokenizer
from qformer.model.llm import CausalLM, LanguageModel, Seq2SeqLM
from qformer.types import Batch, Tiles

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from qformer.config import BackboneConfig
    from qformer.data.stories import Stories, Story

LONGEST_GROUP = 6
SAMPLE_FOR_TOKENIZER = 4000


class StoryTask(nn.Module):
    """A small OPT or T5 that reads a description and a prompt and writes the reply.

    In half of the rows runs of one to six words of the description are added up to one vector each, in any order. A
    visual token tells several things at once and has no place in a sentence; text alone teaches the model to read such.
    """

    def __init__(self, config: BackboneConfig, stories: Stories) -> None:
        super().__init__()
        self.max_tokens = config.max_tokens
        some = [stories[i] for i in range(min(SAMPLE_FOR_TOKENIZER, len(stories)))]
        texts = [text for s in some for text in (clean_caption(s.description), s.prompt, s.reply, "\n")]
        tokenizer = train_tokenizer(config.kind, texts, config.vocab_size)
        model = build_language_model(config, tokenizer)
        for key in ("dropout", "attention_dropout", "activation_dropout", "dropout_rate"):
            if hasattr(model.config, key):
                setattr(model.config, key, 0.0)
        kind = CausalLM if config.kind == "opt" else Seq2SeqLM
        self.llm: LanguageModel = kind(model, tokenizer)
        self.llm.model.requires_grad_(True)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        stories = cast("list[Story]", batch.text)
        prefix, mask = self.read([story.description for story in stories])
        replies, prompts = [story.reply for story in stories], [story.prompt for story in stories]
        total, count = self.llm.loss(prefix, mask, replies, prompts, self.max_tokens)
        loss = total / count
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
            ids = self.llm.tokenizer(clean_caption(text), add_special_tokens=False)["input_ids"]
            embeds = table(torch.tensor(ids, device=table.weight.device))  # (T, L)
            if torch.rand(()) < added:
                group = _groups(len(ids)).to(embeds.device)
                embeds = embeds.new_zeros(int(group.max()) + 1, embeds.shape[1]).index_add(0, group, embeds)
            rows.append(embeds)
        prefix = pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows], device=prefix.device)
        return prefix, torch.arange(prefix.shape[1], device=prefix.device) < lengths[:, None]

    def save(self, folder: Path) -> None:
        self.llm.model.save_pretrained(folder)
        self.llm.tokenizer.save_pretrained(folder)


def _groups(count: int) -> Tensor:
    """The group of each of `count` words: neighbours, one to six to a group, groups numbered at random. long[count]."""
    sizes = torch.randint(1, LONGEST_GROUP + 1, (count,))
    ends = sizes.cumsum(0)
    group = torch.searchsorted(ends, torch.arange(count), right=True)
    return torch.randperm(int(group[-1]) + 1)[group]


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
    single = [story for story in stories if story.kind not in ("describe", "self-ask")]
    for start in range(0, len(single), batch):
        part = single[start : start + batch]
        prefix, mask = task.read([story.description for story in part], added)
        ids = task.llm.generate(prefix, mask, [story.prompt for story in part], num_beams=1, max_new_tokens=8)
        for story, reply in zip(part, task.llm.decode(ids), strict=True):
            right.setdefault(story.kind, []).append(reply.strip() == story.reply)
    every = [value for values in right.values() for value in values]
    shares = {f"right_{kind}": sum(values) / len(values) for kind, values in sorted(right.items())}
    return {"right": sum(every) / len(every), **shares}
