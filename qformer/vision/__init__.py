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
    "mof": "qformer.vision.mof:MofConfig",
    "oryx": "qformer.vision.options:OryxConfig",
    "qwen2vl": "qformer.vision.options:Qwen2VLConfig",
}


def check(name: str, **options: Any) -> Any:
    """Check the options of an encoder and return them as its dataclass; no weights are read.

    Raises:
        UsageError: an unknown name or option, or a value that is not valid.
    """
    return lookup.build(ENCODERS, name, options, "vision")


def build(name: str, **options: Any) -> VisionEncoder:
    """Build an encoder of the table, or of your own dataclass of options, `module:Class`, with a `build()` method.

    Raises:
        UsageError: an unknown name or option, a value of the wrong type, or weights that do not fit.
    """
    return lookup.build(ENCODERS, name, options, "vision").build()


def options_of(choice: Choice) -> Any:
    """Make the dataclass of options of the encoder that a configuration names.

    Raises:
        UsageError: see `build`; or (`Untrusted`) somebody else's file names a class.
    """
    with choice.building():
        return lookup.build(ENCODERS, choice.name, choice.options, "vision")
