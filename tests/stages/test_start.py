"""Language towers that go on from a former one: its words, its positions, and positions behind them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qformer.config import BackboneConfig
from qformer.files.pretrained import tower
from qformer.scenes.stories import Stories, Story
from qformer.stages.towers.build import train_tokenizer
from qformer.stages.towers.places import Places
from qformer.stages.towers.start import matched_rows, sine_table, spread_numbers
from qformer.stages.towers.stories import StoryTask, answered
from qformer.types import UsageError


def task(kind: str, **options: Any) -> StoryTask:
    torch.manual_seed(0)
    sizes = {"width": 16, "layers": 1, "heads": 2, "vocab_size": 320, "max_tokens": 64}
    return StoryTask(BackboneConfig(kind=kind, **(sizes | options)), Stories(count=200))


@pytest.fixture(params=["opt", "t5"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def logits(made: StoryTask) -> torch.Tensor:
    some = [Stories(task="ask")[i] for i in range(3)]
    prefix, mask = made.eval().read(some)
    return made.llm.predict(prefix, mask, [s.reply for s in some], [s.prompt for s in some], 64)[0]


def test_the_same_words_give_the_same_model(tmp_path: Path, kind: str) -> None:
    former = task(kind)
    for parameter in former.parameters():  # as far from the beginning as training goes
        parameter.data += 0.05 * torch.randn_like(parameter)
    expected = logits(former)
    former.save(tmp_path)
    assert torch.allclose(logits(task(kind, start=str(tmp_path))), expected, atol=1e-5)
    assert not torch.allclose(logits(task(kind)), expected, atol=1e-2)


def test_words_keep_their_rows_under_another_tokenizer(tmp_path: Path, kind: str) -> None:
    former = task(kind)
    texts = ["there are sixteen hollow arrows, a red star at the top left"] * 3
    words = train_tokenizer(kind, texts, 400)
    old, new = former.llm.tokenizer.get_vocab(), words.get_vocab()
    table = former.llm.model.get_input_embeddings().weight.detach()
    rows = matched_rows(table, former.llm.tokenizer, words)
    both = old.keys() & new.keys()
    assert len(both) > 30
    assert any(old[word] != new[word] for word in both)
    assert all(torch.equal(rows[new[word]], table[old[word]]) for word in both)
    fresh = [rows[new[word]] for word in new.keys() - old.keys()]
    assert fresh
    lengths = torch.stack(fresh).norm(dim=1)
    assert lengths.min() > 0
    assert lengths.max() < 2 * table.norm(dim=1).max()
    assert torch.cdist(torch.stack(fresh), torch.stack(fresh)).fill_diagonal_(1).min() > 0  # no two are the same


def test_numbers_that_are_nearly_alike_are_made_distinct() -> None:
    """Pins what kept the mini OPT from copying a box: a hundred number rows with a mean cosine of 0.87."""
    words = {"red": 0, "Ġred": 1, "3x": 2, **{f"Ġ{n}": 3 + n for n in range(50)}, "▁7": 53, "7": 54}
    table = torch.randn(56, 16)
    table[3:55] = torch.ones(16) + 0.1 * torch.randn(52, 16)
    rows = spread_numbers(table, words)
    assert torch.equal(rows[[0, 1, 2, 55]], table[[0, 1, 2, 55]])
    unit = torch.nn.functional.normalize(rows[3:53], dim=1)
    assert abs(float((unit @ unit.T).fill_diagonal_(0).sum() / (50 * 49))) < 0.1
    assert torch.equal(rows[10], rows[53])
    assert torch.equal(rows[10], rows[54])
    assert torch.allclose(rows[3:55].norm(dim=1), table[[0, 1, 2, 55]].norm(dim=1).mean().expand(52))
    assert torch.equal(spread_numbers(rows, words), rows)  # distinct ones stay


def test_former_positions_stay_and_the_sines_go_on(tmp_path: Path) -> None:
    former = task("opt", positions=100)
    table = former.llm.model.model.decoder.embed_positions.weight
    with torch.no_grad():
        table.mul_(0.6)  # as weight decay does
        table[:50] += torch.randn(50, 16)
    former.save(tmp_path)
    longer = task("opt", positions=140, start=str(tmp_path)).llm.model.model.decoder.embed_positions.weight
    assert len(longer) == len(table) + 40
    assert torch.equal(longer[: len(table)], table)
    assert torch.allclose(longer[len(table) :], 0.6 * sine_table(len(longer), 16)[len(table) :], atol=1e-6)
    with pytest.raises(
        UsageError, match=r"has 102 rows in 'model\.decoder\.embed_positions\.weight', and 92 are wanted"
    ):
        task("opt", positions=90, start=str(tmp_path))


def test_the_shipped_tower_goes_on_at_768_positions() -> None:
    sizes = {"width": 128, "layers": 4, "heads": 4, "vocab_size": 512, "max_tokens": 128}
    config = BackboneConfig(kind="opt", positions=768, start="mini:opt", **sizes)
    made = StoryTask(config, Stories(unordered=448_000, count=448_000)).eval()
    some = [story for i in range(40) if (story := Stories("test", task="ask")[i]).kind in ("colour", "position")]
    assert answered(made, some, 20)["right"] > 0.9
    assert Path(tower("mini:opt")).name == "opt"


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    task("opt").save(tmp_path)
    for wrong in ({"layers": 2}, {"width": 32}):
        with pytest.raises(UsageError, match=r"backbone\.start '.*' has another architecture"):
            task("opt", start=str(tmp_path), **wrong)
    with pytest.raises(ValueError, match=r"backbone\.start is an option .* vit, rope, opt, t5, not of bert"):
        BackboneConfig(kind="bert", start=str(tmp_path))
    with pytest.raises(ValueError, match=r"backbone\.positions is an option of backbone\.kind opt, not of t5"):
        BackboneConfig(kind="t5", positions=768)


def test_numbers_are_those_that_were_drawn() -> None:
    """A row that begins at position 7 gives what seven more tokens in front give, of which it sees none."""
    made = task("opt", positions=80).eval()
    story = Story("a red star", "Question: what color is the star? Answer:", "red", "colour")
    seen: list[torch.Tensor] = []
    embed = made.llm.model.model.decoder.embed_positions
    embed.register_forward_pre_hook(lambda module, args, given: seen.append(given["position_ids"]), with_kwargs=True)
    prefix, mask = made.read([story])
    for start in (0, 7):
        with made.places.at(made.places.start_at(start, 1)):
            made.llm.loss(prefix, mask, ["red"], [story.prompt], 64)
    assert torch.equal(seen[1], seen[0] + 7)
    assert seen[0][0, :3].tolist() == [0, 1, 2]
    seen.clear()
    answered(made, [story], 1, start=7)
    assert [row[0, 0].item() for row in seen] == list(range(7, 7 + 1)) + [
        seen[0].shape[1] + 7 + i for i in range(len(seen) - 1)
    ]
    seen.clear()
    made.llm.loss(prefix, mask, ["red"], [story.prompt], 64)  # as usual outside the context
    assert seen[0][0, :3].tolist() == [0, 1, 2]


def test_drawn_positions_increase_and_leave_room() -> None:
    torch.manual_seed(0)
    places = Places(task("opt", positions=200).llm.model)
    lengths, loose = torch.tensor([5, 30] * 150), torch.arange(300) < 150
    table = places.draw(lengths, loose, text=40)
    assert table is not None
    gaps = []
    for row, length, is_loose in zip(table, lengths.tolist(), loose.tolist(), strict=True):
        used = row[: length + 40]
        steps = used.diff()
        assert steps.min() >= 1
        assert used[-1] < 200
        assert (steps[length - 1 :] == 1).all()  # the text follows its prefix
        gaps.append(bool((steps > 1).any()))
        assert is_loose or not gaps[-1]
    assert 0.2 < sum(gaps[:150]) / 150 < 0.45
    starts = table[:, 0]
    assert 0.2 < (starts == 0).float().mean() < 0.6
    assert starts.max() > 120
    assert Places(task("t5").llm.model).draw(lengths, loose, 40) is None
