"""Answers to claims of papers about bridges, each from a comparison of its own by `qformer compare`.

    python benchmarks/claims.py [CLAIM ...] [--seeds 0] [--processes 2] [-o runs/claims]
    python benchmarks/claims.py --table          # of the comparisons that are there, without training

The claims and their systems are in `benchmarks/claims.yaml`. Comparisons share their runs and stored tokens, so a
system that stands in several of them is trained once; the same command goes on after any interruption. A claim is
answered for, against, or "cannot tell" from the interval of a paired difference, which holds for all systems of its
comparison together (docs/compare_statistics.md).
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict

from qformer.config import read_values
from qformer.progress import console
from qformer.stages.compare import found
from qformer.stages.compare.comparison import Settings, compare
from qformer.stages.compare.table import Row, Table, make_table, read

if TYPE_CHECKING:
    from qformer.metrics.paired import Difference

HERE = Path(__file__).parent
FOR, AGAINST, OPEN = "for", "against", "cannot tell"
Answer = Literal["for", "against", "cannot tell"]


class Claim(BaseModel):
    """A claim, and systems that answer it; see the head of `claims.yaml`."""

    model_config = ConfigDict(extra="forbid")
    says: str
    source: str
    systems: dict[str, list[str]]
    better: str = ""
    than: str = ""
    equal: float | None = None
    skill: str = ""

    @property
    def reference(self) -> str:
        return self.than or next(iter(self.systems))


class World(BaseModel):
    """Keys of every system, and the number of questions."""

    model_config = ConfigDict(extra="forbid")
    keys: list[str]
    questions: int


class Line(NamedTuple):
    """An answer with the difference that gives it: of the better system, or of the one that differs most."""

    answer: Answer
    system: str
    difference: Difference


def read_claims(path: Path = HERE / "claims.yaml") -> tuple[World, dict[str, Claim]]:
    """Read the world and the claims by name."""
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    return World(**values["world"]), {name: Claim(**value) for name, value in values["claims"].items()}


def write_systems(claim: Claim, world: World, folder: Path) -> list[str]:
    """Write a configuration for each system, named as in the table, and list the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, (base, *changes) in claim.systems.items():
        own = {change.partition("=")[0] for change in changes}
        shared = [key for key in world.keys if key.partition("=")[0] not in own]
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(read_values(f"{base}.yaml", [*shared, *changes])), encoding="utf-8")
        files.append(str(file))
    return files


def answer(claim: Claim, table: Table) -> Line:
    """Answer a claim from the table of its comparison.

    Raises:
        ValueError: a system that the answer needs was refused, or has no run.
    """
    rows = {row.name: row for row in table.rows}
    if claim.equal is None:
        one = _difference(rows[claim.better], claim)
        return Line(FOR if one.low > 0 else AGAINST if one.high < 0 else OPEN, claim.better, one)
    within = claim.equal / 100
    others = {name: _difference(row, claim) for name, row in rows.items() if name != table.reference}
    most = max(others, key=lambda name: abs(others[name].mean))
    beyond = [name for name, one in others.items() if one.low > within or one.high < -within]
    if beyond:
        return Line(AGAINST, most, others[most])
    inside = all(-within <= one.low and one.high <= within for one in others.values())
    return Line(FOR if inside else OPEN, most, others[most])


def _difference(row: Row, claim: Claim) -> Difference:
    one = row.by_skill.get(claim.skill) if claim.skill else row.difference
    if one is None:
        raise ValueError(f"'{row.name}' has no difference to '{claim.reference}': {row.note or 'it is not trained'}")
    return one


def markdown(claims: dict[str, Claim], folder: Path) -> list[str]:
    """Lines of a table in Markdown, with what each system answers and how many tokens it takes."""
    lines = [
        "| claim | answer | difference in points | smallest seen | systems: % right (visual tokens; steps to 90 %) |",
        "|---|---|---|---|---|",
    ]
    for name, claim in claims.items():
        if not (folder / "claims" / name / found.FILE).is_file():
            continue
        table = make_table(read(folder / "claims" / name), claim.reference)
        line = answer(claim, table)
        one = line.difference
        points = f"{line.system}: {100 * one.mean:+.1f} ({100 * one.low:+.1f} to {100 * one.high:+.1f})"
        seen = "; ".join(_seen(row, claim) for row in table.rows)
        said = f"{claim.says}{f', in {claim.skill}' * bool(claim.skill)} ({claim.source})"
        lines.append(f"| {said} | **{line.answer}** | {points} | {100 * one.smallest:.1f} | {seen} |")
    return lines


def _seen(row: Row, claim: Claim) -> str:
    share = row.skills.get(claim.skill) if claim.skill else row.accuracy
    if share is None:
        return f"{row.name}: {row.note}"
    near = "" if row.near is None else f"; {row.near:.0f}"
    return f"{row.name} {100 * share.mean:.1f} ({row.cost['tokens']:.0f}{near})"


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
    for name, claim in {} if given.table else chosen.items():
        own = given.output / "claims" / name
        settings = Settings(
            tuple(write_systems(claim, world, own)),
            seeds=tuple(int(seed) for seed in given.seeds.split(",")),
            questions=world.questions,
            reference=claim.reference,
            processes=given.processes,
            folder=given.output,
        )
        console.print(f"{name}: {claim.says}", markup=False)
        compare(settings)
        shutil.copy(given.output / found.FILE, own / found.FILE)
    console.print("\n".join(markdown(chosen, given.output)), markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
