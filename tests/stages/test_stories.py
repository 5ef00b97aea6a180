"""Language models trained on stories: what stands in front of the prompt, and that it is learned."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from qformer import stages
from qformer.checkpoints import folder as checkpoint
from qformer.config import BackboneConfig, parse_config
from qformer.llm.loading import load_language_model
from qformer.scenes.stories import Stories, Story
from qformer.stages.towers import stories as towers
from qformer.stages.towers.stories import StoryBatches, StoryTask, answered, crowd
from qformer.types import Batch, Tiles, UsageError

if TYPE_CHECKING:
    from pathlib import Path


def task(kind: str) -> StoryTask:
    torch.manual_seed(0)
    config = BackboneConfig(kind=kind, width=16, layers=1, heads=2, vocab_size=320, max_tokens=64)
    return StoryTask(config, Stories(count=200))


def configuration(folder: Path, kind: str, **changes: Any) -> dict[str, Any]:
    return {
        "stage": "language",
        "run": str(folder / kind),
        "backbone": {"kind": kind, "width": 32, "layers": 1, "heads": 2, "vocab_size": 320, "max_tokens": 64},
        "data": {
            "train": {"name": "stories", "count": 64},
            "validation": {"name": "stories", "split": "test", "count": 12},
            "batch": 16,
            **changes,
        },
        "train": {"steps": 40, "warmup": 4, "lr": 1e-2, "validate_every": 0, "save_every": 0},
    }


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_words_that_are_added_up_keep_their_sum(kind: str) -> None:
    made = task(kind).eval()
    texts = [
        "top left large red circle with the word cat on it, center small blue star",
        "there are two objects, a small blue star at the center and a red moon at the top right",
    ]
    told = [Story(text, "", "", "describe") for text in texts]
    _, mask = made.read(told)
    words = made.llm.tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert mask.sum(dim=1).tolist() == [len(ids) for ids in words]
    fewer, fewer_mask = made.read([replace(story, unordered=True) for story in told])
    assert fewer_mask.sum(dim=1).tolist() == [2, 3]  # a vector for each object, and one for `there are two objects`
    table = made.llm.model.get_input_embeddings()
    star = table(
        torch.tensor(made.llm.tokenizer("a small blue star at the center", add_special_tokens=False)["input_ids"])
    )
    assert (fewer[1] - star.sum(dim=0)).abs().amax(dim=1).min() < 1e-5


def test_in_training_some_objects_stand_there_twice() -> None:
    made = task("opt")
    text = "top left large red circle, center small blue star, bottom left small red moon"
    story = Story(text, "", "", "describe", unordered=True)
    once, _ = made.eval().read([story])
    rows = [made.train().read([story])[0][0] for _ in range(40)]
    assert {len(row) for row in rows} == {3, 4, 5, 6}
    for row in rows:  # nothing is left out, nothing is made up
        near = torch.cdist(row, once[0]) < 1e-5
        assert near.any(dim=0).all()
        assert near.any(dim=1).all()


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_an_answer_weighs_as_much_beside_a_long_description(kind: str) -> None:
    made = task(kind).eval()
    answers = [Stories(task="ask")[i] for i in range(4)]
    told = [Stories(task="describe")[i] for i in range(4)]

    def loss(stories: list[Story]) -> float:
        return made(Batch(Tiles([], []), stories))["loss"].item()  # type: ignore[arg-type]

    assert loss(answers + told) == pytest.approx(loss(answers) + loss(told), abs=1e-4)
    prefix, mask = made.read(told)
    total, count = made.llm.loss(prefix, mask, [s.reply for s in told], [s.prompt for s in told], made.max_tokens)
    assert loss(told) == pytest.approx((total / count).item(), abs=1e-4)


def test_queries_of_t5_learn_at_the_scale_of_the_other_weights(tmp_path: Path) -> None:
    made = task("t5")
    attention = made.llm.model.encoder.block[0].layer[0].SelfAttention
    learned = attention.q.parametrizations.weight.original
    assert learned.requires_grad
    assert torch.equal(attention.q.weight, learned * attention.key_value_proj_dim**-0.5)
    used = attention.q.weight.clone()
    made.save(tmp_path)
    saved = load_language_model(tmp_path).model.encoder.block[0].layer[0].SelfAttention.q.weight
    assert torch.equal(saved, used)


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_training_saves_a_model_that_stage_two_can_read(tmp_path: Path, kind: str) -> None:
    config = parse_config(configuration(tmp_path, kind))
    tower = stages.train(config)
    losses = [r["lm"] for r in checkpoint_metrics(tmp_path / kind) if r["kind"] == "train"]
    assert losses[-1] < 0.7 * losses[0]
    read = load_language_model(tower)
    assert read.family == {"opt": "causal", "t5": "seq2seq"}[kind]
    assert not any(p.requires_grad for p in read.model.parameters())
    saved = checkpoint.read(checkpoint.find(tmp_path / kind)).tensors
    name, tensor = next((n, t) for n, t in saved.items() if t.dim() == 2)
    assert torch.equal(dict(read.named_parameters())[name.removeprefix("llm.")], tensor)


def test_a_run_that_goes_on_keeps_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where other stories than at its beginning would train another tokenizer."""
    values = configuration(tmp_path, "opt") | {"train": {"steps": 2, "warmup": 1, "save_every": 1, "validate_every": 0}}
    stages.train(parse_config(values))
    first = load_language_model(tmp_path / "opt" / "tower").tokenizer.get_vocab()
    shutil.rmtree(tmp_path / "opt" / "checkpoints" / "step-0000002")
    monkeypatch.setattr(towers, "SAMPLE_FOR_TOKENIZER", 3)
    stages.train(parse_config(values))
    assert load_language_model(tmp_path / "opt" / "tower").tokenizer.get_vocab() == first
    assert checkpoint.newest(tmp_path / "opt").name == "step-0000002"  # type: ignore[union-attr]


def test_a_reply_counts_only_when_it_is_exact() -> None:
    made = task("opt").eval()
    stories = [Story("a red star", "Question: what color is the star? Answer:", "red", "colour")]
    made.llm.decode = lambda ids: [" red "]  # type: ignore[method-assign]
    assert answered(made, stories, 4) == {"right": 1.0, "right_colour": 1.0}
    made.llm.decode = lambda ids: ["red star"]  # type: ignore[method-assign]
    assert answered(made, stories, 4)["right"] == 0.0


def test_batches_are_stories_in_order() -> None:
    batches = StoryBatches(Stories(count=10), 4)
    assert batches[1].batch.text == [Stories(count=10)[i] for i in (4, 5, 6, 7)]
    assert batches[2].batch.text == [Stories(count=10)[i] for i in (8, 9, 0, 1)]


def test_an_option_that_stories_do_not_have(tmp_path: Path) -> None:
    config = parse_config(configuration(tmp_path, "opt", train={"name": "stories", "sise": 3}))
    with pytest.raises(UsageError, match=r"data\.train\.sise is not an option of 'stories'"):
        stages.train(config)


def checkpoint_metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_phrases_of_a_canvas_a_clip_and_two_pictures() -> None:
    made = task("opt").eval()
    for text, parts in (
        ("there are two objects, a red star in the box [1, 2, 30, 4] and two blue moons, the left edge is red", 4),
        ("there is one object, a red star; first the red star moves up to the center, then it disappears", 4),
        ("first picture: a red star and a moon; second picture: three crosses in a grid", 7),
    ):
        _, mask = made.read([Story(text, "", "", "describe", unordered=True)])
        assert mask.sum() == parts, text


def test_what_is_in_the_first_picture_stays_in_front_of_the_second() -> None:
    made = task("opt").eval()
    text = "first picture: a red star and a blue moon; second picture: a white cross"
    rows = {made.read([Story(text, "", "", "describe", unordered=True)])[0][0, [0, 1, 4, 5, 6]] for _ in range(6)}
    assert all(torch.allclose(row, next(iter(rows)), atol=1e-5) for row in rows)


def test_a_number_of_a_box_is_another_vector_in_each_place() -> None:
    made = task("opt").eval()
    boxes = ["[10, 20, 30, 40]", "[20, 10, 30, 40]", "[10, 20, 40, 30]"]
    told = [Story(f"a red star in the box {box}", "", "", "describe", unordered=True) for box in boxes]
    rows, _ = made.read(told)
    assert rows.shape[1] == 1
    assert torch.cdist(rows[:, 0], rows[:, 0]).fill_diagonal_(1).min() > 0.1
    table = made.llm.model.get_input_embeddings().weight
    words = made.llm.tokenizer("a red star in the box", add_special_tokens=False)["input_ids"]
    expected = table[words].sum(dim=0)
    for turn, number in enumerate((10, 20, 30, 40), start=1):
        ids = made.llm.tokenizer(f" {number}", add_special_tokens=False)["input_ids"]
        expected = expected + table[ids].sum(dim=0).roll(turn * 16 // 5)
    assert torch.allclose(rows[0, 0], expected, atol=1e-5)


def test_where_an_object_points_is_not_mixed_up_with_where_it_stands() -> None:
    made = task("opt").eval()
    told = [
        *("a red arrow pointing left at the top right", "a red arrow pointing right at the top left"),
        *("top right red arrow pointing left in the box [1, 2, 3, 4]", "a red arrow pointing up at the top left"),
    ]
    rows, _ = made.read([Story(text, "", "", "describe", unordered=True) for text in told])
    assert rows.shape[1] == 1
    assert torch.cdist(rows[:, 0], rows[:, 0]).fill_diagonal_(1).min() > 0.05
    table = made.llm.model.get_input_embeddings().weight
    ids = made.llm.tokenizer(told[3], add_special_tokens=False)["input_ids"]
    assert torch.allclose(rows[3, 0], table[ids].sum(dim=0), atol=1e-5)  # nothing to mix up


def test_a_crowd_repeats_every_row_in_order() -> None:
    torch.manual_seed(0)
    prefix, mask = torch.randn(6, 4, 8), torch.arange(4) < torch.tensor([4, 4, 2, 3, 4, 1])[:, None]
    many, kept = crowd(prefix, mask, 50)
    assert 20 < many.shape[1] <= 50
    for before, known, after, new in zip(prefix, mask, many, kept, strict=True):
        near = torch.cdist(after[new], before[known]) < 1e-2
        assert near.any(dim=0).all()
        assert (near.int().argmax(dim=1).diff() >= 0).all()
        assert near.sum(dim=1).eq(1).all()
    same, all_kept = crowd(prefix, mask, 1)  # no room for more
    assert torch.equal(same, prefix * mask[..., None])
    assert torch.equal(all_kept, mask)


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_some_unordered_batches_have_hundreds_of_rows(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = task(kind).train()
    monkeypatch.setattr(towers, "CROWDED", 1.0)
    seen: list[tuple[int, int]] = []
    loss = made.llm.loss
    monkeypatch.setattr(made.llm, "loss", lambda *given: seen.append(tuple(given[0].shape[:2])) or loss(*given))
    batch = [Stories(task="ask", unordered=99)[i] for i in range(32)]
    made(Batch(Tiles([], []), batch))["loss"].backward()  # type: ignore[arg-type]
    made(Batch(Tiles([], []), [replace(story, unordered=False) for story in batch]))  # type: ignore[arg-type]
    assert seen[0][0] == 4
    assert seen[0][1] > 200
    assert seen[1][0] == 32
    assert seen[1][1] < 100
