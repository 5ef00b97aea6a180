"""The parts of `benchmarks/cost.py`: counts of a preset, a measured first token, and the table."""

from __future__ import annotations

import runpy
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

COST: dict[str, Any] = runpy.run_path(str(Path(__file__).parent.parent.parent / "benchmarks" / "cost.py"))


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    found = COST["counted"]("system_llava15")
    return found[:1]


def test_a_row_is_counted_and_measured(rows: list[dict[str, Any]]) -> None:
    (row,) = rows
    assert (row["preset"], row["size"], row["tiles"], row["tokens"]) == ("system_llava15", [224, 224], 1, 36)
    # an MLP from 96 to 128 and 128 to 128 on 36 tokens, see the mini towers
    model = COST["build"]("system_llava15")
    first, last = (model.connector.get_parameter(name) for name, p in model.connector.named_parameters() if p.ndim == 2)
    assert row["connector"] == 2 * 36 * (first.numel() + last.numel())
    COST["measured"](rows, 1)
    assert 0 < row["cpu_seconds"] < 60
    assert 0 < row["estimate"] < row["cpu_seconds"]  # other things than matrix products take time too
    assert row["megabytes"] >= 0
    out = StringIO()
    Console(file=out, width=140).print(COST["show"](rows, 1e9, "GFLOP"))
    assert "224 x 224" in out.getvalue()
    assert f"{1e3 * row['cpu_seconds']:,.0f}" in out.getvalue()


def test_what_does_not_fit_is_refused(rows: list[dict[str, Any]]) -> None:
    found = [{key: rows[0][key] for key in ("preset", "size", "tiles", "tokens")} | {"refused": "too long"}]
    COST["measured"](found, 1)
    assert "seconds" not in found[0]
    out = StringIO()
    Console(file=out, width=140).print(COST["show"](found, 1e9, "GFLOP"))
    assert "refused" in out.getvalue()
