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
    """A strategy of the table, or `module:Class` of a dataclass of your own.

    Raises:
        UsageError: unknown name or option, or a value of the wrong type.
    """
    return lookup.build(STRATEGIES, name, options, "resolution")


def chosen(choice: Choice) -> ResolutionStrategy:
    """The strategy that a configuration names.

    Raises:
        UsageError: as of `build`; or (`Untrusted`) a class that somebody else's file names.
    """
    with choice.building():
        return build(choice.name, **choice.options)
