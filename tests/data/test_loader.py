"""Batches are a function of (seed, number), in any process, from any start. Bad samples are replaced and named."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._utils import ExceptionWrapper

from qformer import distributed
from qformer.data import sources
from qformer.data.held_out import held_out
from qformer.data.loader import Batches, BatchRecord, Skipped, training_batches
from qformer.data.texts import draw_texts
from qformer.losses import same_image
from qformer.resolution.fixed import Fixed
from qformer.schema import DataConfig
from qformer.types import BadSample, Batch, Sample, Tiles, UsageError
from tests.data.making import jsonl, photo

STRATEGY = Fixed(8)


@dataclass(frozen=True)
class Numbered:
    """Sample i is a noisy picture of its own with captions that say i. `bad` ones cannot be used, in three ways."""

    count: int = 20
    bad: frozenset[int] = frozenset()
    captions: int = 3
    asks: bool = False
    same: int = 1  # so many records in a row show the same image

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        if index in self.bad and index % 3 == 0:
            raise BadSample("broken", f"number {index}")
        image: Any = np.random.default_rng(index // self.same).integers(0, 256, (24, 20, 3), dtype=np.uint8)
        captions = [f"Picture {index}, {words}." for words in ("first", "second", "third")[: self.captions]]
        if index in self.bad:
            image, captions = (b"no image", captions) if index % 3 == 1 else (image, ["", " ... "])
        ask = (
            {"question": f"Which number is it (really)? {index}", "answers": [str(index), "unknown"]}
            if self.asks
            else {}
        )
        return Sample(image, f"key {index}", f"image {index // self.same}" if self.same > 1 else None, captions, **ask)  # type: ignore[arg-type]


def batches(source: Any, seed: int = 1, **options: Any) -> Batches:
    data = DataConfig.model_validate({"train": {"name": "unused"}, "batch": 4, "crop": [0.3, 1.0]} | options)
    return Batches(source, STRATEGY, data, seed)


def written(batch: Batch) -> list[str]:
    assert isinstance(batch.text, list)
    return batch.text


def content(loaded: BatchRecord) -> tuple[Any, ...]:
    """Everything in a batch, comparable."""
    batch = loaded.batch
    pixels = torch.stack(batch.tiles.pixels).numpy().tobytes()
    return (
        pixels,
        batch.text,
        batch.image_id,
        batch.question,
        batch.answers,
        batch.cuts,
        loaded.keys,
        loaded.skipped,
        batch.tiles.plans,
    )


BAD = frozenset({0, 1, 2, 10, 14})


def test_a_batch_is_a_function_of_seed_and_number() -> None:
    """The same with workers and without, from the start and resumed, in any order, over the ends of epochs."""
    made = batches(Numbered(bad=BAD))
    expected = [content(made[i]) for i in range(12)]
    assert any(skipped for *_, skipped, _ in expected)
    backwards = batches(Numbered(bad=BAD))
    assert [content(backwards[i]) for i in reversed(range(12))] == expected[::-1]
    assert [content(loaded) for loaded in training_batches(made, 0, 0, 12)] == expected
    assert [content(loaded) for loaded in training_batches(batches(Numbered(bad=BAD)), 2, 0, 12)] == expected
    assert [content(loaded) for loaded in training_batches(batches(Numbered(bad=BAD)), 0, 7, 12)] == expected[7:]
    assert content(batches(Numbered(bad=BAD), seed=2)[0]) != expected[0]
    assert len({pixels for pixels, *_ in expected}) == 12


def test_it_leaves_the_global_random_states_alone() -> None:
    np.random.seed(3)
    torch.manual_seed(3)
    first = content(batches(Numbered())[0])
    np.random.seed(4)
    torch.manual_seed(4)
    before = torch.get_rng_state()
    assert content(batches(Numbered())[0]) == first
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("count", "size"), [(20, 4), (10, 4), (3, 4), (7, 3)])
def test_every_sample_once_per_epoch(count: int, size: int) -> None:
    """Also where batches lie across the ends of epochs."""
    made = batches(Numbered(count), batch=size)
    keys = [key for number in range(4 * count) for key in made[number].keys][: 4 * count]
    epochs = [keys[i * count : (i + 1) * count] for i in range(4)]
    everything = sorted(f"key {i}" for i in range(count))
    assert all(sorted(epoch) == everything for epoch in epochs)
    if count >= 7:
        assert len({tuple(epoch) for epoch in epochs}) == 4  # shuffled anew


def test_augmentation_and_caption_change_from_epoch_to_epoch() -> None:
    seen = set()
    texts: Counter[str] = Counter()
    for number in range(40):
        batch = batches(Numbered(1), batch=1)[number].batch
        seen.add(batch.tiles.pixels[0].numpy().tobytes())
        texts.update(written(batch))
    assert len(seen) > 35
    assert set(texts) == {f"picture 0, {words}" for words in ("first", "second", "third")}
    assert min(texts.values()) >= 5


def test_without_augmentation_the_image_is_as_it_is() -> None:
    made = batches(Numbered(1), batch=1, crop=[1, 1], flip=0)
    pixels = [made[number].batch.tiles.pixels[0] for number in range(5)]
    assert all(torch.equal(tile, pixels[0]) for tile in pixels)
    image: Any = Numbered(1)[0].image
    whole = torch.from_numpy(image).permute(2, 0, 1)
    expected = torch.nn.functional.interpolate(whole[None].float(), (8, 8), mode="bicubic", antialias=True)[0]
    assert (pixels[0].float() - expected.clamp(0, 255)).abs().max() <= 2


def test_bad_samples_are_replaced_counted_and_named() -> None:
    source = Numbered(bad=BAD)
    made = batches(source)
    loaded = [made[number] for number in range(5)]  # one epoch
    bad_keys = {f"key {i}" for i in BAD}
    assert all(len(one.keys) == len(one.batch) == len(one.batch.text) == 4 for one in loaded)
    assert not bad_keys & {key for one in loaded for key in one.keys}
    skipped = [record for one in loaded for record in one.skipped]
    assert {record["index"] for record in skipped} == {str(i) for i in BAD}
    kinds = {record["index"]: record["kind"] for record in skipped}
    assert kinds == {"0": "broken", "1": "undecodable", "2": "no caption", "10": "undecodable", "14": "no caption"}
    good = {f"key {i}" for i in range(20)} - bad_keys
    assert good <= {key for one in loaded for key in one.keys}
    for one in loaded:  # pictures and texts still belong together
        assert [key.split()[1] for key in one.keys] == [text.split()[1].rstrip(",") for text in written(one.batch)]


def test_replacements_are_not_always_the_same() -> None:
    made = batches(Numbered(bad=frozenset({3})), batch=20)
    doubled = {key for number in range(12) for key, times in Counter(made[number].keys).items() if times == 2}
    assert len(doubled) > 5


@dataclass
class InWorker:
    """Raises what the batches raise in the form in which torch hands on an error of a worker process."""

    batches: Batches

    def __getitem__(self, number: int) -> BatchRecord:
        try:
            return self.batches[number]
        except UsageError:
            ExceptionWrapper(where="in DataLoader worker process 0").reraise()
            raise


@pytest.mark.parametrize("wrap", [lambda batches: batches, InWorker], ids=["here", "worker"])
def test_data_that_are_all_bad_end_the_run_with_one_sentence(wrap: Any) -> None:
    made = wrap(batches(Numbered(bad=frozenset(range(20)))))
    with pytest.raises(UsageError, match="50 samples in a row could not be used") as caught:
        next(training_batches(made, 0, 0, 3))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("50 samples")


def test_repeated_images_share_an_id() -> None:
    loaded = batches(Numbered(4, same=2))[0]
    ids = loaded.batch.image_id
    assert sorted(ids or []) == ["image 0", "image 0", "image 1", "image 1"]
    numbers = [int(key.split()[1]) // 2 for key in loaded.keys]
    assert same_image(ids, 4).tolist() == [[a == b for b in numbers] for a in numbers]
    alone = batches(Numbered(4))[0]
    assert same_image(alone.batch.image_id, 4).equal(torch.eye(4, dtype=torch.bool))  # known by their pixels


def test_held_out_records_of_one_image_are_one(tmp_path: Path) -> None:
    """Wherever they stand; one that cannot be read is counted each time, and questions stay apart."""
    held = held_out(Numbered(12, same=3, captions=1), STRATEGY, None, 4)
    texts = [[f"picture {number}, first" for number in range(start, start + 3)] for start in (0, 3, 6, 9)]
    assert held.captions == texts
    assert [len(group) for group in held.groups] == [4]
    assert held_out(Numbered(12, same=3, captions=1), STRATEGY, 2, 4).captions == texts[:2]
    assert len(held_out(Numbered(12, same=3, captions=0, asks=True), STRATEGY, None, 4)) == 12
    photo(1).save(tmp_path / "a.png")
    rows = [("a.png", 1), ("none.png", 2), ("b/../a.png", 3), ("none.png", 4), ("./a.png", 5)]
    (tmp_path / "b").mkdir()
    path = jsonl(tmp_path / "a.jsonl", [{"image": name, "caption": f"caption {number}"} for name, number in rows])
    held = held_out(sources.build("jsonl", path=path), STRATEGY, None, 4)
    assert held.captions == [["caption 1", "caption 3", "caption 5"]]
    assert [record["kind"] for record in held.skipped] == ["missing", "missing"]


def test_question_data() -> None:
    loaded = batches(Numbered(asks=True, captions=0))[0]
    numbers = [key.split()[1] for key in loaded.keys]
    assert loaded.batch.question == [f"which number is it really? {number}" for number in numbers]
    assert loaded.batch.answers == [[number, "unknown"] for number in numbers]
    assert loaded.batch.text == loaded.batch.answer
    assert all(answer in own for answer, own in zip(loaded.batch.answer or [], loaded.batch.answers or [], strict=True))
    plain = batches(Numbered())[0].batch
    assert plain.question is None
    assert plain.answers is None


def test_draw_texts() -> None:
    rng = np.random.default_rng(0)
    sample = Sample(b"", "k", captions=["  A (Dog).", "", "***"])
    assert {draw_texts(sample, rng) for _ in range(20)} == {("a dog", "")}
    for bad, kind in (
        (Sample(b"", "k"), "no caption"),
        (Sample(b"", "k", captions=["", "..."]), "no caption"),
        (Sample(b"", "k", question="what?"), "no answer"),
    ):
        with pytest.raises(BadSample) as caught:
            draw_texts(bad, rng)
        assert caught.value.kind == kind
    asked = Sample(b"", "k", captions=["a dog"], question="what?", answers=["this"])
    assert draw_texts(asked, rng) == ("a dog", "this")
    assert draw_texts(replace(asked, captions=[], answers=["", "this"]), rng) == ("this", "this")
    assert draw_texts(replace(asked, answers=[]), rng) == ("a dog", "")  # still a caption


def test_answers_are_drawn_as_often_as_they_were_given() -> None:
    rng = np.random.default_rng(0)
    sample = Sample(
        b"", "k", question="what?", answers=["no", "yes", "yes", "maybe", "yes", "yes", "yes", "no", "yes", "yes"]
    )
    drawn = Counter(draw_texts(sample, rng)[1] for _ in range(4000))
    for answer, count in Counter(sample.answers).items():
        assert drawn[answer] / 4000 == pytest.approx(count / 10, abs=0.03)  # three standard deviations are 0.022


def test_a_drawn_answer_is_a_function_of_seed_and_place_alone() -> None:
    """So it is the same after a resume, in any worker, and in however many processes share the stream."""
    first, again = (batches(Numbered(asks=True, captions=0), seed=3) for _ in range(2))
    drawn = [first[i].batch.answer for i in range(6)]
    assert [again[i].batch.answer for i in (5, 1, 0)] == [drawn[i] for i in (5, 1, 0)]
    assert [batches(Numbered(asks=True, captions=0), seed=4)[i].batch.answer for i in range(6)] != drawn
    two = batches(Numbered(asks=True, captions=0), seed=3, batch=2)  # each of two processes reads every other one
    assert [two[2 * i].batch.answer + two[2 * i + 1].batch.answer for i in range(6)] == drawn
    assert {answer == "unknown" for own in drawn for answer in own} == {True, False}


def result(good: int, bad: int) -> BatchRecord:
    batch = Batch(Tiles([], []), [])
    return BatchRecord(batch, ["k"] * good, [{"index": str(i), "kind": "missing", "detail": "f"} for i in range(bad)])


def test_too_many_bad_of_the_last_thousand_stop_the_run(tmp_path: Path) -> None:
    skipped = Skipped(tmp_path, 0.2)
    for _ in range(110):
        skipped.add(result(8, 2))  # exactly 200 of 1,000
    with pytest.raises(UsageError) as caught:
        skipped.add(result(7, 3))
    message = str(caught.value)
    assert "201 of the last 1000 samples could not be used (223 missing)" in message
    assert str(tmp_path / "skipped.jsonl") in message
    assert "20%" in message


def test_few_bad_samples_never_stop_it(tmp_path: Path) -> None:
    skipped = Skipped(tmp_path, 0.2)
    skipped.add(result(0, 300))  # too early to tell
    for _ in range(100):
        skipped.add(result(100, 0))
    for _ in range(100):
        skipped.add(result(81, 19))
    assert skipped.kinds == {"missing": 2200}
    assert skipped.summary() == "2200 missing"


def test_all_may_be_bad_where_the_user_says_so(tmp_path: Path) -> None:
    skipped = Skipped(tmp_path, 1.0)
    for _ in range(30):
        skipped.add(result(1, 99))


def test_the_list_of_skipped(tmp_path: Path) -> None:
    skipped = Skipped(tmp_path, 0.5)
    skipped.add(result(5, 0))
    assert not (tmp_path / "skipped.jsonl").exists()
    skipped.add(result(5, 2))
    skipped.add(result(5, 1))
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == ["0", "1", "0"]
    assert lines[0] == {"index": "0", "kind": "missing", "detail": "f"}


def test_the_list_of_an_interrupted_run(tmp_path: Path) -> None:
    """What was recorded for batches that are made again is dropped; counts go on; half a line is no error."""
    made = batches(Numbered(bad=BAD))
    first = Skipped(tmp_path, 1.0)
    for number in range(5):
        first.add(made[number])
    whole = first.path.read_text()
    first.add(made[5])
    first.path.write_text(first.path.read_text()[:-20])
    again = Skipped(tmp_path, 1.0)
    again.forget_from(3)
    for number in (3, 4):
        again.add(made[number])
    assert again.path.read_text() == whole
    assert again.kinds == {"broken": 1, "undecodable": 2, "no caption": 2}  # one epoch: each bad sample once
    again.forget_from(0)
    assert (again.path.read_text(), again.kinds) == ("", {})
    Skipped(tmp_path / "new", 1.0).forget_from(0)
    assert not (tmp_path / "new").exists()


def test_replacements_that_are_bad_are_listed_but_not_counted(tmp_path: Path) -> None:
    made = batches(Numbered(10, bad=frozenset(range(8))), batch=1)
    skipped = Skipped(tmp_path, 1.0)
    for number in range(10):
        skipped.add(made[number])
    lines = [json.loads(line) for line in skipped.path.read_text().splitlines()]
    own = [line for line in lines if "replacement" not in line]
    assert sorted(line["index"] for line in own) == [str(i) for i in range(8)]
    assert len(lines) > len(own)
    assert skipped.kinds.total() == 8
    assert all(line["position"] == line["batch"] for line in lines)


def test_each_process_has_its_rows_of_the_global_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = batches(Numbered(bad=BAD), batch=6)
    monkeypatch.setattr(distributed, "world", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(list(training_batches(batches(Numbered(bad=BAD), batch=2), 0, 0, 10)))
    for number in range(10):
        assert [key for share in shares for key in share[number].keys] == whole[number].keys
        cuts = [cut for share in shares for cut in share[number].batch.cuts or []]  # where a T5 cuts captions
        assert cuts == whole[number].batch.cuts
        assert len({*cuts}) == 6
        pixels = torch.stack([tile for share in shares for tile in share[number].batch.tiles.pixels])
        assert torch.equal(pixels, torch.stack(whole[number].batch.tiles.pixels))


def test_held_out_keeps_all_captions_and_skips_bad() -> None:
    held = held_out(Numbered(bad=BAD), STRATEGY, None, 4)
    good = [i for i in range(20) if i not in BAD]
    assert [sample.key for sample in held.samples] == [f"key {i}" for i in good]
    assert held.captions == [[f"picture {i}, {words}" for words in ("first", "second", "third")] for i in good]
    assert [len(group) for group in held.groups] == [4, 4, 4, 3]
    assert [record["index"] for record in held.skipped] == ["0", "1", "2", "10", "14"]
    assert len(held) == 15
    tiles = [tile for group in held.groups for tile in group.pixels]
    alone = [held_out(Numbered(), STRATEGY, None, 1).groups[i].pixels[0] for i in good]
    assert all(torch.equal(a, b) for a, b in zip(tiles, alone, strict=True))  # rows are not mixed up


def test_held_out_limit_counts_what_is_usable() -> None:
    held = held_out(Numbered(bad=BAD), STRATEGY, 3, 2)
    assert [sample.key for sample in held.samples] == ["key 3", "key 4", "key 5"]
    assert [len(group) for group in held.groups] == [2, 1]
    assert len(held_out(Numbered(5), STRATEGY, 50, 8)) == 5


def test_held_out_data_that_are_all_bad() -> None:
    with pytest.raises(UsageError, match="none of the 4 validation samples could be used"):
        held_out(Numbered(4, bad=frozenset(range(4))), STRATEGY, None, 2)


@dataclass
class Exploding:
    """A source with a fault of its own, which must not be taken for a bad sample."""

    seen: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Sample:
        raise KeyError("a programming error")


def test_errors_of_the_program_are_not_swallowed() -> None:
    with pytest.raises(KeyError):
        batches(Exploding())[0]
