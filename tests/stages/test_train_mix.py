"""A run on a mixture of a tar, a parquet file and JSON lines, a tenth of it bad: every sample is accounted for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest
import torch

from qformer import stages
from qformer.checkpoints import folder as checkpoint
from qformer.data.loader import Skipped
from tests.data.making import encoded, jsonl, photo, shard, tar
from tests.workspace import config, make_workspace

EACH = 20
STEPS, BATCH = 40, 4
BAD = {
    "tar": {"(0, (1, 3))": "undecodable", "(0, (1, 7))": "no caption"},
    "parquet": {"(1, 4)": "no image", "(1, 11)": "undecodable"},
    "jsonl": {"(2, 0)": "missing", "(2, 19)": "not json"},
}


def mixture(root: Path) -> dict[str, Any]:
    shard(root / "0.tar", range(10))
    members = []
    for number in range(10):
        image = b"<html>" if number == 3 else encoded(photo(number))
        members += [(f"{number}.png", image), (f"{number}.txt", b"..." if number == 7 else b"a red dog")]
    tar(root / "1.tar", members)
    images: list[Any] = [encoded(photo(number)) for number in range(EACH)]
    images[4], images[11] = None, images[11][:40]
    pandas.DataFrame({"image": images, "caption": "a cat on a mat"}).to_parquet(root / "a.parquet")
    records: list[Any] = [{"image": f"{number}.png", "captions": ["one dog", "two dogs"]} for number in range(EACH)]
    for number in range(1, EACH):
        (root / f"{number}.png").write_bytes(encoded(photo(number)))
    records[19] = "{broken"
    parts = [
        {"name": "webdataset", "path": f"{root}/{{0..1}}.tar", "weight": 1, "prompt": "a photo of", "window": 1},
        {"name": "datasets", "path": str(root / "a.parquet")},
        {"name": "jsonl", "path": jsonl(root / "a.jsonl", records)},
    ]
    return {"name": "mix", "sources": parts}


def settings(root: Path, run: str) -> Any:
    train = {"steps": STEPS, "save_every": 7, "validate_every": 0}
    data = {"train": mixture(root), "batch": BATCH}
    return config(root, "stage1", run=str(root / run), train=train, data=data)


def trained(root: Path, run: str) -> tuple[list[Any], dict[str, torch.Tensor], str, dict[str, int]]:
    folder = root / run
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record.pop("images_per_second", None)
    meta = json.loads((checkpoint.find(folder) / "meta.json").read_text())
    return records, checkpoint.read(folder).tensors, (folder / "skipped.jsonl").read_text(), meta["skipped"]


def test_a_mixture_with_bad_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    datasets.disable_progress_bars()
    root = make_workspace(tmp_path / "space")
    seen: list[Any] = []
    add = Skipped.add

    def watched(self: Skipped, loaded: Any) -> None:
        seen.append(loaded)
        add(self, loaded)

    monkeypatch.setattr(Skipped, "add", watched)
    stages.train(settings(root, "whole"))
    _every_sample_once_per_epoch(seen[:STEPS])

    def interrupted(self: Skipped, loaded: Any) -> None:
        add(self, loaded)
        if next(count) == 17:
            raise KeyboardInterrupt

    count = iter(range(100))
    monkeypatch.setattr(Skipped, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stages.train(settings(root, "cut"))
    assert checkpoint.find(root / "cut").name == "step-0000014"
    monkeypatch.setattr(Skipped, "add", add)
    stages.train(settings(root, "cut"))
    whole, cut = trained(root, "whole"), trained(root, "cut")
    assert whole[0] == cut[0]
    assert all(torch.equal(tensor, cut[1][name]) for name, tensor in whole[1].items())
    assert whole[2:] == cut[2:]  # what was skipped, its list and its counts, as if nothing had happened
    assert sum(whole[3].values()) == sum("replacement" not in json.loads(line) for line in whole[2].splitlines())


def _every_sample_once_per_epoch(seen: list[Any]) -> None:
    """Of each source, every run of `EACH` of its samples holds all of them: used, or skipped under the right kind."""
    met: dict[str, list[str]] = {"tar": [], "parquet": [], "jsonl": []}
    bad_kinds = {index: kind for kinds in BAD.values() for index, kind in kinds.items()}
    for number, loaded in enumerate(seen):
        bad = {record["position"]: record for record in loaded.skipped if "replacement" not in record}
        for row, key in enumerate(loaded.keys):
            record = bad.get(number * BATCH + row)
            if record is not None:
                assert record["kind"] == bad_kinds[record["index"]]
                key = record["index"]
                source = next(name for name, kinds in BAD.items() if key in kinds)
            else:
                source = next(name for name in met if f".{name}" in key)
            met[source].append(key)
    assert sum(len(keys) for keys in met.values()) == STEPS * BATCH
    for source, keys in met.items():
        assert len(keys) > 2 * EACH  # at least two epochs, each with its bad samples
        for start in range(0, len(keys) - EACH + 1, EACH):
            epoch = set(keys[start : start + EACH])
            assert len(epoch) == EACH
            assert epoch >= BAD[source].keys()
