"""`qformer probe`: where and at which size a model counts right, whether padding blinds it, how strategies cut.

Answers go to a file of the output folder as they come, so the same command again asks what is left.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from qformer import resolution
from qformer.answering.kept import KeptAnswers
from qformer.answering.models import Checkpoint, TransformersModel
from qformer.answering.server import Server
from qformer.data.arguments import pairs
from qformer.evaluation import probes
from qformer.evaluation.geometry import geometry
from qformer.evaluation.probes import scaled
from qformer.figures import probes as figures
from qformer.files.records import replace_text, replacing, to_json, writing
from qformer.probing import padding
from qformer.progress import Bar
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections import Counter

    from PIL import Image

    from qformer.resolution.base import ResolutionStrategy

ANSWERS, RESULT, PAGE = "answers.jsonl", "probes.json", "probes.html"
SQUARE = 768  # side of the picture of the probe by position, for tiles of 512
OBJECTS = 4
MODEL_PROBES = ("counting-position", "counting-size", "padding")
GEOMETRY = "geometry"


@dataclass(frozen=True)
class Settings:
    """Options of `qformer probe`; its `--help` explains each."""

    checkpoint: str | None = None
    model: str | None = None
    server: str | None = None
    strategy: str | None = None
    every: bool = False
    options: list[str] = field(default_factory=list)
    only: str | None = None
    tile: int | None = None
    repeats: int | None = None
    seed: int = 0
    batch: int = 16
    timeout: float = 120.0
    output: Path | None = None
    as_json: bool = False
    device: str | None = None
    quantize: str | None = None
    trust: bool = False


def split_words(words: list[str]) -> tuple[list[str], list[str]]:
    """Paths, and options of a strategy, which are `key=value` and no file."""
    options = [word for word in words if "=" in word and not Path(word).exists()]
    paths = [word for word in words if word not in options]
    return paths, options


def probe(settings: Settings) -> None:
    """Ask, measure, print, and write numbers, pictures and a page.

    Raises:
        UsageError: options that exclude one another, or a model, a server or a strategy that cannot be used.
    """
    _check(settings)
    strategies = _strategies(settings)
    asked = _asked(settings, None if settings.checkpoint is None else next(iter(strategies.values()), None))
    if isinstance(asked, Checkpoint):
        strategies = {settings.strategy or _name_of(asked.strategy): asked.strategy}
    tile = settings.tile or (asked.tile if isinstance(asked, Checkpoint) else probes.TILE)
    name = (
        settings.checkpoint
        or settings.model
        or settings.server
        or ("all strategies" if settings.every else next(iter(strategies)))
    )
    result: dict[str, Any] = {"name": name, "tile": tile, "seed": settings.seed}
    if settings.output is not None:
        with writing(settings.output):
            settings.output.mkdir(parents=True, exist_ok=True)
    if asked is not None and settings.only != GEOMETRY:
        assert settings.output is not None
        result |= _ask(settings, asked, settings.output / ANSWERS, tile)
    if strategies and settings.only in (None, GEOMETRY):
        square = scaled(SQUARE, tile)
        result |= {"square": [square] * 2, "geometry": {one: geometry(rule, tile) for one, rule in strategies.items()}}
    if settings.output is not None:
        _write(settings.output, result, {one: rule.rule.exposed for one, rule in strategies.items()})
    print(to_json(result) if settings.as_json else "\n".join(_lines(result, strategies, settings.output)))


def _check(settings: Settings) -> None:
    whose = [name for name in (settings.checkpoint, settings.server) if name is not None]
    if settings.model is not None and settings.server is None:
        whose.append(f"--model {settings.model}")
    if len(whose) > 1:
        raise UsageError(f"both {whose[0]} and {whose[1]} were given; give one checkpoint, --model or --server to ask")
    if settings.every and (whose or settings.strategy is not None):
        raise UsageError("--all compares strategies without a model; leave the other, or --all, out")
    if not whose and settings.strategy is None and not settings.every:
        raise UsageError("there is nobody to ask; give a checkpoint, --model, --server, or --strategy NAME or --all")
    if settings.strategy is not None and whose and settings.checkpoint is None:
        raise UsageError("--strategy replaces that of a checkpoint of qformer; others cut pictures as they do")
    if not whose and settings.only in MODEL_PROBES:
        raise UsageError(f"--only {settings.only} asks a model; give a checkpoint, --model or --server")
    if settings.only == GEOMETRY and whose and settings.checkpoint is None:
        raise UsageError("--only geometry needs a strategy, which only checkpoints of qformer tell; give one of those")
    if settings.options and settings.strategy is None and not settings.every:
        raise UsageError(f"'{settings.options[0]}' is an option of a strategy; name it with --strategy")
    if whose and settings.only != GEOMETRY and settings.output is None:
        raise UsageError("answers are kept in a folder, so that a run that is broken off goes on; name one with -o")


def _strategies(settings: Settings) -> dict[str, ResolutionStrategy]:
    if settings.every and settings.options:
        raise UsageError(
            f"'{settings.options[0]}' is an option of one strategy; give --strategy NAME in place of --all"
        )
    names = list(resolution.STRATEGIES) if settings.every else [settings.strategy] if settings.strategy else []
    options = pairs(settings.options, "a strategy", "size=120")
    return {name: resolution.build(name, **options) for name in names}


def _name_of(strategy: ResolutionStrategy) -> str:
    kind = type(strategy.rule)
    own = f"{kind.__module__}:{kind.__name__}"
    return next((name for name, entry in resolution.STRATEGIES.items() if entry == own), own)


def _asked(settings: Settings, strategy: ResolutionStrategy | None) -> Checkpoint | TransformersModel | Server | None:
    """Whoever answers; None where strategies alone are measured."""
    if settings.checkpoint is not None:
        return Checkpoint(settings.checkpoint, settings.device, strategy, settings.quantize, settings.trust)
    if settings.server is not None:
        return Server(settings.server, settings.model, settings.timeout)
    return None if settings.model is None else TransformersModel(settings.model, settings.device)


def _ask(settings: Settings, asked: Any, file: Path, tile: int) -> dict[str, Any]:
    """Results of the probes that are wanted, by their names."""
    wanted = MODEL_PROBES if settings.only is None else (settings.only,)
    with Bar(console=Console(stderr=True), redirect_stdout=False) as bar:
        kept = KeptAnswers(asked, file, asked.identity, settings.batch)
        found: dict[str, Any] = {"asked": asked.identity}
        for name in wanted:
            run, total = _probe(name, settings, tile)
            task = bar.add_task(f"asking ({name})", total=total)
            kept.on_answers = partial(bar.advance, task)
            found |= run(kept)
    return found | {"answers": {"new": kept.new, "kept": kept.known}}


def _probe(name: str, settings: Settings, tile: int) -> tuple[Callable[[probes.Ask], dict[str, Any]], int]:
    """A probe by its name, and how many questions it asks."""
    seed, repeats = settings.seed, settings.repeats
    if name == "counting-position":
        side, many = scaled(SQUARE, tile), repeats or 15

        def position(ask: probes.Ask) -> dict[str, Any]:
            heat = probes.counting_by_position(ask, side=side, objects=OBJECTS, repeats=many, seed=seed)
            mean = [[None if one != one else round(one, 4) for one in row] for row in heat.mean.tolist()]
            told = {"side": side, "objects": OBJECTS, "mean": mean, "answers": _counted(heat.answers)}
            return {"counting_position": told | {"cells": [_counted(cell) for cell in heat.cells]}}

        return position, 9 * many
    if name == "counting-size":
        sizes, often = tuple(scaled(size, tile) for size in probes.SIZES), repeats or 30

        def by_size(ask: probes.Ask) -> dict[str, Any]:
            told = probes.counting_by_size(ask, sizes, repeats=often, seed=seed)
            return {"counting_size": {str(size): _counted(answers) for size, answers in told.items()}}

        return by_size, len(sizes) * often
    each = repeats or 5

    def by_padding(ask: probes.Ask) -> dict[str, Any]:
        effect = padding.padding_effect(ask, side=tile, repeats=each, seed=seed)
        shares = effect.shares(padding.NAMED)
        told = {kind: {side: round(s, 4) for side, s in one.items()} for kind, one in shares.items()}
        return {"padding": told, "padding_baseline": effect.record()}

    different = len(padding.ASPECTS) * len(padding.RECTANGLES) * len(padding.SIDES)
    return by_padding, each * different * padding.WAYS


def _counted(answers: Counter[int | None]) -> dict[str, int]:
    """Counts by answer, the smallest first, no number last."""
    ordered = sorted(answers.items(), key=lambda pair: (pair[0] is None, pair[0] or 0))
    return {figures.NONE if answer is None else str(answer): count for answer, count in ordered}


def _write(folder: Path, result: dict[str, Any], exposed: dict[str, str]) -> None:
    drawn: dict[str, Image.Image] = figures.figures(result)
    with writing(folder):
        for name, image in drawn.items():
            with replacing(folder / f"{name}.png") as partial:
                image.save(partial, "PNG")
        replace_text(folder / RESULT, json.dumps(result, indent=1) + "\n")
        replace_text(folder / PAGE, figures.page(result, drawn, exposed))


def _lines(result: dict[str, Any], strategies: dict[str, ResolutionStrategy], output: Path | None) -> list[str]:
    """The result as lines of text."""
    lines: list[str] = []
    if position := result.get("counting_position"):
        rows = [["-" if one is None else f"{one:.2f}" for one in row] for row in position["mean"]]
        lines += [f"{position['objects']} objects, mean answer by where they are:", *_table(rows)]
        lines += [f"answers: {figures.answers_in_words(position['answers'])}", ""]
    if sizes := result.get("counting_size"):
        rows = [[size, figures.answers_in_words(answers)] for size, answers in sizes.items()]
        lines += ["nine circles, by the side of the picture in pixels:", *_table(rows), ""]
    if attack := result.get("padding"):
        head, rows = figures.attack_table(attack)
        lines += ["rectangle on padding's gray, answers that name its color at each edge:", *_table([head, *rows]), ""]
        head, rows = figures.baseline_table(result["padding_baseline"])
        lines += ["the same on other grounds:", *_table([head, *rows]), ""]
    if records := result.get("geometry"):
        head, rows = figures.geometry_table(records)
        lines += [*_table([head, *rows]), ""]
        lines += [
            f"{name} is there to be exposed: {rule.rule.exposed}"
            for name, rule in strategies.items()
            if rule.rule.exposed
        ]
    if answers := result.get("answers"):
        lines += [f"{answers['new']} questions asked, {answers['kept']} answers kept from before"]
    return lines + ([f"written to {output / PAGE}"] if output is not None else [])


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
