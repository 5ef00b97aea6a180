"""Resolution strategies by name: `build("fixed", size=224).plan(640, 480)`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qformer import lookup
from qformer.resolution.limits import Limited, guard

if TYPE_CHECKING:
    from qformer.fields import Choice
    from qformer.resolution.base import ResolutionStrategy
    from qformer.schema import LimitsConfig

__all__ = ["STRATEGIES", "build", "chosen", "guard"]

STRATEGIES: dict[str, Any] = {
    "fixed": "qformer.resolution.fixed:Fixed",
    "pad_square": "qformer.resolution.pad_square:PadSquare",
    "uhd": "qformer.resolution.uhd:Uhd",
    "internvl": "qformer.resolution.internvl:InternVL",
    "anyres": "qformer.resolution.anyres:AnyRes",
    "oryx": "qformer.resolution.oryx:Oryx",
    "qwen2vl": "qformer.resolution.qwen2vl:Qwen2VL",
    "overlap512": "qformer.resolution.overlap:Overlap512",
}


def build(name: str, **options: Any) -> ResolutionStrategy:
    """Build a strategy of the table, or of your own dataclass, `module:Class`.

    Raises:
        UsageError: an unknown name or option, or a value of the wrong type.
    """
    return lookup.build(STRATEGIES, name, options, "resolution")


def chosen(choice: Choice, limits: LimitsConfig | None = None) -> ResolutionStrategy:
    """Build the strategy that a configuration names, within the limits that it sets.

    Raises:
        UsageError: see `build`; or (`Untrusted`) somebody else's file names a class.
    """
    with choice.building():
        strategy = build(choice.name, **choice.options)
    if limits is None or (limits.tiles is None and limits.tokens is None):
        return strategy
    return Limited(strategy, limits.tiles, limits.tokens)
