"""A warm start of stage one, beside the paper's: the bridge begins where its frozen towers are.

BLIP-2 starts cross-attention, queries and heads at random, and learns from 129 million images what belongs together.
Two pre-trained towers already share much of that, as two linear maps that are solved in closed form
(`qformer.alignment`). Here the maps are written into the last cross-attention and the heads of ITC: the first half of
the attention heads attends to the class token, the other half to the patches, the values of each half are its share of
the solved map, and the head of ITC adds both. What texts pass through (embeddings, self-attention, text feed-forwards)
stays BERT's, so the text features that were solved for are those of the model.

All queries read the same map. They differ in how they weigh the patches: the first one averages them, the others
attend a little more to patches that lie in a direction of their own.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qformer.alignment import align
from qformer.types import UsageError

if TYPE_CHECKING:
    from qformer.alignment import Alignment
    from qformer.model.bert import Attention
    from qformer.model.image_text import ImageTextModel
    from qformer.model.qformer import QFormerLayer
    from qformer.types import VisualTokens

LOUDNESS = 8.0  # root mean square of what is read from the image; that of the query to which it is added is about 1
SELECTION = 12.0  # attention logit between the class token and a patch: 256 patches keep 0.2 % of the weight together
PREFERENCE = 0.5  # standard deviation of the attention logits of a query over the patches
SHRINKAGE = 0.01  # of the covariance of the patches, without which few of them would have no inverse


def check_warm_start(model: ImageTextModel) -> None:
    """Refuse a model that the maps cannot be written into.

    Raises:
        UsageError: the last layer has no cross-attention, or the heads cannot be divided between the class token and
            the patches.
    """
    config = model.qformer.config
    if (config.layers - 1) % config.cross_attention_every:
        raise UsageError(
            f"a warm start reads the image in the last layer, and with qformer.cross_attention_every "
            f"{config.cross_attention_every} layer {config.layers} of {config.layers} does not; set it to a divisor of "
            f"{config.layers - 1}"
        )
    if config.heads % 2 or config.hidden_size < 4 * config.heads:
        raise UsageError(
            f"a warm start divides the heads between class token and patches, and {config.heads} heads of a width of "
            f"{config.hidden_size // config.heads} cannot be; use a BERT with an even number of heads of 4 or more"
        )


@torch.no_grad()
def warm_start(model: ImageTextModel, pools: Tensor, texts: Tensor, some: VisualTokens) -> Alignment:
    """Write the alignment of N photos with their captions into a model of stage one that was just built from BERT.

    Args:
        pools: float[N, 2 * D], or float[N, D] without a class token: `pooled` tokens behind the front end's adapter.
        texts: float[N, H], the mean over a photo's captions of what `model.read_texts` gives.
        some: the tokens of a few photos, behind the adapter: they show how patches differ.

    Returns:
        The maps, of which the first H / 2 directions (H without a class token) are in the model now.

    Raises:
        UsageError: see `check_warm_start` and `align`.
    """
    check_warm_start(model)
    layer = cast("QFormerLayer", model.qformer.layers[-1])
    assert layer.cross_attention is not None
    reader, hidden = layer.cross_attention, model.qformer.config.hidden_size
    halves = 2 if some.extra else 1
    width = min(hidden // halves, model.config.embed_width)
    solved = align(pools, texts, width)
    _write_values(reader, solved, pools, halves)
    nn.init.eye_(reader.output.weight)
    for silent in (reader.output.bias, layer.query_ffn.output.weight, layer.query_ffn.output.bias):
        nn.init.zeros_(silent)
    rows = torch.cat(list(some.rows)).float()
    first = torch.cat([torch.arange(len(row), device=rows.device) < some.extra for row in some.rows])
    _write_keys(reader, rows[~first], rows[first] if some.extra else None)
    _write_queries(model, reader, some, halves)
    _write_heads(model, solved, texts, halves)
    return solved


def _write_values(reader: Attention, solved: Alignment, pools: Tensor, halves: int) -> None:
    """Values: the class token's share of the maps in the first half of the rows, the patches' in the second."""
    shares = solved.image.weight.chunk(halves, dim=1)  # each (P, D)
    parts = pools.to(solved.image.weight).chunk(halves, dim=1)  # each (N, D)
    mapped = torch.stack([part @ share.T for part, share in zip(parts, shares, strict=True)])
    mapped[-1] += solved.image.bias
    hidden = reader.value.out_features
    scale = LOUDNESS / (mapped.square().sum() / (len(pools) * hidden)).sqrt()
    nn.init.zeros_(reader.value.weight)
    nn.init.zeros_(reader.value.bias)
    for number, share in enumerate(shares):
        start = number * hidden // halves
        reader.value.weight[start : start + len(share)] = share * scale
    reader.value.bias[start : start + len(share)] = solved.image.bias * scale


def _write_keys(reader: Attention, patches: Tensor, classes: Tensor | None) -> None:
    """Keys: what tells the class token from patches in the first number of each head, then what patches differ in.

    Args:
        patches: float[n, D]. classes: float[m, D], None if the encoder has none.
    """
    mean, covariance = patches.mean(dim=0), torch.cov(patches.T).double()
    spread, directions = torch.linalg.eigh(covariance)
    width = reader.key.out_features // reader.heads - 1
    main = (directions / spread.clamp(min=spread[-1] * 1e-6).sqrt()).T.flip(0)[:width].float()  # (width, D), whitening
    keys = F.pad(main, (0, 0, 1, width - len(main)))  # (H / heads, D)
    biases = -(keys @ mean)
    if classes is not None:
        apart = classes.mean(dim=0) - mean
        ridge = SHRINKAGE * covariance.diagonal().mean() * torch.eye(len(mean), device=mean.device)
        telling = torch.linalg.solve(covariance + ridge, apart.double()).float()
        keys[0] = telling / (telling @ apart)  # 1 between the two means
        biases[0] = -(keys[0] @ (mean + apart / 2))
    reader.key.weight.copy_(keys.repeat(reader.heads, 1))
    reader.key.bias.copy_(biases.repeat(reader.heads))


def _write_queries(model: ImageTextModel, reader: Attention, some: VisualTokens, halves: int) -> None:
    """Queries: the biases send heads to the class token or to patches; each query prefers patches of its own kind.

    The directions are drawn; the weights are the smallest that give them to what arrives of the queries.
    """
    count, heads, hidden = model.qformer.config.queries, reader.heads, reader.query.out_features
    width = hidden // heads
    scale = math.sqrt(width)  # by which attention divides its logits
    wanted = torch.zeros(count, heads, width, device=model.device)
    drawn = F.normalize(torch.randn(count, width - 1, device=model.device), dim=1) * PREFERENCE
    wanted[1:, heads - heads // halves :, 1:] = drawn[1:, None] * scale
    biases = torch.zeros(heads, width, device=model.device)
    if halves == 2:
        biases[: heads // 2, 0], biases[heads // 2 :, 0] = SELECTION * scale, -SELECTION * scale
    arriving = _arriving(model, reader, some)
    reader.query.weight.copy_(torch.linalg.pinv(arriving.double()).float().matmul(wanted.flatten(1)).T)
    reader.query.bias.copy_(biases.flatten())


def _arriving(model: ImageTextModel, reader: Attention, some: VisualTokens) -> Tensor:
    """The queries as the last cross-attention gets them, float[Q, H], the mean over some photos."""
    seen: list[Tensor] = []
    hook = reader.register_forward_pre_hook(lambda _module, given: seen.append(given[0]))
    try:
        model.qformer.encode_image(some)
    finally:
        hook.remove()
    return seen[0].float().mean(dim=0)


def _write_heads(model: ImageTextModel, solved: Alignment, texts: Tensor, halves: int) -> None:
    """Heads of ITC: the image's adds both halves, the text's is solved, scaled to numbers of about 1."""
    width = len(solved.text.weight)
    scale = 1 / solved.text(texts.to(solved.text.weight)).square().mean().sqrt()
    for head in (model.vision_proj, model.text_proj):
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    hidden = model.vision_proj.in_features
    for start in range(0, hidden, hidden // halves):
        model.vision_proj.weight[:width, start : start + width] = torch.eye(width)
    model.text_proj.weight[:width] = solved.text.weight * scale
    model.text_proj.bias[:width] = solved.text.bias * scale
