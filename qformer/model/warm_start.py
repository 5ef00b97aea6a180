"""A warm start of stage one, beside the paper's: the bridge begins where its frozen towers are.

BLIP-2 starts cross-attention, queries and heads at random, which takes millions of images to make up for. What two
frozen towers have in common can be solved in closed form (`qformer.alignment`), and this module writes the solution
into the last cross-attention: the first half of its heads attend to the class token, the other half to the patches,
its values are the solved map of each, and the heads of ITC read the sum of both. Self-attention and the text
feed-forwards, which texts pass through, keep BERT's weights.

Every query reads the same map, each of patches that it weighs in its own way: the first all alike, the others more of
those that look like a center of the patches' distribution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from qformer.alignment import Affine, Alignment, align, pooled
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from qformer.model.bert import Attention
    from qformer.model.image_text import ImageTextModel
    from qformer.model.qformer import QFormer, QFormerLayer
    from qformer.types import VisualTokens

LOUD = 8.0  # root mean square of what cross-attention adds to a query, whose own is 1: the query is hardly heard
APART = 12.0  # logit between the class token and a patch: with 256 patches, 0.2 % of the weight is misplaced
SHARP = 1.0  # how much more a query attends to patches like its center


@dataclass
class PhotoFeatures:
    """What the start is solved from.

    Attributes:
        pools: float[N, 2 * D], or float[N, D] without a class token: see `pooled`; behind the adapter.
        some: tokens of a few of the photos, of which the attention learns what patches look like.
    """

    pools: Tensor
    some: VisualTokens


@torch.no_grad()
def warm_start(model: ImageTextModel, photos: PhotoFeatures, texts: Tensor, ridge: float) -> Alignment:
    """Write the alignment of photos and texts into a model of stage one that was just built from BERT.

    Args:
        photos: N of them.
        texts: float[N, H], the mean of the features of a photo's captions (`ImageTextModel.read_texts`).
        ridge: see `align`.

    Raises:
        UsageError: the encoder has no patches, or nothing can be solved.
    """
    qformer = model.qformer
    attention, layer = _last_reader(qformer)
    hidden, classed = qformer.config.hidden_size, photos.some.extra > 0
    width = hidden // 2 if classed else hidden
    solved = align(photos.pools, texts, min(width, model.config.embed_width), ridge)
    _write_values(attention, solved, width, photos.pools)
    queries = _reading_queries(model, photos.some)
    _write_attention(attention, queries, photos.some)
    _silence(layer.query_ffn.output)
    _write_heads(model, solved, width)
    return solved


def _last_reader(qformer: QFormer) -> tuple[Attention, QFormerLayer]:
    layer = cast("QFormerLayer", qformer.layers[-1])
    if layer.cross_attention is None:
        raise UsageError(
            f"the warm start writes into cross-attention of the last layer, and layer {len(qformer.layers) - 1} has "
            "none; set qformer.cross_attention_every to a divisor of that number"
        )
    return layer.cross_attention, layer
