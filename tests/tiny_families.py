"""Language models of many families of transformers with a few thousand random weights, each from its configuration.

`CAUSAL` and `SEQ2SEQ` name the families and the sizes in which a tiny one differs from the usual sizes.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from qformer.llm.base import CausalLM, LanguageModel, Seq2SeqLM
from tests.tiny import tiny_tokenizer

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
WIDE = GROUPED | {"head_dim": 8}
OLD = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8}

CAUSAL: dict[str, dict[str, Any]] = {
    "bamba": GROUPED | MAMBA | {"attn_layer_indices": [1]},
    "biogpt": SIZES,
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "codegen": OLD | {"n_ctx": 128, "rotary_dim": 4},
    "cohere": GROUPED,
    "deepseek_v3": SIZES
    | LATENT
    | {"moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    | {"first_k_dense_replace": 1},
    "ernie4_5": WIDE,
    "exaone4": GROUPED | SLIDING,
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True},
    "falcon_h1": WIDE | MAMBA | {"mamba_d_ssm": 64},
    "gemma": WIDE,
    "gemma2": WIDE | {"sliding_window": 16},
    "gemma3_text": WIDE | SLIDING,
    "gemma3n_text": WIDE
    | SLIDING
    | {"intermediate_size": [48, 48], "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0, "laurel_rank": 4}
    | {"activation_sparsity_pattern": [0.0, 0.0], "vocab_size_per_layer_input": 300},
    "gemma4_text": WIDE | SLIDING | {"global_head_dim": 8, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
    "glm": WIDE | {"pad_token_id": 0},
    "gpt2": OLD,
    "gpt_bigcode": OLD,
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 128, "window_size": 16}
    | {"attention_types": [[["global", "local"], 1]]},
    "gpt_neox": SIZES,
    "gpt_oss": WIDE | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
    "gptj": OLD | {"rotary_dim": 4},
    "granite": GROUPED,
    "granitemoehybrid": GROUPED
    | MAMBA
    | {"num_local_experts": 0, "shared_intermediate_size": 48, "layer_types": ["mamba", "attention"]},
    "helium": WIDE,
    "hunyuan_v1_dense": WIDE,
    "jamba": GROUPED
    | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    | {"num_experts": 2, "mamba_d_state": 4, "use_mamba_kernels": False},
    "lfm2": GROUPED | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "llama": GROUPED,
    "llama4_text": WIDE
    | EXPERTS
    | {"num_local_experts": 2, "intermediate_size_mlp": 48, "pad_token_id": 0, "interleave_moe_layer_step": 1},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "mamba2": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "num_heads": 8, "head_dim": 8}
    | {"n_groups": 1, "chunk_size": 8},
    "minimax": WIDE
    | {"num_local_experts": 2, "num_experts_per_tok": 1, "block_size": 8}
    | {"layer_types": ["linear_attention", "full_attention"]},
    "ministral3": WIDE,
    "mistral": GROUPED | {"sliding_window": 16},
    "mixtral": GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128},
    "nanochat": WIDE,
    "nemotron_h": WIDE
    | {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8}
    | {"hybrid_override_pattern": "M*"},
    "olmo2": GROUPED,
    "olmo3": GROUPED | SLIDING,
    "opt": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48}
    | {"max_position_embeddings": 128, "word_embed_proj_dim": 32},
    "phi": SIZES,
    "phi3": GROUPED | {"pad_token_id": 0},
    "qwen2": GROUPED,
    "qwen3": WIDE,
    "qwen3_5_text": WIDE | LINEAR,
    "qwen3_moe": WIDE | EXPERTS,
    "qwen3_next": WIDE | EXPERTS | LINEAR | {"shared_expert_intermediate_size": 24},
    "recurrent_gemma": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    | {"lru_width": 32, "head_dim": 8},
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "context_length": 128},
    "smollm3": GROUPED | {"pad_token_id": 0},
    "stablelm": GROUPED,
    "starcoder2": GROUPED,
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48, "max_position_embeddings": 128},
    "zamba2": SIZES
    | {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "mamba_d_state": 8}
    | {"mamba_ngroups": 1, "n_mamba_heads": 8, "mamba_headdim": 8, "num_mem_blocks": 1, "chunk_size": 8}
    | {"use_mamba_kernels": False},
}

BOTH = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 128,
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}

SEQ2SEQ: dict[str, dict[str, Any]] = {
    "bart": BOTH,
    "blenderbot": BOTH,
    "led": BOTH
    | {"max_encoder_position_embeddings": 128, "max_decoder_position_embeddings": 128}
    | {"attention_window": 8},
    "longt5": T5 | {"local_radius": 8},
    "m2m_100": BOTH,
    "marian": BOTH,
    "mbart": BOTH,
    "mt5": T5,
    "pegasus": BOTH,
    "switch_transformers": T5
    | {"num_decoder_layers": 3, "num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "t5": T5 | {"num_decoder_layers": 3},
    "t5gemma": {},
    "umt5": T5,
}


def tiny_family(kind: str) -> LanguageModel:
    """A random language model of a family, with the tokenizer of another one."""
    encodes = kind in SEQ2SEQ
    tokenizer = tiny_tokenizer("t5" if encodes else "gpt2")
    shared: dict[str, Any] = {
        "vocab_size": len(tokenizer) + 3,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id or 0,
    }
    if encodes:
        start = (
            0 if "t5" in kind or kind == "switch_transformers" else tokenizer.eos_token_id
        )  # BART's begin with the end
        shared |= {"decoder_start_token_id": start, "decoder_vocab_size": shared["vocab_size"]}
    sizes = (SEQ2SEQ if encodes else CAUSAL)[kind]
    if kind == "t5gemma":
        part = WIDE | {"vocab_size": shared["vocab_size"], "sliding_window": 16}
        sizes = {"encoder": part, "decoder": part | {"bos_token_id": 2}}
        del shared["decoder_start_token_id"]
    auto: Any = AutoModelForSeq2SeqLM if encodes else AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = auto.from_config(AutoConfig.for_model(kind, **(shared | sizes))).eval()
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.data.normal_(std=0.25)
    return (Seq2SeqLM if encodes else CausalLM)(model, tokenizer)
