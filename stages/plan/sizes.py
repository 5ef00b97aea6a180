"""Sizes of well-known towers by hub id, so that a model can be outlined without a network.

Source: the `config.json` of each model on the Hugging Face hub. Values that a table omits are the defaults of the
configuration class in transformers. Folders, and hub ids in the local cache, are read instead of these tables.
"""

from __future__ import annotations

from typing import Any

#: OPT (Zhang et al. 2022, table 1): width, layers, heads.
OPT = {
    "125m": (768, 12, 12),
    "350m": (1024, 24, 16),
    "1.3b": (2048, 24, 32),
    "2.7b": (2560, 32, 32),
    "6.7b": (4096, 32, 32),
}
#: T5 (Raffel et al. 2020, section 3.7): width, width of a head, width of the feed-forward, layers, heads.
T5 = {
    "small": (512, 64, 2048, 6, 8),
    "base": (768, 64, 3072, 12, 12),
    "large": (1024, 64, 4096, 24, 16),
    "3b": (1024, 128, 16384, 24, 32),
    "11b": (1024, 128, 65536, 24, 128),
}
#: T5 1.1, the base of Flan-T5, in the same columns: gated GELU, untied output embeddings.
T5_GATED = {
    "small": (512, 64, 1024, 8, 6),
    "base": (768, 64, 2048, 12, 12),
    "large": (1024, 64, 2816, 24, 16),
    "xl": (2048, 64, 5120, 24, 32),
    "xxl": (4096, 64, 10240, 24, 64),
}


def _opt(size: str) -> dict[str, Any]:
    width, layers, heads = OPT[size]
    sizes = {
        "model_type": "opt",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "ffn_dim": 4 * width,
        "word_embed_proj_dim": width,
        "dtype": "float16",
    }
    return sizes | ({"word_embed_proj_dim": 512, "do_layer_norm_before": False} if size == "350m" else {})


def _t5(row: tuple[int, int, int, int, int], gated: bool) -> dict[str, Any]:
    width, head, inner, layers, heads = row
    sizes = {
        "model_type": "t5",
        "d_model": width,
        "d_kv": head,
        "d_ff": inner,
        "num_layers": layers,
        "num_heads": heads,
        "vocab_size": 32128,
        "decoder_start_token_id": 0,
        "dtype": "float32",
    }
    return sizes | ({"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False} if gated else {})


BERT_BASE: dict[str, Any] = {"model_type": "bert"}  # the defaults of BertConfig
CLIP_LARGE: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
}

DINOV2_SMALL: dict[str, Any] = {
    "model_type": "dinov2",
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "patch_size": 14,
    "image_size": 518,
}
DINOV2_LARGE: dict[str, Any] = DINOV2_SMALL | {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
MINILM: dict[str, Any] = {
    "model_type": "bert",
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
}
SMOLLM2: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "dtype": "float16",
}

VICUNA_13B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "dtype": "float16",
}
#: Its own code is not run; a Llama of these sizes computes the same.
INTERNLM2_20B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 6144,
    "intermediate_size": 16384,
    "num_hidden_layers": 48,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "vocab_size": 92544,
    "max_position_embeddings": 32768,
    "dtype": "bfloat16",
}
_QWEN2: dict[str, Any] = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}
QWEN2_7B: dict[str, Any] = {"model_type": "qwen2", **_QWEN2, "dtype": "bfloat16"}
QWEN2_VL_7B: dict[str, Any] = {
    "model_type": "qwen2_vl",
    "text_config": {**_QWEN2, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}},
    "dtype": "bfloat16",
}
SIGLIP_SO400M: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 384,
}
#: As transformers builds it; the code that comes with it is not run.
INTERNVIT_6B: dict[str, Any] = {
    "model_type": "internvl_vision",
    "hidden_size": 3200,
    "intermediate_size": 12800,
    "num_hidden_layers": 45,
    "num_attention_heads": 25,
    "use_qk_norm": True,
    "norm_type": "rms_norm",
    "patch_size": 14,
    "image_size": 448,
}

KNOWN: dict[str, dict[str, Any]] = {
    **{f"facebook/opt-{size}": _opt(size) for size in OPT},
    **{f"google-t5/t5-{size}": _t5(row, gated=False) for size, row in T5.items()},
    **{f"t5-{size}": _t5(row, gated=False) for size, row in T5.items()},
    **{f"google/t5-v1_1-{size}": _t5(row, gated=True) for size, row in T5_GATED.items()},
    **{f"google/flan-t5-{size}": _t5(row, gated=True) for size, row in T5_GATED.items()},
    **dict.fromkeys(("bert-base-uncased", "google-bert/bert-base-uncased"), BERT_BASE),
    "openai/clip-vit-large-patch14": CLIP_LARGE,
    "openai/clip-vit-large-patch14-336": CLIP_LARGE | {"image_size": 336},
    "facebook/dinov2-large": DINOV2_LARGE,
    "google/siglip-so400m-patch14-384": SIGLIP_SO400M,
    "OpenGVLab/InternViT-6B-448px-V1-5": INTERNVIT_6B,
    "lmsys/vicuna-13b-v1.5": VICUNA_13B,
    "internlm/internlm2-chat-20b": INTERNLM2_20B,
    "Qwen/Qwen2-7B-Instruct": QWEN2_7B,
    "Qwen/Qwen2-VL-7B-Instruct": QWEN2_VL_7B,
    "real:dinov2-small-focus": DINOV2_SMALL,
    "real:minilm-l6": MINILM,
    "real:smollm2-135m-q4": SMOLLM2,
}
