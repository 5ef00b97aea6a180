"""Names of every tensor of a BLIP-2: here, in LAVIS's state dicts, and in transformers'.

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
