"""Frozen language models with one interface: visual tokens in, a loss or a text out.

A model reads a visual prefix float[B, M, L] with its mask, and texts as strings; it returns the *sum* of the token
losses with the number of targets, or generated ids. Visual tokens come before the text embeddings as soft prompts
(BLIP-2, arXiv:2301.12597, section 3.3): in the decoder for OPT, Llama, Qwen, Phi, GPT (`CausalLM`), in the encoder for
T5, Flan-T5, UL2 (`Seq2SeqLM`). Rows of a batch can have different numbers of visual tokens, anywhere in the mask.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from qformer.llm import chat, mrope
from qformer.llm.decoding import GenerateConfig, write, write_tokens
from qformer.llm.plain_text import adds_bos, newline, spaced
from qformer.llm.rows import join, pad, positions, shared
from qformer.llm.steps import Abilities, CausalStep, ModelStep, Seq2SeqStep, cache_name
from qformer.llm.tokenization import Tokenization
from qformer.losses import IGNORE
from qformer.types import Tokens, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from transformers import PreTrainedTokenizerBase

MAX_TOKENS = 32  # length at which training texts are cut, including special tokens


class LanguageModel(nn.Module, Tokenization, ABC):
    """A frozen language model and its tokenizer. Its weights get no gradient, but its inputs do.

    The given transformers model is modified: parameters are frozen, generation settings cleared (special ids stay).
    It computes in its own dtype even under autocast: a bf16 T5 overflows under fp16 autocast.

    Attributes:
        autocast: follow the surrounding autocast, for a small model that is itself trained.
        width: L, the width of the *input embeddings* (OPT-350m: 512, though its layers are 1024 wide).
        abilities: see `qformer.llm.abilities`.
        has_places: number tokens of pictures by time, row and column (`qformer.llm.mrope`).
        clip_ids: rule by which these numbers go on behind a clip, `paper` or `transformers`.
        end: id of the token that ends a text. pad: id of the padding after it in a batch.
        start: ids that begin every text; empty if the tokenizer uses no BOS.
        template: prefix of prompts in which special tokens are read as such, like those of a chat; usually empty.
        chat: ids around image, prompt and answer, see `use_template`; by default there are none.
    """

    family: ClassVar[str]  # "causal" or "seq2seq"; the wording of prompts depends on it

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, *, end: int | None, dropout: bool) -> None:
        """Wrap a model; with `dropout` its dropout is active in training, as in LAVIS, else it stays in eval mode."""
        super().__init__()
        if end is None:
            raise UsageError(
                f"the tokenizer of this {model.config.model_type} model has no token that ends a text; "
                "set its eos_token and save it again"
            )
        self.model = model.requires_grad_(False)
        self.tokenizer = tokenizer
        self.dropout = dropout
        self.autocast = False
        self.template = ""
        self.chat = chat.Chat()
        self.adapters: list[nn.Module] = []  # parts that follow `train()` whatever `dropout` is
        self.end: int = end
        self.start = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
        self.pad: int = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.abilities = Abilities(caches=cache_name(model) is not None)
        self.has_places = model.config.model_type in mrope.FAMILIES
        self.clip_ids: mrope.Rule = "paper"
        self.width: int = model.get_input_embeddings().weight.shape[1]
        model.config.return_dict = True  # outputs are read by name
        # Special ids only; they are exported with the model.
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=end,
            pad_token_id=self.pad,
            decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
        )
        self.train()

    def use_template(self, template: str) -> None:
        """Read images and prompts, and write answers, in the turns of a chat (`qformer.llm.chat`).

        Args:
            template: a text with places, as in the configuration, or `none`.
        """
        self.chat = chat.encode(template, self._plain_text, ends=self.family == "causal")
        if self.chat:
            self.start = []  # which the template writes itself if the model wants it
        if self.chat.ending:
            self.end = self.chat.ending[-1]

    @property
    def wording(self) -> str:
        """Name the column of the table of prompts: `chat` with a template, else the family."""
        return "chat" if self.chat else self.family

    def train(self, mode: bool = True) -> Self:
        super().train(mode and self.dropout)
        for part in self.adapters:
            part.train(mode)
        return self

    def loss(
        self,
        prefix: Tensor,
        prefix_mask: Tensor,
        text: list[str],
        prompt: list[str] | None = None,
        max_tokens: int = MAX_TOKENS,
        places: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute the cross-entropy of `text` after the visual prefix, without smoothing.

        Args:
            prefix: float[B, M, L] visual tokens. prefix_mask: bool[B, M], True where they exist.
            text: B target texts.
            prompt: B texts that are read but not predicted; None means empty ones.
            max_tokens: length at which texts are cut (in training; `generate` never cuts prompts).
            places: long[B, M, 3], time, row and column of each visual token in its picture, -1 where it is read as
                text; models without `has_places` ignore them. None: all are read as text.

        Returns:
            The sum of the token losses, float32[], and the number of targets, long[]. The caller divides, because over
            processes the sums and the counts add up but the means do not.
        """
        logits, targets = self.predict(prefix, prefix_mask, text, prompt or [""] * len(text), max_tokens, places)
        total = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE, reduction="sum")
        return total, targets.ne(IGNORE).sum()

    def predict(
        self,
        prefix: Tensor,
        prefix_mask: Tensor,
        text: list[str],
        prompt: list[str],
        max_tokens: int = MAX_TOKENS,
        places: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute the logits float[B, T, V] at the positions of the texts, and their targets long[B, T].

        `IGNORE` marks positions without a target. The arguments are those of `loss`.
        """
        with self._own_dtype(prefix.device):
            return self._predict(prefix, prefix_mask, text, prompt, max_tokens, self._known(places))

    def count_targets(self, text: list[str], prompt: list[str], max_tokens: int = MAX_TOKENS) -> int:
        """Count the targets of a `loss` with at least one visual token in every row."""
        return int(self._targets(text, prompt, max_tokens, torch.device("cpu"))[1].ne(IGNORE).sum())

    @torch.no_grad()
    def generate(
        self, prefix: Tensor, prefix_mask: Tensor, prompts: list[str], places: Tensor | None = None, **options: Any
    ) -> Tensor:
        """Generate texts after [visual][prompt].

        Args:
            prefix: float[B, M, L]. prefix_mask: bool[B, M]. prompts: B strings, possibly empty, never cut.
            places: long[B, M, 3], see `loss`.
            options: fields of `GenerateConfig`.

        Returns:
            The ids of the new tokens, long[B * n, new], padded on the right.

        Raises:
            UsageError: an unknown option, or a row that exceeds the positions of the model.
        """
        config = GenerateConfig.of(options)
        config.check_draws(len(prompts) * config.num_return_sequences)
        size = len(prompts) if self.abilities.batches else 1
        texts: list[Tensor] = []
        for first in range(0, len(prompts), max(size, 1)):
            rows = slice(first, first + size)
            own = None if places is None else places[rows]
            with self._own_dtype(prefix.device):
                visual = prefix[rows], prefix_mask[rows]
                read, start, unseen = self.begin(*visual, prompts[rows], config.max_new_tokens, own)
                step = self.chat.ending_step(read, self.end)
                texts += write(step, start, self.end, self.pad, config.of_rows(rows), unseen)
        return pad_sequence(texts, batch_first=True, padding_value=self.pad)

    def stream(
        self, prefix: Tensor, prefix_mask: Tensor, prompt: str, places: Tensor | None = None, **options: Any
    ) -> Iterator[int]:
        """Yield the ids of one greedy or sampled text as they are generated; they equal those of `generate`.

        Args:
            prefix: float[1, M, L]. prefix_mask: bool[1, M]. places: long[1, M, 3], see `loss`.
        """
        config, tokens = GenerateConfig.of(options), None
        while True:  # between two tokens, the caller's gradient mode and precision apply
            with torch.no_grad(), self._own_dtype(prefix.device):
                if tokens is None:
                    step, start, _ = self.begin(prefix, prefix_mask, [prompt], config.max_new_tokens, places)
                    tokens = write_tokens(self.chat.ending_step(step, self.end), start, self.end, self.pad, config)
                token = next(tokens, None)
            if token is None:
                return
            yield int(token)

    def _own_dtype(self, device: torch.device) -> AbstractContextManager[Any]:
        return nullcontext() if self.autocast else torch.autocast(device.type, enabled=False)

    @abstractmethod
    def _predict(
        self,
        prefix: Tensor,
        prefix_mask: Tensor,
        text: list[str],
        prompt: list[str],
        max_tokens: int,
        places: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute logits float[B, T, V] at the text positions and their targets long[B, T], `IGNORE` for none."""

    @abstractmethod
    def _targets(
        self, text: list[str], prompt: list[str], max_tokens: int, device: torch.device
    ) -> tuple[Tokens, Tensor]:
        """Tokenize texts into rows of T ids, and their targets long[B, T], `IGNORE` for none."""

    @abstractmethod
    def begin(
        self, prefix: Tensor, prefix_mask: Tensor, prompts: list[str], new: int, places: Tensor | None = None
    ) -> tuple[ModelStep, Tensor, Tensor | int]:
        """Start generation after rows [visual][prompt].

        Args:
            new: the maximal number of new tokens.

        Returns:
            The step; the start of each text, long[B, t]; and the number of prompt tokens, long[B], that count toward
            the text length in beam search, as in the original.
        """

    def room(self, visual: int, new: int) -> int | None:
        """Return the number of prompt tokens that fit after `visual` and before `new` tokens; None for no limit."""
        limit = positions(self.model)
        return None if limit is None else limit - visual - self.chat.length - (new if self.family == "causal" else 1)

    def _with_head(self, prefix: Tensor, prefix_mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.chat.headed(self.model.get_input_embeddings(), prefix, prefix_mask)

    def _known(self, places: Tensor | None) -> Tensor | None:
        """The places with those of a template's head, which is text; None where this model has no use for them."""
        if places is None or not self.has_places:
            return None
        return F.pad(places, (0, 0, len(self.chat.head), 0), value=mrope.TEXT)


class CausalLM(LanguageModel):
    """A decoder-only model: [visual][BOS prompt text end]. OPT ends its texts with a newline, others with their EOS.

    Prompt, text and end are cut together, on the right. But a prompt that takes more than half of the room, such as a
    long question, loses its first tokens instead, so that the answer is not cut off. A newline within a text for OPT,
    which would end the text, is read as a space. The tokens of a prompt, including BOS, are not targets; without a
    prompt BOS is one. Rows are packed with the padding on the right, so that positions equal those of the row alone.
    """

    family = "causal"

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, *, dropout: bool = False) -> None:
        is_opt = model.config.model_type == "opt"
        end = newline(tokenizer) if is_opt else tokenizer.eos_token_id
        super().__init__(model, tokenizer, end=end, dropout=dropout)
        self.one_line = is_opt
        if is_opt and tokenizer.bos_token_id is not None:  # OPT was trained with BOS, which some tokenizers omit
            self.start = [tokenizer.bos_token_id]

    def _predict(
        self,
        prefix: Tensor,
        prefix_mask: Tensor,
        text: list[str],
        prompt: list[str],
        max_tokens: int,
        places: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        row, targets = self._targets(text, prompt, max_tokens, prefix.device)
        prefix, prefix_mask = self._with_head(prefix, prefix_mask)
        visual = prefix_mask.sum(dim=1, keepdim=True)  # (B, 1)
        # Text token t of a row is in column `visual + t`, so the column before it predicts it.
        columns = visual - 1 + torch.arange(row.ids.shape[1], device=visual.device)  # (B, T)
        targets = targets.masked_fill(columns < 0, IGNORE)  # no token precedes the first one if there is no image

        inputs = join(self.model, prefix, prefix_mask, row, "right", places=places, clip_ids=self.clip_ids)
        # Compute logits of these columns only: a prefix of many tiles would produce thousands of unused ones.
        return self.model(**inputs, logits_to_keep=columns.clamp(min=0), use_cache=False).logits, targets

    def _targets(
        self, text: list[str], prompt: list[str], max_tokens: int, device: torch.device
    ) -> tuple[Tokens, Tensor]:
        if self.one_line:
            text = [line.replace("\n", " ") for line in text]
        if self.chat:  # tokens never span prompt and text, between which turns change
            known = self._ids(prompt)
            whole = [asked + said for asked, said in zip(known, self.ended(text), strict=True)]
        else:
            whole = self.ended([spaced(p, t) for p, t in zip(prompt, text, strict=True)])
            known = [ids if p else [] for p, ids in zip(prompt, self._ids(prompt), strict=True)]
        given = [shared(*both) for both in zip(known, whole, strict=True)]
        kept = [self._cut(ids, of, max_tokens) for ids, of in zip(whole, given, strict=True)]
        asked = self.chat.around([ids[:count] for ids, count in kept])
        row = pad([front + ids[count:] for front, (ids, count) in zip(asked, kept, strict=True)], self.end, device)
        read = torch.tensor([len(front) for front in asked], device=device)[:, None]  # (B, 1)
        in_prompt = torch.arange(row.ids.shape[1], device=device) < read  # (B, T)
        return row, row.ids.masked_fill(~row.mask | in_prompt, IGNORE)

    def _cut(self, ids: list[int], given: int, max_tokens: int) -> tuple[list[int], int]:
        """Cut [BOS prompt text end] to `max_tokens` ids; also returns how many of them belong to the prompt."""
        front = len(self.start)
        spare = max(given - max(max_tokens // 2, front), 0)
        gone = min(max(len(ids) - max_tokens, 0), spare)
        return [*ids[:front], *ids[front + gone :]][:max_tokens], given - gone

    def begin(
        self, prefix: Tensor, prefix_mask: Tensor, prompts: list[str], new: int, places: Tensor | None = None
    ) -> tuple[ModelStep, Tensor, Tensor | int]:
        row = pad(self.chat.around(self._ids(prompts)), self.end, prefix.device)
        prefix, prefix_mask = self._with_head(prefix, prefix_mask)
        # Padding in front of the visual tokens: new tokens follow the prompt in every row.
        inputs = join(self.model, prefix, prefix_mask, row, "left", new, self._known(places), self.clip_ids)
        embeds, mask, ids = inputs["inputs_embeds"], inputs["attention_mask"], inputs.get("position_ids")
        step = CausalStep(self.model, embeds, mask, self.abilities.caches, ids)
        unseen = 1 if self.chat else row.mask.sum(dim=1).clamp(min=1)
        return step, row.ids.new_empty(len(prompts), 0), unseen


class Seq2SeqLM(LanguageModel):
    """An encoder-decoder model: the encoder reads [visual][prompt end], the decoder predicts [text end].

    Prompt and text are cut separately and keep their end. For `erf_gelu` see `qformer.llm.loading`.
    """

    family = "seq2seq"

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, *, dropout: bool = False, erf_gelu: bool = True
    ) -> None:
        text = model.config.get_text_config(decoder=True)
        starts = [getattr(model.config, "decoder_start_token_id", None), getattr(text, "bos_token_id", None)]
        first = next((token for token in starts if token is not None), None)
        if first is None:
            raise UsageError(
                f"the configuration of this {model.config.model_type} model has no decoder_start_token_id; "
                "set it there (T5 uses its pad id, 0)"
            )
        super().__init__(model, tokenizer, end=tokenizer.eos_token_id, dropout=dropout)
        self.first: int = first  # the first input token of the decoder
        if erf_gelu and getattr(model.config, "dense_act_fn", None) == "gelu_new":
            for module in model.modules():
                if hasattr(module, "act"):
                    module.act = nn.GELU()

    def _predict(
        self,
        prefix: Tensor,
        prefix_mask: Tensor,
        text: list[str],
        prompt: list[str],
        max_tokens: int,
        places: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        inputs = join(self.model, *self._read(prefix, prefix_mask, prompt, max_tokens), "right")
        _, targets = self._targets(text, prompt, max_tokens, prefix.device)
        first = targets.new_full((len(targets), 1), self.first)
        shifted = torch.cat([first, targets[:, :-1].masked_fill(targets[:, :-1] == IGNORE, self.pad)], dim=1)
        return self.model(**inputs, decoder_input_ids=shifted, use_cache=False).logits, targets

    def _targets(
        self, text: list[str], prompt: list[str], max_tokens: int, device: torch.device
    ) -> tuple[Tokens, Tensor]:
        target = pad(self.ended(text, max_tokens), self.end, device)
        return target, target.ids.masked_fill(~target.mask, IGNORE)

    def begin(
        self, prefix: Tensor, prefix_mask: Tensor, prompts: list[str], new: int, places: Tensor | None = None
    ) -> tuple[ModelStep, Tensor, Tensor | int]:
        # The decoder has positions of its own.
        inputs = join(self.model, *self._read(prefix, prefix_mask, prompts), "right", new=0)
        step = Seq2SeqStep(self.model, inputs["inputs_embeds"], inputs["attention_mask"], self.abilities.caches)
        return step, inputs["attention_mask"].new_full((len(prompts), 1), self.first), 0

    def _read(
        self, prefix: Tensor, prefix_mask: Tensor, prompt: list[str], limit: int | None = None
    ) -> tuple[Tensor, Tensor, Tokens]:
        """Make what the encoder reads: a prefix, its mask and the tokens after it, whose prompts are cut at `limit`."""
        asked = self.chat.around([row[:-1] for row in self.ended(prompt, limit)])
        read = pad([[*row, self.end] for row in asked], self.end, prefix.device)
        return *self._with_head(prefix, prefix_mask), read
