"""Checkpoints: bit-equal, complete or absent, and found in the order of their steps."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from qformer.checkpoints import folder as checkpoint
from qformer.config import parse_config
from qformer.files import soundness
from qformer.types import UsageError

CONFIG = parse_config(
    {
        "stage": "stage1",
        "run": "r",
        "data": {"train": {"name": "jsonl", "path": "x"}},
        "train": {"steps": 10, "warmup": 1, "lr": 3e-4},
    }
)


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(3, 4, generator=generator)
    return {
        "weight": matrix,
        "turned": torch.nn.Parameter(torch.randn(4, 3, generator=generator)).T,  # not contiguous, needs a gradient
        "half": matrix.to(torch.bfloat16),
        "scalar": torch.tensor(0.07),
        "odd": torch.tensor([3.4e38, -0.0, 1e-45]),
    }


def save(run: Path, step: int, **options: Any) -> Path:
    return checkpoint.save(run, step, CONFIG, tensors(step), {"losses": {"itc": 1.5}}, **options)


def test_round_trip_is_bit_equal(tmp_path: Path) -> None:
    trainer = {"optimizer": {"state": {0: {"exp_avg": torch.randn(3)}}, "lr": 0.1}, "random": torch.get_rng_state()}
    folder = save(tmp_path, 12, trainer=trainer, extra=lambda folder: (folder / "vocab.txt").write_text("words"))
    assert folder == tmp_path / "checkpoints" / "step-0000012"
    read = checkpoint.read(tmp_path)
    assert read.path == folder
    assert read.config == CONFIG
    assert read.meta["step"] == 12
    assert read.meta["losses"] == {"itc": 1.5}
    assert {"commit", "torch", "transformers"} <= read.meta.keys()
    expected = tensors(12)
    assert read.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert read.tensors[name].dtype == tensor.dtype
        assert read.tensors[name].shape == tensor.shape
        bits = read.tensors[name].contiguous().reshape(-1).view(torch.uint8)
        assert torch.equal(bits, tensor.detach().contiguous().reshape(-1).view(torch.uint8)), name
    again = checkpoint.read_trainer(folder)
    assert torch.equal(again["random"], trainer["random"])  # type: ignore[arg-type]
    assert torch.equal(again["optimizer"]["state"][0]["exp_avg"], trainer["optimizer"]["state"][0]["exp_avg"])  # type: ignore[index]
    assert (folder / "vocab.txt").read_text() == "words"
    assert not list(folder.parent.glob("*.partial"))


def test_only_the_newest_are_kept_and_steps_are_numbers(tmp_path: Path) -> None:
    for step in (2, 10, 9_999_999, 10_000_001):
        save(tmp_path, step, keep_last=3)
    left = sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir())
    assert left == ["step-0000010", "step-10000001", "step-9999999"]
    assert checkpoint.newest(tmp_path) == tmp_path / "checkpoints" / "step-10000001"
    assert checkpoint.read(tmp_path).meta["step"] == 10_000_001


def test_steps_of_keep_every_stay(tmp_path: Path) -> None:
    for step in (3, 5, 6, 10, 11, 13):
        save(tmp_path, step, keep_last=2, keep_every=5)
    assert [folder.name[-2:] for folder in checkpoint.complete(tmp_path)] == ["05", "10", "11", "13"]


def test_a_later_one_that_was_left_behind_costs_none_of_those_kept(tmp_path: Path) -> None:
    """A damaged newest checkpoint, from before which the run goes on: it must not count as the newest."""
    for step in (4, 6):
        save(tmp_path, step)
    save(tmp_path, 5, keep_last=1)
    assert [folder.name[-1] for folder in checkpoint.complete(tmp_path)] == ["5", "6"]


@pytest.mark.parametrize("name", ["model.safetensors", "trainer.pt", "vocab.txt", "meta.json"])
@pytest.mark.parametrize("gone", [True, False])
def test_check_finds_what_is_missing_or_cut_off(tmp_path: Path, name: str, gone: bool) -> None:
    folder = save(tmp_path, 5, trainer={}, extra=lambda folder: (folder / "vocab.txt").write_text("words"))
    (folder / "config.yaml").write_text("# edited\n" + (folder / "config.yaml").read_text())
    checkpoint.check(folder)
    (folder / name).unlink() if gone else (folder / name).write_bytes((folder / name).read_bytes()[:-1])
    with pytest.raises(checkpoint.Damaged, match=r"is damaged .*use an earlier one"):
        checkpoint.check(folder)


@pytest.mark.parametrize(
    "fault", [OSError(28, "No space left on device"), SafetensorError("IoError"), RuntimeError("x")]
)
def test_a_full_disk_is_an_os_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise fault

    first = save(tmp_path, 5)
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match=str(fault.args[-1])):
        save(tmp_path, 6)
    assert list(first.parent.iterdir()) == [first]


def test_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 5)
    checkpoint.save(tmp_path, 5, CONFIG, tensors(77), {})
    assert torch.equal(checkpoint.read(tmp_path).tensors["weight"], tensors(77)["weight"])


def test_a_failing_save_leaves_the_previous_one(tmp_path: Path) -> None:
    first = save(tmp_path, 5, keep_last=1)

    def fails(folder: Path) -> None:
        (folder / "half").write_text("written")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save(tmp_path, 6, keep_last=1, extra=fails)
    assert checkpoint.newest(tmp_path) == first
    assert checkpoint.find(tmp_path) == first
    assert torch.equal(checkpoint.read(tmp_path).tensors["weight"], tensors(5)["weight"])
    save(tmp_path, 6, keep_last=1)  # what the failed one left is no hindrance
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["step-0000006"]
    assert not (tmp_path / "checkpoints" / "step-0000006" / "half").exists()


def test_nothing_has_the_final_name_before_it_is_complete(tmp_path: Path) -> None:
    seen = []

    def looks(folder: Path) -> None:
        seen.append((folder.name, checkpoint.newest(tmp_path), (folder / "model.safetensors").is_file()))

    save(tmp_path, 5, extra=looks)
    assert seen == [("step-0000005.partial", None, True)]


def test_other_folders_are_never_picked(tmp_path: Path) -> None:
    good = save(tmp_path, 5)
    for name in ("step-0000009.partial", "step-best", "step-0000008.old"):
        other = tmp_path / "checkpoints" / name
        other.mkdir()
        (other / "model.safetensors").write_bytes((good / "model.safetensors").read_bytes())
    (tmp_path / "checkpoints" / "step-0000007").mkdir()  # empty
    assert checkpoint.find(tmp_path) == good
    assert checkpoint.newest(tmp_path) == good


def test_find(tmp_path: Path) -> None:
    folder = save(tmp_path, 5)
    assert checkpoint.find(folder) == folder
    assert checkpoint.find(str(tmp_path)) == folder
    assert checkpoint.newest(tmp_path / "none") is None
    for nothing in (tmp_path / "none", tmp_path / "checkpoints", folder / "config.yaml"):
        with pytest.raises(UsageError, match="no checkpoint at"):
            checkpoint.find(nothing)


@pytest.mark.parametrize("size", [0, 4, 60, -10])
def test_damaged_tensors(tmp_path: Path, size: int) -> None:
    folder = save(tmp_path, 5)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(UsageError, match="is damaged"):
        checkpoint.read(folder)


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["model.safetensors", "vocab.txt", "meta.json"])
@pytest.mark.parametrize("place", [9, -9])
def test_one_flipped_bit_is_named(tmp_path: Path, name: str, place: int) -> None:
    """Of the weights, of what lies beside them, and of the file with the checksums itself."""
    folder = save(tmp_path, 5, extra=lambda folder: (folder / "vocab.txt").write_text("[PAD] [UNK] [CLS]\n"))
    flip(folder / name, place)
    with pytest.raises(checkpoint.Damaged, match=rf"'{folder}' is damaged .*{name}.*; use an earlier one"):
        checkpoint.read(tmp_path)


def test_damage_is_read_where_that_is_asked_for(tmp_path: Path) -> None:
    folder = save(tmp_path, 5)
    flip(folder / "model.safetensors", -9)
    read = checkpoint.read(tmp_path, verify=False).tensors
    assert sum(not torch.equal(read[name], tensor) for name, tensor in tensors(5).items()) == 1
    with soundness.unchecked():
        assert checkpoint.read(tmp_path).tensors.keys() == read.keys()
    with pytest.raises(checkpoint.Damaged):
        checkpoint.read(tmp_path)


def test_the_trainer_state_has_a_checksum(tmp_path: Path) -> None:
    folder = save(tmp_path, 5, trainer={"random": torch.get_rng_state()})
    flip(folder / "trainer.pt", 2000)
    assert checkpoint.read(folder).meta["step"] == 5  # which does not read it
    with pytest.raises(checkpoint.Damaged, match=r"trainer\.pt is not as it was written: its checksum is"):
        checkpoint.read_trainer(folder)


def test_checkpoints_of_before_there_were_checksums_load(tmp_path: Path) -> None:
    folder = save(tmp_path, 5, trainer={"random": torch.get_rng_state()})
    meta = json.loads((folder / "meta.json").read_text())
    old = {key: value for key, value in meta.items() if key not in ("checksum", "checksums")}
    (folder / "meta.json").write_text(json.dumps(old))
    assert torch.equal(checkpoint.read(tmp_path).tensors["weight"], tensors(5)["weight"])
    assert checkpoint.read_trainer(folder).keys() == {"random"}
    checkpoint.check(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    odd = tensors(5)
    odd["half"][1, 2] = value
    folder = checkpoint.save(tmp_path, 5, CONFIG, odd, {})
    with pytest.raises(checkpoint.Damaged, match="the weight 'half' holds NaN or infinity"):
        checkpoint.read(folder)
    assert checkpoint.read(folder, verify=False).tensors["half"].shape == (3, 4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"step": "5"}, "step: input should be a valid integer, but got '5'"),
        ({"step": None}, "step: input should be a valid integer, but got None"),
        ({"step": 6}, "says step 6"),
        ({"files": ["model.safetensors"]}, "files: input should be a valid dictionary, but got"),
        (
            {"files": {"model.safetensors": 1.5}},
            r"files.model.safetensors: input should be a valid integer, but got 1.5",
        ),
        (
            {"checksums": {"model.safetensors": 7}},
            "checksums.model.safetensors: input should be a valid string, but got 7",
        ),
        ({"torch": 2}, "torch: input should be a valid string, but got 2"),
    ],
)
def test_a_value_of_another_type_in_meta_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    folder = save(tmp_path, 5)
    meta = json.loads((folder / "meta.json").read_text()) | change
    (folder / "meta.json").write_text(json.dumps(soundness.seal(meta)))
    with pytest.raises(checkpoint.Damaged, match=re.escape(said)):
        checkpoint.read(folder)
    with pytest.raises(checkpoint.Damaged, match=re.escape(said)):
        checkpoint.check(folder)


@pytest.mark.parametrize("key", ["step", "files", "checksums", "checksum", "commit"])
def test_a_key_that_is_gone_from_meta_is_named(tmp_path: Path, key: str) -> None:
    folder = save(tmp_path, 5)
    meta = json.loads((folder / "meta.json").read_text())
    del meta[key]
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(checkpoint.Damaged, match=r"meta\.json"):
        checkpoint.read(folder)


def test_a_configuration_that_is_refused_names_its_checkpoint(tmp_path: Path) -> None:
    file = save(tmp_path, 5) / "config.yaml"
    file.write_text(file.read_text().replace("steps: 10", "steps: ten"))
    with pytest.raises(
        checkpoint.Damaged, match=r"step-0000005' is damaged \(its config.yaml is refused: train.steps: "
    ):
        checkpoint.read(tmp_path)


@pytest.mark.parametrize("damage", ["", "{", "[]", "7", '"text"', None])
def test_damaged_meta(tmp_path: Path, damage: str | None) -> None:
    meta = save(tmp_path, 5) / "meta.json"
    meta.unlink() if damage is None else meta.write_text(damage)
    with pytest.raises(UsageError, match="is damaged"):
        checkpoint.read(tmp_path)


def test_missing_config_is_a_usage_error(tmp_path: Path) -> None:
    (save(tmp_path, 5) / "config.yaml").unlink()
    with pytest.raises(UsageError, match=r"config\.yaml"):
        checkpoint.read(tmp_path)


def test_the_trainer_state_executes_nothing(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "executed"),)

    folder = save(tmp_path, 5)
    torch.save({"optimizer": Evil()}, folder / "trainer.pt")
    with pytest.raises(UsageError, match="is damaged"):
        checkpoint.read_trainer(folder)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 half a file", None])
def test_a_damaged_trainer_state(tmp_path: Path, damage: bytes | None) -> None:
    folder = save(tmp_path, 5, trainer={"random": torch.get_rng_state()})
    file = folder / "trainer.pt"
    file.unlink() if damage is None else file.write_bytes(damage)
    with pytest.raises(UsageError) as caught:
        checkpoint.read_trainer(folder)
    assert "\n" not in str(caught.value)


def test_a_machine_without_git_can_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    folder = save(tmp_path, 5)
    assert json.loads((folder / "meta.json").read_text())["commit"] == ""
