"""The store of image tokens: what is packed, how samples are numbered, and that only what was asked for is read."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qformer.data import base, sources
from qformer.data.base import indices, number_of
from qformer.data.features import FeatureStore, ShardWriter, StoredSample, mark
from qformer.files import soundness
from qformer.files.packing import pack, unpack
from qformer.resolution.fixed import Fixed
from qformer.types import BadSample, Sample, Tiles, UsageError
from tests.data.making import jsonl, shard, tar

MADE = {"data": {"samples": 5, "crops": 2, "dtype": "fp16"}}


def test_packed_tokens_come_back() -> None:
    tokens = torch.randn(40, 24) * torch.logspace(-3, 4, 40)[:, None]
    halves = unpack(pack(tokens, "fp16"))
    assert ((halves - tokens).abs() <= tokens.abs() * 2**-11 + 2**-25).all()
    rows = pack(tokens, "int8")
    assert rows.shape == (40, 26)
    step = tokens.abs().amax(dim=1, keepdim=True) / 127
    assert ((unpack(rows) - tokens).abs() <= 0.51 * step + 2**-25).all()
    torch.testing.assert_close(unpack(rows.view(8, 5, 26)), unpack(rows).view(8, 5, 24))
    assert torch.equal(unpack(pack(torch.zeros(2, 4), "int8")), torch.zeros(2, 4))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 7e4])
def test_what_fp16_cannot_hold_is_refused(value: float) -> None:
    tokens = torch.ones(3, 4)
    tokens[1, 2] = value
    with pytest.raises(OverflowError, match="fp16 cannot hold"):
        pack(tokens, "fp16")
    if value == 7e4:
        assert unpack(pack(tokens, "int8")).max() == pytest.approx(value, rel=1e-2)
    else:
        with pytest.raises(OverflowError, match="int8 cannot hold"):
            pack(tokens, "int8")


def test_every_index_has_a_number(tmp_path: Path) -> None:
    """Of tars (one of them empty of samples), lists, a mixture within a mixture, and behind a prompt."""
    shard(tmp_path / "0.tar", range(3))
    tar(tmp_path / "1.tar", [("x/", b"")])
    shard(tmp_path / "2.tar", range(3, 8))
    records = [{"image": f"{number}.png", "caption": "a dog"} for number in range(4)]
    tars = {"name": "webdataset", "path": f"{tmp_path}/{{0..2}}.tar", "prompt": "a photo of"}
    lines = {"name": "jsonl", "path": jsonl(tmp_path / "a.jsonl", records)}
    mixed = {"name": "mix", "sources": [lines, tars]}
    for choice in (lines, tars, mixed, {"name": "mix", "sources": [tars, mixed | {"prompt": "look"}]}):
        source = sources.build(**choice)
        found = {number_of(source, index): index for index in indices(source)}
        assert sorted(found) == list(range(len(source)))
        for number, index in found.items():
            assert _seen(source, number) == _seen(source, index)


def _seen(source: base.Source, index: int) -> tuple[str, str]:
    try:
        sample = source[index]
    except BadSample as bad:
        return "bad", str(bad)
    return sample.key, sample.prompt


def test_marks_tell_images_apart_wherever_they_lie() -> None:
    def of(image: object) -> int:
        return mark(Sample(image=image, key="k"))  # type: ignore[arg-type]

    assert of(Path("/here/photos/1.jpg")) == of(Path("there/photos/1.jpg"))
    pixels = np.zeros((2, 3, 3), dtype=np.uint8)
    different = [Path("photos/1.jpg"), Path("photos/2.jpg"), Path("other/1.jpg"), b"1", b"2", pixels, pixels + 1]
    marks = [of(image) for image in different]
    assert len(set(marks)) == len(different)
    assert all(0 < one < 1 << 63 for one in marks)


def store(folder: Path) -> tuple[FeatureStore, dict[tuple[int, int], list[torch.Tensor]]]:
    """Five samples of two crops in shards of two; the second cannot be read, and tiles differ in number and length."""
    tokens = {}
    kept = FeatureStore(folder, {"made": MADE, "encoder": {"width": 6}, "per_shard": 2, "bytes_per_sample": 1})
    for place in range(len(kept)):
        filling = ShardWriter("fp16")
        for number in kept.numbers(place):
            if number == 1:
                filling.add(StoredSample(number, 7, fault=("missing", "1.jpg")), 2, iter([]))
                continue
            plans = [Fixed(14 * (1 + crop)).plan(20 + number, 30) for crop in range(2)]
            made = [torch.randn(3 + number + crop, 6).half() for crop in range(2)]
            views = StoredSample(number, mark(_sample(number)), Tiles([torch.zeros(1)] * 2, plans))
            filling.add(views, 2, iter(made))
            tokens |= {(number, crop): [made[crop]] for crop in range(2)}
        filling.write(kept.path(place))
    return kept, tokens


def _sample(number: int) -> Sample:
    return Sample(image=Path(f"photos/{number}.jpg"), key=f"line {number}")


def test_a_store_gives_back_what_was_put_in(tmp_path: Path) -> None:
    kept, tokens = store(tmp_path)
    assert kept.missing() == []
    for (number, crop), expected in tokens.items():
        found = kept.read(number, crop, _sample(number), Fixed(28))
        assert found.plans == [Fixed(28).plan(20 + number, 30)]
        assert found.tokens is not None
        assert all(torch.equal(a, b) for a, b in zip(found.tokens, expected, strict=True))
        assert all(rows.untyped_storage().nbytes() == rows.nbytes for rows in found.tokens)  # not the file behind them
    assert kept.faults() == [(1, "missing", "1.jpg")]
    with pytest.raises(BadSample, match=r"missing: 1\.jpg"):
        kept.read(1, 0, _sample(1), Fixed(28))
    assert not pickle.loads(pickle.dumps(kept))._open  # workers that are not forked open the files themselves


def test_tokens_that_do_not_fit_name_their_sample() -> None:
    views = StoredSample(7, 1, Tiles([torch.zeros(1)], [Fixed(28).plan(20, 30)]))
    with pytest.raises(UsageError, match=r"fp16 cannot hold .* 1e\+05 \(sample 7\); set data.features.dtype to int8"):
        ShardWriter("fp16").add(views, 1, iter([torch.full((3, 4), 1e5)]))


def test_other_images_than_those_that_were_stored_are_noticed(tmp_path: Path) -> None:
    kept, _ = store(tmp_path)
    with pytest.raises(UsageError, match=r"sample 2 of data.train \('line 3'\) shows another image .* another folder"):
        kept.read(2, 0, _sample(3), Fixed(28))


def test_a_shard_that_is_cut_off_is_missing(tmp_path: Path) -> None:
    kept, _ = store(tmp_path)
    file = kept.path(1)
    file.write_bytes(file.read_bytes()[:-1])
    again = FeatureStore(tmp_path, kept.about)
    assert again.missing() == [1]
    with pytest.raises(UsageError, match=r"000001.*is missing or damaged .*to fill it again"):
        again.read(2, 0, _sample(2), Fixed(28))


def test_a_flipped_bit_is_named_at_the_first_read(tmp_path: Path) -> None:
    kept, _ = store(tmp_path)
    file = kept.path(1)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    again = FeatureStore(tmp_path, kept.about)
    assert again.missing() == []
    again.read(0, 0, _sample(0), Fixed(28))
    with pytest.raises(UsageError, match=r"000001.* damaged \(its checksum is \w+ instead of .*to fill it again"):
        again.read(2, 0, _sample(2), Fixed(28))
    with soundness.unchecked():
        hasty = pickle.loads(pickle.dumps(FeatureStore(tmp_path, kept.about)))
    assert hasty.read(2, 0, _sample(2), Fixed(28)).tokens is not None


def _without_rows(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["tokens"]


def _change(name: str, change: Any) -> Any:
    return lambda tensors: tensors.update({name: change(tensors[name])})


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_without_rows, "it lacks tokens"),
        (_change("tokens", lambda rows: rows[:-1]), "its tokens are [23, 6], but its lengths sum to 24"),
        (_change("tokens", lambda rows: rows[:, :5].contiguous()), "its rows are F16 of 5 instead of F16 of 6"),
        (_change("tokens", torch.Tensor.float), "its rows are F32 of 6 instead of F16 of 6"),
        (_change("lengths", torch.Tensor.float), "its lengths are torch.float32 [4]"),
        (_change("lengths", torch.neg), "its lengths hold numbers below zero"),
        (_change("tiles", lambda tiles: tiles * 2), "it has lengths of 4 tiles, but 8 tiles"),
        (_change("tiles", lambda tiles: tiles * torch.tensor([0, 2, 1, 1])), "a sample that has no fault has no tiles"),
        (_change("tiles", lambda tiles: tiles * torch.tensor([2, 0, 1, 1])), "a sample that has no fault has no tiles"),
        (_change("sizes", torch.flatten), "its sizes are torch.int32 [8]"),
        (_change("sizes", lambda sizes: sizes[:2].clone()), "it has 2 marks, 4 crops and sizes of shape [2, 2]"),
        (_change("sizes", lambda sizes: sizes * 0), "a sample that has no fault has no tiles"),
        (_change("marks", lambda marks: marks[:1].clone()), "its files are torch.int64 [2, 3]"),
        (
            lambda held: held.update(marks=held["marks"][:1].clone(), files=held["files"][:1].clone()),
            "it holds 1 samples with 4 crops instead of 2",
        ),
        (None, "it lacks faults"),
        ("{", "its faults are not JSON"),
        ("[]", "its faults are not pairs of texts by place"),
        ('{"0": "gone"}', "its faults are not pairs of texts by place"),
        ('{"0": ["gone", 7]}', "its faults are not pairs of texts by place"),
        ('{"9": ["gone", "9.jpg"]}', "its faults name place '9' of 2"),
    ],
)
def test_a_shard_that_cannot_be_is_named(tmp_path: Path, damage: Any, said: str) -> None:
    """Of an earlier version, without a checksum."""
    kept, _ = store(tmp_path)
    tensors, faults = load_file(kept.path(1)), {"faults": "{}"}
    del tensors["checksum"]
    if callable(damage):
        damage(tensors)
    else:
        faults = {} if damage is None else {"faults": damage}
    save_file(tensors, kept.path(1), faults)
    with pytest.raises(UsageError) as caught:
        FeatureStore(tmp_path, kept.about).read(2, 0, _sample(2), Fixed(28))
    assert f"shard-000001.safetensors' is missing or damaged ({said}); remove it" in str(caught.value)


ABOUT: dict[str, Any] = {
    "made": MADE,
    "encoder": {"width": 6, "patch_size": 14, "image_size": 28, "extra": 1},
    "per_shard": 2,
    "bytes_per_sample": 100,
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"per_shard": 0}, "per_shard: input should be greater than 0, but got 0"),
        ({"per_shard": "2"}, "per_shard: input should be a valid integer, but got '2'"),
        ({"made": {}}, "made.data is missing"),
        ({"made": {"data": {"samples": 5.5, "crops": 2}}}, "made.data.samples: input should be a valid integer"),
        ({"made": MADE | {"vision": 7}}, "made.vision: input should be a valid dictionary, but got 7"),
        ({"encoder": {"width": 6}}, "encoder.patch_size is missing"),
        ({"encoder": None}, "encoder: input should be a valid dictionary"),
    ],
)
def test_a_manifest_of_another_form_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    (tmp_path / "store.json").write_text(json.dumps(ABOUT))
    assert FeatureStore.read_manifest(tmp_path).samples == 5  # as from before there were checksums
    (tmp_path / "store.json").write_text(json.dumps(soundness.seal(ABOUT | change)))
    with pytest.raises(UsageError) as caught:
        FeatureStore.read_manifest(tmp_path)
    assert said in str(caught.value)
    assert "remove the folder, or give data.features another" in str(caught.value)


def test_a_manifest_that_was_changed_is_named(tmp_path: Path) -> None:
    (tmp_path / "store.json").write_text(json.dumps(soundness.seal(ABOUT) | {"per_shard": 3}))
    with pytest.raises(UsageError, match=r"store\.json' is not as it was written: its checksum is another"):
        FeatureStore.read_manifest(tmp_path)


def test_batches_of_tiles_are_cut_and_joined_with_their_tokens(tmp_path: Path) -> None:
    kept, tokens = store(tmp_path)
    parts = [kept.read(number, 0, _sample(number), Fixed(28)) for number in (0, 2, 4)]
    joined = Tiles.join(parts)
    assert joined.tokens is not None
    assert [len(rows) for rows in joined.tokens] == [3, 5, 7]
    cut = joined[1:]
    assert cut.tokens is not None
    assert cut.tokens[0] is joined.tokens[1]
    assert len(cut) == 2
    with pytest.raises(ValueError, match="got 2 tiles, but the plans hold 3"):
        Tiles([], joined.plans, joined.tokens[:2])
    assert len(tokens) == 8
