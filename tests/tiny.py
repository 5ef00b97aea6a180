"""Tokenizers and language models of a few thousand weights, made on the spot: no test needs the network.

Tokenizers: `bert` (WordPiece), `opt`, `llama`, `gpt2`, `qwen2` (byte-level BPE), `t5` (Unigram), with the special
tokens of the real ones. Language models: `opt`, `opt-projected` (input embeddings narrower than the layers, as in
OPT-350m), `llama`, `gpt2`, `t5`, `flan-t5`; and `qwen2`, `phi` (half of each head rotary), `ul2`; `qwen2_vl` is the
whole of a Qwen2-VL, whose rotary sections are 1, 1 and 2 wide.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

if TYPE_CHECKING:
    from pathlib import Path

CAPTIONS = [
    "a photo of a cat",
    "a photo of a dog on the beach",
    "two people riding a red bus",
    "a man is holding a small umbrella in the rain",
    "the old train stands at the station",
    "Question: what colour is the bus? Answer: red.",
    "Question: how many cats are there? Short answer: two",
]
LLM_KINDS = ("opt", "opt-projected", "llama", "gpt2", "t5", "flan-t5")
MORE_LLM_KINDS = ("qwen2", "phi", "ul2")
TOKENIZERS = {  # of kinds that have no own one
    "opt-projected": "opt",
    "flan-t5": "t5",
    "phi": "gpt2",
    "ul2": "t5",
    "qwen2_vl": "qwen2",
}


def tiny_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of `kind` with a few hundred tokens; any text can be written in it."""
    return {"bert": _bert, "opt": _opt, "llama": _llama, "gpt2": _gpt2, "qwen2": _qwen2, "t5": _t5}[kind]()


def tiny_llm(kind: str, seed: int = 0) -> tuple[Any, PreTrainedTokenizerFast]:
    """A random language model of `kind` in eval mode, and its tokenizer. Large weights: it prefers some tokens."""
    tokenizer = tiny_tokenizer(TOKENIZERS.get(kind, kind))
    vocabulary = len(tokenizer) + 3  # real models, too, have rows that their tokenizer does not use
    sizes: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    t5: dict[str, Any] = {
        "vocab_size": vocabulary,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 2,
        "num_heads": 2,
        "decoder_start_token_id": 0,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any
        if kind in ("opt", "opt-projected"):
            width = 16 if kind == "opt" else 12
            model = OPTForCausalLM(OPTConfig(word_embed_proj_dim=width, ffn_dim=24, **sizes))
        elif kind == "llama":
            model = LlamaForCausalLM(LlamaConfig(intermediate_size=24, **sizes))
        elif kind == "gpt2":
            model = GPT2LMHeadModel(GPT2Config(**sizes))
        elif kind == "qwen2":
            model = Qwen2ForCausalLM(Qwen2Config(intermediate_size=24, num_key_value_heads=1, **sizes))
        elif kind == "qwen2_vl":
            model = Qwen2VLForConditionalGeneration(_qwen2_vl(sizes))
        elif kind == "phi":
            model = PhiForCausalLM(PhiConfig(intermediate_size=24, partial_rotary_factor=0.5, **sizes))
        elif kind == "t5":
            model = T5ForConditionalGeneration(T5Config(**t5))
        elif kind == "flan-t5":
            t5 |= {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
            model = T5ForConditionalGeneration(T5Config(**t5))
            model.lm_head.weight = nn.Parameter(torch.empty(vocabulary, 16))  # not tied, as in Flan-T5
        elif kind == "ul2":
            t5 |= {"feed_forward_proj": "gated-silu", "tie_word_embeddings": False}
            model = T5ForConditionalGeneration(T5Config(**t5))
        else:
            raise ValueError(f"no tiny language model is called '{kind}'; use one of {LLM_KINDS + MORE_LLM_KINDS}")
        for weight in model.parameters():
            if weight.ndim > 1:
                nn.init.normal_(weight, std=0.4)
    return model.eval(), tokenizer


def _qwen2_vl(sizes: dict[str, Any]) -> Qwen2VLConfig:
    rope = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [1, 1, 2]}
    text = sizes | {"intermediate_size": 24, "num_key_value_heads": 1, "rope_parameters": rope}
    tower = {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 16, "mlp_ratio": 1, "patch_size": 14}
    return Qwen2VLConfig(text_config=text, vision_config=tower)


def save_tiny_llm(path: Path, kind: str, seed: int = 0) -> Path:
    """`tiny_llm` saved with its tokenizer as a folder that `from_pretrained` reads."""
    model, tokenizer = tiny_llm(kind, seed)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def _byte_level(special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = len(special) + len(alphabet) + 60
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CAPTIONS, trainer)
    return tokenizer


def _opt() -> PreTrainedTokenizerFast:
    tokenizer = _byte_level(["<s>", "<pad>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>", unk_token="</s>", pad_token="<pad>"
    )


def _llama() -> PreTrainedTokenizerFast:
    """BOS in front, no pad token."""
    tokenizer = _byte_level(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _gpt2() -> PreTrainedTokenizerFast:
    """One special token that is BOS and EOS but is never put in front, no pad token."""
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=_byte_level([end]), bos_token=end, eos_token=end, unk_token=end)


def _qwen2() -> PreTrainedTokenizerFast:
    """No BOS at all; the end of a text is not the pad token."""
    end, pad = "<|im_end|>", "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=_byte_level([pad, end]), eos_token=end, pad_token=pad)


def _t5() -> PreTrainedTokenizerFast:
    words = sorted({f"▁{word}" for caption in CAPTIONS for word in caption.split()})
    letters = ["▁", *(chr(code) for code in range(33, 127))]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)]
    pieces = special + [(word, -2.0) for word in words] + [(letter, -4.0) for letter in letters]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def _bert() -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = sorted({word.strip(":?.").lower() for caption in CAPTIONS for word in caption.split()})
    letters = [chr(code) for code in range(33, 127)]
    tokens = dict.fromkeys([*special, *words, *letters, *(f"##{letter}" for letter in letters)])
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
