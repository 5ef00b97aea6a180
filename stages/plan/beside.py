"""Cost of an image beside that of another configuration, and beside what is published of the two systems."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qformer.schema import Config

MOST = 20_000  # pixels of a side


@dataclass(frozen=True)
class Published:
    """Numbers of a paper about two systems, this one first: TFLOP of an image, and hours of training."""

    names: str
    tflops: tuple[float, float]
    hours: tuple[float, float]
    source: str


#: Strategy of this configuration and of the other -> what is published.
PUBLISHED = {
    ("uhd", "pad_square"): Published(
        "LLaVA-UHD : LLaVA-1.5", (14.63, 15.50), (23, 26), "13B, 8 A100, arXiv 2403.11703v1, table 2 and abstract"
    )
}


def compare(mine: Mapping[str, Mapping[str, float]], theirs: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Compare the FLOPs of an image, by phase and part, of two forecasts.

    Returns:
        `forward` and `training` (forward and backward), each [this one, the other, their ratio]: TFLOP of an image.
    """
    found = {}
    for name, phases in (("forward", ("forward",)), ("training", ("forward", "backward"))):
        own, other = (sum(sum(flops[phase].values()) for phase in phases) / 1e12 for flops in (mine, theirs))
        found[name] = [own, other, own / other]
    return found


def published(mine: Config, theirs: Config) -> dict[str, Any]:
    """The published numbers of two systems, known by their strategies; empty if there are none."""
    known = PUBLISHED.get((mine.resolution.name, theirs.resolution.name))
    return {} if known is None else {"published": asdict(known)}


def lines(beside: Mapping[str, Any] | None) -> list[str]:
    """Write a comparison as sentences; none for None."""
    if beside is None:
        return []
    (own, other, ratio), (own_all, other_all, ratio_all) = beside["forward"], beside["training"]
    found = [
        f"beside {beside['config']}: {own:,.2f} : {other:,.2f} TFLOP an image forward, a ratio of {ratio:.3f}; "
        f"training, forward and backward: {own_all:,.2f} : {other_all:,.2f}, a ratio of {ratio_all:.3f}"
    ]
    if known := beside.get("published"):
        (first, second), (fewer, more) = known["tflops"], known["hours"]
        found.append(
            f"published, {known['names']}: {first} : {second} TFLOP, a ratio of {first / second:.3f}; training "
            f"{fewer} h : {more} h, a ratio of {fewer / more:.3f} ({known['source']})"
        )
    return found


def parse_picture(text: str) -> tuple[int, int]:
    """Parse `672x1008` into (width, height) in pixels.

    Raises:
        UsageError: the text is no size.
    """
    width, _, height = text.replace(" ", "").lower().partition("x")
    if width.isdecimal() and height.isdecimal() and 0 < int(width) <= MOST and 0 < int(height) <= MOST:
        return int(width), int(height)
    raise UsageError(f"'{text}' is no size of a picture; give width x height in pixels, such as 672x1008")
