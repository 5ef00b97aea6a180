"""Runs of every mini preset: killed by the system and continued, and on stored tokens in place of pictures."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qformer.checkpoints import folder as checkpoint
from tests.stages.test_resume import kill_when
from tests.stages.test_systems import SHORT, SYSTEMS, losses, mini

STEPS = 6
SAVES = "train.save_every=2"
OFTEN = ("oryx", "qwen2vl", "blip2 stage1")
#: Every preset; the usual ones, whose parts other tests resume and store too, weekly.
EACH = [pytest.param(name, marks=() if name in OFTEN else pytest.mark.weekly) for name in (*SYSTEMS, "blip2 stage1")]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums over more threads may differ in the last bit, and the killed runs have one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def kill(name: str, run: Path, *overrides: str) -> None:
    """Train a preset in a process of its own, and end it by SIGKILL when it has saved its second step."""
    words = [f"configs/system_{name}.yaml", f"run={run}", f"train.steps={STEPS}", *SHORT, SAVES, *overrides]
    process = subprocess.Popen(
        [sys.executable, "-m", "qformer", "train", *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parent.parent.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    kill_when(process, lambda: any(checkpoint.complete(run)))


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH)
def test_killed_runs_end_with_the_same_bits_and_stored_tokens_train_alike(tmp_path: Path, name: str) -> None:
    name, _, stage = name.partition(" ")
    more = [f"stage={stage}", "train.precision=fp32"] if stage else []
    whole, cut, stored = (tmp_path / which for which in ("whole", "cut", "stored"))
    mini(name, whole, STEPS, SAVES, *more)
    kill(name, cut, *more)
    assert max(int(folder.name[-7:]) for folder in checkpoint.complete(cut)) < STEPS
    mini(name, cut, STEPS, SAVES, *more)
    assert losses(cut) == losses(whole)
    assert len(losses(whole)) == STEPS
    mine, theirs = (checkpoint.read(run / "checkpoints" / f"step-{STEPS:07d}").tensors for run in (cut, whole))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    mini(name, stored, STEPS, *more, f"data.features={tmp_path / 'store'}")
    assert losses(stored) == pytest.approx(losses(whole), rel=5e-3)
