"""`qformer compare`: systems trained on the same data with the same seeds and steps, and asked the same questions.

Everything that is found goes into one file, `comparison.json`; the table and the page are made from it alone.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from qformer.checkpoints import folder as checkpoint
from qformer.config import FeaturesConfig, TextConfig, dump_config
from qformer.data import sources
from qformer.files.digests import digests, file_digests
from qformer.files.records import Form, read_object, replace_text, writing
from qformer.llm.abilities import require_training
from qformer.model.assembly import build_vision_language
from qformer.progress import console
from qformer.stages.compare import budgets, found
from qformer.stages.compare.costs import Cost, measure_cost
from qformer.stages.compare.questions import list_questions
from qformer.stages.compare.runs import Exam, Run, forget_faults
from qformer.stages.compare.samples import digest, digest_data, part_of
from qformer.stages.compare.systems import Refused, System, digest_config, find_reference, read_systems, split_words
from qformer.stages.compare.workers import spread
from qformer.stages.inherit import inherit
from qformer.stages.plan.planned import MOST, Planner, Rows
from qformer.stages.stage2 import require_room
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qformer.fields import Choice
    from qformer.schema import Config
    from qformer.types import Sample

Mode = Literal["published", "tokens", "flops"]
COSTED = 16  # questions whose operations are counted; their visual tokens are counted on all, `MOST` at most
CURVE = 32  # questions that are asked during training, at most
RETRIEVED = 96  # pictures among which a stage one finds captions
POINTS = 8  # of a curve
SAME = ("train", "validation", "batch", "crop", "flip")  # keys of `data` that systems share
Systems = dict[str, System | Refused]


@dataclass(frozen=True)
class Settings:
    """Options of `qformer compare`; its `--help` explains each."""

    words: tuple[str, ...]
    over: tuple[str, ...] = ()
    mode: Mode = "published"
    tokens: float | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int | None = None
    questions: int | None = None
    reference: str | None = None
    blind: bool = False
    choose: bool = False
    metric: str = "accuracy"
    processes: int = 1
    folder: Path = Path("runs/compare")


class CostRecord(Form):
    """Contents of a file of costs."""

    tokens: float


def compare(settings: Settings) -> dict[str, Any]:
    """Train, ask and measure what is not done yet, and write `comparison.json`; returns its contents.

    Raises:
        UsageError: fewer than two systems, keys or a reference that do not exist, systems that differ in their data,
            data without questions, or a disk that cannot be written.
    """
    if settings.processes < 1:
        raise UsageError(f"processes is {settings.processes}; give a whole number from 1")
    with writing(settings.folder):
        settings.folder.mkdir(parents=True, exist_ok=True)
    paths, changes = split_words(settings.words)
    systems = read_systems(paths, [*settings.over, *changes], settings.steps)
    reference = _reference(settings.reference, systems)
    data = Shared.of(systems, settings)
    if settings.mode == "tokens":
        systems = _with_tokens(systems, settings, data, reference)
    systems = _without_doubles(systems)
    systems, costs = _measure(systems, data, settings.folder)
    reference = _reference(settings.reference, systems)
    if settings.mode == "flops":
        systems = _with_flops(systems, costs, reference)
    for name, one in systems.items():
        if isinstance(one, Refused):
            console.print(f"{name} is refused: {one.reason}", soft_wrap=True, markup=False)
    runs = {name: data.runs(name, one) for name, one in systems.items() if isinstance(one, System)}
    every = [run for seed in range(len(settings.seeds)) for own in runs.values() for run in own[seed : seed + 1]]
    forget_faults(every)
    try:
        spread(every, data.exam, settings.processes)
    except SystemExit:
        console.print("stopped: what is finished stays; run the same command to go on", soft_wrap=True)
        raise
    whole = _head(settings, data, reference) | {
        "systems": [_entry(name, one, costs.get(name), runs.get(name, []), data) for name, one in systems.items()],
        "retrieval": found.retrieval(every),
    }
    with writing(settings.folder):
        replace_text(settings.folder / found.FILE, json.dumps(whole), shared=True)
    return whole


def _reference(name: str | None, systems: Systems) -> str:
    """The reference, by default the first system that can be built.

    Raises:
        UsageError: it cannot be built, there is no such system, or none can be built.
    """
    refused = {name: one.reason for name, one in systems.items() if isinstance(one, Refused)}
    if len(refused) == len(systems):
        raise UsageError(f"none of the {len(systems)} systems can be built: {next(iter(refused.values()))}")
    chosen = find_reference(name, [one for one in systems if name or one not in refused])
    if chosen in refused:
        raise UsageError(f"the reference '{chosen}' cannot be built: {refused[chosen]}")
    return chosen


@dataclass(frozen=True)
class Shared:
    """Settings that all systems share.

    Attributes:
        train: the part of the training data that is seen, and `digest`, its hash.
        captioned: questions come with captions, among which a stage one can find those of a picture.
        skipped: records of the questions that could not be used.
    """

    folder: Path
    seeds: tuple[int, ...]
    train: Choice
    images: int
    digest: str
    exam: Exam
    captioned: bool
    skipped: list[dict[str, str]]

    @cached_property
    def sizes(self) -> Rows:
        """Sizes of what the questions show, by which visual tokens are counted."""
        return Rows.of(self.exam.open("answers"))

    @classmethod
    def of(cls, systems: Systems, settings: Settings) -> Shared:
        """Open the data. Raises UsageError: systems differ in them, or there are no questions."""
        configs = {name: one.config for name, one in systems.items() if isinstance(one, System)}
        _require_same(configs)
        config = next(iter(configs.values()))
        if config.data.validation is None:
            raise UsageError(
                "the configurations have no held-out questions; give data.validation=..., such as "
                "data.validation='{name: canvases, split: val, questions: true}'"
            )
        source = sources.for_run(config.data.validation)
        questions, skipped = list_questions(source, settings.questions or config.data.validation_size)
        firsts = [one.stage_one for one in systems.values() if isinstance(one, System) and one.stage_one is not None]
        images = max(_images(one) for one in [*configs.values(), *firsts])
        train = part_of(config.data.train, images)
        return cls(
            folder=settings.folder.resolve(),
            seeds=settings.seeds,
            train=train,
            images=images,
            digest=digest_data(train, sources.for_run(train)),
            exam=Exam(config.data.validation, tuple(questions), settings.blind, settings.choose, settings.metric),
            captioned=bool(source[questions[0].place].captions),
            skipped=skipped,
        )

    def prepare(self, config: Config, run: Path | None = None, seed: int = 0) -> Config:
        """A configuration that trains on these data: a folder, a seed, stored tokens, and when to look and to save."""
        first, train = config.stage == "stage1", config.train
        features = (config.data.features or FeaturesConfig(path="tokens")).model_copy(
            update={"path": str(self._store(config))}
        )
        held = self.exam.data if self.captioned or not first else None
        changes = {
            "train": self.train,
            "validation": held,
            "validation_size": RETRIEVED if first else min(CURVE, len(self.exam.questions)),
            "features": features if config.freeze_vision else None,
        }
        times = {
            "validate_every": 0 if first else max(train.steps // POINTS, 1),
            "save_every": max(train.steps // 4, 1),
            "keep_last": 1,
            "keep_every": 0,
        }
        return config.model_copy(
            update={
                "run": str(run or self.folder / "run"),
                "seed": seed,
                "data": config.data.model_copy(update=changes),
                "train": train.model_copy(update=times),
            }
        )

    def _store(self, config: Config) -> Path:
        """Folder of the tokens of an image encoder and a resolution, for whatever reads them."""
        eyes = config.model_copy(update={"llm": None, "text": TextConfig()})  # the image encoder alone
        seen = [
            digests(eyes) | file_digests(eyes),
            config.vision.model_dump(mode="json"),
            config.resolution.model_dump(mode="json"),
        ]
        stored = config.data.features and config.data.features.model_dump(exclude={"path"})
        data = [config.data.crop, config.data.flip, config.limits.model_dump(), stored, self.digest]
        return self.folder / "tokens" / digest([*seen, *data])

    def runs(self, name: str, system: System) -> list[Run]:
        """The runs of a system, one for each seed."""
        found = []
        for seed in self.seeds:
            first, config = system.stage_one, system.config
            if first is not None:
                own = digest([digest_config(first), self.digest])
                first = self.prepare(first, self.folder / "stage1" / f"{own}-{seed}", seed)
                config = config.model_copy(update={"init": first.run})
            own = digest([digest_config(system.config, system.stage_one), self.digest])
            found.append(Run(name, seed, self.prepare(config, self.folder / "runs" / f"{own}-{seed}", seed), first))
        return found


def _images(config: Config) -> int:
    return config.train.steps * config.train.accumulate * config.data.batch


def _require_same(configs: dict[str, Config]) -> None:
    """Refuse systems that do not train on the same data, in the same number of steps."""
    (first, one), *others = configs.items()
    for name, other in others:
        for key in SAME:
            if getattr(one.data, key) != getattr(other.data, key):
                raise UsageError(f"'{first}' and '{name}' differ in data.{key}; give one for all, as data.{key}=...")
        if (one.train.steps, one.train.accumulate) != (other.train.steps, other.train.accumulate):
            raise UsageError(
                f"'{first}' trains {one.train.steps} steps of {one.train.accumulate} batches, '{name}' "
                f"{other.train.steps} of {other.train.accumulate}; give --steps and train.accumulate=... for all"
            )


def _without_doubles(systems: Systems) -> Systems:
    """Refuse systems that are another one under a second name."""
    made: dict[str, str] = {}
    found: Systems = {}
    for name, one in systems.items():
        if isinstance(one, System):
            same = made.setdefault(digest_config(one.config, one.stage_one), name)
            one = one if same == name else Refused(f"nothing that it reads differs from '{same}'")
        found[name] = one
    return found


def _with_tokens(systems: Systems, settings: Settings, data: Shared, reference: str) -> Systems:
    """Let all systems have as many visual tokens, by default those of the reference."""
    configs = {name: one.config for name, one in systems.items() if isinstance(one, System)}
    tokens = settings.tokens or Planner(configs[reference]).mean(data.sizes)[0]
    return _changed(systems, budgets.equal_tokens(configs, data.exam.open("answers"), tokens))


def _with_flops(systems: Systems, costs: dict[str, Cost], reference: str) -> Systems:
    configs = {name: one.config for name, one in systems.items() if isinstance(one, System)}
    return _changed(systems, budgets.equal_flops(configs, costs, reference))


def _changed(systems: Systems, made: dict[str, Config | Refused]) -> Systems:
    found: Systems = {}
    for name, one in systems.items():
        new = made.get(name)
        if isinstance(one, System) and new is not None:
            one = new if isinstance(new, Refused) else one.with_config(new)
        found[name] = one
    return found


def _measure(systems: Systems, data: Shared, folder: Path) -> tuple[Systems, dict[str, Cost]]:
    """Build each system once, and measure what it costs, unless that is known; refuse those that cannot be built."""
    source = data.exam.open("answers")
    count = min(COSTED, len(source))
    rows = [source[len(source) * number // count] for number in range(count)]
    found, costs = dict(systems), {}
    for name, one in systems.items():
        if isinstance(one, Refused):
            continue
        own = digest([digest_config(one.config, one.stage_one), data.digest, data.exam.digest, COSTED, MOST])
        file = folder / "costs" / f"{own}.json"
        try:
            costs[name] = _kept(file) or _cost(one, data, rows)
        except OSError:
            raise
        except UsageError as error:
            found[name] = Refused(str(error))
        except Exception as error:  # of a class of the user, say
            found[name] = Refused(f"{type(error).__name__}: {error}")
        else:
            with writing(folder):
                file.parent.mkdir(parents=True, exist_ok=True)
                replace_text(file, json.dumps(dataclasses.asdict(costs[name])), shared=True)
    return found, costs


def _kept(file: Path) -> Cost | None:
    try:
        return Cost(**read_object(file, CostRecord)) if file.is_file() else None
    except (UsageError, TypeError):  # damaged, or of another version
        return None


def _cost(system: System, data: Shared, rows: Sequence[Sample]) -> Cost:
    config = data.prepare(system.config)
    if config.init is not None:
        config = inherit(config, checkpoint.read_config(config.init))
    torch.manual_seed(config.seed)
    model, config = build_vision_language(config)
    require_training(model.llm)
    require_room(model)
    first = system.stage_one and data.prepare(system.stage_one)
    cost = measure_cost(config, model, rows, first)
    return dataclasses.replace(cost, tokens=Planner(config, model=model).mean(data.sizes)[0])


def _head(settings: Settings, data: Shared, reference: str) -> dict[str, Any]:
    questions = data.exam.questions
    return {
        "made_by": checkpoint.provenance() | {"machine": platform.machine(), "cores": os.cpu_count()},
        "mode": settings.mode,
        "seeds": list(settings.seeds),
        "reference": reference,
        "data": {"train": data.train.model_dump(mode="json"), "images": data.images, "hash": data.digest},
        "questions": {
            "source": data.exam.data.model_dump(mode="json"),
            "hash": data.exam.digest,
            "metric": settings.metric,
            "choose": settings.choose,
            "skipped": data.skipped,
            "text": [one.text for one in questions],
            "kind": [one.kind for one in questions],
            "shows": [one.shows for one in questions],
            "skills": [one.skills for one in questions],
            "cluster": [one.cluster for one in questions],
            "pair": [one.pair for one in questions],
        },
    }


def _entry(name: str, system: System | Refused, cost: Cost | None, runs: Sequence[Run], data: Shared) -> dict[str, Any]:
    """Everything that was found about a system."""
    if isinstance(system, Refused):
        return {"name": name, "refused": system.reason}
    return {
        "name": name,
        "refused": None,
        "changes": system.changes,
        "config": dump_config(system.config),
        "stage_one": system.stage_one and dump_config(system.stage_one),
        "hash": digest_config(system.config, system.stage_one),
        "steps": system.config.train.steps,
        "images": _images(system.config),
        "stage_one_images": 0 if system.stage_one is None else _images(system.stage_one),
        "cost": None if cost is None else dataclasses.asdict(cost),
        "training_flops": None if cost is None else cost.training_flops(system.config.train.steps),
        "runs": [found.of_run(run, data.exam) for run in runs],
    }
