"""Resolution strategies by name: `build("fixed", size=224).plan(640, 480)`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qformer import lookup

if TYPE_CHECKING:
    from qformer.fields import Choice
    from qformer.resolution.base import ResolutionStrategy

STRATEGIES: dict[str, Any] = {
    "fixed": "qformer.resolution.fixed:Fixed",
}


def build(name: str, **options: Any) -> ResolutionStrategy:
    """Build a strategy of the table, or of your own dataclass, `module:Class`.

    Raises:
        UsageError: an unknown name or option, or a value of the wrong type.
    """
    return lookup.build(STRATEGIES, name, options, "resolution")


def chosen(choice: Choice) -> ResolutionStrategy:
    """Build the strategy that a configuration names.

    Raises:
        UsageError: see `build`; or (`Untrusted`) somebody else's file names a class.
    """
    with choice.building():
        return build(choice.name, **choice.options)
