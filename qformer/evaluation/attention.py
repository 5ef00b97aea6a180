"""Where a bridge looks: cross-attention of its queries over a picture, and relevance of patches for an answer.

`query_maps` reads the Q-Former's cross-attention as it is. `answer_relevance` asks which patches an answer came from,
through the visual prefix and the language model. Plain functions over torch and PIL; `qformer.figures` draws both.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from qformer.evaluation.choice import answer_losses
from qformer.figures.heat import QueryMaps
from qformer.llm.prompts import Prompt, compose
from qformer.losses import IGNORE
from qformer.model.image_text import ImageTextModel
from qformer.types import BadSample, UsageError, VisualTokens

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qformer.figures.heat import Box
    from qformer.model.bert import Attention
    from qformer.model.qformer import QFormer
    from qformer.model.vision_language import VisionLanguageModel
    from qformer.types import Plan, Tile

STEPS = 16  # from the blank picture to the real one
ROWS = 4  # of these at once, which bounds the memory


@torch.no_grad()
def query_maps(model: VisionLanguageModel | ImageTextModel, image: Image.Image) -> QueryMaps:
    """Cross-attention of the queries over the overview of a picture, or its first tile where there is none.

    Averaged over the heads, and over all layers that have cross-attention. Attention to the tokens in front of the
    patches (class token, registers) is left out and the rest made to sum to 1. A Q-Former that reads questions is
    given none. Attention says where a query reads, not what it takes from there.

    Raises:
        UsageError: the picture cannot be read.
    """
    with _at_rest(model):
        visual = _see(model, image)
        plan = visual.plans[0]
        number = plan.overview or 0
        one = slice(number, number + 1)
        mask = None if visual.mask is None else visual.mask[one]
        qformer = model.qformer if isinstance(model, ImageTextModel) else model.connector.qformer
        with watch(qformer) as weights:
            qformer.encode_image(visual.features[one], mask)
    mean = torch.stack(weights).float().mean(dim=(0, 2))[0]  # (layers, 1, heads, Q, S) -> (Q, S)
    rows, columns = visual.grids[number]
    patches = mean[:, visual.extra : visual.extra + rows * columns]
    patches = patches / patches.sum(dim=1, keepdim=True)
    return QueryMaps(patches.unflatten(1, (rows, columns)).cpu(), _box(plan.tiles[number]))


def answer_relevance(
    model: VisionLanguageModel,
    image: Image.Image,
    question: str,
    answer: str,
    token: int | None = None,
    context: str | None = None,
) -> tuple[list[str], Tensor]:
    """How much each place of a picture mattered for the log-probability of an answer, or of one of its tokens.

    Integrated gradients (Sundararajan et al., arXiv:1703.01365) at the image tokens: the tokens of a blank picture, of
    this one's median colour, turn into its own in `STEPS` equal steps, and each token's change times the mean gradient
    on the way is what it adds to the log-probability. Together they are what the answer gained over the blank picture,
    the `extra` tokens in front included. What adds is kept; what speaks against the answer counts as nothing. An image
    token is taken to stand for its patch, though the encoder has mixed in what it saw elsewhere.

    Args:
        question: worded for the model as `VisionLanguageModel.answer` does; empty: the answer is a caption.
        answer: any text: what the model said, or what it might have said.
        token: which one of the answer's tokens, from 0; None: all of them.
        context: free text in front of the question.

    Returns:
        The tokens of the answer as text, and float[h, w] over the whole picture, not negative, summing to 1; uniform
        where no patch speaks for the answer. Several tiles are laid over one another on a grid of the finest patches.

    Raises:
        UsageError: an empty answer, no such token, a picture that cannot be read, or more than the language model has
            positions.
    """
    if not answer.strip():
        raise UsageError("there is no answer to look for; ask first, or give a text")
    with _at_rest(model):
        visual, blank = see_with_blank(model, image)
        words, gained = integrate(model, visual, blank, (question, answer, context), token)
    return words, on_picture(visual, gained.clamp(min=0))


def integrate(
    model: VisionLanguageModel,
    visual: VisualTokens,
    blank: Tensor,
    text: tuple[str, str, str | None],
    token: int | None = None,
) -> tuple[list[str], Tensor]:
    """What each image token adds to the log-probability of an answer over that with `blank` ones: float[N, S].

    Args:
        visual: the tokens float[N, S, D] of one picture. blank: float[N, S, D], where the way to them begins.
        text: question, answer and context. token: as in `answer_relevance`, which tells the errors, too.

    Returns:
        The tokens of the answer as text, and the sums of the integrated gradients over D.
    """
    change = visual.features - blank  # (N, S, D)
    ways = (torch.arange(STEPS, device=change.device) + 0.5) / STEPS  # the midpoints of the steps
    words: list[str] = []
    total = torch.zeros_like(change)
    for part in ways.split(ROWS):
        with torch.enable_grad():
            features = (blank + part[:, None, None, None] * change).detach().requires_grad_()  # (rows, N, S, D)
            ids, scores = score(model, visual, features, *text)
            words = [str(model.llm.tokenizer.decode([number])) for number in ids]
            if token is not None and not 0 <= token < len(words):
                raise UsageError(f"token is {token}, and the answer has the tokens 0 to {len(words) - 1}; give one")
            chosen = scores if token is None else scores[:, token]
            total += torch.autograd.grad(chosen.sum(), features)[0].sum(dim=0)
    return words, (total / STEPS * change).sum(dim=2).detach().cpu()


def score(
    model: VisionLanguageModel, visual: VisualTokens, features: Tensor, question: str, answer: str, context: str | None
) -> tuple[list[int], Tensor]:
    """An answer behind its question and a picture of which the image tokens are given, in R ways.

    Args:
        visual: the picture. features: float[R, N, S, D], in place of its tokens.

    Returns:
        Ids of the n tokens of the answer, without those that begin and end a text, and their log-probabilities, as
        float[R, n].
    """
    llm, rows = model.llm, len(features)
    mask = None if visual.mask is None else visual.mask.repeat(rows, 1)
    images = VisualTokens(features.flatten(0, 1), mask, visual.grids * rows, visual.extra, visual.plans * rows)
    prefix, exists = model.connector(images, [[question]] * rows)
    prompt = compose(question, family=llm.family, context=context) if question else Prompt("", (), model.prompt)
    length = llm.count_tokens(answer) + 1  # and the one that ends it
    room = llm.room(prefix.shape[1], length)
    text = prompt.text if room is None else prompt.fit(llm.count_tokens, room).text
    most = llm.count_tokens(text) + length + 1
    found = answer_losses(llm, prefix, exists, [answer] * rows, [text] * rows, most).without_end()
    ids = found.targets[0]
    places = ids.ne(IGNORE).nonzero()[:, 0]  # (n)
    if ids[places[: len(llm.start)]].tolist() == llm.start:  # which is predicted, too, where there is no prompt
        places = places[len(llm.start) :]
    return ids[places].tolist(), -found.losses[:, places]


@torch.no_grad()
def see_with_blank(model: VisionLanguageModel, image: Image.Image) -> tuple[VisualTokens, Tensor]:
    """The image tokens of a picture, and those float[N, S, D] of one as large that is all of its median colour."""
    colour = np.median(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)
    blank = Image.new("RGB", image.size, tuple(int(part) for part in colour))
    return _see(model, image), _see(model, blank).features


@contextmanager
def watch(qformer: QFormer) -> Iterator[list[Tensor]]:
    """The cross-attention weights float[N, heads, Q, S] of each layer that has them, while the Q-Former runs inside."""
    weights: list[Tensor] = []

    def keep(attention: Any, inputs: tuple[Any, ...], _: Tensor) -> None:
        hidden, keys, _values, mask = inputs
        weights.append(cross_weights(attention, hidden, keys, mask))

    layers = [layer.cross_attention for layer in cast("Any", qformer.layers)]
    hooks = [layer.register_forward_hook(keep) for layer in layers if layer is not None]
    try:
        yield weights
    finally:
        for hook in hooks:
            hook.remove()


def cross_weights(attention: Attention, hidden: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
    """The weights that torch's fused attention uses and never shows: float[N, heads, Q, S], rows sum to 1.

    Args:
        hidden: float[N, Q, H]. keys: float[N, heads, S, H / heads]. mask: bool, broadcast to the result, or None.
    """
    scores = attention.split(attention.query(hidden)) @ keys.transpose(2, 3) / keys.shape[3] ** 0.5
    return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(dim=3)


def on_picture(visual: VisualTokens, scores: Tensor) -> Tensor:
    """What the patches of all tiles of one picture weigh, on one grid over the picture.

    Args:
        scores: float[N, S], not negative, one of each token of each tile; of those in front of the patches and of
            padding, nothing is taken.

    Returns:
        float[h, w], summing to 1, of cells as large as the smallest patches. A patch that lies in several cells is
        shared among them by area, and what lies in the padding of a tile, outside the picture, is dropped.
    """
    (plan,) = visual.plans
    finest = [(rows / _height(tile), columns / _width(tile)) for tile, (rows, columns) in _placed(plan, visual)]
    height, width = (max(1, round(max(sizes))) for sizes in zip(*finest, strict=True))
    heat = torch.zeros(height, width, dtype=torch.float64)
    for row, (tile, (rows, columns)) in zip(scores, _placed(plan, visual), strict=True):
        left, top, right, bottom = _box(tile)
        patches = row[visual.extra : visual.extra + rows * columns].double().view(rows, columns)
        heat += _shares(top, bottom, rows, height).T @ patches @ _shares(left, right, columns, width)
    total = heat.sum()
    return (heat / total if total > 0 else torch.full_like(heat, 1 / heat.numel())).float()


def _placed(plan: Plan, visual: VisualTokens) -> list[tuple[Tile, tuple[int, int]]]:
    return list(zip(plan.tiles, visual.grids, strict=True))


def _shares(start: float, stop: float, parts: int, cells: int) -> Tensor:
    """Which share of each of the equal `parts` of [start, stop] lies in each of the `cells` of [0, 1].

    Returns:
        float64[parts, cells].
    """
    edges = torch.linspace(start, stop, parts + 1, dtype=torch.float64)
    walls = torch.linspace(0, 1, cells + 1, dtype=torch.float64)
    common = torch.minimum(edges[1:, None], walls[1:]) - torch.maximum(edges[:-1, None], walls[:-1])
    return common.clamp(min=0) * parts / (stop - start)


def _box(tile: Tile) -> Box:
    """The part of the picture that a tile shows."""
    (width, height), (x, y) = tile.content, tile.offset
    left, top, right, bottom = tile.box
    return (left - x) / width, (top - y) / height, (right - x) / width, (bottom - y) / height


def _width(tile: Tile) -> float:
    left, _, right, _ = _box(tile)
    return right - left


def _height(tile: Tile) -> float:
    _, top, _, bottom = _box(tile)
    return bottom - top


def _see(model: VisionLanguageModel | ImageTextModel, image: Image.Image) -> VisualTokens:
    try:
        return model.frontend(model.frontend.tiles([image]))
    except BadSample as bad:
        raise UsageError(f"this picture cannot be read ({bad}); give another one") from bad


@contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    """Without dropout, and every part in its own mode again afterwards."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
