"""Stage one: train the Q-Former with ITC, ITM and ITG against a frozen image encoder (BLIP-2, section 3.2)."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from qformer import resolution
from qformer.checkpoints import folder as checkpoint
from qformer.checkpoints.weights import start_from
from qformer.data import sources
from qformer.data.loader import Batches
from qformer.data.texts import answers_of
from qformer.evaluation import retrieval
from qformer.model.assembly import build_image_text
from qformer.stages import linear
from qformer.stages.features import prepare, validation_data
from qformer.stages.loop import fit
from qformer.types import Batch, Tiles, UsageError

if TYPE_CHECKING:
    from torch import nn

    from qformer.data.held_out import HeldOut
    from qformer.model.frontend import FrontEnd
    from qformer.model.image_text import ImageTextModel
    from qformer.schema import Config


MOST_BYTES = 1 << 30  # of held-out tokens in memory; with more, images are encoded at each validation


def train(config: Config) -> Path:
    """Run or resume stage one and return the last checkpoint.

    Raises:
        UsageError: the data, the towers or `init` cannot be used.
    """
    source = sources.for_run(config.data.train, config.run)
    strategy = resolution.chosen(config.resolution, config.limits)
    held = validation_data(config)
    encoder, store, held = prepare(config, source, strategy, held)
    model, config = build_image_text(config, encoder=encoder)
    if config.text.max_tokens > config.qformer.max_positions:
        raise UsageError(
            f"text.max_tokens is {config.text.max_tokens}, but the Q-Former has only {config.qformer.max_positions} "
            "positions; lower it"
        )
    if checkpoint.newest(Path(config.run)) is None:
        if config.init is not None:
            start_from(model, checkpoint.read(config.init))
        elif config.start == "warm" and store is not None:
            linear.start_warm(model, source, store)
    batches = Batches(source, strategy, config.data, config.seed, store)
    evaluate = None if held is None else Validation(held, config.train.rerank if model.can_match else 0)
    begin = None if held is None or store is None else partial(linear.announce, held=held, source=source, store=store)
    return fit(model, batches, config, evaluate, model.tokenizer.save_pretrained, begin)


class Validation:
    """Held-out losses on the first caption of each image, and retrieval over all captions."""

    def __init__(self, held: HeldOut, k: int) -> None:
        self.held = held
        self.k = k

    def __call__(self, model: nn.Module, step: int) -> dict[str, float]:
        bridge = cast("ImageTextModel", model)
        self.held = keep_tokens(self.held, bridge.frontend)
        measured = mean_losses(bridge, self.held)
        if equal := retrieval.count_equal(self.held.captions):
            measured["equal_captions"] = equal
        for name, values in retrieval.measure(bridge, self.held.groups, self.held.captions, self.k).items():
            measured |= {f"{name}_{key}": value for key, value in values.items()}
        return measured


@torch.no_grad()
def keep_tokens(held: HeldOut, frontend: FrontEnd) -> HeldOut:
    """Encode the held-out images once if their encoder is frozen; return the data with the tokens in place of pixels.

    Data whose tokens would take more than `MOST_BYTES` are returned as they are, like those that have tokens already.
    """
    trained = any(parameter.requires_grad for parameter in frontend.encoder.parameters())
    if trained or held.groups[0].tokens is not None:
        return held
    groups, used = [], 0
    for tiles in held.groups:
        rows = [row.cpu().clone() for row in frontend.encode_tiles(tiles).rows]
        used += sum(row.nbytes for row in rows)
        if used > MOST_BYTES:
            return held
        groups.append(Tiles([], tiles.plans, rows))
    return dataclasses.replace(held, groups=groups)


def mean_losses(model: nn.Module, held: HeldOut) -> dict[str, float]:
    """Compute the losses on held-out data, averaged over images.

    Batches have the size of the training batches, so that ITC is comparable. The target of a question is its first
    answer.
    """
    total: dict[str, float] = {}
    start = 0
    for tiles in held.groups:
        stop = start + len(tiles)
        texts = [captions[0] for captions in held.captions[start:stop]]
        ids = [sample.image_id for sample in held.samples[start:stop]]
        cuts = [float(np.random.default_rng([0, number]).random()) for number in range(start, stop)]  # same each time
        batch = Batch(tiles, texts, ids, cuts=cuts)
        if held.asks:
            batch.question = held.questions(start, stop)
            batch.answer = [answers_of(sample)[0] for sample in held.samples[start:stop]]
        for name, value in model(batch).items():
            total[name] = total.get(name, 0.0) + value.item() * len(tiles) / len(held)
        start = stop
    return total
