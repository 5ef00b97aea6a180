"""Frozen language models behind one interface: visual tokens in, a loss or a text out.

Reads a visual prefix float[B, M, L] with its mask and texts as strings; returns the *sum* of the token losses with the
number of targets, or generated ids. Visual tokens stand in front of the text embeddings as soft prompts (BLIP-2,
arXiv:2301.12597, section 3.3): of the decoder itself for OPT, Llama, Qwen, Phi, GPT (`CausalLM`), of the encoder for
T5, Flan-T5, UL2 (`Seq2SeqLM`). Rows of a batch may hold different numbers of visual tokens, anywhere in the mask.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
)

from qformer.lookup import tower
from qformer.model.decoding import GenerateConfig, search_as_original
from qformer.types import Tokens, UsageError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

IGNORE = -100  # label of a position that is no target
MAX_TOKENS = 32  # where training texts are cut, special tokens counted
HINT = "give a folder or hub id of a causal or encoder-decoder language model, such as facebook/opt-2.7b"


class LanguageModel(nn.Module, ABC):
    """A frozen language model and its tokenizer. Weights get no gradient; what flows into them does.

    It takes the given transformers model over: parameters frozen, generation settings cleared (special ids stay).
    The model computes in its own dtype whatever autocast surrounds it: a bf16 T5 overflows under fp16 autocast.

    Attributes:
        autocast: follow the surrounding autocast all the same, which a small model does that is itself trained.
        width: L, the width of the *input embeddings* (OPT-350m: 512, though its layers are 1024 wide).
        end: id of the token that ends a text.
        start: ids that begin every text; empty where the tokenizer uses no BOS.
    """

    family: ClassVar[str]  # "causal" or "seq2seq": how prompts are worded depends on it

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, *, end: int | None, dropout: bool) -> None:
        """`dropout=True` leaves dropout active in training, as LAVIS does; else eval mode survives `train()`."""
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
        self.adapters: list[nn.Module] = []  # parts that are in training mode whenever what is around the model is
        self.end: int = end
        self.start = [tokenizer.bos_token_id] if _adds_bos(tokenizer) else []
        self.width: int = model.get_input_embeddings().weight.shape[1]
        # Special ids alone: what a call leaves unset, transformers fills from the checkpoint's own settings.
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=end,
            pad_token_id=end if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
        )
        self.train()

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
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy of `text` behind the visual prefix, without smoothing.

        Args:
            prefix: float[B, M, L] visual tokens. prefix_mask: bool[B, M], True where they exist.
            text: B target texts.
            prompt: B texts that are read but not predicted; None is an empty one for each.
            max_tokens: where texts are cut (training never reads more; generation reads all of its prompt).

        Returns:
            The sum of the token losses, float32[], and the number of targets, long[]: the caller divides, since across
            processes the sums and the counts add up but the means do not.
        """
        with self._own_dtype(prefix.device):
            logits, targets = self._predict(prefix, prefix_mask, text, prompt or [""] * len(text), max_tokens)
        total = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE, reduction="sum")
        return total, targets.ne(IGNORE).sum()

    def count_targets(self, text: list[str], prompt: list[str], max_tokens: int = MAX_TOKENS) -> int:
        """Number of targets of a `loss` with at least one visual token in every row."""
        return int(self._targets(text, prompt, max_tokens, torch.device("cpu"))[1].ne(IGNORE).sum())

    @torch.no_grad()
    def generate(self, prefix: Tensor, prefix_mask: Tensor, prompts: list[str], **options: Any) -> Tensor:
        """Texts behind [visual][prompt], as ids of the new tokens only: long[B, new], padded on the right.

        Args:
            prefix: float[B, M, L]. prefix_mask: bool[B, M]. prompts: B strings, possibly empty, never cut.
            options: fields of `GenerateConfig`.

        Raises:
            UsageError: an unknown option, or a row longer than the positions of the model.
        """
        config = GenerateConfig.of(options)
        with self._own_dtype(prefix.device):
            return self._continue(prefix, prefix_mask, prompts, config)

    def _own_dtype(self, device: torch.device) -> AbstractContextManager[Any]:
        return nullcontext() if self.autocast else torch.autocast(device.type, enabled=False)

    @abstractmethod
    def _predict(
        self, prefix: Tensor, prefix_mask: Tensor, text: list[str], prompt: list[str], max_tokens: int
    ) -> tuple[Tensor, Tensor]:
        """Logits float[B, T, V] at the text positions and their targets long[B, T], `IGNORE` where there is none."""

    @abstractmethod
    def _targets(
        self, text: list[str], prompt: list[str], max_tokens: int, device: torch.device
    ) -> tuple[Tokens, Tensor]:
        """The ids of the texts, rows of T, and which of them are targets: long[B, T], `IGNORE` where there is none."""

    @abstractmethod
    def _continue(self, prefix: Tensor, prefix_mask: Tensor, prompts: list[str], config: GenerateConfig) -> Tensor:
        """Ids long[B, new] of what follows the visual tokens and the prompts."""

    def _search(self, inputs: dict[str, Tensor], config: GenerateConfig, prompt: Tensor | int = 0) -> Tensor:
        """Ids of `generate`. Beams are compared as in the original, where `prompt` tokens count beside the new ones."""
        search = None if config.num_beams == 1 or config.do_sample else search_as_original(prompt)
        return self.model.generate(
            **inputs,
            generation_config=config.to_transformers(),
            custom_generate=search,
            logits_processor=config.processors(),
        )

    def decode(self, ids: Tensor) -> list[str]:
        """Ids long[B, T] as texts, without special tokens and outer white space (the newline that ends OPT's texts)."""
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text behind `start`. The tokenizer adds nothing: its template may end prompts, or forget BOS."""
        return [self.start + row for row in self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]

    def _pad(self, rows: list[list[int]], device: torch.device) -> Tokens:
        """Rows of ids, padded on the right with `end`: any model can embed it, and a tokenizer may lack a pad token."""
        ids = pad_sequence([torch.tensor(r, dtype=torch.long) for r in rows], batch_first=True, padding_value=self.end)
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(ids.shape[1]) < lengths[:, None]  # (B, T)
        return Tokens(ids, mask).to(device)

    def _join(
        self, prefix: Tensor, prefix_mask: Tensor, text: Tokens, side: Literal["left", "right"], room: int = 0
    ) -> dict[str, Tensor]:
        """Inputs of the model: packed rows [visual][text] of M + T columns that leave `room` for what is generated."""
        visual, words = prefix.shape[1], text.ids.shape[1] + room
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and visual + words > limit:
            raise UsageError(
                f"{visual} visual and {words} text tokens exceed the {limit} positions of this "
                f"{self.model.config.model_type} model; use fewer tiles, a connector with fewer tokens, or shorter text"
            )
        embeds = self.model.get_input_embeddings()(text.ids)
        embeds = torch.cat([prefix.to(embeds.dtype), embeds], dim=1)
        embeds, mask, _ = pack(embeds, torch.cat([prefix_mask, text.mask], dim=1), side)
        return {"inputs_embeds": embeds, "attention_mask": mask.long()}


class CausalLM(LanguageModel):
    """A decoder-only model: [visual][BOS prompt text end]. OPT ends its texts with a newline, others with their EOS.

    Prompt, text and end are cut together. The tokens of a prompt, BOS included, are no targets; without a prompt BOS is
    one. Rows are packed with the padding on the right, so that positions are those of the row alone in every model.
    """

    family = "causal"

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, *, dropout: bool = False) -> None:
        is_opt = model.config.model_type == "opt"
        end = _newline(tokenizer) if is_opt else tokenizer.eos_token_id
        super().__init__(model, tokenizer, end=end, dropout=dropout)
        if is_opt and tokenizer.bos_token_id is not None:  # trained with BOS in front, which some tokenizers forget
            self.start = [tokenizer.bos_token_id]

    def _predict(
        self, prefix: Tensor, prefix_mask: Tensor, text: list[str], prompt: list[str], max_tokens: int
    ) -> tuple[Tensor, Tensor]:
        row, targets = self._targets(text, prompt, max_tokens, prefix.device)
        visual = prefix_mask.sum(dim=1, keepdim=True)  # (B, 1)
        # Text token t of a row sits in column `visual + t`, so the column before it predicts it.
        columns = visual - 1 + torch.arange(row.ids.shape[1], device=visual.device)  # (B, T)
        targets = targets.masked_fill(columns < 0, IGNORE)  # without an image nothing stands before the first token

        inputs = self._join(prefix, prefix_mask, row, side="right")
        # Only these columns meet the vocabulary: a prefix of many tiles would make thousands of useless logits.
        return self.model(**inputs, logits_to_keep=columns.clamp(min=0), use_cache=False).logits, targets

    def _targets(
        self, text: list[str], prompt: list[str], max_tokens: int, device: torch.device
    ) -> tuple[Tokens, Tensor]:
        whole = self._ids([_spaced(p, t) for p, t in zip(prompt, text, strict=True)])
        row = self._pad([[*ids, self.end][:max_tokens] for ids in whole], device)
        return row, row.ids.masked_fill(~row.mask | self._in_prompt(prompt, row), IGNORE)

    def _continue(self, prefix: Tensor, prefix_mask: Tensor, prompts: list[str], config: GenerateConfig) -> Tensor:
        row = self._pad(self._ids(prompts), prefix.device)
        # Padding in front of the visual tokens: new tokens follow the prompt in every row.
        inputs = self._join(prefix, prefix_mask, row, side="left", room=config.max_new_tokens)
        return self._search(inputs, config, row.mask.sum(dim=1).clamp(min=1))

    def _in_prompt(self, prompt: list[str], row: Tokens) -> Tensor:
        """Which tokens of the rows [BOS prompt text end] belong to the prompt: bool[B, T].

        The leading ids that a row shares with its prompt tokenised alone: a token that merges the end of the prompt
        with the beginning of the text belongs to the text.
        """
        known = self._pad(self._ids(prompt), row.ids.device)
        missing = row.ids.shape[1] - known.ids.shape[1]  # negative where the prompts are longer: F.pad cuts them
        same = (F.pad(known.ids, (0, missing)) == row.ids) & F.pad(known.mask, (0, missing)) & row.mask
        given = torch.tensor([bool(p) for p in prompt], device=row.ids.device)
        return same.cumprod(dim=1).bool() & given[:, None]


class Seq2SeqLM(LanguageModel):
    """An encoder-decoder model: the encoder reads [visual][prompt end], the decoder predicts [text end].

    Prompt and text are cut separately and keep their end. `erf_gelu`: see `load_language_model`.
    """

    family = "seq2seq"

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, *, dropout: bool = False, erf_gelu: bool = True
    ) -> None:
        if getattr(model.config, "decoder_start_token_id", None) is None:
            raise UsageError(
                f"the configuration of this {model.config.model_type} model has no decoder_start_token_id; "
                "set it there (T5 uses its pad id, 0)"
            )
        super().__init__(model, tokenizer, end=tokenizer.eos_token_id, dropout=dropout)
        if erf_gelu and getattr(model.config, "dense_act_fn", None) == "gelu_new":
            for module in model.modules():
                if hasattr(module, "act"):
                    module.act = nn.GELU()

    def _predict(
        self, prefix: Tensor, prefix_mask: Tensor, text: list[str], prompt: list[str], max_tokens: int
    ) -> tuple[Tensor, Tensor]:
        inputs = self._join(prefix, prefix_mask, self._pad(self._ended(prompt, max_tokens), prefix.device), "right")
        _, targets = self._targets(text, prompt, max_tokens, prefix.device)
        shifted = self.model.prepare_decoder_input_ids_from_labels(labels=targets)
        return self.model(**inputs, decoder_input_ids=shifted, use_cache=False).logits, targets

    def _targets(
        self, text: list[str], prompt: list[str], max_tokens: int, device: torch.device
    ) -> tuple[Tokens, Tensor]:
        target = self._pad(self._ended(text, max_tokens), device)
        return target, target.ids.masked_fill(~target.mask, IGNORE)

    def _continue(self, prefix: Tensor, prefix_mask: Tensor, prompts: list[str], config: GenerateConfig) -> Tensor:
        inputs = self._join(prefix, prefix_mask, self._pad(self._ended(prompts), prefix.device), "right")
        return self._search(inputs, config)[:, 1:]  # without the token that starts the decoder

    def _ended(self, texts: list[str], limit: int | None = None) -> list[list[int]]:
        cut = None if limit is None else limit - 1
        return [[*row[:cut], self.end] for row in self._ids(texts)]


def pack(embeds: Tensor, mask: Tensor, side: Literal["left", "right"]) -> tuple[Tensor, Tensor, Tensor]:
    """Gather the valid tokens of each row, their order kept, with all the padding on one `side`.

    Args:
        embeds: float[B, X, L]. mask: bool[B, X].

    Returns:
        The packed embeds and mask, and order long[B, X]: the column that each packed column came from.
    """
    last = mask if side == "left" else ~mask
    order = last.byte().argsort(dim=1, stable=True)
    return embeds.take_along_dim(order[..., None], dim=1), mask.take_along_dim(order, dim=1), order


def load_language_model(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | Literal["auto"] | None = "auto",
    dropout: bool = False,
    erf_gelu: bool = True,
) -> LanguageModel:
    """The language model in a folder or under a hub id, with its tokenizer; its configuration tells which kind it is.

    Args:
        dtype: None: as stored. "auto": float32 on the CPU, where 16 bits are slow; elsewhere as stored if that is 16
            bits, else bfloat16. So OPT (stored in float16) and Flan-T5 (stored in float32) run as in the paper, and no
            model runs in a float16 that it was not trained in.
        dropout: leave dropout active in training, as LAVIS does.
        erf_gelu: compute T5's gated GELU with erf, as LAVIS does and as released BLIP-2 weights were trained, though
            T5 itself was trained with the tanh form (`gelu_new`).

    Raises:
        UsageError: there is no such folder or id, or what is there is not a language model that generates.
    """
    config = _fetch(AutoConfig, path)
    is_seq2seq = getattr(config, "is_encoder_decoder", False)
    # transformers gives encoders such as BERT a causal head without complaint.
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not (is_seq2seq or getattr(config, "is_decoder", False)):
        raise UsageError(f"'{path}' is a {config.model_type} model, an encoder that cannot generate text; {HINT}")
    auto = AutoModelForSeq2SeqLM if is_seq2seq else AutoModelForCausalLM
    model, report = _fetch(auto, path, dtype=choose_dtype(config, device, dtype), output_loading_info=True)
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UsageError(f"the weights in '{path}' lack {len(missing)} tensors ({missing[0]}, ...); {HINT}")
    return wrap_language_model(model.to(device), path, dropout, erf_gelu)


def wrap_language_model(
    model: Any, tokenizer_of: str | Path, dropout: bool = False, erf_gelu: bool = True
) -> LanguageModel:
    """A causal or encoder-decoder model of transformers and the tokenizer of a folder or hub id.

    Args:
        dropout, erf_gelu: see `load_language_model`.

    Raises:
        UsageError: there is no tokenizer.
    """
    tokenizer = _fetch(AutoTokenizer, tokenizer_of)
    letter = tokenizer("a", add_special_tokens=False)["input_ids"]
    if not letter or tokenizer.unk_token_id in letter:  # transformers makes up a tokenizer where it finds no files
        raise UsageError(f"'{tokenizer_of}' holds a language model but no tokenizer; save its tokenizer beside it")
    if model.config.is_encoder_decoder:
        return Seq2SeqLM(model, tokenizer, dropout=dropout, erf_gelu=erf_gelu)
    return CausalLM(model, tokenizer, dropout=dropout)


def _fetch(auto: Any, path: str | Path, **options: Any) -> Any:
    """`auto.from_pretrained`, with one error for its many."""
    path = tower(str(path))
    try:
        return auto.from_pretrained(path, **options)
    except (OSError, ValueError, ImportError) as error:
        where = f"the folder '{path}'" if Path(path).is_dir() else f"'{path}', which is no folder here, or from the hub"
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise UsageError(f"no language model can be loaded from {where} ({reason}); {HINT}") from error


def choose_dtype(
    config: PreTrainedConfig, device: torch.device | str, dtype: torch.dtype | Literal["auto"] | None
) -> torch.dtype | str:
    """How the weights are stored; see `load_language_model`."""
    if dtype is None:
        return "auto"  # transformers' word for "as stored"
    if dtype != "auto":
        return dtype
    if torch.device(device).type == "cpu":
        return torch.float32
    return config.dtype if config.dtype in (torch.float16, torch.bfloat16) else torch.bfloat16


def _newline(tokenizer: PreTrainedTokenizerBase) -> int | None:
    ids = tokenizer("\n", add_special_tokens=False)["input_ids"]
    return ids[-1] if ids else None


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer begins texts with its BOS by itself: many have one and never use it."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    return tokenizer("a")["input_ids"][: 1 + len(plain)] == [tokenizer.bos_token_id, *plain]


def _spaced(prompt: str, text: str) -> str:
    """Prompt and text with a space between them, unless one brings it or one is empty."""
    touching = prompt and text and not prompt[-1].isspace() and not text[0].isspace()
    return f"{prompt} {text}" if touching else prompt + text
