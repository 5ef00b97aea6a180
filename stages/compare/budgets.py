"""Equal budgets: options at which systems have as many visual tokens, and steps at which they take as many FLOPs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qformer.schema import QFORMER
from qformer.stages.compare.systems import Refused, with_steps
from qformer.stages.plan.planned import Planner, Rows
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from qformer.data.base import Source
    from qformer.schema import Config
    from qformer.stages.compare.costs import Cost

NEAR = 0.05  # an option that comes within this share of the tokens is taken, without looking at others
WITHIN = 0.15  # beyond it a system is refused
BEYOND = 1.5  # times the tokens, where looking for a larger value ends
PAIRED = 8  # values of the strategy that are tried together with those of the connector
SAME = 8  # values in a row that change nothing, after which looking ends as well


@dataclass(frozen=True)
class Option:
    """An option that sets the number of visual tokens and leaves a system what it is.

    Attributes:
        key: such as `connector.queries`.
        values: that it may have, those with fewer tokens first; called with the configuration, the side of a patch of
            the encoder and the wanted number of tokens.
        grows: a larger value never gives fewer tokens, so that halving finds it.
    """

    key: str
    values: Callable[[Config, int, float], Iterator[int]]
    grows: bool = False

    def set(self, config: Config, value: int) -> Config:
        """The configuration with this value, and what has to follow it."""
        section, name = self.key.split(".")
        changes = {name: value}
        if self.key == "resolution.min_tokens":
            changes["max_tokens"] = max(value, config.resolution.options.get("max_tokens", value))
        if self.key == "resolution.max_tokens":
            changes["min_tokens"] = min(value, config.resolution.options.get("min_tokens", 4))
        made = config.model_copy(update={section: getattr(config, section).model_copy(update=changes)})
        if self.key == "connector.queries" and "queries" in config.resolution.options:  # uhd plans with them
            made = made.model_copy(update={"resolution": config.resolution.model_copy(update={"queries": value})})
        return made


def _counted(config: Config, patch: int, tokens: float) -> Iterator[int]:
    yield from range(1, int(BEYOND * tokens) + 2)


def _squares(config: Config, patch: int, tokens: float) -> Iterator[int]:
    yield from (side * side for side in range(1, int((BEYOND * tokens) ** 0.5) + 3))


def _scales(config: Config, patch: int, tokens: float) -> Iterator[int]:
    yield from range(12, 0, -1)


def _sides(config: Config, patch: int, tokens: float) -> Iterator[int]:
    yield from (patch * count for count in range(1, 65))


def _pieces(config: Config, patch: int, tokens: float) -> Iterator[int]:
    """Numbers of slices or tiles: with one, nothing would be cut."""
    yield from range(2, 41)


def _crops(config: Config, patch: int, tokens: float) -> Iterator[int]:
    yield from range(1, 37)


def _native(config: Config, patch: int, tokens: float) -> Iterator[int]:
    """Longer sides of the native view, not below the low one."""
    low, stride = config.resolution.options.get("low", 384), config.resolution.options.get("stride", 32)
    yield from range(-(-low // stride) * stride, max(4096, 2 * low), stride)


OF_CONNECTOR = {
    QFORMER: Option("qformer.queries", _counted, grows=True),
    "resampler": Option("connector.queries", _squares, grows=True),
    "spatial_resampler": Option("connector.queries", _squares, grows=True),
    "avg_pool": Option("connector.queries", _squares, grows=True),
    "c_abstractor": Option("connector.queries", _squares, grows=True),
    "token_packer": Option("connector.scale", _scales),
}
OF_STRATEGY = {
    "fixed": [Option("resolution.size", _sides)],
    "pad_square": [Option("resolution.size", _sides)],
    "uhd": [Option("resolution.max_slices", _pieces)],
    "internvl": [Option("resolution.max_tiles", _pieces)],
    "anyres": [Option("resolution.max_patches", _crops)],
    "oryx": [Option("resolution.high", _native)],
    "qwen2vl": [
        Option("resolution.max_tokens", _counted, grows=True),
        Option("resolution.min_tokens", _counted, grows=True),
    ],
}


@dataclass(frozen=True)
class Found:
    """A configuration with its mean number of visual tokens, and what was changed for it."""

    config: Config
    mean: float
    changes: str

    def distance(self, tokens: float) -> float:
        """Distance from the wanted number, as a share of it."""
        return abs(self.mean / tokens - 1)


def mean_tokens(config: Config, source: Source) -> float:
    """Mean number of vectors that the language model reads in place of a row of a source, as `equal_tokens` counts it.

    Raises:
        UsageError: a configuration that cannot be built, or rows none of which it takes.
    """
    return Planner(config).mean(Rows.of(source))[0]


def equal_tokens(configs: Mapping[str, Config], source: Source, tokens: float) -> dict[str, Config | Refused]:
    """Give systems as nearly `tokens` visual tokens a row as they can have, on the mean of a source's rows.

    A system within 5 % stays as it is. Else the option of the connector comes first, as it leaves what the encoder
    sees, then that of the strategy, then both together: the first that comes within 5 % is taken at its nearest value,
    or the nearest of all. A system that stays beyond 15 % is refused. Values are left out that refuse rows which the
    system takes as it is.

    A Q-Former whose `init` is set has the queries of that run: leave `init` to what follows, and train its stage one
    with the queries that are found.

    Args:
        configs: of stage two, by the names of the systems.
        source: at most 500 of its rows are looked at, evenly spread.
        tokens: vectors that the language model reads in place of a row, markers included.

    Raises:
        UsageError: the source cannot be read, or tokens that are not positive.
    """
    if not tokens > 0:
        raise UsageError(f"tokens is {tokens}; give a positive number of visual tokens a row")
    rows = Rows.of(source)
    found: dict[str, Config | Refused] = {}
    for name, config in configs.items():
        try:
            best = _nearest(config, rows, tokens)
        except UsageError as error:
            found[name] = Refused(str(error))
            continue
        if best.distance(tokens) <= WITHIN:
            found[name] = best.config
            continue
        has = f"the nearest to {tokens:g} visual tokens that it can have is {best.mean:.1f}, with {best.changes}"
        found[name] = Refused(f"{has}; give another number of tokens")
    return found


def equal_flops(
    configs: Mapping[str, Config], costs: Mapping[str, Cost], reference: str
) -> dict[str, Config | Refused]:
    """Give systems the steps that take the training FLOPs of the reference, with as large a share of warm-up.

    All operations count: encoding each picture once where tokens are stored, else at each step; connector and language
    model forward and backward; and the whole stage one of a system that begins with one.

    Args:
        costs: of the systems; one without costs is refused.

    Raises:
        UsageError: the reference has no configuration or no costs.
    """
    if reference not in configs or reference not in costs:
        raise UsageError(f"the reference '{reference}' has no costs to be equal to; give a system that can be built")
    budget = costs[reference].training_flops(configs[reference].train.steps)
    found: dict[str, Config | Refused] = {}
    for name, config in configs.items():
        if name not in costs:
            found[name] = Refused("its costs are not known")
            continue
        cost = costs[name]
        steps = round((budget - cost.training_flops(0)) / cost.step_flops)
        if steps < 1 or abs(cost.training_flops(steps) / budget - 1) > WITHIN:
            before = f"{cost.training_flops(0) / budget:.0%} of the budget goes before its first step"
            found[name] = Refused(
                f"{before}, and a step takes {cost.step_flops / budget:.1%}; give the reference more steps"
            )
            continue
        found[name] = config if steps == config.train.steps else with_steps(config, steps)
    return found


def _nearest(config: Config, rows: Rows, tokens: float) -> Found:
    """The configuration of a system that is nearest, see `equal_tokens`.

    Raises:
        UsageError: it cannot be built as it is.
    """
    start = Planner(config)
    mean, refused = start.mean(rows)
    best = Found(config, mean, "its options as they are")
    if best.distance(tokens) <= NEAR:
        return best
    search = Search(rows, tokens, refused, start)
    own = OF_CONNECTOR.get(config.connector.name)
    if config.has_qformer and config.init is not None:
        own = None
    of_strategy = OF_STRATEGY.get(config.resolution.name, [])
    for option in [*filter(None, [own]), *of_strategy]:
        best = search.along(option, best, config)
        if best.distance(tokens) <= NEAR:
            return best
    for option in of_strategy if own is not None else []:
        known: set[float] = set()
        for value in option.values(config, start.patch, tokens):
            step = search.at(option, config, value, best)
            if step is None or step.mean in known:
                continue
            known.add(step.mean)
            assert own is not None
            best = search.along(own, best, step.config, f"{step.changes} ")
            if best.distance(tokens) <= NEAR or len(known) == PAIRED:
                return best
    return best


@dataclass(frozen=True)
class Search:
    """A search for values of options.

    Attributes:
        refused: rows that the system as it is does not take.
        start: the system as it is.
    """

    rows: Rows
    tokens: float
    refused: int
    start: Planner

    def at(self, option: Option, config: Config, value: int, than: Found, said: str = "") -> Found | None:
        """A configuration with this value; None where it is refused, or refuses more rows.

        Where it is nearer `than` another, its connector was seen to take all tiles.
        """
        changed = option.set(config, value)
        try:
            planner = Planner(changed, self.start)
            mean, refused = planner.mean(self.rows)
        except UsageError:
            return None
        found = Found(changed, mean, f"{said}{option.key}={value}")
        nearer = found.distance(self.tokens) < than.distance(self.tokens)
        return found if refused <= self.refused and (not nearer or planner.projects()) else None

    def along(self, option: Option, best: Found, config: Config, said: str = "") -> Found:
        """The nearest configuration along an option, or `best` where that is nearer."""
        values = option.values(config, self.start.patch, self.tokens)
        last: float | None = None
        same = 0
        for value in self._halved(option, config, list(values)) if option.grows else values:
            found = self.at(option, config, value, best, said)
            if found is None:
                continue
            best = min(best, found, key=lambda one: one.distance(self.tokens))
            same = same + 1 if last == found.mean else 0
            last = found.mean
            if found.mean > BEYOND * self.tokens or same == SAME:
                break
        return best

    def _halved(self, option: Option, config: Config, values: list[int]) -> list[int]:
        """The last value with too few tokens and the first one with enough."""
        unlike = Found(config, self.tokens, "")  # nothing is nearer, so that nothing is projected
        first, last = 0, len(values) - 1
        while first < last:
            middle = (first + last) // 2
            found = self.at(option, config, values[middle], unlike)
            mean = values[middle] if found is None else found.mean  # too few to have a plan, or too many for the room
            first, last = (middle + 1, last) if mean < self.tokens else (first, middle)
        return values[max(first - 1, 0) : first + 1]
