"""`load` is `build(open_checkpoint(path))`, whatever form the checkpoint has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import qformer
from qformer.checkpoints.convert import convert_checkpoint
from qformer.checkpoints.loading import build, open_checkpoint
from qformer.checkpoints.parts import LoadOptions
from qformer.types import UsageError
from tests.fixtures import reading
from tests.their_blip2 import make


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each form."""
    root = reading.copy(tmp_path_factory.mktemp("old"))
    make("opt", root / "theirs")
    convert_checkpoint(str(root / "theirs"), root / "held", "qformer", LoadOptions())
    return {"stage1": root / "stage1", "stage2": root / "stage2", "held": root / "held", "theirs": root / "theirs"}


@pytest.mark.parametrize("form", ["stage1", "stage2", "held", "theirs"])
def test_every_form_is_opened_and_then_built(forms: dict[str, Path], form: str) -> None:
    opened = open_checkpoint(forms[form], {})
    assert opened.parts.stage == opened.config.stage == ("stage1" if form == "stage1" else "stage2")
    assert (opened.folder is not None) == (form != "theirs")
    assert bool(opened.parts.vision) == bool(opened.parts.llm) == (form == "theirs")  # ours names its towers
    expected, built = qformer.load(forms[form], "cpu").state_dict(), build(opened, "cpu")
    assert not built.training
    assert built.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in built.state_dict().items())
    names = {name for name, parameter in built.named_parameters() if parameter.requires_grad}
    assert names == opened.parts.bridge.keys()


def test_sizes_are_for_checkpoints_that_leave_them_open(forms: dict[str, Path]) -> None:
    message = r"'.*stage1' is a checkpoint of qformer, which knows its sizes; leave heads out"
    with pytest.raises(UsageError, match=message):
        qformer.load(forms["stage1"], "cpu", heads=2)
    with pytest.raises(UsageError, match=message):
        convert_checkpoint(str(forms["stage1"]), forms["stage1"].parent / "new", "lavis", LoadOptions(heads=2))
