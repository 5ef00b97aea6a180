"""Answers to claims: what intervals say, questions of one skill, systems that can be built, what is not answered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from benchmarks import claims
from benchmarks.claims import AGAINST, FOR, OPEN, Claim, World, answer, markdown, of_skill, read_claims, write_systems
from qformer.metrics.paired import Difference
from qformer.stages.compare.comparison import Settings
from qformer.stages.compare.systems import System, read_systems
from qformer.stages.compare.table import COSTS, Row, Table
from qformer.types import UsageError

WORLD = World(keys=["data.batch=16"], questions=4)


def claim(**more: Any) -> Claim:
    return Claim(says="b helps", source="a paper", systems={"a": ["one"], "b": ["two"], "c": ["three"]}, **more)


def table(**intervals: tuple[float, float]) -> Table:
    """A table with these intervals of differences to `a`, in points."""
    rows = [
        Row(name, difference=Difference((low + high) / 200, low / 100, high / 100, 0.1, 0.5))
        for name, (low, high) in intervals.items()
    ]
    return Table("published", "a", 4, 4, [Row("a"), *rows], [], {})


@pytest.mark.parametrize(
    ("more", "b", "c", "expected"),
    [
        ({"better": "b", "than": "a"}, (1, 9), (-9, -1), (FOR, "b")),
        ({"better": "b", "than": "a"}, (-9, -1), (1, 9), (AGAINST, "b")),
        ({"better": "b", "than": "a"}, (-1, 9), (1, 9), (OPEN, "b")),
        ({"better": "b", "than": "a", "within": 5}, (-4, 2), (-9, 9), (FOR, "b")),
        ({"better": "b", "than": "a", "within": 5}, (7, 9), (-9, 9), (FOR, "b")),  # better is no loss
        ({"better": "b", "than": "a", "within": 5}, (-9, -4), (-9, 9), (OPEN, "b")),
        ({"better": "b", "than": "a", "within": 5}, (-9, -6), (-9, 9), (AGAINST, "b")),
        ({"equal": 5}, (-4, 2), (-1, 5), (FOR, "c")),
        ({"equal": 5}, (-4, 2), (-1, 6), (OPEN, "c")),
        ({"equal": 5}, (-9, -6), (-1, 20), (AGAINST, "b")),  # c may differ by more, and b surely does
        ({"differ": 5}, (-9, -6), (-1, 20), (FOR, "b")),
        ({"differ": 5}, (-4, 2), (-1, 6), (OPEN, "c")),
        ({"differ": 5}, (-4, 2), (-3, 3), (AGAINST, "b")),
    ],
)
def test_intervals_answer(
    more: dict[str, Any], b: tuple[float, float], c: tuple[float, float], expected: tuple[str, str]
) -> None:
    assert answer(claim(**more), table(b=b, c=c))[:2] == expected


def test_a_refused_system_answers_nothing() -> None:
    refused = Table("published", "a", 4, 4, [Row("a"), Row("b", "refused: too long"), Row("c")], [], {})
    for more in ({"better": "b", "than": "a"}, {"equal": 5}):
        with pytest.raises(UsageError, match="'b' has no difference to 'a': refused: too long"):
            answer(claim(**more), refused)


@pytest.mark.parametrize(
    "more", [{}, {"better": "b"}, {"better": "b", "than": "d"}, {"equal": 5, "differ": 5}, {"equal": 5, "flops": "d"}]
)
def test_claims_that_cannot_be_answered(more: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"none of its systems|give one of"):
        claim(**more)


def found(right: dict[str, list[int]], **more: Any) -> dict[str, Any]:
    """What a comparison of one seed leaves of 40 questions, of which every other one is of counting."""
    run = {"seed": 0, "status": "trained", "reason": "", "answers_refused": 0, "curve": []}
    cost = dict.fromkeys(COSTS.split(), 1.0) | {"tokens": 36.0, "peak_bytes": 1.0}
    system = {"refused": None, "cost": cost, "training_flops": 1.0, "steps": 1, "images": 1}
    system |= {"stage_one_images": 0, "hash": ""}
    questions = {"cluster": list(range(40)), "kind": ["count", "word"] * 20, "shows": [""] * 40, "pair": [None] * 40}
    return {
        "mode": "published",
        "made_by": {},
        "reference": "a",
        "data": {"images": 1, "hash": ""},
        "questions": questions | {"skills": [["counting"], ["reading"]] * 20},
        "systems": [system | {"name": name, "runs": [run | {"answers": own}]} for name, own in right.items()],
        "retrieval": [],
    } | more


def test_a_skill_is_answered_by_its_questions_alone() -> None:
    """B counts and does not read; the interval is that of a comparison in which nothing else was asked."""
    whole = found({"a": [0] * 40, "b": [1, 0] * 20})
    kept = of_skill(whole, "count")
    assert kept["questions"]["kind"] == ["count"] * 20
    assert [one["runs"][0]["answers"] for one in kept["systems"]] == [[0] * 20, [1] * 20]
    assert len(whole["questions"]["kind"]) == 40
    one = Claim(
        says="b counts", source="a paper", systems={"a": ["one"], "b": ["two"]}, better="b", than="a", skill="count"
    )
    made = claims.make_table(kept, "a")
    assert answer(one, made).difference.mean == 1
    assert made.rows[1].by_skill == {}
    with pytest.raises(UsageError, match="no question is of the skill 'taste'"):
        of_skill(whole, "taste")


def test_a_system_is_compared_with_its_blind_self(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """B sees as much as a does and more than it knows blind; of a nothing is claimed."""
    one = claim(better="b", than="blind")
    whole = found({"a": [1] * 40, "b": [1] * 20 + [0] * 20}, claim=claims._asked(one, WORLD))
    for system, blind in zip(whole["systems"], ([1] * 40, [1] * 2 + [0] * 38), strict=True):
        system["runs"][0]["blind"] = blind
    (tmp_path / "claims" / "sees").mkdir(parents=True)
    (tmp_path / "claims" / "sees" / "comparison.json").write_text(json.dumps(whole))
    line = markdown({"sees": one}, WORLD, tmp_path)[2]
    assert line.startswith("| b helps (a paper) | **for** | 1 | b: +45.0 (")
    assert line.endswith("| a 100.0, blind 100.0 (36); b 50.0, blind 5.0 (36) |")
    given: list[Settings] = []
    monkeypatch.setattr(claims, "compare", lambda settings: given.append(settings) or whole)
    monkeypatch.setattr(claims, "read_values", lambda *_: {})
    claims.train(one, WORLD, Settings(()), tmp_path / "asked")
    assert (given[0].blind, given[0].reference) == (True, None)


def test_a_table_says_what_is_not_answered(tmp_path: Path) -> None:
    """One claim that is answered, one whose systems have changed, one with a refused system, and one not asked."""
    one = claim(better="b", than="a")
    asked = {"claim": claims._asked(one, WORLD)}
    right = {"a": [0] * 40, "b": [1] * 20 + [0] * 20}
    whole = found(right | {"c": [0, 1] * 20}, **asked)
    refused = found({"a": [0] * 40}, **asked)
    refused["systems"].append({"name": "b", "refused": "it is too large"})
    for name, own in (("answered", whole), ("changed", whole | {"claim": {}}), ("refused", refused)):
        (tmp_path / "claims" / name).mkdir(parents=True)
        (tmp_path / "claims" / name / "comparison.json").write_text(json.dumps(own))
    lines = markdown(dict.fromkeys(("answered", "changed", "refused", "unasked"), one), WORLD, tmp_path)[2:]
    alone = claims.make_table(found(right)).rows[1].difference  # as if nobody had trained c
    assert alone is not None
    points = f"b: +50.0 ({100 * alone.low:+.1f} to {100 * alone.high:+.1f})"
    assert lines[0].startswith(f"| b helps (a paper) | **for** | 1 | {points} | ")
    assert lines[0].endswith("| a 0.0 (36); b 50.0 (36); c 50.0 (36) |")
    assert "not answered: its systems have changed since" in lines[1]
    assert "not answered: 'b' has no difference to 'a': refused: it is too large" in lines[2]
    assert len(lines) == 3


def test_a_fault_costs_no_other_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is written of a comparison that ended with a sentence; the budget is that of the system that is named."""
    given: list[Settings] = []

    def compare(settings: Settings) -> dict[str, Any]:
        given.append(settings)
        raise UsageError("none of the systems can be built")

    monkeypatch.setattr(claims, "compare", compare)
    monkeypatch.setattr(claims, "read_values", lambda *_: {})
    claims.train(claim(better="b", than="a", flops="b"), WORLD, Settings(()), tmp_path / "flops")
    claims.train(claim(equal=5), WORLD, Settings(()), tmp_path / "plain")
    assert [(one.mode, one.reference) for one in given] == [("flops", "b"), ("published", "a")]
    assert [Path(word).name for word in given[0].words] == ["a.yaml", "b.yaml", "c.yaml"]
    assert not list(tmp_path.rglob("comparison.json"))
    assert capsys.readouterr().out.count("none of the systems can be built") == 2


def test_systems_of_the_shipped_claims_can_be_built(tmp_path: Path) -> None:
    """They train on the same data for as many steps, at one rate; those of a claim differ from each other."""
    world, known = read_claims()
    assert len(known) > 15
    alike = set()
    for name, one in known.items():
        systems = read_systems(write_systems(one, world, tmp_path / name), [])
        assert list(systems) == list(one.systems)
        assert all(isinstance(system, System) for system in systems.values()), systems
        configs = [system.config for system in systems.values() if isinstance(system, System)]
        assert len({config.model_dump_json() for config in configs}) + (name.startswith("stage_one")) == len(configs)
        assert len({str(config.data.validation) for config in configs}) == 1
        alike |= {str(config.data.train) + str(config.data.batch) + str(config.train) for config in configs}
    assert len(alike) == 1
