"""Training from stored tokens: the losses of the direct path; stores that are killed, shared, full, of other data."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file, save_file

import qformer
from qformer import resolution, stages
from qformer.checkpoints import folder as checkpoint
from qformer.config import Choice
from qformer.data import sources
from qformer.data.features import CropDataset, FeatureStore
from qformer.data.loader import Batches
from qformer.files.packing import pack, unpack
from qformer.model.assembly import build_encoder, build_image_text, build_vision_language
from qformer.model.chunked import chunked_step
from qformer.model.frontend import FrontEnd
from qformer.model.image_text import ImageTextModel
from qformer.schema import Config
from qformer.stages import features, stage1
from qformer.types import BadSample, Batch, Tiles, UsageError
from tests.processes import together
from tests.stages.test_processes import Forced, train_all
from tests.stages.test_train_mix import mixture
from tests.workspace import config, make_workspace

TILES = {"vision": Choice(name="tests.tiny_stage1:Tower"), "resolution": Choice(name="tests.tiny_stage1:Views")}
WHOLE = {"crop": [1, 1], "flip": 0, "validation": None}
#: Of a loss, relative. fp16 is held to what is promised; of int8 nothing is, but here it stays below this.
CLOSE = {"fp16": 1e-3, "int8": 5e-3}


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_workspace(tmp_path_factory.mktemp("space"))
    stages.train(config(root, "stage1", data=WHOLE))
    return root


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two samples in each."""
    monkeypatch.setattr(features, "SHARD_SAMPLES", 2)


def fill(settings: Config) -> FeatureStore:
    source = sources.for_run(settings.data.train, settings.run)
    strategy = resolution.build(settings.resolution.name, **settings.resolution.options)
    return features.fill(settings, source, strategy, build_encoder(settings))


def losses(run: str | Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in ("images_per_second", "kind")} for record in records]


def pairs(settings: Config, store: FeatureStore) -> tuple[Batch, Batch]:
    """Six photos, each cropped as one of the store's crops was: as pixels, and as they are stored."""
    source = sources.for_run(settings.data.train, settings.run)
    strategy = resolution.build(settings.resolution.name, **settings.resolution.options)
    crops = CropDataset(source, strategy, settings.data)
    views = [crops[number].tiles for number in range(6)]
    pixels = Tiles.join([tiles[i % 3 : i % 3 + 1] for i, tiles in enumerate(views) if tiles is not None])
    stored = Tiles.join([store.read(i, i % 3, source[i], strategy) for i in range(6)])
    assert stored.plans == pixels.plans
    assert len({len(plan.tiles) for plan in stored.plans}) > 1
    shift = torch.arange(6)
    rest: dict[str, Any] = {"text": [source[i].captions[0] for i in range(6)]}
    rest |= {"negatives": ((shift + 1) % 6, (shift + 2) % 6), "cuts": [0.4] * 6}
    return Batch(pixels, **rest), Batch(stored, **rest)


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_losses_are_those_of_the_same_crops(space: Path, tmp_path: Path, dtype: str) -> None:
    """Of both stages, plain and in chunks, with images of several tiles of unequal size; and their gradients."""
    data = {"features": {"path": str(tmp_path), "crops": 3, "dtype": dtype}}
    settings = config(space, "stage1", data=data, qformer={"dropout": 0.0}).model_copy(update=TILES)
    direct, stored = pairs(settings, fill(settings))
    model, _ = build_image_text(settings)
    model.train()
    expected, gradients = model(direct), []
    for batch in (direct, stored):
        model.zero_grad()
        found = model(batch)
        found["loss"].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    chunked = chunked_step(model, stored, 2)
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=CLOSE[dtype])
        assert chunked[name].item() == pytest.approx(found[name].item(), rel=1e-5)
    # Not equal: they did go through the store.
    assert 0 < (gradients[0] - gradients[1]).norm() < 20 * CLOSE[dtype] * gradients[0].norm()

    for llm in ("opt", "flan-t5"):
        second = config(space, "stage2", llm={"path": str(space / llm)}, qformer={"queries": 3})
        speaker = build_vision_language(second.model_copy(update=TILES))[0].eval()
        with torch.no_grad():
            lm = speaker(direct)["lm"].item()
            assert speaker(stored)["lm"].item() == pytest.approx(lm, rel=CLOSE[dtype])


def test_stored_is_encoded_whatever_the_sizes_and_layers(space: Path, tmp_path: Path) -> None:
    """Tiles of one image that are packed with others; and manifests are as they were where no layers are named."""
    options = {"image_size": 56, "patch_size": 14, "width": 16, "depth": 2, "heads": 2, "mlp_hidden": 24}
    for name, layers in (("qwen2vl", None), ("oryx", [1, 2])):
        seen = Choice(name=name, **options, **({} if layers is None else {"layers": layers}))
        data = {"features": {"path": str(tmp_path / name), "crops": 3}}
        settings = config(space, "stage1", data=data).model_copy(update=TILES | {"vision": seen})
        torch.manual_seed(0)
        store = fill(settings)
        torch.manual_seed(0)
        frontend = FrontEnd(build_encoder(settings))
        direct, stored = pairs(settings, store)
        encoded, read = frontend.encode_tiles(direct.tiles), frontend.encode_tiles(stored.tiles)
        assert read.lengths == encoded.lengths
        assert set(read.lengths) == {4, 6}
        assert read.grids == encoded.grids
        torch.testing.assert_close(read.packed.float(), encoded.packed, atol=1e-5, rtol=1e-3)  # it is stored in fp16
        assert read.packed.shape[1] == store.about["encoder"]["width"] == 16 * (1 if layers is None else 2)
        assert store.about["made"]["vision"].get("layers") == layers
        assert ("layers" in store.about["made"]["vision"]) == (layers is not None)


@pytest.mark.parametrize("changes", [{"workers": 2, "chunk": 2}, {"stage": "stage2"}], ids=str)
def test_whole_runs_are_those_of_the_direct_path(space: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Images are shown whole, so that both see the same; captions, negatives and dropout are drawn alike."""
    stage = changes.get("stage", "stage1")
    data = WHOLE | {"workers": changes.get("workers", 0)}
    train = {"chunk": changes.get("chunk", 0)}
    runs = [str(tmp_path / name) for name in ("direct", "stored")]
    stages.train(config(space, stage, run=runs[0], train=train, data=data))
    stages.train(config(space, stage, run=runs[1], train=train, data=data | {"features": str(tmp_path / "store")}))
    for mine, theirs in zip(losses(runs[1]), losses(runs[0]), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3)
    assert losses(runs[1]) != losses(runs[0])  # it did go through the store
    if stage == "stage1":
        model = qformer.load(runs[1], device="cpu")
        assert isinstance(model, ImageTextModel)
        embeds, _ = model.embed_images(model.frontend.tiles([space / "images" / "0.png"]))
        assert embeds.isfinite().all()


def test_validation_reads_a_store_too(space: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tower is needed in training then, and nothing is encoded again; the rows are those that int8 keeps."""
    data = {"features": {"path": str(tmp_path / "store"), "dtype": "int8"}, "crop": [0.5, 0.6]}
    settings = config(space, "stage1", run=str(tmp_path / "run"), data=data)
    held = features.validation_data(settings)
    assert held is not None
    with torch.no_grad():
        tokens = FrontEnd(build_encoder(settings)).encode_tiles(Tiles.join(list(held.groups))).rows
    stages.fill_features(settings)
    real, checked = stage1.fit, []

    def fit(model: Any, *given: Any) -> Path:
        assert not list(model.frontend.encoder.parameters())
        rows = model.frontend.encode_tiles(Tiles.join(list(given[2].held.groups))).rows
        assert len(rows) == len(tokens)
        checked.extend(torch.equal(row, unpack(pack(own, "int8"))) for row, own in zip(rows, tokens, strict=True))
        return real(model, *given)

    monkeypatch.setattr(stage1, "fit", fit)
    monkeypatch.setattr(features.Filler, "_encode", None)
    stages.train(settings)
    assert checked
    assert all(checked)
    assert "itc_i2t_r1" in losses(tmp_path / "run")[-1]


def test_held_out_images_are_encoded_once(space: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a run without a store, and with the same results; too many are encoded at each validation as before."""
    encoded: list[int] = []
    real = FrontEnd.encode_tiles

    def encode_tiles(self: FrontEnd, tiles: Tiles) -> Any:
        if tiles.tokens is None and not self.training:
            encoded.append(len(tiles))
        return real(self, tiles)

    monkeypatch.setattr(FrontEnd, "encode_tiles", encode_tiles)
    records, counts = [], []
    for most in (stage1.MOST_BYTES, 0):
        monkeypatch.setattr(stage1, "MOST_BYTES", most)
        run = tmp_path / str(most)
        stages.train(config(space, "stage1", run=str(run), train={"validate_every": 1}))
        records.append([record for record in losses(run) if "itc_i2t_r1" in record])
        counts.append(sum(encoded))
        encoded.clear()
    assert records[0] == records[1]
    assert len(records[0]) == 4
    assert counts[0] == 4  # the dev photos
    assert counts[1] > 4 * 4


def test_visits_draw_from_all_crops_and_repeat(space: Path, tmp_path: Path) -> None:
    settings = config(space, "stage1", data={"features": {"path": str(tmp_path), "crops": 3}})
    store = fill(settings)
    source = sources.for_run(settings.data.train, settings.run)
    strategy = resolution.build("fixed", size=28)
    batches = Batches(source, strategy, settings.data, 0, store)
    views: dict[str, set[bytes]] = {}
    for number in range(60):
        loaded, again = batches[number], batches[number]
        assert loaded.batch.tiles.tokens is not None
        assert again.batch.tiles.tokens is not None
        for key, rows, same in zip(loaded.keys, loaded.batch.tiles.tokens, again.batch.tiles.tokens, strict=True):
            assert torch.equal(rows, same)
            views.setdefault(key, set()).add(rows.numpy().tobytes())
    assert [len(some) for some in views.values()] == [3] * len(source)


def test_a_mixture_with_bad_samples_gives_the_samples_of_the_direct_path(space: Path, tmp_path: Path) -> None:
    """Tars, parquet and JSON lines, their indices tuples of tuples; what is bad is skipped, replaced and recorded."""
    train = mixture(tmp_path)
    settings = config(
        space, "stage1", run=str(tmp_path / "run"), data={"train": train, "features": str(tmp_path / "f")}
    )
    store = fill(settings)
    source, strategy = sources.for_run(settings.data.train, settings.run), resolution.build("fixed", size=28)
    listed = [json.loads(line) for line in (tmp_path / "f" / "skipped.jsonl").read_text().splitlines()]
    assert sorted(record["kind"] for record in listed) == [
        "missing",
        "no image",
        "not json",
        "undecodable",
        "undecodable",
    ]
    assert store.samples == len(source) == 60
    stored, direct = (Batches(source, strategy, settings.data, 0, given) for given in (store, None))
    met = set()
    for number in range(40):
        mine, theirs = stored[number], direct[number]
        assert (mine.keys, mine.skipped, mine.batch.text) == (theirs.keys, theirs.skipped, theirs.batch.text)
        met |= {record["kind"] for record in mine.skipped}
    assert met == {"missing", "no image", "not json", "undecodable", "no caption"}


KILLED = """
import os, signal, sys, yaml
from qformer import stages
from qformer.config import parse_config
from qformer.stages import features
features.SHARD_SAMPLES = 2
real = features.Filler._write
def write(self, store, shard, views):
    if shard == 2:
        next(iter(views))
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, store, shard, views)
features.Filler._write = write
stages.fill_features(parse_config(yaml.safe_load(sys.stdin)))
"""


@pytest.mark.slow
def test_filling_goes_on_after_kill_9(space: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Finished shards stay as they are, and the whole store is that of an undisturbed filling."""
    settings, whole = (
        config(space, "stage1", run=str(tmp_path / "run"), data={"features": str(tmp_path / name)})
        for name in ("cut", "whole")
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED],
        input=json.dumps(settings.model_dump(mode="json", exclude_unset=True)),
        env=environment,
        text=True,
        capture_output=True,
        cwd=Path(__file__).parent.parent.parent,
        timeout=300,
    )
    assert killed.returncode == -9, killed.stderr
    store = FeatureStore.read_manifest(tmp_path / "cut")
    assert store.missing() == [2, 3]
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "cut").glob("shard-*.safetensors")}
    assert len(before) == 2
    stages.train(settings)
    assert "holds 8 images" in " ".join(capsys.readouterr().out.split())
    fill(whole)
    assert not list((tmp_path / "cut").glob("*.lock"))
    assert not list((tmp_path / "cut").glob("*.partial"))
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "cut" / file.name).read_bytes()
    assert all(file.stat().st_mtime_ns == time for file, time in before.items())


def test_shards_that_somebody_else_fills_are_left_to_him(
    space: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And waited for; if he ends without having filled them, they are taken over."""
    other = FileLock(tmp_path / "shard-000001.lock")
    other.acquire()
    waited = []

    def sleep(_seconds: float) -> None:
        waited.append(sorted(file.name for file in tmp_path.glob("shard-*.safetensors")))
        if len(waited) == 2:
            other.release()

    monkeypatch.setattr(features.time, "sleep", sleep)
    store = fill(config(space, "stage1", data={"features": str(tmp_path)}))
    assert waited == [[f"shard-00000{shard}.safetensors" for shard in (0, 2, 3)]] * 2
    assert store.missing() == []


@pytest.mark.slow
def test_two_processes_fill_one_store_and_train_as_one_does(space: Path, tmp_path: Path) -> None:
    runs = {}
    for world in (1, 2):
        data = WHOLE | {"batch": 4 // world, "features": str(tmp_path / f"store-{world}")}
        settings = {"run": str(tmp_path / f"run-{world}"), "qformer": {"dropout": 0.0, "queries": 3}, "data": data}
        runs[world] = config(space, "stage1", loss={"gather_grad": "full"}, **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage1, "Batches", Forced)
        stages.train(runs[1])
    together(tmp_path / "meet", 2, train_all, [runs[2]])
    for mine, theirs in zip(losses(runs[2].run), losses(runs[1].run), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    one, two = (FeatureStore.read_manifest(tmp_path / f"store-{world}") for world in (1, 2))
    assert one.about["made"] == two.about["made"]
    assert two.missing() == []


def test_a_resumed_run_repeats_the_bits(space: Path, tmp_path: Path) -> None:
    data = {"features": {"path": str(tmp_path / "store"), "crops": 2, "dtype": "int8"}, "validation": None}
    run = tmp_path / "run"
    settings = config(space, "stage1", run=str(run), data=data, train={"steps": 6})
    stages.train(settings)
    end = run / "checkpoints" / "step-0000006"
    whole, metrics = checkpoint.read(end).tensors, losses(run)
    (end / "model.safetensors").unlink()
    stages.train(settings)
    assert losses(run) == metrics
    assert all(torch.equal(whole[name], tensor) for name, tensor in checkpoint.read(end).tensors.items())
    with pytest.raises(UsageError, match=r"data\.features was"):
        stages.train(config(space, "stage1", run=str(run), data={"validation": None}, train={"steps": 6}))


OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"data": {"crop": [0.2, 1]}}, r"data.crop was \[0.5, 1.0\], is \[0.2, 1.0\]"),
    ({"data": {"flip": 0.1}}, "data.flip was 0.5, is 0.1"),
    ({"data": {"features": {"crops": 2}}}, "data.crops was 1, is 2"),
    ({"data": {"features": {"dtype": "int8"}}}, "data.dtype was fp16, is int8"),
    ({"resolution": {"size": 42}}, "resolution.size was 28, is 42"),
    ({"vision": {"layer": 1}}, "vision.layer was -1, is 1"),
    ({"data": {"train": {"where": {"split": "dev"}}}}, "data.samples was 8, is 4"),
]


def test_a_store_of_something_else_is_refused(space: Path, tmp_path: Path) -> None:
    fill(config(space, "stage1", data={"features": str(tmp_path)}))
    for changes, said in OTHERS:
        base: dict[str, Any] = config(space, "stage1", data={"features": str(tmp_path)}).model_dump(exclude_none=True)
        for section, values in changes.items():
            for key, value in values.items():
                base[section][key] = base[section][key] | value if isinstance(value, dict) else value
        with pytest.raises(UsageError, match=rf"'{tmp_path}' were stored under another .*{said}.*another folder"):
            fill(Config.model_validate(base))


def test_a_store_of_another_tower_is_refused(space: Path, tmp_path: Path) -> None:
    """Of the same sizes and options: one weight differs."""
    settings = config(space, "stage1", data={"features": str(tmp_path)}).model_copy(update=TILES)
    fill(settings)
    other = build_encoder(settings)
    before = features.hash_weights(other)
    with torch.no_grad():
        other.project.weight[0, 0] += 1e-3  # type: ignore[union-attr,index]
    assert features.hash_weights(other) != before
    source = sources.for_run(settings.data.train, settings.run)
    with pytest.raises(UsageError, match="hash of the weights was"):
        features.fill(settings, source, resolution.build("tests.tiny_stage1:Views"), other)


def test_data_that_changed_behind_a_store_are_noticed(space: Path, tmp_path: Path) -> None:
    lines = (space / "captions.jsonl").read_text().splitlines()
    file = space / "sorted.jsonl"
    file.write_text("\n".join(lines) + "\n")
    data = {"train": {"name": "jsonl", "path": str(file)}, "features": str(tmp_path / "store"), "validation": None}
    fill(config(space, "stage1", data=data))
    file.write_text("\n".join(lines[1:] + lines[:1]) + "\n")
    with pytest.raises(UsageError, match=r"sample \d+ of data.train .*shows another image .*another folder"):
        stages.train(config(space, "stage1", run=str(tmp_path / "run"), data=data))


def photos(space: Path, folder: Path) -> dict[str, Any]:
    """Eight photos in a folder of their own, with a store beside it."""
    shutil.copytree(space / "images", folder / "images")
    lines = [line for line in (space / "captions.jsonl").read_text().splitlines() if '"train"' in line]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    train = {"name": "jsonl", "path": str(folder / "a.jsonl")}
    return WHOLE | {"train": train, "features": str(folder / "store")}


def test_pictures_that_changed_behind_a_store_are_noticed(space: Path, tmp_path: Path) -> None:
    """By size and time of the file, or its bytes where the time alone is another; gone ones are as they were stored."""
    settings = config(space, "stage1", run=str(tmp_path / "run"), data=photos(space, tmp_path))
    store = fill(settings)
    source, strategy = sources.for_run(settings.data.train, settings.run), resolution.build("fixed", size=28)
    file, seen = tmp_path / "images" / "0.png", (tmp_path / "images" / "0.png").stat()
    whole = file.read_bytes()

    def read() -> Tiles:
        return FeatureStore.read_manifest(tmp_path / "store").read(0, 0, source[0], strategy)

    tokens = read().tokens
    assert tokens is not None
    os.utime(file, ns=(0, 0))
    assert torch.equal((read().tokens or [])[0], tokens[0])
    file.unlink()
    assert torch.equal((read().tokens or [])[0], tokens[0])
    changed = "0.png' has changed since its tokens were stored; remove '.*shard-000000.safetensors'"
    for data in (whole[:-1] + b"x", whole + b"x"):
        file.write_bytes(data)
        with pytest.raises(UsageError, match=changed):
            read()
    Image.new("RGB", (40, 30)).save(file)
    with pytest.raises(UsageError, match=changed):
        stages.train(settings)
    store.path(0).unlink()
    fill(settings)
    assert not torch.equal((read().tokens or [])[0], tokens[0])
    file.write_bytes(whole)
    os.utime(file, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    with pytest.raises(UsageError, match=changed):
        read()


def test_a_picture_that_came_after_its_fault_was_stored_is_noticed(space: Path, tmp_path: Path) -> None:
    settings = config(space, "stage1", data=photos(space, tmp_path))
    file = tmp_path / "images" / "1.png"
    file.rename(tmp_path / "1.png")
    store = fill(settings)
    source, strategy = sources.for_run(settings.data.train, settings.run), resolution.build("fixed", size=28)
    with pytest.raises(BadSample, match="missing"):
        store.read(1, 0, source[1], strategy)
    (tmp_path / "1.png").rename(file)
    with pytest.raises(UsageError, match=r"1.png' has changed since its tokens were stored"):
        FeatureStore.read_manifest(tmp_path / "store").read(1, 0, source[1], strategy)


def test_a_store_of_an_earlier_version_is_read(space: Path, tmp_path: Path) -> None:
    """It does not say of what files it is; its manifest names the precision of the run that filled it."""
    settings = config(space, "stage1", data=photos(space, tmp_path))
    store = fill(settings)
    for shard in range(len(store)):
        tensors, about = load_file(store.path(shard)), {"faults": "{}"}
        del tensors["files"], tensors["checksum"]
        save_file(tensors, store.path(shard), about)
    made = store.about | {"made": store.about["made"] | {"train": {"precision": "bf16"}}}
    del made["checksum"]
    (tmp_path / "store" / "store.json").write_text(json.dumps(made))
    os.utime(tmp_path / "images" / "0.png", ns=(0, 0))
    stages.train(settings.model_copy(update={"run": str(tmp_path / "run")}))


def test_a_store_is_for_every_precision(space: Path, tmp_path: Path) -> None:
    """What a run in bf16 stored is what one in fp32 stores, bit by bit; each trains from either, also in chunks."""
    runs = {}
    for name, store, train in (
        ("bf16", "one", {"precision": "bf16"}),
        ("fp32", "one", {"precision": "fp32"}),
        ("chunks", "one", {"precision": "bf16", "chunk": 2}),
        ("alone", "two", {"precision": "fp32"}),
    ):
        data = WHOLE | {"features": str(tmp_path / store)}
        settings = {"run": str(tmp_path / name), "qformer": {"dropout": 0.0}, "train": train | {"steps": 2}}
        stages.train(config(space, "stage1", data=data, **settings))
        runs[name] = losses(tmp_path / name)
    for name in ("bf16", "chunks"):
        assert runs[name] != runs["fp32"]
        for mine, theirs in zip(runs[name], runs["fp32"], strict=True):
            assert mine == pytest.approx(theirs, rel=0.05)
    assert runs["alone"] == runs["fp32"]
    first, second = (tmp_path / store / "shard-000000.safetensors" for store in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()


def test_a_full_disk_keeps_what_is_filled(space: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import qformer.data.shard_file as writing

    settings = config(space, "stage1", data={"features": str(tmp_path), "validation": None})
    real, written = writing.save_file, []

    def save_file(tensors: Any, path: Path, *given: Any) -> None:
        written.append(path)
        real(tensors, path, *given)
        if len(written) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "save_file", save_file)
    with pytest.raises(
        OSError, match=r"could not be filled .*No space left.*: 1 of 4 shards are complete and stay; free"
    ):
        stages.fill_features(settings)
    assert [file.name for file in tmp_path.glob("shard-*") if file.suffix != ".lock"] == ["shard-000000.safetensors"]
    stages.fill_features(settings)
    assert [path.name for path in written] == [f"shard-00000{shard}.safetensors.partial" for shard in (0, 1, 1, 2, 3)]


def test_a_disk_that_is_too_small_is_said_before(space: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features.shutil, "disk_usage", lambda _: os.statvfs_result)
    monkeypatch.setattr(os.statvfs_result, "free", 700, raising=False)
    with pytest.raises(UsageError, match=r"8 images x 2 crops as fp16 take about 1.9 kB .*700 bytes are free; give"):
        stages.fill_features(config(space, "stage1", data={"features": {"path": str(tmp_path), "crops": 2}}))


def test_data_without_an_image_are_said_before(space: Path, tmp_path: Path) -> None:
    data = {"train": {"name": "jsonl", "path": str(space / "captions.jsonl"), "images": str(tmp_path)}}
    with pytest.raises(UsageError, match=r"none of 4 samples .*\(missing: .*check data.train"):
        stages.fill_features(config(space, "stage1", data=data | {"features": str(tmp_path / "store")}))


def test_the_command_fills_and_trains_nothing(run: Any, space: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    settings = config(space, "stage1", run=str(tmp_path / "run"))
    file.write_text(json.dumps(settings.model_dump(mode="json", exclude_unset=True)))
    code, out, err = run("features", str(file), f"data.features={tmp_path / 'store'}")
    assert code == 0, err
    assert out.splitlines()[-1] == str(tmp_path / "store")
    assert "8 images as fp16 take about" in out
    assert not (tmp_path / "run").exists()
    code, _, err = run("features", str(file))
    assert (code, err.strip()) == (2, "qformer: the configuration has no store to fill; give data.features a folder")
    code, _, err = run("train", str(file), f"data.features={tmp_path / 'store'}", "freeze_vision=false")
    assert code == 2
    assert "tokens of a frozen image encoder, but this run trains the image encoder" in err
    code, _, err = run("features", str(file), f"data.features={file / 'store'}")
    assert code == 2
    assert "give data.features another folder" in err


def test_stage_two_fills_with_the_tower_of_its_start(space: Path, tmp_path: Path) -> None:
    """And finds the store of stage one."""
    store = str(tmp_path / "store")
    first = config(space, "stage1", data=WHOLE | {"features": store})
    stages.fill_features(first)
    times = [file.stat().st_mtime_ns for file in sorted(Path(store).iterdir())]
    stages.fill_features(config(space, "stage2", data=WHOLE | {"features": store}))
    assert [file.stat().st_mtime_ns for file in sorted(Path(store).iterdir())] == times
    assert all(a <= b for a, b in pairwise(times[:-1]))
