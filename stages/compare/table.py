"""The table of a comparison, computed from `comparison.json` alone: equal files give equal digits."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import numpy as np
from pydantic import Field, FiniteFloat

from qformer.files.records import Form, Point, form_of, read_object
from qformer.metrics.paired import holm, paired_difference, share_interval
from qformer.stages.compare.found import FILE
from qformer.stages.compare.questions import TWINS, rows_by_skill, rows_of_pairs
from qformer.stages.compare.systems import find_reference
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from qformer.metrics.paired import Difference, Interval

NEAR = 0.9  # of the final accuracy
SEEN, BLIND = VIEWS = ("answers", "blind")
Scores = dict[int, list[float]]  # of every question, by seed
Share = Annotated[float, Field(ge=0, le=1)]
COSTS = "tokens trained encoder_flops connector_flops prefill_flops step_flops first_token_seconds images_per_second"
Costs, Recalls = form_of(FiniteFloat, f"{COSTS} peak_bytes"), form_of(Share, "i2t_r1 t2i_r1 i2t_r10 t2i_r10")
#: By name, what takes some columns of scores [seeds, questions], and the image of each.
Views: TypeAlias = "dict[str, tuple[Callable[[np.ndarray], np.ndarray], np.ndarray]]"


class RunEntry(Form):
    """A run in `comparison.json`; without answers where it came to nothing."""

    seed: int
    status: str
    reason: str
    answers: list[Share] = Field(default=[])
    blind: list[Share] = Field(default=[])
    answers_refused: int = 0
    curve: list[Point]


class SystemEntry(Form):
    """A system in `comparison.json`; with a reason in `refused` and without anything else, or with all."""

    name: str
    refused: str | None
    hash: str = ""
    cost: Costs | None = None  # type: ignore[valid-type]
    training_flops: FiniteFloat | None = None
    steps: int | None = None
    images: int | None = None
    stage_one_images: int | None = None
    runs: list[RunEntry] = Field(default=[])


class QuestionsEntry(Form):
    """The questions in `comparison.json`, column by column."""

    kind: list[str]
    shows: list[str]
    skills: list[list[str]]
    cluster: list[int]
    pair: list[int | None]


class RetrievalEntry(Form):
    """Recalls of a stage one in `comparison.json`."""

    systems: list[str]
    bridge: Recalls  # type: ignore[valid-type]
    linear: Recalls | None  # type: ignore[valid-type]


class DataEntry(Form):
    """The training data in `comparison.json`."""

    images: int
    hash: str


class Found(Form):
    """Contents of `comparison.json`."""

    mode: Literal["published", "tokens", "flops"]
    reference: str
    data: DataEntry
    made_by: dict[str, str | int | None]
    questions: QuestionsEntry
    systems: list[SystemEntry]
    retrieval: list[RetrievalEntry]


@dataclass(frozen=True)
class Row:
    """A system in the table; shares are in 0..1, what is not known is None.

    Attributes:
        note: why it has no numbers, or which of its seeds has none.
        seeds: those that were trained to the end.
        accuracy: of all questions. skills: of some of them, by name; pairs of twins as `TWINS`.
        blind: accuracy with gray pictures.
        difference: to the reference, corrected for the number of systems; p is that of the whole family (Holm).
        by_skill: differences by skill, corrected for the number of systems and skills; so is p.
        cost: fields of `qformer.stages.compare.costs.Cost`.
        near: mean step at which `NEAR` of the final accuracy of the curve is reached.
        refused: questions per seed that it could not be asked, which count as wrong.
        curves: (step, accuracy, or loss where there is none) of each seed; `curve` says which.
    """

    name: str
    note: str = ""
    seeds: list[int] = field(default_factory=list)
    accuracy: Interval | None = None
    skills: dict[str, Interval] = field(default_factory=dict)
    blind: Interval | None = None
    difference: Difference | None = None
    by_skill: dict[str, Difference] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)
    training_flops: float | None = None
    steps: int | None = None
    images: int | None = None
    stage_one_images: int | None = None
    near: float | None = None
    refused: float = 0.0
    hash: str = ""
    data: str = ""
    curves: list[list[tuple[int, float]]] = field(default_factory=list)
    curve: str = "accuracy"


@dataclass(frozen=True)
class Retrieval:
    """Recall of a stage one and of the linear map of its frozen towers, means over seeds in 0..1."""

    systems: list[str]
    bridge: dict[str, float]
    linear: dict[str, float] | None

    @property
    def loses(self) -> bool:
        """True where the bridge is behind the linear map in the mean of both directions at rank one."""
        return self.linear is not None and _first(self.bridge) < _first(self.linear)


def _first(recalls: dict[str, float]) -> float:
    return recalls["i2t_r1"] + recalls["t2i_r1"]


@dataclass(frozen=True)
class Table:
    """All rows, in the order of the systems, and what they have in common."""

    mode: str
    reference: str
    questions: int
    images: int
    rows: list[Row]
    retrieval: list[Retrieval]
    made_by: dict[str, Any]

    def as_data(self) -> dict[str, Any]:
        """Plain data, as `--json` prints them."""
        return dataclasses.asdict(self) | {
            "retrieval": [dataclasses.asdict(one) | {"loses": one.loses} for one in self.retrieval]
        }


def read(folder: Path) -> dict[str, Any]:
    """Contents of the `comparison.json` of a folder. Raises UsageError: it has none, or not as it was written."""
    if not (folder / FILE).is_file():
        raise UsageError(f"'{folder}' holds no {FILE}; give the folder of a comparison that has ended")
    found = read_object(folder / FILE, Found)
    count = len(found["questions"]["cluster"])
    columns = [found["questions"][name] for name in QuestionsEntry.model_fields]
    scores = [run[view] for one in found["systems"] for run in one.get("runs", []) for view in VIEWS if run.get(view)]
    if not count or {len(column) for column in columns + scores} != {count}:
        raise UsageError(
            f"'{folder / FILE}' is not as it was written (its {count} questions have other numbers of scores)"
        )
    return found


def make_table(found: dict[str, Any], reference: str | None = None) -> Table:
    """Compute the table from what was found.

    Args:
        reference: in place of that of the comparison.

    Raises:
        UsageError: there is no such reference, or it has no numbers to compare with.
    """
    questions = found["questions"]
    clusters = np.array(questions["cluster"])
    named = [one["name"] for one in found["systems"]]
    chosen = find_reference(reference or found["reference"], named)
    scores = {one["name"]: _scores(one, SEEN) for one in found["systems"]}
    if reference is not None and not scores[chosen]:
        raise UsageError(f"the reference '{chosen}' has no answers to compare with; give another with --reference")
    skills = rows_by_skill(questions["kind"], questions["shows"], questions["skills"])
    pairs = rows_of_pairs(questions["pair"])
    views: Views = {name: (_columns(rows), clusters[rows]) for name, rows in skills.items()}
    if pairs:
        views[TWINS] = (_of_pairs(list(pairs.values())), np.arange(len(pairs)))
    compared = [name for name in named if scores[name] and scores[chosen] and name != chosen]
    rows = [_row(one, found, scores[one["name"]], clusters, views) for one in found["systems"]]
    whole: Views = {"": ((lambda every: every), clusters)}
    differences = _differences(scores, chosen, compared, whole)
    by_skill = _differences(scores, chosen, compared, views)
    rows = [
        dataclasses.replace(
            row,
            difference=differences.get(("", row.name)),
            by_skill={skill: one for (skill, name), one in by_skill.items() if name == row.name},
        )
        for row in rows
    ]
    return Table(
        mode=found["mode"],
        reference=chosen,
        questions=len(clusters),
        images=found["data"]["images"],
        rows=rows,
        retrieval=_retrieval(found["retrieval"]),
        made_by=found["made_by"],
    )


def _scores(system: dict[str, Any], view: str) -> Scores:
    return {run["seed"]: run[view] for run in system.get("runs", []) if run.get(view)}


def _columns(rows: list[int]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda scores: scores[:, rows]


def _of_pairs(pairs: list[list[int]]) -> Callable[[np.ndarray], np.ndarray]:
    """A pair of twins earns what the worse of its answers earns."""
    return lambda scores: np.stack([scores[:, rows].min(axis=1) for rows in pairs], axis=1)


def _differences(
    scores: dict[str, Scores], reference: str, compared: Sequence[str], views: Views
) -> dict[tuple[str, str], Difference]:
    """Paired differences by view and name, on the seeds that both systems have; all of them are one family."""
    found = {}
    for (view, (choose, clusters)), name in itertools.product(views.items(), compared):
        shared = sorted(scores[name].keys() & scores[reference].keys())
        if shared:
            ours, theirs = (choose(np.array([scores[one][seed] for seed in shared])) for one in (name, reference))
            found[view, name] = paired_difference(ours, theirs, clusters, len(compared) * len(views))
    corrected = holm([one.p for one in found.values()])
    return {key: dataclasses.replace(one, p=p) for (key, one), p in zip(found.items(), corrected, strict=True)}


def _row(
    system: dict[str, Any],
    found: dict[str, Any],
    scores: Scores,
    clusters: np.ndarray,
    views: Views,
) -> Row:
    if system["refused"] is not None:
        return Row(system["name"], f"refused: {system['refused']}")
    known: dict[str, Any] = {key: system.get(key) for key in ("training_flops", "steps", "images", "stage_one_images")}
    row = Row(
        name=system["name"],
        note=_note(system.get("runs", []), scores),
        seeds=sorted(scores),
        cost=system.get("cost") or {},
        hash=system.get("hash", ""),
        data=found["data"]["hash"],
        **known,
    )
    if not scores:
        return row
    values = np.array([scores[seed] for seed in row.seeds])
    blind = _scores(system, BLIND)
    ended = [run for run in system["runs"] if run["seed"] in scores]
    points = [point for run in ended for point in run["curve"]]
    kind = "accuracy" if all("accuracy" in point for point in points) else "loss"
    curves = [[(int(one["step"]), one[kind]) for one in run["curve"] if kind in one] for run in ended]
    near = [step for run in ended if (step := _near(run["curve"])) is not None]
    return dataclasses.replace(
        row,
        accuracy=share_interval(values, clusters),
        skills={name: share_interval(view(values), own) for name, (view, own) in views.items()},
        blind=share_interval(np.array([blind[seed] for seed in sorted(blind)]), clusters) if blind else None,
        near=sum(near) / len(near) if near else None,
        refused=sum(run.get(f"{SEEN}_refused", 0) for run in ended) / len(scores),
        curves=[curve for curve in curves if curve],
        curve=kind,
    )


def _note(runs: Sequence[dict[str, Any]], scores: Scores) -> str:
    lost = [run for run in runs if run["seed"] not in scores]
    told = [f"seed {run['seed']} {run['status']}: {run['reason']}" for run in lost]
    same = {(run["status"], run["reason"]) for run in lost}
    if len(lost) == len(runs) and len(same) == 1:
        return "{}: {}".format(*same.pop())
    return "; ".join(told)


def _near(points: Sequence[dict[str, float]]) -> int | None:
    """The first step at which a curve of accuracy reaches `NEAR` of its end; None without such a curve."""
    known = [point for point in points if 0 <= point.get("accuracy", -1) <= 1]
    if not known or not known[-1]["accuracy"]:
        return None
    return next(int(point["step"]) for point in known if point["accuracy"] >= NEAR * known[-1]["accuracy"])


def _retrieval(records: Sequence[dict[str, Any]]) -> list[Retrieval]:
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(tuple(record["systems"]), []).append(record)
    return [
        Retrieval(
            list(systems),
            _mean([one["bridge"] for one in own]),
            _mean([one["linear"] for one in own]) if all(one["linear"] for one in own) else None,
        )
        for systems, own in groups.items()
    ]


def _mean(tables: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: sum(one[key] for one in tables) / len(tables) for key in Recalls.model_fields}
