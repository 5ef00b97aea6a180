"""Where every tensor of a BLIP-2 stands: its name here, in LAVIS's state dicts and in transformers'.

Tables of the parts, and functions that write out the names for the layers that a model has, one by one: no patterns, so
that nothing can slip through a conversion unseen. Sources: BLIP-2 (arXiv 2301.12597) as released with LAVIS 1.0.2, and
`Blip2ForConditionalGeneration` and `Blip2ForImageTextRetrieval` of transformers 5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from qformer.schema import QFormerConfig

Stage = Literal["stage1", "stage2"]
Row = tuple[str, str | None, str | None]  # our name, LAVIS's, transformers'; None: has no place there

ATTENTION: tuple[Row, ...] = (
    ("query", "self.query", "attention.query"),
    ("key", "self.key", "attention.key"),
    ("value", "self.value", "attention.value"),
    ("output", "output.dense", "output.dense"),
    ("norm", "output.LayerNorm", "output.LayerNorm"),
)
FEED_FORWARD: tuple[tuple[str, str], ...] = (
    ("inner", "intermediate{}.dense"),
    ("output", "output{}.dense"),
    ("norm", "output{}.LayerNorm"),
)
#: What stage one alone has, and of it what transformers has no place for: there is no ITG in it, and no training.
TEXT_EMBEDDINGS: tuple[Row, ...] = (
    (
        "qformer.embeddings.words.weight",
        "Qformer.bert.embeddings.word_embeddings.weight",
        "embeddings.word_embeddings.weight",
    ),
    (
        "qformer.embeddings.positions.weight",
        "Qformer.bert.embeddings.position_embeddings.weight",
        "embeddings.position_embeddings.weight",
    ),
)
LM_HEAD: tuple[Row, ...] = (
    ("qformer.lm_head.dense.weight", "Qformer.cls.predictions.transform.dense.weight", None),
    ("qformer.lm_head.dense.bias", "Qformer.cls.predictions.transform.dense.bias", None),
    ("qformer.lm_head.norm.weight", "Qformer.cls.predictions.transform.LayerNorm.weight", None),
    ("qformer.lm_head.norm.bias", "Qformer.cls.predictions.transform.LayerNorm.bias", None),
    ("qformer.lm_head.bias", "Qformer.cls.predictions.bias", None),
    ("temp", "temp", None),
)
HEADS = (
    ("vision_proj", "vision_proj", "vision_projection"),
    ("text_proj", "text_proj", "text_projection"),
    ("itm_head", "itm_head", "itm_head"),
)
EVA = (  # here and in LAVIS, in transformers
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj.weight", "embeddings.patch_embedding.weight"),
    ("patch_embed.proj.bias", "embeddings.patch_embedding.bias"),
)
EVA_BLOCK = (
    ("norm1", "layer_norm1"),
    ("norm2", "layer_norm2"),
    ("attn.proj", "self_attn.projection"),
    ("mlp.fc1", "mlp.fc1"),
    ("mlp.fc2", "mlp.fc2"),
)
#: What the released EVA may hold beyond what BLIP-2 uses: its final norm and classification head.
EVA_HEAD = ("norm.weight", "norm.bias", "fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias")
EVA_RELEASED_DEPTH = 40  # BLIP-2 reads the output of the block before the last
CLIP = ("class_embedding", "positional_embedding", "conv1.weight", "ln_pre.weight", "ln_pre.bias")
CLIP_BLOCK = ("attn.out_proj", "ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj")
#: What the released CLIP holds beyond what BLIP-2 uses: its final norm and projection.
CLIP_END = ("ln_post.weight", "ln_post.bias", "proj")
CLIP_RELEASED_DEPTH = 24
#: Tensors of LAVIS that repeat others of the same file, or number the positions; dropped where they say the same.
REPEATED = {
    "Qformer.cls.predictions.decoder.weight": "Qformer.bert.embeddings.word_embeddings.weight",
    "Qformer.cls.predictions.decoder.bias": "Qformer.cls.predictions.bias",
}
#: Second names of a frozen language model's embedding, which LAVIS saves by oversight where it leaves the model out.
SPARE = ("embed_tokens.weight", "shared.weight", "lm_head.weight")
POSITION_IDS = "Qformer.bert.embeddings.position_ids"


def bridge_rows(sizes: QFormerConfig, stage: Stage, family: str | None) -> list[Row]:
    """Every tensor of the bridge: its name here, in LAVIS, in transformers."""
    rows: list[Row] = [("qformer.queries", "query_tokens", "query_tokens")]
    rows += _both("qformer.embeddings.norm", "Qformer.bert.embeddings.LayerNorm", "qformer.layernorm")
    for layer in range(sizes.layers):
        rows += _layer_rows(layer, layer % sizes.cross_attention_every == 0, stage == "stage1")
    if stage == "stage2":
        rows = [(f"connector.{ours}", lavis, theirs) for ours, lavis, theirs in rows]
        rows += _both("connector.projection", f"{family}_proj", "language_projection")
    else:
        rows += [*TEXT_EMBEDDINGS, *LM_HEAD, *(row for names in HEADS for row in _both(*names))]
    return rows + _both("frontend.norm", "ln_vision", "vision_model.post_layernorm")


def _layer_rows(layer: int, has_cross_attention: bool, has_text: bool) -> list[Row]:
    mine, lavis, theirs = (
        f"{start}.{layer}." for start in ("qformer.layers", "Qformer.bert.encoder.layer", "qformer.encoder.layer")
    )
    rows = []
    for ours, name in (("attention", "attention"), ("cross_attention", "crossattention")):
        if ours == "attention" or has_cross_attention:
            for part, in_lavis, in_theirs in ATTENTION:
                rows += _both(f"{mine}{ours}.{part}", f"{lavis}{name}.{in_lavis}", f"{theirs}{name}.{in_theirs}")
    for ours, suffix in (("query_ffn", "_query"), ("text_ffn", "")):
        if ours == "query_ffn" or has_text:
            for part, name in FEED_FORWARD:
                both = name.format(suffix)
                rows += _both(f"{mine}{ours}.{part}", f"{lavis}{both}", f"{theirs}{both}")
    return rows


def _both(ours: str, lavis: str, theirs: str) -> list[Row]:
    """Weight and bias of one module."""
    return [(f"{ours}.{kind}", f"{lavis}.{kind}", f"{theirs}.{kind}") for kind in ("weight", "bias")]


def eva_rows(depth: int) -> list[tuple[str, str | None]]:
    """Every tensor of EVA by its name here and in LAVIS, and in transformers; None for the biases, which it joins."""
    return [*EVA, *(row for block in range(depth) for row in _eva_block_rows(block))]


def eva_unused(depth: int) -> set[str]:
    """Names of tensors in the released file that an encoder of this depth does not use: of ViT-g the 40th block too."""
    last = range(depth, EVA_RELEASED_DEPTH if depth == EVA_RELEASED_DEPTH - 1 else depth)
    return {*EVA_HEAD, *(ours for block in last for ours, _ in _eva_block_rows(block))}


def _eva_block_rows(block: int) -> list[tuple[str, str | None]]:
    ours, theirs = f"blocks.{block}.", f"encoder.layers.{block}."
    rows: list[tuple[str, str | None]] = [(f"{ours}attn.q_bias", None), (f"{ours}attn.v_bias", None)]
    rows.append((f"{ours}attn.qkv.weight", f"{theirs}self_attn.qkv.weight"))
    for mine, name in EVA_BLOCK:
        rows += [(f"{ours}{mine}.{kind}", f"{theirs}{name}.{kind}") for kind in ("weight", "bias")]
    return rows


def clip_names(depth: int) -> list[str]:
    """Every tensor of CLIP's image encoder, by its name here and in LAVIS; transformers' BLIP-2 has no place for it."""
    return [*CLIP, *(name for block in range(depth) for name in _clip_block_names(block))]


def clip_unused(depth: int) -> set[str]:
    """Names of tensors in the released file that an encoder of this depth does not use."""
    return {*CLIP_END, *(name for block in range(depth, CLIP_RELEASED_DEPTH) for name in _clip_block_names(block))}


def _clip_block_names(block: int) -> list[str]:
    start = f"transformer.resblocks.{block}."
    joined = [f"{start}attn.in_proj_{kind}" for kind in ("weight", "bias")]
    return joined + [f"{start}{name}.{kind}" for name in CLIP_BLOCK for kind in ("weight", "bias")]
