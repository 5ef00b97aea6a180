"""The notebook of the documentation, from its first cell to its last, in a few steps of training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.notebook import run

NOTEBOOK = Path(__file__).parent.parent.parent / "docs" / "walkthrough.ipynb"
FEW = "first_steps, second_steps, scenes = 3, 2, 12"


@pytest.mark.slow
def test_the_walk_through_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    names = run(notebook, FEW)
    assert sorted(path.name for path in (tmp_path / "runs" / "walkthrough").iterdir()) == ["drawn.png", "opt", "stage1"]
    assert sorted(names["reranked"][0].tolist()) == sorted(names["candidates"][0].tolist())
    pictures = [
        out for cell in notebook["cells"] for out in cell.get("outputs", ()) if "image/png" in out.get("data", {})
    ]
    assert len(pictures) == 7


def test_the_committed_notebook_is_small_and_was_run_in_order() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert NOTEBOOK.stat().st_size < 300_000
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not [out for cell in cells for out in cell["outputs"] if out["output_type"] == "error"]
