"""M-RoPE by its public name: `qformer.llm.mrope`, which language models use, stands below this folder."""

from qformer.llm.mrope import parts, position_ids, rotary

__all__ = ["parts", "position_ids", "rotary"]
