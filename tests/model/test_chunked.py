"""Chunks change nothing but the memory: losses and gradients of the plain step, in one process and in several."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qformer import distributed
from qformer.config import parse_config
from qformer.model.chunked import chunked_step
from qformer.model.image_text import ImageTextModel
from qformer.types import Batch, UsageError
from tests.processes import together
from tests.tiny_stage1 import tiny_batch, tiny_model

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
RULES = [
    {"gather_grad": "anchor"},
    {"gather_grad": "full"},
    {"gather_grad": "full", "frozen": False},
    {"gather_grad": "anchor", "frozen": False, "linked": True},
]
Step = tuple[dict[str, float], dict[str, Tensor]]


def plain(model: ImageTextModel, batch: Batch) -> Step:
    losses = model(batch)
    losses["loss"].backward()
    return _found(model, losses)


def chunked(model: ImageTextModel, batch: Batch, chunk: int, **options: Any) -> Step:
    return _found(model, chunked_step(model, batch, chunk, **options))


def _found(model: ImageTextModel, losses: dict[str, Tensor]) -> Step:
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: loss.item() for name, loss in losses.items()}, grads


def same(a: Step, b: Step, atol: float = 1e-5) -> None:
    assert a[0] == pytest.approx(b[0], abs=atol)
    assert a[1].keys() == b[1].keys()
    for name, grad in b[1].items():
        torch.testing.assert_close(a[1][name], grad, atol=atol, rtol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("tiles", ["uneven", "equal"])
@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_chunks_give_the_plain_step(rule: dict[str, Any], tiles: str, chunk: int) -> None:
    """Images of one to three tiles, texts of unequal length, an image that is there twice, negatives drawn twice."""
    same(
        chunked(tiny_model(**rule), tiny_batch(8, tiles=tiles), chunk),
        plain(tiny_model(**rule), tiny_batch(8, tiles=tiles)),
    )


@pytest.mark.parametrize("weights", [(0.5, 2.0), (0.0, 1.0), (0.25, 0.0), (0.0, 0.0)], ids=str)
def test_weighted_losses_are_those_of_the_plain_step(weights: tuple[float, float]) -> None:
    """A loss of weight 0 is not computed, and what it alone would train gets no gradient."""
    loss = dict(zip(("itm", "itg"), weights, strict=True))
    step = plain(tiny_model(**loss), tiny_batch(8))
    same(chunked(tiny_model(**loss), tiny_batch(8), 3), step)
    whole, _ = plain(tiny_model(), tiny_batch(8))
    kept = {name: weight for name, weight in loss.items() if weight}
    assert step[0].keys() == {"loss", "itc", *kept}
    assert step[0]["loss"] == pytest.approx(whole["itc"] + sum(kept[name] * whole[name] for name in kept), abs=1e-5)
    assert ("itm_head.weight" in step[1]) == bool(loss["itm"])


def test_the_temperature_learns_from_itc_alone_and_once() -> None:
    model = tiny_model()
    model(tiny_batch(8))["itc"].backward()
    expected = model.temp.grad
    _, grads = chunked(tiny_model(), tiny_batch(8), 3)
    torch.testing.assert_close(grads["temp"], expected)


@pytest.mark.parametrize("frozen", [True, False])
def test_one_chunk_with_dropout_draws_what_the_plain_step_draws(frozen: bool) -> None:
    """Masks of the encoder and the Q-Former, hard negatives, and whatever is drawn after the step."""
    steps, next_draws = [], []
    for step in (plain, lambda model, batch: chunked(model, batch, 8)):
        torch.manual_seed(5)
        batch = tiny_batch(8)
        batch.negatives = None
        steps.append(step(tiny_model(dropout=0.3, frozen=frozen), batch))
        next_draws.append(torch.rand(()).item())
    same(*steps)
    assert next_draws[0] == next_draws[1]


@pytest.mark.parametrize("chunk", [3, 8])
def test_dropout_repeats_to_the_last_bit(chunk: int) -> None:
    steps = []
    for _ in range(2):
        torch.manual_seed(5)
        steps.append(chunked(tiny_model(dropout=0.3, frozen=False), tiny_batch(8), chunk))
    assert steps[0][0] == steps[1][0]
    assert all(torch.equal(grad, steps[1][1][name]) for name, grad in steps[0][1].items())
    assert all(torch.tensor(loss).isfinite() for loss in steps[0][0].values())


def test_the_second_pass_has_the_dropout_of_the_first_and_chunks_have_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, seen = tiny_model(dropout=0.3), []
    inner = model.read
    monkeypatch.setattr(model, "read", lambda *given: seen.append(inner(*given)) or seen[-1])
    torch.manual_seed(5)
    batch = tiny_batch(8, tiles="equal")
    pixels = batch.tiles.pixels
    pixels[3:6], batch.text[3:6] = pixels[:3], batch.text[:3]  # type: ignore[index]
    chunked_step(model, batch, 3)
    assert len(seen) == 6
    for first, second in zip(seen[:3], seen[3:], strict=True):
        for kept, again in zip(first[1:], second[1:], strict=True):
            assert (kept is None and again is None) or torch.equal(kept, again)
    assert not torch.allclose(seen[0][1], seen[1][1])  # the same pictures, other masks


def test_no_more_than_a_chunk_passes_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, encoded, read = tiny_model(), [], []
    model.frontend.encoder.register_forward_hook(lambda _, given, __: encoded.append(len(given[0])))
    model.qformer.embeddings.register_forward_hook(lambda *given: read.append(len(given[2])))
    chunked_step(model, tiny_batch(8, tiles="equal"), 2)
    assert encoded == [2] * 4  # and the frozen encoder sees each image once
    assert max(read) == 3 * 2  # ITM


def test_the_loss_scale_enters_once() -> None:
    _, once = chunked(tiny_model(frozen=False), tiny_batch(8), 3)
    _, scaled = chunked(tiny_model(frozen=False), tiny_batch(8), 3, scale=lambda loss: 8 * loss)
    for name, grad in once.items():
        torch.testing.assert_close(scaled[name], 8 * grad, **CLOSE)


def test_tokens_shared_over_accumulated_batches_are_respected() -> None:
    batches = [tiny_batch(8), tiny_batch(8)]
    for batch in batches:
        batch.targets = torch.tensor(17.0)
    same(chunked(tiny_model(), batches[0], 3), plain(tiny_model(), batches[1]))


@pytest.mark.parametrize("frozen", [True, False])
def test_under_autocast(frozen: bool) -> None:
    def autocast() -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16)

    with autocast():
        expected = tiny_model(frozen=frozen)(tiny_batch(8))
    model = tiny_model(frozen=frozen)
    losses, grads = chunked(model, tiny_batch(8), 3, autocast=autocast)
    assert losses == pytest.approx({name: loss.item() for name, loss in expected.items()}, rel=0.02)
    assert all(grad.isfinite().all() for grad in grads.values())
    assert grads.keys() == {name for name, p in model.named_parameters() if p.requires_grad}


def shared_steps(count: int, chunk: int) -> list[Step]:
    world, rank = distributed.world(), distributed.rank()
    steps = []
    for rule in RULES:
        model = tiny_model(**rule)
        losses = chunked_step(model, tiny_batch(count, rank * count, world * count), chunk)
        distributed.average_gradients(model.parameters())
        steps.append(_found(model, {name: distributed.total(loss) / world for name, loss in losses.items()}))
    return steps


@pytest.mark.parametrize(("world", "count", "chunk"), [(2, 3, 2), pytest.param(3, 2, 1, marks=pytest.mark.weekly)])
def test_chunks_of_several_processes(tmp_path: Path, world: int, count: int, chunk: int) -> None:
    found = together(tmp_path, world, shared_steps, count, chunk)
    for number, rule in enumerate(RULES):
        expected = plain(tiny_model(**rule), tiny_batch(world * count))
        for process in found:
            same(process[number], expected)


def test_chunks_are_for_stage_one() -> None:
    values = {"stage": "stage2", "run": "x", "llm": {"path": "y"}, "data": {"train": {"name": "jsonl"}}}
    with pytest.raises(UsageError, match=r"train\.chunk 8 is for the contrastive loss of stage1"):
        parse_config(values | {"train": {"steps": 9000, "chunk": 8}})
