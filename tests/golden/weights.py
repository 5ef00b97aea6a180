"""LAVIS's state dicts under our names. TO BE REPLACED by `qformer.convert.from_lavis` once that is there."""

from __future__ import annotations

import re

from torch import Tensor

COMMON = (
    (r"^visual_encoder\.", "frontend.encoder."),
    (r"^ln_vision\.", "frontend.norm."),
    (r"^query_tokens$", "qformer.queries"),
    (r"^Qformer\.bert\.embeddings\.word_embeddings\.", "qformer.embeddings.words."),
    (r"^Qformer\.bert\.embeddings\.position_embeddings\.", "qformer.embeddings.positions."),
    (r"^Qformer\.bert\.embeddings\.LayerNorm\.", "qformer.embeddings.norm."),
    (r"^Qformer\.bert\.encoder\.layer\.", "qformer.layers."),
    (r"\.attention\.self\.", ".attention."),
    (r"\.crossattention\.self\.", ".cross_attention."),
    (r"\.attention\.output\.dense\.", ".attention.output."),
    (r"\.attention\.output\.LayerNorm\.", ".attention.norm."),
    (r"\.crossattention\.output\.dense\.", ".cross_attention.output."),
    (r"\.crossattention\.output\.LayerNorm\.", ".cross_attention.norm."),
    (r"\.intermediate_query\.dense\.", ".query_ffn.inner."),
    (r"\.output_query\.dense\.", ".query_ffn.output."),
    (r"\.output_query\.LayerNorm\.", ".query_ffn.norm."),
    (r"^(qformer\.layers\.\d+)\.intermediate\.dense\.", r"\1.text_ffn.inner."),
    (r"^(qformer\.layers\.\d+)\.output\.dense\.", r"\1.text_ffn.output."),
    (r"^(qformer\.layers\.\d+)\.output\.LayerNorm\.", r"\1.text_ffn.norm."),
    (r"^Qformer\.cls\.predictions\.transform\.dense\.", "qformer.lm_head.dense."),
    (r"^Qformer\.cls\.predictions\.transform\.LayerNorm\.", "qformer.lm_head.norm."),
    (r"^Qformer\.cls\.predictions\.bias$", "qformer.lm_head.bias"),
    (r"^(opt|t5)_proj\.", "connector.projection."),
    (r"^(opt|t5)_model\.", "llm.model."),
)
# A buffer that counts, and the decoder, whose weight is that of the words and whose bias is `predictions.bias`.
UNUSED = (
    "Qformer.bert.embeddings.position_ids",
    "Qformer.cls.predictions.decoder.weight",
    "Qformer.cls.predictions.decoder.bias",
)


def our_name(name: str, stage_two: bool) -> str | None:
    """Our name of a tensor of LAVIS; None for one that we do not have."""
    if name in UNUSED:
        return None
    for theirs, ours in COMMON:
        name = re.sub(theirs, ours, name)
    return f"connector.{name}" if stage_two and name.startswith("qformer.") else name


def ours(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of LAVIS, or gradients by its names, under our names."""
    stage_two = any(name.startswith(("opt_proj.", "t5_proj.")) for name in tensors)
    named = {our_name(name, stage_two): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in named.items() if name is not None}
