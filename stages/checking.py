"""What `qformer.config` leaves open: the options of what a configuration names, rates that rise, texts without words.

Commands that are given a configuration check it here before they open weights or data. One that is read from a
checkpoint is not checked: only what is built of it counts, and old ones load as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qformer import lookup, resolution, vision
from qformer.data import sources
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qformer.config import Choice, Config, TrainConfig

#: What a tower can be trained on beside the sources of all stages.
OF_TOWERS: dict[str, dict[str, Any]] = {
    "vision": {"phrases": "qformer.data.phrases:Phrases"},
    "language": {"stories": "qformer.data.stories:Stories"},
}

SHORTEST = 3  # tokens of a text with a word


def check(config: Config, trusted: Callable[[Choice], bool] = lambda _: True) -> Config:
    """The configuration, if what it names takes the options that it gives.

    Args:
        trusted: whether a `module:Class` that a choice names may be imported; where not, it is refused by its name.

    Raises:
        UsageError: with the path of the first key that is wrong.
    """
    data, own = config.data, OF_TOWERS.get(config.stage, {})
    for where, choice in (
        ("vision", config.vision),
        ("resolution", config.resolution),
        ("data.train", data.train),
        ("data.validation", data.validation),
    ):
        if choice is not None and not trusted(choice):
            _refuse_strangers(choice, where)
    if config.stage == "stage2" and config.init is not None:  # options that are left out are taken from there
        lookup.check(vision.ENCODERS, config.vision.name, config.vision.options, "vision", complete=False)
    else:
        vision.check(config.vision.name, **config.vision.options)
    resolution.build(config.resolution.name, **config.resolution.options)
    table = own if data.train.name in own else sources.SOURCES
    sources.check(data.train.name, data.train.options, "data.train", table)
    if data.validation is not None and data.train.name == "phrases":
        sources.check("scenes", data.validation.options, "data.validation")  # a ViT is probed on scenes
    elif data.validation is not None:
        sources.check(data.validation.name, data.validation.options, "data.validation", table)
    _check_rates(config.train)
    for key, section in (("text", config.text), ("question", config.question)):
        if section is not None and section.max_tokens < SHORTEST:
            raise UsageError(
                f"{key}.max_tokens {section.max_tokens} leaves no room for a word between [CLS] and [SEP]; "
                f"give at least {SHORTEST}"
            )
    return config


def _refuse_strangers(choice: Choice, where: str) -> None:
    """Name what would be imported: by the choice itself, or by a source that it mixes."""

    def names(name: Any, options: dict[str, Any]) -> Iterator[str]:
        if isinstance(name, str) and ":" in name:
            yield name
        parts = options.get("sources")
        for part in parts if isinstance(parts, list) else ():
            if isinstance(part, dict):
                yield from names(part.get("name"), part)

    for name in names(choice.name, choice.options):
        raise UsageError(f"{where} names '{name}', code that is imported for the one who typed it only; leave it out")


def _check_rates(train: TrainConfig) -> None:
    """The learning rate starts and ends below its peak: one that is lowered alone would be passed otherwise."""
    for key, rate in (("min_lr", train.min_lr), ("warmup_lr", train.warmup_lr if train.warmup else 0)):
        if rate > train.lr:
            raise UsageError(f"train.{key} {rate:g} is above train.lr {train.lr:g}, its peak; lower train.{key}, too")
