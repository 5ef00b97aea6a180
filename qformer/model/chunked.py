"""Stage one on batches of any size in the memory of a few pairs, with the same losses and gradients: gradient caching.

ITC needs the embeddings of the whole batch but not the activations behind them (GradCache, arXiv:2101.06983). Pass 1
reads the batch chunk by chunk without gradient and keeps embeddings, random states and the encoder's tokens. The ITC of
them all gives the gradient of every embedding and the whole gradient of the temperature; negatives are drawn there.
Pass 2 reads each chunk again, now with gradient and with the dropout of pass 1, and goes back from the gradients of its
embeddings, its rows of ITM and its tokens of ITG at once. A trained image encoder needs pass 3: pass 2 ends at its
tokens, since those of one image serve as a negative in several chunks, and processes.

What still grows with the batch: pixels, the encoder's tokens (where it is trained their gradients too), embeddings and
similarities, float[B, N]. Chunks of one process are its own affair: several processes work as without.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qformer import distributed
from qformer.model.exchange import GlobalBatch, fetch_images, gather_batch, mean_count
from qformer.model.image_text import target_places, trim
from qformer.types import Batch, Tokens, VisualTokens

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from qformer.model.image_text import ImageTextModel


@dataclass
class Chunk:
    """Some pairs of the batch, and what pass 1 leaves for the others.

    Attributes:
        rows: which pairs. span: which of all image tokens are theirs.
        tokens, targets: their texts, no longer than they need, and what of them ITG predicts.
        encoded: their images before the LayerNorm.
        before_encoding, before_reading: random states.
        image, valid, text: the ITC embeddings float[b, V, P], bool[b, V] or None, float[b, P], in fp32.
    """

    rows: slice
    span: slice
    tokens: Tokens
    targets: Tensor
    encoded: VisualTokens
    before_encoding: list[Tensor]
    before_reading: list[Tensor]
    image: Tensor
    valid: Tensor | None
    text: Tensor


@dataclass
class StepContext:
    """Context of the forward and backward passes; see `chunked_step`."""

    scale: Callable[[Tensor], Tensor]
    autocast: Callable[[], AbstractContextManager[Any]]


def chunked_step(
    model: ImageTextModel,
    batch: Batch,
    chunk: int,
    scale: Callable[[Tensor], Tensor] = lambda loss: loss,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, Tensor]:
    """The losses of `model(batch)`, without gradient: that is already added to the gradients of the parameters.

    Those of several processes are still to be averaged (`distributed.average_gradients`).

    Args:
        chunk: pairs that pass the model at a time.
        scale: what is done to a loss before it goes backward: a gradient scaler's factor, division by accumulation.
        autocast: the context of forward passes.
    """
    how, device = StepContext(scale, autocast), model.device
    texts = model.tokenize(batch.text)
    number = len(target_places(texts))
    shared = mean_count(number, device) if batch.targets is None else batch.targets
    count = torch.tensor(max(float(number), 1.0), device=device) if shared is None else shared.to(device)

    chunks = _read_all(model, batch, texts, chunk, how)
    image, valid, text = _join_embeddings(chunks)
    everyone = gather_batch(image, text, valid, texts.to(device), batch.image_id, model.config.gather_grad == "full")
    itc = _contrastive(model, (image, text, valid), everyone, chunks, how)
    with autocast():
        image_for_text, text_for_image = batch.negatives or model.mine_negatives(image, text, valid, everyone, chunk)
    texts_drawn = everyone.text_place(text_for_image.to(device))
    images = Images(model, chunks, image_for_text.to(device))

    found = {"itc": itc}
    fresh = _random_state(device)  # ITM draws on from here, as it would without chunks
    for part in chunks:
        _set_random_state(part.before_reading, device)
        own, drawn, places = images.of(part)
        with autocast():
            keys_values, own_image, _, own_text, text_rows = model.read(own, part.tokens)
            _set_random_state(fresh, device)
            some = {}
            if model.config.itm:
                if len(drawn):
                    keys_values = keys_values.join(model.keys_values(drawn)[1])
                pairs, text_places = _pairs(everyone.tokens, part.rows, texts_drawn[part.rows])
                legal = ~everyone.same[part.rows].all(dim=1)
                loss = model.matching_loss(keys_values, pairs, (places, text_places), legal)
                some["itm"] = loss * _share(part, batch)
            if text_rows is not None:
                some["itg"] = model.captioning_loss(text_rows, part.tokens, part.targets, count)
        fresh = _random_state(device)
        assert image.grad is not None and text.grad is not None  # noqa: PT018
        torch.autograd.backward(
            [own_image.float(), own_text.float(), *([scale(model.weigh(some))] if some else [])],
            [image.grad[part.rows, : own_image.shape[1]], text.grad[part.rows], *([None] if some else [])],
        )
        images.collect(part, own, drawn)
        found |= {name: found.get(name, 0) + loss.detach() for name, loss in some.items()}
    images.backward(model, batch, chunks, how)
    _set_random_state(fresh, device)
    return {"loss": model.weigh(found), **found}


@torch.no_grad()
def _read_all(model: ImageTextModel, batch: Batch, texts: Tokens, chunk: int, how: StepContext) -> list[Chunk]:
    """Pass 1. ITG's text is read too, although only the queries are kept: dropout has to fall on the same places."""
    found, device, seen = [], model.device, 0
    for start in range(0, len(batch), chunk):
        rows = slice(start, min(start + chunk, len(batch)))
        some = trim(Tokens(texts.ids[rows], texts.mask[rows]))  # on the CPU, where no device waits for the length
        tokens, targets = some.to(device), target_places(some).to(device)
        before_encoding = _random_state(device)
        with how.autocast():
            encoded = model.frontend.encode_tiles(batch.tiles[rows])
            before_reading = _random_state(device)
            _, image, valid, text, _ = model.read(encoded, tokens)
        span = slice(seen, seen + sum(encoded.lengths))
        seen = span.stop
        states = before_encoding, before_reading
        found.append(Chunk(rows, span, tokens, targets, encoded, *states, image.float(), valid, text.float()))
    return found


def _join_embeddings(chunks: list[Chunk]) -> tuple[Tensor, Tensor | None, Tensor]:
    """Those of all chunks as leaves: float[B, V, P], bool[B, V] or None, float[B, P]."""
    most = max(part.image.shape[1] for part in chunks)
    image = torch.cat([F.pad(part.image, (0, 0, 0, most - part.image.shape[1])) for part in chunks])
    text = torch.cat([part.text for part in chunks])
    valid = None
    if any(part.valid is not None or part.image.shape[1] < most for part in chunks):
        masks = [torch.ones_like(p.image[..., 0], dtype=torch.bool) if p.valid is None else p.valid for p in chunks]
        valid = torch.cat([F.pad(mask, (0, most - mask.shape[1])) for mask in masks])
    return image.requires_grad_(), valid, text.requires_grad_()


def _contrastive(
    model: ImageTextModel,
    embeddings: tuple[Tensor, Tensor, Tensor | None],
    everyone: GlobalBatch,
    chunks: list[Chunk],
    how: StepContext,
) -> Tensor:
    """ITC and its backward pass, a chunk of rows at a time against all columns: [b, Q, N] numbers, not [B, Q, N]."""
    image, text, valid = embeddings
    full = everyone.image.requires_grad
    columns = [column.detach().requires_grad_(full) for column in (everyone.image, everyone.text)]
    total = torch.zeros((), device=image.device)
    for part in chunks:
        rows = part.rows
        some = replace(everyone, image=columns[0], text=columns[1], same=everyone.same[rows])
        with how.autocast():
            loss = model.contrastive_loss(image[rows], text[rows], None if valid is None else valid[rows], some)
        loss = loss * (rows.stop - rows.start) / len(text)
        how.scale(loss).backward()
        total = total + loss.detach()
    if full:
        torch.autograd.backward([everyone.image, everyone.text], [column.grad for column in columns])
    return total


class Images:
    """The encoder's tokens of own images and of others' drawn as negatives; where it is trained their gradients too.

    Own images come first, in the order of the batch.
    """

    def __init__(self, model: ImageTextModel, chunks: list[Chunk], wanted: Tensor) -> None:
        """`wanted`: long[B], the image drawn for each own text, numbered in the global batch."""
        trained = not model.frontend.encoder.frozen
        joined = VisualTokens.join([part.encoded for part in chunks])
        self.own = joined.repack(joined.packed.requires_grad_(trained))
        for part in chunks:  # one copy is enough
            part.encoded = part.encoded.repack(self.own.packed.detach()[part.span])
        self.all, self.others = self.own, None
        if distributed.world() > 1:
            self.others, wanted = fetch_images(self.own, wanted, model.qformer.place_tokens is not None)
            self.all = VisualTokens.join([self.own, self.others])
        self.places = wanted.tolist()
        packed = self.own.packed
        self.grad = packed.new_zeros(sum(self.all.lengths), packed.shape[1]) if trained else None

    def of(self, part: Chunk) -> tuple[VisualTokens, VisualTokens, Tensor]:
        """Images of a chunk, those drawn for its texts that are not among them, and where each drawn one stands."""
        drawn, start = self._drawn(part), part.rows.start
        place = {i: part.rows.stop - start + number for number, i in enumerate(drawn)}
        places = [place.get(i, i - start) for i in self.places[part.rows]]
        own, others = part.encoded, self.all.select(drawn)
        if self.grad is not None:
            own, others = (some.repack(some.packed.detach().requires_grad_()) for some in (own, others))
        return own, others, torch.tensor(places, device=self.own.device)

    def _drawn(self, part: Chunk) -> list[int]:
        """Each once, in the order in which they were drawn."""
        return list(dict.fromkeys(i for i in self.places[part.rows] if not part.rows.start <= i < part.rows.stop))

    def collect(self, part: Chunk, own: VisualTokens, drawn: VisualTokens) -> None:
        """Take up the gradients that a chunk's backward pass left."""
        if self.grad is None:
            return
        assert own.packed.grad is not None
        self.grad[part.span] += own.packed.grad
        if drawn.packed.grad is not None:
            self.grad.index_add_(0, self.all.places(self._drawn(part)), drawn.packed.grad)

    def backward(self, model: ImageTextModel, batch: Batch, chunks: list[Chunk], how: StepContext) -> None:
        """Pass 3, where the encoder is trained: gradients return to the images' owners and go through the encoder."""
        if self.grad is None:
            return
        count = len(self.own.packed)
        grad = self.grad[:count]
        if self.others is not None:
            self.others.packed.backward(self.grad[count:])
            assert self.own.packed.grad is not None
            grad += self.own.packed.grad
        for part in chunks:
            _set_random_state(part.before_encoding, model.device)
            with how.autocast():
                encoded = model.frontend.encode_tiles(batch.tiles[part.rows])
            encoded.packed.backward(grad[part.span])


def _pairs(tokens: Tokens, rows: slice, drawn: Tensor) -> tuple[Tokens, Tensor]:
    """The texts of a chunk and behind them the text drawn for each of its images, and where the latter are."""
    own = torch.arange(rows.start, rows.stop, device=drawn.device)
    index = torch.cat([own, drawn])
    return trim(Tokens(tokens.ids[index], tokens.mask[index])), torch.arange(len(own), len(index), device=drawn.device)


def _share(part: Chunk, batch: Batch) -> float:
    return (part.rows.stop - part.rows.start) / len(batch)


def _random_state(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_random_state(state: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)
