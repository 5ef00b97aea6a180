"""Real processes that are killed while they index; `benchmarks/kill_gallery.py` does so twenty times."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_kills_cost_nothing(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "benchmarks/kill_gallery.py",
        "--kills",
        "3",
        "--images",
        "60",
        "--folder",
        tmp_path / "k",
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "the gallery equals one made without kills" in ended.stdout
    assert ended.stdout.count("all there") == 3
