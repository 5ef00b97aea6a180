"""Devices that this machine has, and a sentence for the others."""

from __future__ import annotations

import pytest
import torch

import qformer
from qformer import devices
from qformer.types import UsageError


def test_a_device_by_its_name() -> None:
    assert devices.choose("cpu") == devices.choose("cpu:0") == torch.device("cpu")
    assert devices.choose(None).type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["cuda", "cuda:3", "mps", "xpu", "meta", "gpu", "cuda:x", "", 7])
def test_one_that_is_not_there_is_a_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is read, by the library as on the command line."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for choose in (devices.choose, lambda device: qformer.load("nowhere", device)):
        with pytest.raises(UsageError) as raised:
            choose(name)
        assert str(raised.value).startswith(f"device is '{name}'")
        assert "\n" not in str(raised.value)
