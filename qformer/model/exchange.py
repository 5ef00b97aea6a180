"""The global batch of stage one: what W processes tell each other so that they train like one (BLIP-2, section 3.2).

Embeddings, ids of texts and of images go to everybody: little. Image tokens go only to who drew the image as a hard
negative: the encoder's own, before the LayerNorm, which are about a sixth of the keys and values made of them. Where
the encoder is frozen they carry no gradient; else it flows back to the process that owns the image.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from qformer import distributed
from qformer.losses import same_image
from qformer.types import Tokens, VisualTokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qformer.types import Plan


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
        """Map numbers of texts in the global batch to their rows in `tokens`: long[B] -> long[B]."""
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


def fetch_images(encoded: VisualTokens, wanted: Tensor, planned: bool = False) -> tuple[VisualTokens, Tensor]:
    """The images of other processes among those wanted, each sent once however often it was drawn.

    Args:
        encoded: the B images of this process.
        wanted: long[B], numbers in the global batch.
        planned: send their plans too, for a Q-Former that reads where a tile stands.

    Returns:
        R images, tokens and numbers of tiles alone unless `planned`, and long[B]: where in [own B images; those R] each
        wanted one stands.
    """
    world, rank, count = distributed.world(), distributed.rank(), len(encoded)
    asked = distributed.gather(wanted).view(world, -1).tolist()
    needs = [
        [sorted({i % count for i in drawn if i // count == owner != process}) for owner in range(world)]
        for process, drawn in enumerate(asked)
    ]  # process -> owner -> images of that owner
    lengths = _tile_lengths(encoded)  # (W, B, most tiles)

    def tokens(owner: int, images: list[int]) -> int:
        return int(lengths[owner, images].sum())

    given = encoded.select([image for process in range(world) for image in needs[process][rank]])
    send = [tokens(rank, needs[process][rank]) for process in range(world)]
    receive = [tokens(owner, needs[rank][owner]) for owner in range(world)]
    packed = distributed.exchange(given.packed, send, receive)

    taken = [(owner, image) for owner in range(world) for image in needs[rank][owner]]
    tiles = [[n for n in lengths[owner, image].tolist() if n] for owner, image in taken]
    place = {owner * count + image: count + number for number, (owner, image) in enumerate(taken)}
    places = torch.tensor([place.get(i, i % count) for i in asked[rank]], device=wanted.device)
    counts, rows = [len(own) for own in tiles], [n for own in tiles for n in own]
    grids, plans = _geometry(encoded, {i for own in needs for i in own[rank]}, taken) if planned else ([], [])
    return VisualTokens.unpack(packed, rows, grids, encoded.extra, plans, encoded.per_patch, counts), places


def _geometry(
    encoded: VisualTokens, asked: set[int], taken: Sequence[tuple[int, int]]
) -> tuple[list[tuple[int, int]], list[Plan]]:
    """Grids of the tiles, and plans, of the images (process, number) that are taken; `asked` are those of others."""
    chosen = sorted(asked)
    told = [(own.grids, own.plans[0]) for own in (encoded.select([image]) for image in chosen)]
    every = distributed.gather_objects(dict(zip(chosen, told, strict=True)))
    found = [every[owner][image] for owner, image in taken]
    return [grid for grids, _ in found for grid in grids], [plan for _, plan in found]


def _tile_lengths(encoded: VisualTokens) -> Tensor:
    """Tokens of every tile of every image of all processes, long[W, B, most tiles], 0 where there is no tile.

    On the CPU.
    """
    (most,) = distributed.largest(max(encoded.counts), device=encoded.device)
    table, lengths = torch.zeros(len(encoded), most, dtype=torch.long), iter(encoded.lengths)
    for image, tiles in enumerate(encoded.counts):
        table[image, :tiles] = torch.tensor(list(islice(lengths, tiles)))
    return distributed.gather(table.to(encoded.device)).view(distributed.world(), len(encoded), most).cpu()
