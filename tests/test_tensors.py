"""Files and folders of tensors: read whole, or refused in one sentence that names the path; nothing in them runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qformer.files.tensors import listed, read_tensors
from qformer.types import UsageError

INDEX = "model.safetensors.index.json"


def tensors() -> dict[str, Tensor]:
    return {
        "a.weight": torch.randn(3, 4),
        "a.bias": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        "b.half": torch.randn(2).half(),
        "b.brain": torch.randn(5).bfloat16(),
        "b.ids": torch.arange(7)[None],
        "c": torch.tensor(0.07),
    }


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (ours[name], tensor))), name  # NaN, too


def refused(path: Path, expected: str, named: Path | None = None) -> None:
    with pytest.raises(UsageError) as caught:
        read_tensors(path)
    said = str(caught.value)
    assert expected in said
    assert f"'{named or path}'" in said
    assert "\n" not in said
    assert not said.endswith(".")


@pytest.mark.parametrize("nested", [True, False])
def test_torch_checkpoints(tmp_path: Path, nested: bool) -> None:
    made, path = tensors(), tmp_path / "blip2.pth"
    turned = made["a.weight"].T  # not contiguous
    torch.save({"model": made | {"turned": turned}} if nested else made | {"turned": turned}, path)
    same(read_tensors(path), made | {"turned": turned})
    same(read_tensors(str(path)), made | {"turned": turned})


def test_what_training_left_beside_the_model_is_let_be(tmp_path: Path) -> None:
    """LAVIS writes its optimizer, its configuration and its scaler beside the model."""
    made = tensors()
    extra = {"optimizer": {"state": {0: torch.ones(2)}}, "config": {"run": {"lr": 1e-4}}, "scaler": None, "epoch": 9}
    torch.save({"model": made, **extra}, tmp_path / "checkpoint.pth")
    same(read_tensors(tmp_path / "checkpoint.pth"), made)


def test_the_legacy_format_of_torch(tmp_path: Path) -> None:
    made, path = tensors(), tmp_path / "old.pth"
    torch.save({"model": made}, path, _use_new_zipfile_serialization=False)
    same(read_tensors(path), made)


def test_safetensors(tmp_path: Path) -> None:
    made = tensors()
    save_file(made, tmp_path / "a.safetensors")
    same(read_tensors(tmp_path / "a.safetensors"), made)


def test_nothing_there(tmp_path: Path) -> None:
    refused(tmp_path / "none.pth", "there is no file or folder")


@pytest.mark.parametrize("name", ["blip2.pth", "blip2.safetensors", "blip2", "blip2.bin"])
@pytest.mark.parametrize("content", [b"", b"<html>404 Not Found</html>\n", b"words\nof\ntext.\n", bytes(range(256))])
def test_what_is_no_checkpoint(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    refused(path, "is not a checkpoint, is damaged, or holds code (which is not run); download it again")


@pytest.mark.parametrize("name", ["cut.pth", "cut.safetensors"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_a_download_that_broke_off(tmp_path: Path, name: str, share: float) -> None:
    path = tmp_path / name
    save_file(tensors(), path) if path.suffix == ".safetensors" else torch.save({"model": tensors()}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    refused(path, "is damaged")


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.made),)


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("inside", ["whole", "model", "beside"])
def test_code_in_a_pickle_does_not_run(tmp_path: Path, new: bool, inside: str) -> None:
    path, made = tmp_path / "evil.pth", tmp_path / "made"
    code = Code(made)
    held = {
        "whole": code,
        "model": {"model": {"a": torch.ones(2), "b": code}},
        "beside": {"model": tensors(), "x": code},
    }
    torch.save(held[inside], path, _use_new_zipfile_serialization=new)
    refused(path, "holds code (which is not run)")
    assert not made.exists()
    torch.load(path, weights_only=False)  # it would have
    assert made.exists()


@pytest.mark.parametrize(
    "held",
    [
        {},
        [torch.ones(2)],
        torch.ones(2),
        {"epoch": 3, "lr": 0.1},
        {"a": torch.ones(2), "b": 3},
        {"weights": {"a": torch.ones(2)}},
        {"model": {}},
        {"model": [1]},
        {"model": {"a": {"b": torch.ones(1)}}},
    ],
)
def test_checkpoints_of_something_else(tmp_path: Path, held: Any) -> None:
    path = tmp_path / "other.pth"
    torch.save(held, path)
    refused(path, "does not hold tensors by name")


def sharded(folder: Path) -> dict[str, Tensor]:
    """Two shards and their index, as `save_pretrained` writes them."""
    folder.mkdir()
    made = tensors()
    shards = {f"model-0000{n + 1}-of-00002.safetensors": [*made][n::2] for n in range(2)}
    for shard, names in shards.items():
        save_file({name: made[name] for name in names}, folder / shard, {"format": "pt"})
    places = {name: shard for shard, names in shards.items() for name in names}
    write_index(folder, {"metadata": {"total_size": 99}, "weight_map": places})
    return made


def write_index(folder: Path, content: Any) -> None:
    (folder / INDEX).write_text(json.dumps(content))


def change_index(folder: Path, **changes: str | None) -> None:
    content = json.loads((folder / INDEX).read_text())
    places = content["weight_map"] | changes
    write_index(folder, {"weight_map": {name: shard for name, shard in places.items() if shard}})


def test_folders(tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    made = sharded(folder)
    same(read_tensors(folder), made)
    (tmp_path / "whole").mkdir()
    save_file(made, tmp_path / "whole" / "model.safetensors")
    same(read_tensors(tmp_path / "whole"), made)


def test_folders_without_tensors(tmp_path: Path) -> None:
    refused(tmp_path, "holds none of model.safetensors, pytorch_model.bin and no index of their shards; give a folder")
    torch.save(tensors(), tmp_path / "weights.bin")
    refused(tmp_path, "holds none of model.safetensors")


def test_a_shard_that_is_missing_or_damaged(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    sharded(folder)
    shard = folder / "model-00002-of-00002.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-5])
    refused(folder, "is damaged", named=shard)
    shard.unlink()
    refused(folder, "lacks model-00002-of-00002.safetensors, which its index names")


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"more": "model-00001-of-00002.safetensors"}, "more"), ({"a.bias": None, "b.half": None}, "a.bias, b.half")],
)
def test_an_index_that_disagrees_with_its_shards(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    folder = tmp_path / "folder"
    sharded(folder)
    change_index(folder, **changes)
    refused(folder, f"the shards in '{folder}' do not match its index: {named};", named=folder)


def test_a_tensor_in_another_shard_than_the_index_says(tmp_path: Path) -> None:
    """Nothing is lost by that: names are unique."""
    made = sharded(tmp_path / "folder")
    change_index(tmp_path / "folder", **{"a.weight": "model-00002-of-00002.safetensors"})
    same(read_tensors(tmp_path / "folder"), made)


@pytest.mark.parametrize(
    "content", ["", "no json", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "null"]
)
def test_a_damaged_index(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX).write_text(content)
    refused(tmp_path, "is damaged", named=tmp_path / INDEX)


def test_lists_in_messages_are_cut() -> None:
    assert listed([]) == "nothing"
    assert listed(["b", "a"]) == "a, b"
    assert listed([f"{n:02}" for n in reversed(range(23))], limit=20).endswith("18, 19 and 3 more")
