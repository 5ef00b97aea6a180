"""Records that show several pictures or a clip: from files to tiles, cropped alike, and those that cannot be used."""

from __future__ import annotations

import builtins
import warnings
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from qformer import resolution
from qformer.data import sources
from qformer.data.columns import Columns, unfold
from qformer.data.held_out import held_out, list_images, read_groups
from qformer.data.loader import Batches, training_batches
from qformer.data.preview import preview
from qformer.data.transforms import augment
from qformer.formats import VideoFile
from qformer.identity import stamp
from qformer.resolution.limits import Limited
from qformer.schema import DataConfig
from qformer.types import BadSample, LeftOut, Sample, Tiles, UsageError
from qformer.videos import Clip
from qformer.videos.rows import glance, only_picture
from tests.clips import SIZE, level, write_clip
from tests.data.making import encoded, jsonl, photo

STRATEGY = resolution.build("qwen2vl", patch=8, max_tokens=16, video_tokens=64, frame_tokens=[4, 16])


def pairs(folder: Path) -> str:
    """JSON lines: a picture, two of them, a clip of 3 seconds, and a conversation about three."""
    for number in range(3):
        photo(number + 1, 40 + 8 * number, 32).save(folder / f"{number}.png")
    write_clip(folder / "clip.mp4")
    turns = [
        {"from": "human", "value": "First <image>, then\n<image>\n<image>\nWhat changed?"},
        {"from": "gpt", "value": "red"},
    ]
    records = [
        {"image": "0.png", "caption": "one"},
        {"image": ["0.png", "1.png"], "question": "<image><image>\nwhich is larger?", "answers": ["second"]},
        {"video": "clip.mp4", "question": "what happens?", "answer": "it gets brighter"},
        {"id": "7", "image": ["2.png", "1.png", "0.png"], "conversations": turns},
    ]
    return jsonl(folder / "rows.jsonl", records)


def batches(source: Any, strategy: Any = STRATEGY, **options: Any) -> Batches:
    given = {"train": {"name": "unused"}, "batch": 4, "crop": [1, 1], "flip": 0} | options
    return Batches(source, strategy, DataConfig.model_validate(given), 1)


def sizes(tiles: Tiles) -> list[list[tuple[int, int]]]:
    return [[part.image for part in plan.parts or (plan,)] for plan in tiles.plans]


def same(one: Tiles, other: Tiles) -> bool:
    return one.plans == other.plans and all(map(torch.equal, one.pixels, other.pixels))


def test_a_record_shows_one_picture_several_or_a_clip(tmp_path: Path) -> None:
    source = sources.build("jsonl", path=pairs(tmp_path))
    one, two, clip, three = (source[number] for number in range(4))
    assert (one.image, two.image) == (tmp_path / "0.png", [tmp_path / "0.png", tmp_path / "1.png"])
    assert (clip.image, clip.answers) == (tmp_path / "clip.mp4", ["it gets brighter"])
    assert two.question == "which is larger?"
    assert (three.question, three.answers) == ("First , then What changed?", ["red"])
    assert two.image_id != Sample([*reversed(two.image)], "k").image_id
    assert two.image_id == Sample([tmp_path / "x" / ".." / "0.png", tmp_path / "1.png"], "k").image_id
    assert stamp(two.image) == " + ".join(map(stamp, two.image))
    lines = list(preview(source))
    assert lines[0] == "4 of the first 4 samples can be used"
    assert lines[1:] == ["40 x 32: one", "40 x 32 + 48 x 32: second", "video of 64 x 48: it gets brighter"]


def test_batches_of_mixed_rows_are_the_same_from_any_process_and_start(tmp_path: Path) -> None:
    source = sources.build("jsonl", path=pairs(tmp_path))
    made = batches(source, crop=[0.3, 1.0], flip=0.5)
    expected = [made[number].batch for number in range(4)]
    for start, workers in ((0, 2), (2, 0)):
        found = training_batches(batches(source, crop=[0.3, 1.0], flip=0.5), workers, start, 4)
        for batch, loaded in zip(expected[start:], found, strict=True):
            assert same(batch.tiles, loaded.batch.tiles)
            assert (batch.text, batch.image_id) == (loaded.batch.text, loaded.batch.image_id)
    plain = batches(source)[0].batch
    assert sorted(map(len, sizes(plain.tiles))) == [1, 1, 2, 3]
    assert plain.question is None  # one of the four is a caption


def test_of_a_video_the_frames_that_the_strategy_names_are_cut(tmp_path: Path) -> None:
    """Two a second of 24 frames in 3 seconds, in pairs."""
    source = sources.build("jsonl", path=pairs(tmp_path), where={"video": "clip.mp4"})
    tiles = batches(source, batch=1)[0].batch.tiles
    (plan,), numbers = tiles.plans, STRATEGY.sample(24, 8.0)
    assert len(numbers) == 6
    assert plan == STRATEGY.plan_video(*SIZE, 6)
    assert [round(level(frame)) for tile in tiles.pixels for frame in tile] == pytest.approx(numbers, abs=1)


def test_what_can_be_compared_is_cropped_alike() -> None:
    rows, columns = torch.meshgrid(torch.arange(40), torch.arange(90), indexing="ij")
    image = torch.stack([rows, columns, rows]).to(torch.uint8)
    clip = Clip(torch.stack([image, image + 1]), 2.0)
    other = torch.zeros(3, 50, 50, dtype=torch.uint8)
    other[:, :, :25] = 255
    mirrored = 0
    for seed in range(20):
        rng, twin = np.random.default_rng(seed), np.random.default_rng(seed)
        first, second, third, fourth = augment([image, clip, other, image + 2], (0.5, 0.9), 0.5, rng)
        assert torch.equal(first, augment([image], (0.5, 0.9), 0.0, twin)[0]) or first[1, 0, 0] > first[1, 0, -1]
        assert isinstance(second, Clip)
        assert torch.equal(torch.stack([first, first + 1]), second.frames)
        assert torch.equal(first + 2, fourth)
        assert (first[1, 0, 0] > first[1, 0, -1]) == (third[0, 0, 0] < third[0, 0, -1])
        mirrored += int(first[1, 0, 0] > first[1, 0, -1])
    assert 4 <= mirrored <= 16


def test_what_is_broken_is_skipped_and_named(tmp_path: Path) -> None:
    pairs(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "clip.mp4").read_bytes()[:900])
    (tmp_path / "frames").mkdir()
    shown: list[dict[str, Any]] = [
        {"image": ["0.png", "broken.png"]},
        {"image": ["0.png", "gone.png"]},
        {"image": ["0.png", ""]},
        {"image": []},
        {"video": "gone.mp4"},
        {"video": "cut.mp4"},
        {"video": "frames"},
        {"video": {"bytes": b"1".hex(), "path": None}},
        {"image": ["0.png"] * 10},  # more than limits.tokens
        {"image": ["0.png", "clip.mp4"]},  # together
        *[{"image": ["1.png", "2.png"]}] * 10,
    ]
    path = jsonl(tmp_path / "bad.jsonl", [{"caption": f"number {n}"} | one for n, one in enumerate(shown)])
    made = batches(sources.build("jsonl", path=path), Limited(STRATEGY, tokens=38), batch=20)
    found = {record["index"]: record for record in made[0].skipped if "replacement" not in record}
    kinds = ["undecodable", "missing", "no image", "no image", "missing", "undecodable", "unreadable", "no image"]
    assert {index: record["kind"] for index, record in found.items()} == {
        str(n): kind for n, kind in enumerate([*kinds, "refused", "refused"])
    }
    assert found["0"]["detail"].endswith("(number 2 of the 2 shown)")
    assert "a row of 10 pictures makes 40 tokens" in found["8"]["detail"]
    assert "a row of 2 pictures makes 40 tokens, but limits.tokens is 38" in found["9"]["detail"]
    assert sizes(made[0].batch.tiles) == [[(48, 32), (56, 32)]] * 20


def test_without_pyav_the_run_ends_with_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, real = sources.build("jsonl", path=pairs(tmp_path), where={"video": "clip.mp4"}), builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "av":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match="videos are read by PyAV, which is not installed"):
        batches(source)[0]
    monkeypatch.undo()


def test_what_takes_one_picture_a_sample_skips_others() -> None:
    assert only_picture(Sample([b"1"], "k")) == b"1"
    for shown, told in (
        ([b"1", b"2"], "several images: k shows 2 together"),
        (Path("a.mp4"), "no image: k shows a video"),
    ):
        with pytest.raises(BadSample, match=told):
            only_picture(Sample(shown, "k"))


def test_held_out_rows_are_read_as_in_training(tmp_path: Path) -> None:
    source = sources.build("jsonl", path=pairs(tmp_path))
    expected = [batches([source[number]], batch=1)[0].batch.tiles for number in range(4)]
    held = held_out(source, STRATEGY, None, 3)
    assert same(Tiles.join(held.groups), Tiles.join(expected))
    only = sources.build("jsonl", path=jsonl(tmp_path / "two.jsonl", [{"image": ["0.png", "2.png"], "caption": "a"}]))
    listed, _ = list_images(only)
    (group,) = read_groups(only, listed, STRATEGY, [range(1)])
    assert sizes(group.tiles or Tiles([], [])) == [[(40, 32), (56, 32)]]
    assert listed[0].read(only).shape == (3, 32, 96)
    assert level(glance(tmp_path / "clip.mp4")) == pytest.approx(12, abs=1)


def test_a_gif_among_videos_is_a_clip(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (32, 24), (10 * number,) * 3) for number in range(6)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100, loop=0)
    source = sources.build("jsonl", path=jsonl(tmp_path / "a.jsonl", [{"video": "a.gif", "caption": "grey"}] * 2))
    assert source[0].image == VideoFile(tmp_path / "a.gif")
    loaded = next(training_batches(batches(source, batch=1), 1, 0, 1))
    assert loaded.batch.tiles.plans == [STRATEGY.plan_video(32, 24, len(STRATEGY.sample(6, 10.0)))]
    named = sources.build("jsonl", path=str(tmp_path / "a.jsonl"), video="{video}")
    assert named[0].image == source[0].image
    with pytest.raises(UsageError, match="has no column 'film'"):
        sources.build("jsonl", path=str(tmp_path / "a.jsonl"), video="film")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_table_with_a_list_of_pictures(tmp_path: Path, streaming: bool) -> None:
    write_clip(tmp_path / "clip.mp4")
    held = [{"bytes": encoded(photo(number)), "path": None} for number in (1, 2)]
    rows = {
        "images": [held, held[:1], [], None],
        "video": [None, None, "clip.mp4", None],
        "question": ["<image>first or <image>second?"] * 4,
        "answer": ["first"] * 4,
    }
    features = {"images": datasets.Sequence(datasets.Image()), "video": datasets.Value("string")}
    features |= {name: datasets.Value("string") for name in ("question", "answer")}
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    table.to_parquet(str(tmp_path / "rows.parquet"))
    more = {"streaming": True, "cache": str(tmp_path / "cache")} if streaming else {}
    source = sources.build("datasets", path=str(tmp_path / "rows.parquet"), images=str(tmp_path), **more)
    read = [source[number] for number in range(3)]
    assert [one.image for one in read] == [
        [held[0]["bytes"], held[1]["bytes"]],
        held[0]["bytes"],
        VideoFile(tmp_path / "clip.mp4"),
    ]
    assert isinstance(read[2].image, VideoFile)
    assert read[0].question == "first or second?"
    assert len({one.image_id for one in read}) == 3
    with pytest.raises(BadSample, match="no image"):
        source[3]


def test_of_a_conversation_the_first_exchange_is_read() -> None:
    turns = [
        {"from": "system", "value": "be brief"},
        {"from": "human", "value": "<video>\nwho is it?"},
        {"from": "gpt", "value": "a cat"},
    ]
    record = {"video": "a.mp4", "conversations": turns}
    assert unfold(record) == {"video": "a.mp4", "question": "who is it?", "answers": ["a cat"]}
    more = [*turns, {"from": "human", "value": "and now?"}, {"from": "gpt", "value": "a dog"}]
    with pytest.warns(LeftOut, match="the first question and its answer are read"):
        assert unfold({"conversations": more}) == {"question": "who is it?", "answers": ["a cat"]}
    with warnings.catch_warnings(action="error"):
        assert unfold({"conversations": turns[:1], "caption": "a"}) == {"caption": "a"}
        assert unfold({"conversations": turns[:2]})["answers"] == []
        assert unfold({"conversations": "none"}) == {"conversations": "none"}
    assert Columns().among(["image_id", "video"]).image is None
