"""Image encoders by name. Each table entry is a dataclass of options whose `build()` makes the encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qformer import lookup

if TYPE_CHECKING:
    from qformer.fields import Choice
    from qformer.vision.base import VisionEncoder

ENCODERS: dict[str, Any] = {
    "clip": "qformer.vision.options:ClipConfig",
    "eva": "qformer.vision.options:EvaConfig",
    "hf": "qformer.vision.options:HFVisionConfig",
}


def check(name: str, **options: Any) -> Any:
    """The options of an encoder, as the dataclass that they are of; no weights are read.

    Raises:
        UsageError: unknown name or option, or a value that cannot be.
    """
    return lookup.build(ENCODERS, name, options, "vision")


def build(name: str, **options: Any) -> VisionEncoder:
    """An encoder of the table, or `module:Class` of a config dataclass of your own with a `build()` method.

    Raises:
        UsageError: unknown name or option, a value of the wrong type, or weights that do not fit.
    """
    return lookup.build(ENCODERS, name, options, "vision").build()


def options_of(choice: Choice) -> Any:
    """The dataclass of options of the encoder that a configuration names.

    Raises:
        UsageError: as of `build`; or (`Untrusted`) a class that somebody else's file names.
    """
    with choice.building():
        return lookup.build(ENCODERS, choice.name, choice.options, "vision")
