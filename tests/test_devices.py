"""Devices that this machine has, and a sentence for the others."""

from __future__ import annotations

from pathlib import Path

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


def test_the_fastest_precision_of_a_kind_of_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for features, taken in (({"avx2", "avx512_bf16"}, "bf16"), ({"amx_bf16"}, "bf16"), ({"avx512_f", "bf16"}, "fp32")):
        monkeypatch.setattr(devices, "cpu_features", lambda features=features: features)
        assert devices.fastest_precision("cpu")[0] == taken
    for has_bf16, taken in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, there=has_bf16: there)
        assert devices.fastest_precision("cuda")[0] == taken
    assert devices.fastest_precision("mps")[0] == "fp32"


def test_a_cpu_is_asked_on_linux_if_pytorch_does_not_tell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told = devices.cpu_features()
    monkeypatch.setattr(torch.cpu, "get_capabilities", None, raising=False)
    monkeypatch.setattr(devices, "CPU_INFO", tmp_path / "cpuinfo")
    assert devices.cpu_features() == set()
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nflags\t\t: fpu avx2 amx_bf16\nbugs\t\t: mds\n")
    monkeypatch.setattr(devices.sys, "platform", "linux")
    assert devices.cpu_features() >= {"avx2", "amx_bf16"}
    monkeypatch.setattr(devices.sys, "platform", "win32")
    assert devices.cpu_features() == set()
    assert told == set() or not told & {"l1d_cache_size", "architecture"}
