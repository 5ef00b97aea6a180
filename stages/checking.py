"""Checks that `qformer.config` cannot make: options of the named parts, rates above their peak, lengths without room.

Commands check a user's configuration here before they open weights or data. The configuration of a checkpoint is not
checked: only the parts built from it matter, and old checkpoints must keep loading.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from qformer import lookup, resolution, vision
from qformer.data import sources
from qformer.schema import POSITIONS
from qformer.types import UsageError

if TYPE_CHECKING:
    from qformer.schema import Config, TrainConfig

#: Sources that only towers are trained on, in addition to those of all stages.
OF_TOWERS: dict[str, dict[str, Any]] = {
    "vision": {"phrases": "qformer.scenes.phrases:Phrases", "views": "qformer.stages.towers.canvas_views:Views"},
    "language": {
        "stories": "qformer.scenes.stories:Stories",
        "canvas_stories": "qformer.canvases.stories:CanvasStories",
    },
}

SHORTEST = 3  # tokens: begin, one word, end


def check(config: Config) -> Config:
    """Check that the parts a configuration names take the options it gives them; returns the configuration.

    Raises:
        UsageError: naming the first wrong key; or (`Untrusted`) the class that somebody else's file would import.
    """
    if config.stage == "stage2" and config.init is not None:  # options that are left out come from init
        with config.vision.building():
            lookup.check(vision.ENCODERS, config.vision.name, config.vision.options, "vision", complete=False)
    else:
        vision.options_of(config.vision)
    resolution.chosen(config.resolution)
    if not config.has_qformer:  # whose options are sections of the configuration
        from qformer.model import connectors  # here alone: torch comes along

        with config.connector.building():
            complete = config.init is None  # options that are left out come from init
            connectors.check(config.connector.name, config.connector.options, complete)
    own, train, validation = OF_TOWERS.get(config.stage, {}), config.data.train, config.data.validation
    table = own if train.name in own else sources.SOURCES
    if train.name != sources.ELSEWHERE:  # which `sources.build` refuses, where data are needed
        with train.building():
            sources.check(train.name, train.options, "data.train", table)
    if validation is not None:
        probed = train.name == "phrases"  # a ViT is probed on scenes
        if probed and validation.name not in ("scenes", "phrases"):
            raise UsageError(
                f"data.validation.name is '{validation.name}', but a ViT that learns phrases is probed on drawn "
                "scenes; use scenes"
            )
        name, known = ("scenes", sources.SOURCES) if probed else (validation.name, table)
        with validation.building():
            sources.check(name, validation.options, "data.validation", known)
    _check_rates(config.train)
    _check_kept(config.train)
    _check_lengths(config)
    return config


def _check_lengths(config: Config) -> None:
    """Require room for one word and the tokens around it in every training text."""
    for key, section in (("text", config.text), ("question", config.question), ("backbone", config.backbone)):
        if section is not None and section.max_tokens < SHORTEST:
            raise UsageError(
                f"{key}.max_tokens {section.max_tokens} leaves no room for a word between the tokens around a text; "
                f"give at least {SHORTEST}"
            )
    tower = config.backbone
    if tower is not None and tower.max_tokens > (
        most := tower.positions or POSITIONS.get(tower.kind, tower.max_tokens)
    ):
        raise UsageError(
            f"backbone.max_tokens {tower.max_tokens} is more than the {most} positions of this {tower.kind}; lower it"
        )
    if config.llm is not None and config.llm.max_tokens < SHORTEST - 1:
        raise UsageError(
            f"llm.max_tokens {config.llm.max_tokens} leaves no room for a word before the token that ends a text; "
            f"give at least {SHORTEST - 1}"
        )


def _check_kept(train: TrainConfig) -> None:
    """Require that a checkpoint to keep for good is written at all: those of `save_every` are.

    A run that is shorter than `keep_every`, such as a trial of a long one, keeps nothing for good and may.
    """
    if not train.keep_every or train.steps < train.keep_every:
        return
    if not train.save_every or math.lcm(train.keep_every, train.save_every) > train.steps:
        raise UsageError(
            f"train.keep_every {train.keep_every} keeps nothing, since checkpoints are written at multiples of "
            f"train.save_every {train.save_every} up to step {train.steps}; give a multiple of that"
        )


def _check_rates(train: TrainConfig) -> None:
    """Require that the learning rate starts and ends below its peak, which a lowered `lr` can violate."""
    for key, rate in (("min_lr", train.min_lr), ("warmup_lr", train.warmup_lr if train.warmup else 0)):
        if rate > train.lr:
            raise UsageError(f"train.{key} {rate:g} is above train.lr {train.lr:g}, its peak; lower train.{key} too")
