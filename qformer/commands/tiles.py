"""`qformer tiles`: how each resolution strategy cuts a picture, as a table, as JSON and as a drawing."""

from __future__ import annotations

import json
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image

from qformer import lookup, resolution
from qformer.data.arguments import pairs
from qformer.figures import tiles as drawing
from qformer.figures.cost import Cost, in_words, this_machine, usual
from qformer.files.records import writing
from qformer.images import read_image
from qformer.resolution.measures import useful
from qformer.types import BadSample, Plan, TooLong, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from qformer.figures.cost import Machine, Operations
    from qformer.resolution.base import ResolutionStrategy

    Read = tuple[Plan, dict[str, Any], Cost]  # of a picture, with what says whose it is
    Reading = Callable[[int, int], Read]

HEAD = ("strategy", "grid", "tiles", "size of a tile", "tokens", "markers", "useful", "GFLOP: encoder", "in all")
EXPOSED = "there to be exposed"


class System(Protocol):
    """The model of a configuration that reads pictures without having numbers (`stages/plan/first_token.py`)."""

    strategy: str

    def plan(self, width: int, height: int) -> Plan:
        """Plan a picture of this size."""

    def tokens(self, plan: Plan) -> int:
        """Count what the language model reads of a plan, without markers."""

    def operations(self, width: int, height: int) -> Operations:
        """Count the operations until the first token."""


def show(
    path: Path,
    strategy: str | None,
    words: list[str],
    output: Path | None,
    as_json: bool,
    systems: Mapping[str, System] | None = None,
    machine: Machine | None = None,
) -> None:
    """Print what a strategy makes of a picture, and draw it.

    Args:
        strategy: its name, or your own `module:Class`; None: all of the table.
        words: options of the strategy, `key=value`; of all strategies, for those that have them.
        output: file for the drawing, a PNG, with the strategies side by side.
        systems: instead of strategies, models of configurations by the names to show.
        machine: whose time to the first token is estimated; by default this one.

    Raises:
        UsageError: no picture there, an unknown strategy or option, or a picture that every strategy asked for refuses.
    """
    try:
        pixels = read_image(path)
    except BadSample as bad:
        raise UsageError(f"'{path}' cannot be read as an image ({bad}); give a JPEG, PNG or WebP file") from bad
    if output is not None and output.suffix.lower() != ".png":
        raise UsageError(f"'{output}' does not end in .png; the drawing is a PNG")
    picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    machine = machine or this_machine()
    readers = _strategies(strategy, words, machine) if systems is None else _systems(systems, machine)
    cards, records, refused = [], [], []
    for name, read in readers.items():
        try:
            plan, own, cost = read(*picture.size)
        except (BadSample, TooLong) as bad:  # this picture, not the options
            refused.append(UsageError(f"{name}: {bad}"))
            continue
        if output is not None:
            title = Path(name).stem if systems else name
            cards.append(drawing.draw(picture, plan, f"{title}: {EXPOSED}" if own.get("exposed") else title, cost))
        records.append(own | record(own["strategy"], plan, cost))
    if not records:
        raise refused[0]
    for reason in refused:
        print(f"qformer: {reason}", file=sys.stderr)
    if output is not None:
        with writing(output):
            drawing.side_by_side(cards).save(output)
    print(json.dumps(records) if as_json else table(records))


def _strategies(strategy: str | None, words: list[str], machine: Machine) -> dict[str, Reading]:
    """A reading of the picture for each strategy, with one model for all of them."""
    names = list(resolution.STRATEGIES) if strategy is None else [strategy]
    found: dict[str, Reading] = {}
    for name, options in _options(names, pairs(words, "a strategy", "max_tiles=6")).items():
        rule = resolution.build(name, **options)

        def read(width: int, height: int, name: str = name, rule: ResolutionStrategy = rule) -> Read:
            plan = rule.plan(width, height)
            return plan, {"strategy": name, "exposed": rule.exposed}, usual(plan, machine)

        found[name] = read
    return found


def _systems(systems: Mapping[str, System], machine: Machine) -> dict[str, Reading]:
    """A reading of the picture for each configuration, with its own model."""
    found: dict[str, Reading] = {}
    for name, system in systems.items():

        def read(width: int, height: int, name: str = name, system: System = system) -> Read:
            plan = system.plan(width, height)
            plan = replace(plan, tokens=system.tokens(plan))
            known = {"config": name, "strategy": system.strategy}
            return plan, known, Cost.of(system.operations(width, height), machine)

        found[name] = read
    return found


def _options(names: list[str], given: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Options of each strategy: those given that it has.

    Raises:
        UsageError: one that none of them has.
    """
    if len(names) == 1:
        return {names[0]: given}
    known = {
        name: {field.name for field in fields(lookup.find(resolution.STRATEGIES, name)) if field.init} for name in names
    }
    every = set().union(*known.values())
    for key in given:
        if key not in every:
            raise UsageError(f"resolution.{key} is not an option of any strategy: {lookup.nearest(key, every)}")
    return {name: {key: value for key, value in given.items() if key in known[name]} for name in names}


def record(name: str, plan: Plan, cost: Cost) -> dict[str, Any]:
    """Numbers of a plan, as `--json` prints them.

    A strategy's record also says which fault it is there to show, in `exposed`; empty for one that is there to be used.
    `sizes` are (width, height) of each tile in reading order, and `useful` is a share in 0..1. Costs are of the model
    of the configuration, or else of one model for all strategies (`qformer.figures.cost.usual`): `gflops` of the image
    encoder on these tiles, and `first_token_seconds`, which are estimated, by the rates that `estimated` names.
    """
    return {
        "strategy": name,
        "image": list(plan.image),
        "grid": list(plan.grid),
        "tiles": len(plan.tiles),
        "sizes": [list(tile.size) for tile in plan.tiles],
        "tokens": plan.tokens,
        "markers": plan.markers,
        "useful": round(useful(plan), 4),
        "gflops": round(cost.encoder, 1),
        "connector_gflops": round(cost.connector, 1),
        "prefill_gflops": round(cost.prefill, 1),
        "first_token_seconds": float(f"{cost.seconds:.3g}"),
        "estimated": cost.machine,
    }


def table(records: list[dict[str, Any]]) -> str:
    """The same as lines of text."""
    rates = "; ".join(dict.fromkeys(one["estimated"] for one in records))
    faulty = any(one.get("exposed") for one in records)
    rows = [(*HEAD, f"first token, estimated ({rates})", "remark" * faulty)]
    for one in records:
        sizes = " and ".join(f"{w} x {h}" for w, h in dict.fromkeys(map(tuple, one["sizes"])))
        rows.append(
            (
                Path(one["config"]).stem if "config" in one else one["strategy"],
                f"{one['grid'][0]} x {one['grid'][1]}",
                f"{one['tiles']}",
                sizes,
                f"{one['tokens']:,}",
                f"{one['markers']}",
                f"{one['useful']:.0%}",
                f"{one['gflops']:,.0f}",
                f"{sum(one[key] for key in ('gflops', 'connector_gflops', 'prefill_gflops')):,.0f}",
                in_words(one["first_token_seconds"]),
                f"{EXPOSED}: {one['exposed']}" if one.get("exposed") else "",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)
