"""Small towers built from configuration classes: a ViT, a BERT, an OPT and a T5 of a few million weights; tokenizers.

They are ordinary transformers models in ordinary folders, so that any code for real towers can load them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from qformer.files import pretrained
from qformer.losses import IGNORE
from qformer.schema import POSITIONS
from qformer.stages.towers.start import sine_table, start_from

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from qformer.config import BackboneConfig

#: First ids of each tokenizer; the very first is the padding.
SPECIAL = {
    "bert": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
    "opt": ["<pad>", "<unk>", "</s>"],
    "clip": ["<pad>", "<unk>", "<|startoftext|>", "<|endoftext|>"],
    "t5": ["<pad>", "</s>", "<unk>"],
}


class TextModel(nn.Module):
    """A small language model trained on text alone.

    BERT fills in masked words, OPT predicts the next token, T5 reads the first part of a text and writes the rest.
    """

    def __init__(self, config: BackboneConfig, texts: Iterable[str]) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = train_tokenizer(config.kind, texts, config.vocab_size)
        self.model = build_language_model(config, self.tokenizer)

    def forward(self, text: list[str]) -> Tensor:
        """Compute the mean cross-entropy over the target tokens of B texts."""
        if self.config.kind == "bert":
            tokens = self._tokenize(text)
            tokens["input_ids"], labels = _mask_words(tokens["input_ids"], self.tokenizer)
            return self.model(**tokens, labels=labels).loss
        if self.config.kind == "opt":
            tokens = self._tokenize([line + "\n" for line in text])
            labels = tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, IGNORE)
            return self.model(**tokens, labels=labels).loss
        halves = [_split(line) for line in text]
        tokens = self._tokenize([head for head, _ in halves])
        targets = self._tokenize([tail for _, tail in halves])
        labels = targets["input_ids"].masked_fill(targets["attention_mask"] == 0, IGNORE)
        return self.model(**tokens, labels=labels).loss

    def _tokenize(self, text: list[str]) -> Any:
        made = self.tokenizer(
            text,
            padding=True,
            truncation=True,
            max_length=self.config.max_tokens,
            return_tensors="pt",
            return_token_type_ids=False,
            split_special_tokens=True,
        )
        return made.to(self.model.device)

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def _mask_words(ids: Tensor, tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Mask words as BERT does: of 15% of them (at least one per row), 80% become `[MASK]`, 10% random words."""
    chance = torch.rand(ids.shape, device=ids.device)
    chance = chance.masked_fill(ids < len(SPECIAL["bert"]), 2.0)  # special tokens come first and are never chosen
    chosen = (chance < 0.15) | ((chance == chance.amin(dim=1, keepdim=True)) & (chance < 2))
    what = torch.rand(ids.shape, device=ids.device)
    random = torch.randint_like(ids, len(SPECIAL["bert"]), len(tokenizer))
    replaced = torch.where(what < 0.8, tokenizer.mask_token_id, torch.where(what < 0.9, random, ids))
    return torch.where(chosen, replaced, ids), ids.masked_fill(~chosen, IGNORE)


def _split(text: str) -> tuple[str, str]:
    """Cut a text at a random word boundary; only the first part can be empty."""
    words = text.split(" ")
    at = int(torch.randint(len(words), ()))
    return " ".join(words[:at]), " ".join(words[at:])


def build_vit(config: BackboneConfig) -> ViTModel:
    """Build a ViT with random weights and no pooler.

    The usual initialization, positions with a scale of 0.02, hides the place of a patch for many steps, and so every
    shape larger than a patch. Here positions start as sines, which stay trainable, and the patch projection with
    Xavier weights.
    """
    sizes = ViTConfig(
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=config.intermediate or 4 * config.width,
        image_size=config.image_size,
        patch_size=config.patch_size,
    )
    vit = ViTModel(sizes, add_pooling_layer=False)
    embeddings = vit.embeddings
    with torch.no_grad():
        side = config.image_size // config.patch_size
        embeddings.position_embeddings[0, 1:] = 0.5 * sine_positions(side, config.width)
        nn.init.xavier_uniform_(embeddings.patch_embeddings.projection.weight.flatten(1))  # a view: in place
    return vit


def sine_positions(side: int, width: int) -> Tensor:
    """Compute sines and cosines of column and row, wavelengths 2 to 4 * side patches: float[side * side, width]."""
    waves = math.pi * (2 * side) ** -torch.linspace(0, 1, width // 4)  # radians per patch
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [place.flatten()[:, None] * waves for place in (column, row)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)


UNSEEN = -6.0  # bias for the side that a head ignores at first; training can overcome it


def build_language_model(config: BackboneConfig, tokenizer: PreTrainedTokenizerFast) -> Any:
    """Build a BERT, an OPT or a gated-GELU T5 for the tokenizer's vocabulary, with random weights or former ones.

    Raises:
        UsageError: the tower of `backbone.start` has other sizes.
    """
    if config.kind == "bert":
        return BertForMaskedLM(
            BertConfig(
                vocab_size=len(tokenizer),
                hidden_size=config.width,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                intermediate_size=config.intermediate or 4 * config.width,
                max_position_embeddings=POSITIONS["bert"],
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    model = _build_opt(config, tokenizer) if config.kind == "opt" else _build_t5(config, tokenizer)
    if config.start is not None:
        start_from(model, tokenizer, config.start)
    return model


def _build_t5(config: BackboneConfig, tokenizer: PreTrainedTokenizerFast) -> Any:
    """Build a T5 whose encoder starts with position biases.

    T5's relative biases start without any meaning and change by at most a learning rate per step, so a small T5 stays
    blind to word order. Here its encoder starts with slopes (as in ALiBi, Press et al. 2022): of each four heads one
    attends uniformly, and the others decay with distance and look back, ahead, or both ways; later heads are steeper.
    """
    sizes = T5Config(
        vocab_size=len(tokenizer),
        d_model=config.width,
        d_kv=config.width // config.heads,
        d_ff=config.intermediate or 4 * config.width,
        num_layers=config.layers,
        num_decoder_layers=config.decoder_layers,
        num_heads=config.heads,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    sizes.decoder_start_token_id = tokenizer.pad_token_id
    sizes.dense_act_fn = "gelu"  # the erf form, as stage two and the original use for every gated T5
    model: Any = T5ForConditionalGeneration(sizes)
    with torch.no_grad():
        model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.copy_(_slopes(config.heads, sizes))
    return model


def _slopes(heads: int, sizes: T5Config) -> Tensor:
    """Compute the biases of T5's distance buckets, float[buckets, heads]: tokens before (and 0), then tokens after."""
    half = sizes.relative_attention_num_buckets // 2
    near = half // 2  # exact distances; the others grow by a constant factor
    factor = (sizes.relative_attention_max_distance / near) ** (1 / (half - near))
    far = near * factor ** (torch.arange(half - near) + 0.5)
    distance = torch.cat([torch.arange(near), far])
    biases = torch.zeros(2 * half, heads)
    for head in range(heads):
        look, slope = head % 4, 0.3 * 3 ** (head // 4)
        sides = {1: (True, False), 2: (False, True), 3: (True, True)}.get(look)
        for start, is_seen in zip((0, half), sides or (), strict=False):
            biases[start : start + half, head] = -slope * distance if is_seen else UNSEEN
    return biases.clamp(min=UNSEEN)


def _build_opt(config: BackboneConfig, tokenizer: PreTrainedTokenizerFast) -> OPTForCausalLM:
    """Build an OPT that is initialized for a small width.

    OPT's own scale of 0.02 suits widths of about 1000; a narrow model learns three times slower with it. Here rows have
    unit length, positions start as sines, and projections into the residual stream shrink with the number of layers
    (Radford et al. 2019, GPT-2, section 2.3).
    """
    sizes = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.width,
        word_embed_proj_dim=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        ffn_dim=config.intermediate or 4 * config.width,
        max_position_embeddings=config.positions or POSITIONS["opt"],
        init_std=config.width**-0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = OPTForCausalLM(sizes)
    decoder = model.model.decoder
    with torch.no_grad():
        table = decoder.embed_positions.weight
        table.copy_(sine_table(len(table), config.width))
        for layer in decoder.layers:
            layer.self_attn.out_proj.weight.div_((2 * config.layers) ** 0.5)
            layer.fc2.weight.div_((2 * config.layers) ** 0.5)
    return model


def train_tokenizer(kind: str, texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer with the special tokens of its kind.

    BERT: lower-case WordPiece, `[CLS] words [SEP]`. OPT: byte-level BPE, `</s>` first; CLIP the same, between
    two tokens of its own. T5: BPE of words with a leading space, `</s>` last; the unigram model of T5 falls back to
    letters if there are few different words.
    """
    special = SPECIAL[kind]
    trainer: Any
    if kind == "bert":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        template, options = "[CLS] $0 [SEP]", {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
        trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    elif kind in ("opt", "clip"):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        template, options = "</s> $0", {"bos_token": "</s>", "eos_token": "</s>"}
        if kind == "clip":
            begin, end = special[2:]
            template, options = f"{begin} $0 {end}", {"bos_token": begin, "eos_token": end}
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
        tokenizer.decoder = decoders.Metaspace()
        template, options = "$0 </s>", {"eos_token": "</s>"}
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    used = [(token, special.index(token)) for token in special if token in template.split()]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    options["unk_token"] = "<unk>" if "<unk>" in special else "[UNK]"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=special[0], **options)


def read_tokenizer(folder: Path) -> Any:
    """Read the tokenizer of a tower, or of a checkpoint of its training."""
    return pretrained.read(AutoTokenizer, folder)


def ship_language(kind: str, source: Path, target: Path) -> None:
    """Copy a BERT, an OPT or a T5 and its tokenizer, with fp16 weights."""
    kinds: dict[str, Any] = {"bert": BertForMaskedLM, "opt": OPTForCausalLM, "t5": T5ForConditionalGeneration}
    model = pretrained.read(kinds[kind], source).half()  # `dtype` would leave parts of a T5 in float32
    model.save_pretrained(target)
    pretrained.read(AutoTokenizer, source).save_pretrained(target)
