"""Answers to claims of papers about bridges, each from a comparison of its own by `qformer compare`.

    python benchmarks/claims.py [CLAIM ...] [--seeds 0] [--processes 2] [-o runs/claims]
    python benchmarks/claims.py --table          # of the comparisons that are there, without training

The claims and their systems are in `benchmarks/claims.yaml`. Comparisons share their runs and stored tokens, so a
system that stands in several of them is trained once; the same command goes on after any interruption. A claim is
answered for, against, or "cannot tell" from the interval of a paired difference (docs/compare_statistics.md): of the
two systems and the skill that it names, or of all its systems together. Intervals do not hold for all claims of the
table together: of twenty answers about one may be wrong by chance. With one seed an answer is about the systems as they
were trained that time.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from qformer.config import read_values
from qformer.files.records import replace_text, writing
from qformer.progress import console
from qformer.stages.compare import found
from qformer.stages.compare.command import read_seeds
from qformer.stages.compare.comparison import Settings, compare
from qformer.stages.compare.questions import rows_by_skill
from qformer.stages.compare.table import BLIND, SEEN, VIEWS, Row, Table, make_table, read
from qformer.types import UsageError

if TYPE_CHECKING:
    from qformer.metrics.paired import Difference

HERE = Path(__file__).parent
FOR, AGAINST, OPEN = "for", "against", "cannot tell"
Answer = Literal["for", "against", "cannot tell"]
Points = Field(default=0.0, ge=0, le=100)


class Claim(BaseModel):
    """A claim, and systems that answer it; see the head of `claims.yaml`."""

    model_config = ConfigDict(extra="forbid")
    says: str
    source: str
    systems: dict[str, list[str]] = Field(min_length=2)
    better: str = ""
    than: str = ""
    within: float = Points
    equal: float = Points
    differ: float = Points
    skill: str = ""
    flops: str = ""

    @model_validator(mode="after")
    def _can_be_answered(self) -> Self:
        named = [one for one in (self.better, self.than, self.flops) if one]
        if unknown := set(named) - {*self.systems, *([BLIND] if self.blind else [])}:
            raise ValueError(f"'{min(unknown)}' is none of its systems: {', '.join(self.systems)}")
        if (
            bool(self.better) != bool(self.than)
            or [bool(self.better), self.equal > 0, self.differ > 0].count(True) != 1
        ):
            raise ValueError("give one of: better with than, equal, differ")
        return self

    @property
    def blind(self) -> bool:
        """True where a system is compared with itself when it is shown gray pictures."""
        return self.than == BLIND

    @property
    def reference(self) -> str:
        return self.than or next(iter(self.systems))


class World(BaseModel):
    """Keys of every system, and the number of questions."""

    model_config = ConfigDict(extra="forbid")
    keys: list[str]
    questions: int


class Line(NamedTuple):
    """An answer with the difference that gives it: of the better system, or of the one that decides."""

    answer: Answer
    system: str
    difference: Difference


def read_claims(path: Path = HERE / "claims.yaml") -> tuple[World, dict[str, Claim]]:
    """Read the world and the claims by name."""
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    return World(**values["world"]), {name: Claim(**value) for name, value in values["claims"].items()}


def write_systems(claim: Claim, world: World, folder: Path) -> list[str]:
    """Write a configuration for each system, named as in the table, and list the files."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, (base, *changes) in claim.systems.items():
        own = {change.partition("=")[0] for change in changes}
        shared = [key for key in world.keys if key.partition("=")[0] not in own]
        file = folder / f"{name}.yaml"
        replace_text(file, yaml.safe_dump(read_values(f"{base}.yaml", [*shared, *changes])))
        files.append(str(file))
    return files


def answer(claim: Claim, table: Table) -> Line:
    """Answer a claim from the table of its comparison, of the questions of its skill (`of_skill`).

    Raises:
        UsageError: a system that the answer needs was refused, or has no run.
    """
    rows = {row.name: row for row in table.rows}
    if claim.better:
        one, margin = _difference(rows[claim.better], claim), claim.within / 100
        return Line(FOR if one.low > -margin else AGAINST if one.high < -margin else OPEN, claim.better, one)
    margin = (claim.equal or claim.differ) / 100
    others = {name: _difference(row, claim) for name, row in rows.items() if name != claim.reference}
    most = max(others, key=lambda name: max(others[name].low, -others[name].high))  # surely so far from the reference
    if max(others[most].low, -others[most].high) > margin:
        return Line(AGAINST if claim.equal else FOR, most, others[most])
    most = max(others, key=lambda name: max(-others[name].low, others[name].high))  # perhaps so far from it
    inside = max(-others[most].low, others[most].high) <= margin
    return Line(OPEN if not inside else FOR if claim.equal else AGAINST, most, others[most])


def _difference(row: Row, claim: Claim) -> Difference:
    if row.difference is None:
        raise UsageError(f"'{row.name}' has no difference to '{claim.reference}': {row.note or 'it is not trained'}")
    return row.difference


def of_skill(whole: dict[str, Any], skill: str) -> dict[str, Any]:
    """A comparison of the questions of one skill alone: a claim names it beforehand, so others need no correction.

    Raises:
        UsageError: no question needs that skill.
    """
    asked = whole["questions"]
    skills = rows_by_skill(asked["kind"], asked["shows"], asked["skills"])
    if skill not in skills:
        raise UsageError(f"no question is of the skill '{skill}'; there are {', '.join(skills)}")
    kept = copy.deepcopy(whole)
    for columns in (kept["questions"], *(run for one in kept["systems"] for run in one.get("runs", []))):
        for name in ("kind", "shows", "skills", "cluster", "pair", *VIEWS):
            if columns.get(name):
                columns[name] = [columns[name][row] for row in skills[skill]]
    return kept


def of_pair(whole: dict[str, Any], claim: Claim) -> dict[str, Any]:
    """A comparison of the two systems that a claim names, if it does: others then need no correction either.

    The blind one is the better one with its answers to gray pictures.
    """
    named = (claim.better, claim.than) if claim.better else claim.systems
    kept = [one for one in whole["systems"] if one["name"] in named]
    if claim.blind:
        kept += [
            one | {"name": BLIND, "runs": [run | {SEEN: run.get(BLIND, [])} for run in one.get("runs", [])]}
            for one in kept
        ]
    return whole | {"systems": kept}


def markdown(claims: dict[str, Claim], world: World, folder: Path) -> list[str]:
    """Lines of a table in Markdown, with what each system answers and how many tokens it takes."""
    head = (
        "claim",
        "answer",
        "seeds",
        "difference in points",
        "smallest seen",
        "systems: % right (tokens; steps to 90 %)",
    )
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, claim in claims.items():
        own = folder / "claims" / name
        if not (own / found.FILE).is_file():
            continue
        said = f"{claim.says}{f', in {claim.skill}' * bool(claim.skill)} ({claim.source})"
        try:
            whole = read(own)
            if whole.get("claim") != _asked(claim, world):
                raise UsageError("its systems have changed since; run it again")
            asked = of_skill(whole, claim.skill) if claim.skill else whole
            table = make_table(asked, None if claim.blind else claim.reference)
            line = answer(claim, make_table(of_pair(asked, claim), claim.reference))
        except UsageError as fault:
            lines.append(f"| {said} | not answered: {fault} | | | | |")
            continue
        one, seeds = line.difference, {row.name: len(row.seeds) for row in table.rows}[line.system]
        points = f"{line.system}: {100 * one.mean:+.1f} ({100 * one.low:+.1f} to {100 * one.high:+.1f})"
        seen = "; ".join(map(_seen, table.rows))
        lines.append(f"| {said} | **{line.answer}** | {seeds} | {points} | {100 * one.smallest:.1f} | {seen} |")
    return lines


def _seen(row: Row) -> str:
    if row.accuracy is None:
        return f"{row.name}: {row.note}"
    near = "" if row.near is None else f"; {row.near:.0f}"
    blind = "" if row.blind is None else f", blind {100 * row.blind.mean:.1f}"
    return f"{row.name} {100 * row.accuracy.mean:.1f}{blind} ({row.cost['tokens']:.0f}{near})"


def _asked(claim: Claim, world: World) -> dict[str, Any]:
    """Everything of a claim that its comparison depends on."""
    return {"systems": claim.systems, "flops": claim.flops, "world": world.model_dump()}


def train(claim: Claim, world: World, settings: Settings, own: Path) -> None:
    """Compare the systems of a claim; a fault is said, and costs no other claim.

    Args:
        settings: those of all claims. own: folder of what is found.
    """
    console.print(f"{own.name}: {claim.says}", markup=False)
    own_settings = dataclasses.replace(
        settings,
        words=tuple(write_systems(claim, world, own)),
        mode="flops" if claim.flops else "published",
        reference=claim.flops or (None if claim.blind else claim.reference),
        blind=claim.blind,
    )
    try:
        whole = compare(own_settings)
        replace_text(own / found.FILE, json.dumps(whole | {"claim": _asked(claim, world)}))
    except UsageError as fault:
        console.print(f"{own.name}: {fault}", markup=False, soft_wrap=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claims", nargs="*", metavar="CLAIM")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/claims"))
    given = parser.parse_args()
    world, claims = read_claims()
    if unknown := set(given.claims) - set(claims):
        parser.error(f"no claim '{min(unknown)}'; there are {', '.join(claims)}")
    chosen = {name: claims[name] for name in given.claims or claims}
    try:
        seeds = read_seeds(given.seeds)
    except UsageError as fault:
        parser.error(str(fault))
    for name, claim in {} if given.table else chosen.items():
        settings = Settings((), seeds=seeds, questions=world.questions, processes=given.processes, folder=given.output)
        train(claim, world, settings, given.output / "claims" / name)
    console.print("\n".join(markdown(chosen, world, given.output)), markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
