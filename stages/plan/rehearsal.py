"""Training steps of an outlined model, as rank 0 of n processes would run them: memory, FLOPs, bytes received.

The real step runs, with the real exchange between processes. Only the tensors of the other processes are made up, with
the right size and no data, so a hundred thousand processes cost no more than two.
A large batch in chunks is extrapolated from smaller ones: the memory of each pass is a polynomial in the batch size
(similarities grow with its square), which three batch sizes determine.
"""

from __future__ import annotations

import math
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from qformer import compat, distributed
from qformer.model import chunked, image_text
from qformer.resolution.base import cut_all
from qformer.stages.plan import hardware
from qformer.stages.plan.ledger import AsOnGPU, Step, part_of, run_step
from qformer.stages.plan.outline import outline, words
from qformer.stages.recompute import recompute_layers
from qformer.types import Batch, Tiles, Tokens, VisualTokens

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from qformer.model.assembly import Bridge
    from qformer.schema import Config
    from qformer.vision.base import VisionEncoder

PICTURE = (640, 480)
CHUNKS = (2, 3, 4)  # chunks in the batches that are run


@dataclass
class Rehearsed(Step):
    """A step with the bytes that the process receives in one of its batches, by their content."""

    received: Counter[str]


@dataclass
class Subject:
    """An outlined model on a device, and the questions that a forecast asks about it."""

    config: Config
    model: Bridge
    mode: Any
    device: str
    gpus: int
    picture: tuple[int, int] = PICTURE
    _known: dict[int, Rehearsed] = field(default_factory=dict, init=False)

    @classmethod
    def of(cls, config: Config, device: str, gpus: int, picture: tuple[int, int] = PICTURE) -> Subject:
        """Outline the model of a configuration and prepare it as for training on pictures of (width, height)."""
        model, mode = outline(config, device)
        if config.train.gradient_checkpointing:
            recompute_layers(model, AsOnGPU if device == "cuda" else nullcontext)
        return cls(config, model, mode, device, gpus, picture)

    @property
    def encoder(self) -> VisionEncoder:
        return self.model.frontend.encoder

    @property
    def trained(self) -> int:
        """The number of trained parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    def with_train(self, **changes: int) -> Subject:
        """Copy the subject with other training options."""
        train = self.config.train.model_copy(update=changes)
        return replace(self, config=self.config.model_copy(update={"train": train}))

    def step(self, count: int) -> Rehearsed:
        """Run one step of `count` samples."""
        chunk = self.config.train.chunk
        if not chunk or count <= max(CHUNKS) * chunk:
            return self._run(count)
        return _extend({number * chunk: self._run(number * chunk) for number in CHUNKS}, count)

    def peak(self, count: int) -> int:
        """Compute the peak memory of a process in bytes, tensors and everything else."""
        tensors = self.step(count).peak
        return tensors + hardware.reserve(self.device, tensors)

    def tokens(self) -> int:
        """Count the tokens that the image encoder produces for one image."""
        tiles = self.batch(1).tiles.pixels
        return sum(self.encoder.extra + math.prod(self.encoder.grid(tile.shape[2], tile.shape[1])) for tile in tiles)

    def batch(self, count: int) -> Batch:
        """So many samples, of texts as long as may be."""
        width, height = self.picture
        cut = cut_all([torch.zeros(3, height, width, dtype=torch.uint8)], self.model.frontend.strategy)
        pixels: list[Tensor] = [self.mode.from_tensor(tile) for tile in cut.pixels]
        tiles = Tiles(pixels * count, cut.plans * count)
        if self.config.llm is not None and self.config.stage == "stage2":
            texts = [words(self.config.llm.max_tokens)] * count
            batch = Batch(tiles, texts)
            if self.config.question is not None:
                batch.question, batch.answer = [words(self.config.question.max_tokens)] * count, texts
            return batch
        shape = count, self.config.text.max_tokens
        batch = Batch(tiles, Tokens(torch.ones(shape, dtype=torch.long), torch.ones(shape, dtype=torch.bool)))
        if self.gpus > 1 or self.config.train.chunk:
            batch.negatives = (negatives(count, self.gpus, self.config.train.chunk),) * 2
        return batch

    def _run(self, count: int) -> Rehearsed:
        if count not in self._known:
            train, received = self.config.train, Counter[str]()
            with one_of(self.gpus, received, self.mode):
                step = run_step(self.model, self.batch(count), train, self.device)
            if train.fsdp and self.gpus > 1:
                received["frozen layers"] = self._spread(step)
            batches = min(train.accumulate, 2)
            each = Counter({what: size // batches for what, size in received.items()})
            self._known[count] = Rehearsed(step.moments, step.flops, each)
        return self._known[count]

    def _spread(self, step: Step) -> int:
        """Reduce the frozen layers to the share of one process, plus two whole layers: the running one and the next.

        Returns:
            The bytes that the process receives: layers of a frozen image encoder once, of a language model twice, as
            the backward pass needs them too.
        """
        sizes: dict[str, list[int]] = {}
        for name, layer in distributed.frozen_layers(self.model):
            sizes.setdefault(part_of(name), []).append(sum(parameter.nbytes for parameter in layer.parameters()))
        received = 0
        for part, layers in sizes.items():
            others = sum(layers) * (self.gpus - 1) // self.gpus
            passes = 1 if part == part_of("frontend.encoder") else 2
            received += others * passes * min(self.config.train.accumulate, 2)
            for held in step.moments.values():
                held["weights", part] -= others
                held["temporary", part] += 2 * max(layers)
        return received


def negatives(count: int, world: int, chunk: int) -> Tensor:
    """Choose hard negatives for rank 0 as if they were drawn uniformly from the global batch: its indices, long[B].

    Every process provides B / W of them. The number of different ones is the average for B uniform draws. Negatives
    from rank 0 itself are never in the same chunk.
    """
    others = max(world * count - 1, 1)
    different = max(round(count * (1 - (1 - 1 / others) ** count)), 1)
    row = torch.arange(count)
    owner = row % world
    drawn = owner * count + row // world % different
    return torch.where(owner == 0, (row + chunk) % count, drawn) if chunk else drawn


@contextmanager
def one_of(world: int, received: Counter[str], mode: Any) -> Iterator[None]:
    """Act as rank 0 of `world` processes that all do the same, and add up the bytes it receives; nothing is sent.

    Tensors of the other processes have a shape but no data (`mode`), so the number of processes costs nothing.
    """
    if world == 1:
        yield
        return
    blank = mode.from_tensor(torch.empty(0))

    def gather(rows: Tensor) -> Tensor:
        what = "embeddings" if rows.is_floating_point() else "texts and ids"
        received[what] += (world - 1) * rows.nbytes
        found = blank.new_empty((world, *rows.shape), dtype=rows.dtype)  # one per process, and then all in one
        return found.clone().flatten(0, 1)

    def exchange(rows: Tensor, _send: list[int], receive: list[int]) -> Tensor:
        what = "gradients of embeddings and image tokens" if compat.is_backward() else "tokens of drawn images"
        row = rows.element_size() * math.prod(rows.shape[1:])
        received[what] += row * (sum(receive) - receive[0])
        return rows.new_empty(sum(receive), *rows.shape[1:])

    pretended: dict[Any, dict[str, Any]] = {
        distributed: {
            "world": lambda: world,
            "rank": lambda: 0,
            "_gather": gather,
            "_exchange": exchange,
            "total": lambda values: values * world,
            "largest": lambda *numbers, **_: list(numbers),
        },
        image_text: {"fetch_images": fetch_images},
        chunked: {"fetch_images": fetch_images, "trim": lambda tokens: tokens},  # all have the maximal length
    }
    real = {module: {name: getattr(module, name) for name in names} for module, names in pretended.items()}
    try:
        for module, values in pretended.items():
            _set(module, values)
        yield
    finally:
        for module, values in real.items():
            _set(module, values)


def fetch_images(encoded: VisualTokens, wanted: Tensor, planned: bool = False) -> tuple[VisualTokens, Tensor]:
    """As `exchange.fetch_images`, without asking who wants what: the others ask of rank 0 as many as it asks of them.

    Args:
        encoded: the B images of rank 0; those of the others have as many tiles.
        wanted: long[B], indices in the global batch.
        planned: as there; plans are known here anyway.
    """
    count = len(encoded)
    distributed.gather(wanted)
    distributed.gather(torch.empty(count, max(encoded.counts), dtype=torch.long))  # the lengths of all tiles
    drawn = wanted.tolist()
    taken = sorted({image for image in drawn if image >= count})
    given = encoded.select([image % count for image in taken])
    sent = sum(given.lengths)
    packed = distributed.exchange(given.packed, [0, sent], [0, sent])
    place = {image: count + number for number, image in enumerate(taken)}
    places = torch.tensor([place.get(image, image % count) for image in drawn])
    return given.repack(packed), places


def _set(module: Any, values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(module, name, value)


def _extend(known: dict[int, Rehearsed], count: int) -> Rehearsed:
    """Extrapolate a step of `count` samples from those of three smaller batches."""
    counts, steps = list(known), list(known.values())

    def at(values: Sequence[Counter[Any]]) -> Counter[Any]:
        keys = {key for value in values for key in value}
        return Counter({key: round(polynomial(counts, [value[key] for value in values], count)) for key in keys})

    moments = {name: +at([step.moments[name] for step in steps]) for name in steps[0].moments}
    return Rehearsed(moments, at([step.flops for step in steps]), at([step.received for step in steps]))


def polynomial(places: list[int], values: list[int], place: int) -> float:
    """Evaluate the polynomial through these points (Lagrange) at another place."""
    total = 0.0
    for a, value in zip(places, values, strict=True):
        total += value * math.prod((place - b) / (a - b) for b in places if b != a)
    return total
