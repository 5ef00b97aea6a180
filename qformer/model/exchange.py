"""The global batch of stage one: what W processes tell each other so that they train like one (BLIP-2, section 3.2).

Embeddings, ids of texts and of images go to everybody: little. Image tokens go only to who drew the image as a hard
negative: the encoder's own, before the LayerNorm, which are about a sixth of the keys and values made of them. Where
the encoder is frozen they carry no gradient; else it flows back to the process that owns the image.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from qformer import distributed
from qformer.model.frontend import Encoded
from qformer.types import Tokens, same_image

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass
class GlobalBatch:
    """The N = W * B pairs of all processes; in one process its own.

    Attributes:
        image: float[N, V, P]. text: float[N, P]. valid: bool[N, V], or None where every row exists.
        tokens: N texts, *those of this process first*, then those of the next rank and so on around.
        same: bool[B, N], which image of the batch is that of each own row.
    """

    image: Tensor
    text: Tensor
    valid: Tensor | None
    tokens: Tokens
    same: Tensor

    def text_place(self, texts: Tensor) -> Tensor:
        """Where in `tokens` the texts numbered in the global batch are: long[B] -> long[B]."""
        return (texts - distributed.rank() * len(self.same)) % len(self.tokens)


def gather_batch(
    image: Tensor,
    text: Tensor,
    valid: Tensor | None,
    tokens: Tokens,
    ids: Sequence[str | int] | Tensor | None,
    grad: bool,
) -> GlobalBatch:
    """Embeddings float[B, V, P] and float[B, P], texts and image ids of all processes, which have equal B.

    With `grad` the gradient of what others compute with an embedding comes back to it (`gather_grad: full`).
    """
    device = image.device
    if distributed.world() == 1:
        same = same_image(ids, len(text)).to(device)
        return GlobalBatch(distributed.gather(image, grad), distributed.gather(text, grad), valid, tokens, same)
    rows, fewest, masked, length = distributed.largest(
        image.shape[1], -image.shape[1], valid is not None, tokens.ids.shape[1], device=device
    )
    all_valid = None
    if masked or rows != -fewest:
        own = image.new_ones(image.shape[:2], dtype=torch.bool) if valid is None else valid
        all_valid = distributed.gather(F.pad(own, (0, rows - own.shape[1])))
        image = F.pad(image, (0, 0, 0, rows - image.shape[1]))
    shift = -distributed.rank() * len(text)
    words, mask = (F.pad(part, (0, length - part.shape[1])) for part in (tokens.ids, tokens.mask))
    every = Tokens(distributed.gather(words).roll(shift, 0), distributed.gather(mask).roll(shift, 0))
    codes = _codes(ids, len(text)).to(device)
    same = codes[:, None] == distributed.gather(codes)[None, :]
    return GlobalBatch(distributed.gather(image, grad), distributed.gather(text, grad), all_valid, every, same)


def mean_count(count: int, device: torch.device) -> Tensor | None:
    """Target tokens of a process, on average, by which each divides its own sum; None in one, which takes the mean.

    The mean over processes of the quotients is the sum of all losses over all targets; the mean of means is not.
    """
    if distributed.world() == 1:
        return None
    return distributed.total(torch.tensor(float(count), device=device)).clamp(min=1) / distributed.world()


def _codes(ids: Sequence[str | int] | Tensor | None, count: int) -> Tensor:
    """A number for each image id, equal on all processes for equal ids: long[B]."""
    if ids is None:
        return torch.arange(count) + distributed.rank() * count
    texts = [i if isinstance(i, str) else f"number {int(i)}" for i in ids]
    digests = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return torch.tensor([int.from_bytes(digest, signed=True) for digest in digests])


def fetch_images(encoded: Encoded, wanted: Tensor) -> tuple[Encoded, Tensor]:
    """The images of other processes among those wanted, each sent once however often it was drawn.

    Args:
        encoded: the B images of this process.
        wanted: long[B], numbers in the global batch.

    Returns:
        R images, and long[B]: where in [own B images; those R] each wanted one stands.
    """
    world, rank, count = distributed.world(), distributed.rank(), len(encoded)
    asked = distributed.gather(wanted).view(world, -1).tolist()
    needs = [
        [sorted({i % count for i in drawn if i // count == owner != process}) for owner in range(world)]
        for process, drawn in enumerate(asked)
    ]  # process -> owner -> images of that owner
    lengths, longest = _tile_lengths(encoded)  # (W, B, most tiles)
    counts = (lengths > 0).sum(dim=2)

    def tiles(owner: int, images: list[int]) -> int:
        return int(counts[owner, images].sum())

    given = encoded.select([image for process in range(world) for image in needs[process][rank]])
    rows = F.pad(given.features, (0, 0, 0, longest - given.features.shape[1]))
    send = [tiles(rank, needs[process][rank]) for process in range(world)]
    receive = [tiles(owner, needs[rank][owner]) for owner in range(world)]
    features = distributed.exchange(rows, send, receive)

    taken = [(owner, image) for owner in range(world) for image in needs[rank][owner]]
    tile_lengths = torch.tensor([n for owner, image in taken for n in lengths[owner, image].tolist() if n])
    mask = None
    if bool((lengths[lengths > 0] < longest).any()):
        mask = (torch.arange(longest) < tile_lengths[:, None]).to(features.device)
    place = {owner * count + image: count + number for number, (owner, image) in enumerate(taken)}
    places = torch.tensor([place.get(i, i % count) for i in asked[rank]], device=wanted.device)
    return Encoded(features, mask, [int(counts[owner, image]) for owner, image in taken]), places


def _tile_lengths(encoded: Encoded) -> tuple[Tensor, int]:
    """Tokens of every tile of every image of all processes, long[W, B, most tiles], 0 where there is no tile; the most.

    On the CPU.
    """
    device, longest = encoded.features.device, encoded.features.shape[1]
    most, longest = distributed.largest(max(encoded.counts), longest, device=device)
    mask = encoded.mask
    own = [encoded.features.shape[1]] * len(encoded.features) if mask is None else mask.sum(dim=1).tolist()
    table = torch.zeros(len(encoded), most, dtype=torch.long)
    start = 0
    for image, tiles in enumerate(encoded.counts):
        table[image, :tiles] = torch.tensor(own[start : start + tiles])
        start += tiles
    return distributed.gather(table.to(device)).view(distributed.world(), len(encoded), most).cpu(), longest
