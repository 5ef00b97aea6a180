"""The building blocks of the Q-Former, taken from BERT: embeddings, attention, feed-forward, language-model head.

They form a post-norm transformer with erf GELU (Devlin et al. 2019). The differences from BERT are those that BLIP-2
(section 3.1) needs: queries that skip the word embeddings, cross-attention to image tokens, and a second feed-forward
for query rows. `bert_weights` maps the tensors of any BERT to these modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, BertForMaskedLM

from qformer.files import pretrained
from qformer.model.sizes import BERT_SIZES
from qformer.schema import QFormerConfig
from qformer.types import UsageError
from qformer.vision import layers

Mode = Literal["unimodal", "bidirectional", "causal"]


def attention_mask(queries: int, text: Tensor, mode: Mode) -> Tensor:
    """Make the mask of joint self-attention over [queries; text].

    unimodal (ITC): queries attend to queries, text attends to text.
    bidirectional (ITM): all rows attend to all rows.
    causal (ITG): queries attend to queries; text attends to all queries and to text up to its own position.
    No row attends to padding.

    Args:
        queries: Q.
        text: bool[B, T], True at real tokens.

    Returns:
        bool[B, 1, Q + T, Q + T], True where a row attends to a column.
    """
    batch, length = text.shape
    total = queries + length
    is_text = torch.arange(total, device=text.device) >= queries  # (Q+T)
    row, column = is_text[:, None], is_text[None, :]
    if mode == "unimodal":
        allowed = row == column
    elif mode == "bidirectional":
        allowed = torch.ones(total, total, dtype=torch.bool, device=text.device)
    else:
        position = torch.arange(total, device=text.device)
        allowed = ~column | (row & (position[None, :] <= position[:, None]))
    exists = torch.cat([text.new_ones(batch, queries), text], dim=1)  # (B, Q+T)
    return (allowed & exists[:, None, :]).unsqueeze(1)


class Embeddings(nn.Module):
    """Embeddings of [queries; words + positions], LayerNorm, dropout. Text positions start at 0, even after queries."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.max_positions, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, queries: Tensor | None, ids: Tensor | None, start: int = 0) -> Tensor:
        """float[B, Q, H] and long[B, T], one of which can be None -> float[B, Q + T, H]; words start at `start`."""
        rows = [] if queries is None else [queries]
        if ids is not None:
            rows.append(self.words(ids) + self.positions.weight[start : start + ids.shape[1]])
        return self.dropout(self.norm(torch.cat(rows, dim=1)))


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """float[B, heads, X, D] attends to float[B, heads, S, D] where `mask` is True -> float[B, heads, X, D].

    On a CPU the backward pass of this in bf16 takes 2 to 10 times as long as in fp32 (torch 2.13), so it is in fp32.
    """
    device = query.device.type
    if query.dtype.itemsize > 2 or device not in layers.SLOW_IN_HALF:
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, dropout_p=dropout)
    with torch.autocast(device, enabled=False):
        mixed = F.scaled_dot_product_attention(
            query.float(), keys.float(), values.float(), attn_mask=mask, dropout_p=dropout
        )
    return mixed.to(query.dtype)


class Attention(nn.Module):
    """Multi-head attention with BERT's output: projection, dropout, residual, LayerNorm.

    Keys and values come from a context of width `key_width`: the hidden states themselves, or image tokens.
    """

    def __init__(self, config: QFormerConfig, key_width: int) -> None:
        super().__init__()
        self.heads = config.heads
        self.drop = config.dropout
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(key_width, config.hidden_size)
        self.value = nn.Linear(key_width, config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def split(self, rows: Tensor) -> Tensor:
        """float[B, X, H] -> float[B, heads, X, H / heads]."""
        return rows.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, X, H/heads)

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """float[B, S, key width] -> two float[B, heads, S, H / heads]."""
        return self.split(self.key(context)), self.split(self.value(context))

    def forward(self, hidden: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """float[B, X, H] attends where `mask` (bool, broadcast to [B, heads, X, S]) is True -> float[B, X, H]."""
        mixed = attend(self.split(self.query(hidden)), keys, values, mask, self.drop if self.training else 0.0)
        mixed = mixed.transpose(1, 2).flatten(2)  # (B, X, H)
        return self.norm(hidden + self.dropout(self.output(mixed)))


class FeedForward(nn.Module):
    """Feed-forward: linear, GELU, linear, dropout, residual, LayerNorm; query rows and text rows have separate ones."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.inner = nn.Linear(config.hidden_size, config.intermediate_size)
        self.output = nn.Linear(config.intermediate_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden + self.dropout(self.output(F.gelu(self.inner(hidden)))))


class LMHead(nn.Module):
    """Language-model head: linear, GELU, LayerNorm, then the word embeddings as decoder, with a separate bias."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor, words: Tensor) -> Tensor:
        """float[..., H] and the word embeddings float[V, H] -> logits float[..., V]."""
        return F.linear(self.norm(F.gelu(self.dense(hidden))), words, self.bias)


@dataclass(frozen=True)
class BertNames:
    """Names of a part of a layer in a BERT state dict, and in ours (one or two)."""

    theirs: str
    ours: tuple[str, ...]


LAYER_PARTS = (
    BertNames("attention.self.query", ("attention.query",)),
    BertNames("attention.self.key", ("attention.key",)),
    BertNames("attention.self.value", ("attention.value",)),
    BertNames("attention.output.dense", ("attention.output",)),
    BertNames("attention.output.LayerNorm", ("attention.norm",)),
    BertNames("intermediate.dense", ("text_ffn.inner", "query_ffn.inner")),
    BertNames("output.dense", ("text_ffn.output", "query_ffn.output")),
    BertNames("output.LayerNorm", ("text_ffn.norm", "query_ffn.norm")),
)
HEAD_PARTS = {"predictions.transform.dense": "dense", "predictions.transform.LayerNorm": "norm"}


def bert_weights(bert: dict[str, Tensor], config: QFormerConfig, fold_token_types: bool = False) -> dict[str, Tensor]:
    """Rename the tensors of a BERT to those of `QFormer`; tensors that BERT does not have keep their initial values.

    The query feed-forward gets a copy of the text feed-forward. Only the first `config.layers` layers are used.
    The word embeddings have BERT's own vocabulary without `[DEC]`, for which the caller adds a row.

    Args:
        bert: state dict of `BertModel` (with or without the `bert.` prefix) or `BertForMaskedLM`.
        fold_token_types: add token-type row 0 to every word, which makes the text path equal to BERT's.

    Raises:
        UsageError: a required tensor is missing.
    """
    bert = {name.removeprefix("bert."): tensor for name, tensor in bert.items()}

    def take(name: str) -> Tensor:
        if name not in bert:
            raise UsageError(f"no tensor '{name}' in these weights; give a BERT with at least {config.layers} layers")
        return bert[name]

    words = take("embeddings.word_embeddings.weight")
    if fold_token_types:
        words = words + take("embeddings.token_type_embeddings.weight")[0]
    weights = {
        "embeddings.words.weight": words,
        "embeddings.positions.weight": take("embeddings.position_embeddings.weight"),
    }
    for kind in ("weight", "bias"):
        weights[f"embeddings.norm.{kind}"] = take(f"embeddings.LayerNorm.{kind}")
        for layer in range(config.layers):
            for part in LAYER_PARTS:
                for name in part.ours:
                    weights[f"layers.{layer}.{name}.{kind}"] = take(f"encoder.layer.{layer}.{part.theirs}.{kind}")
        for theirs, ours in HEAD_PARTS.items():
            if f"cls.{theirs}.{kind}" in bert:
                weights[f"lm_head.{ours}.{kind}"] = bert[f"cls.{theirs}.{kind}"]
    if "cls.predictions.bias" in bert:
        weights["lm_head.bias"] = bert["cls.predictions.bias"]
    return weights


DECODE = "[DEC]"
NO_BERT = "no BERT can be loaded from {where} ({reason}); give text.bert a folder or hub id"


def read_bert(path: str, config: QFormerConfig | None = None) -> tuple[QFormerConfig, dict[str, Tensor]]:
    """Read the sizes and tensors of a BERT from a folder or hub id.

    Args:
        config: requested sizes; those that it does not set are BERT's. The vocabulary has one more word, `[DEC]`.

    Raises:
        UsageError: there is no BERT.
    """
    theirs = pretrained.read(AutoConfig, path, NO_BERT)
    if theirs.model_type != "bert":
        raise UsageError(f"'{path}' is a {theirs.model_type} model; text.bert needs a BERT, such as bert-base-uncased")
    words = max(theirs.vocab_size, len(read_tokenizer(path)))
    loading = {"output_loading_info": True, "dtype": torch.float32}
    model, report = pretrained.read(BertForMaskedLM, path, NO_BERT, **loading)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in report["missing_keys"]}
    return bert_sizes(theirs, words, config), state


def bert_sizes(theirs: Any, words: int, config: QFormerConfig | None = None) -> QFormerConfig:
    """Choose the sizes of a Q-Former that starts from a BERT and has `words` words; those set in `config` stay."""
    sizes = {ours: getattr(theirs, name) for ours, name in BERT_SIZES.items()} | {"vocab_size": words}
    given = {name: getattr(config, name) for name in config.model_fields_set} if config is not None else {}
    return QFormerConfig(**(sizes | given))


def read_tokenizer(path: Any) -> Any:
    """Load a BERT tokenizer and set its BOS to `[DEC]`, the token that starts generation by the Q-Former.

    It reads special tokens in texts as plain words (`pretrained.as_words`).

    Args:
        path: folder or hub id. A tokenizer itself is returned as it is.

    Raises:
        UsageError: there is none.
    """
    if not isinstance(path, str | Path):
        return path
    tokenizer = pretrained.as_words(pretrained.read(AutoTokenizer, path, NO_BERT))
    if tokenizer.bos_token is None:
        tokenizer.add_special_tokens({"bos_token": DECODE})
    return tokenizer
