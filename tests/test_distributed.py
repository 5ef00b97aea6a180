"""W processes with batches of B are one with W * B: the same losses, gradients and weights, over real processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from qformer import distributed, vision
from qformer.model.chunked import chunked_step
from qformer.model.exchange import _codes
from qformer.model.image_text import ImageTextModel
from qformer.types import UsageError
from tests.processes import together
from tests.tiny_stage1 import WIDTH, tiny_batch, tiny_model

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
Gradients = dict[str, Tensor]
RULES = [
    {"gather_grad": "anchor"},
    {"gather_grad": "full"},
    {"gather_grad": "full", "frozen": False},
    {"gather_grad": "anchor", "frozen": False, "linked": True},
]


def gradients(model: torch.nn.Module) -> Gradients:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def shared_step(count: int, rule: dict[str, Any], tiles: str) -> tuple[dict[str, float], Gradients]:
    """Loss and gradients of the share of this process under data-parallel training."""
    model = tiny_model(**rule)
    ddp = DistributedDataParallel(model)
    world, rank = distributed.world(), distributed.rank()
    losses = ddp(tiny_batch(count, rank * count, world * count, tiles))
    losses["loss"].backward()
    means = distributed.total(torch.stack([loss.detach() for loss in losses.values()])) / world
    return dict(zip(losses, means.tolist(), strict=True)), gradients(model)


def all_shared_steps(count: int) -> list[tuple[dict[str, float], Gradients]]:
    return [shared_step(count, rule, tiles) for rule in RULES for tiles in ("uneven", "equal")]


@pytest.mark.parametrize(("world", "count"), [(2, 3), pytest.param(3, 2, marks=pytest.mark.weekly)])
def test_processes_are_one_batch(tmp_path: Path, world: int, count: int) -> None:
    """Both gradient rules, frozen encoder and trained, unequal tiles and texts, an image that two processes have."""
    found = together(tmp_path, world, all_shared_steps, count)
    number = 0
    for rule in RULES:
        for tiles in ("uneven", "equal"):
            model = tiny_model(**rule)
            expected = model(tiny_batch(world * count, tiles=tiles))
            expected["loss"].backward()
            wanted = gradients(model)
            for losses, got in (process[number] for process in found):
                assert losses == pytest.approx({k: v.item() for k, v in expected.items()}, abs=1e-5)
                assert got.keys() == wanted.keys()
                for name, grad in wanted.items():
                    torch.testing.assert_close(got[name], grad, **CLOSE, msg=lambda m, n=name, r=rule: f"{r} {n}: {m}")
            number += 1


LOPSIDED = torch.tensor([3, 3, 4, 5, 3, 4]), torch.tensor([1, 2, 0, 1, 0, 2])


def lopsided_steps() -> list[Gradients]:
    """Process 0 draws images of process 1 alone, which draws its own: nothing is sent to it, but gradients are."""
    own = slice(3 * distributed.rank(), 3 * distributed.rank() + 3)
    found = []
    for chunk in (0, 2):
        model = tiny_model(frozen=False)
        batch = tiny_batch(3, own.start, 6)
        batch.negatives = LOPSIDED[0][own], LOPSIDED[1][own]
        if chunk:
            chunked_step(model, batch, chunk)
            distributed.average_gradients(model.parameters())
        else:
            ddp = DistributedDataParallel(model)  # which has to live until the gradients are there
            ddp(batch)["loss"].backward()
        found.append(gradients(model))
    return found


def test_a_process_that_needs_no_images_still_gets_its_gradients(tmp_path: Path) -> None:
    model, batch = tiny_model(frozen=False), tiny_batch(6)
    batch.negatives = LOPSIDED
    model(batch)["loss"].backward()
    for process in together(tmp_path, 2, lopsided_steps):
        for got in process:
            for name, grad in gradients(model).items():
                torch.testing.assert_close(got[name], grad, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


def test_the_mean_of_the_means_would_be_wrong() -> None:
    """What the test above rests on: the shares have unequal numbers of tokens, and the losses tell."""
    model = tiny_model()
    counts = [model.count_targets(tiny_batch(3, start, 6)) for start in (0, 3)]
    assert counts[0] != counts[1]


def collectives() -> dict[str, Any]:
    rank, world = distributed.rank(), distributed.world()
    own = torch.arange(6.0).view(3, 2) + 10 * rank
    own.requires_grad_()
    every = distributed.gather(own, grad=True)
    weights = torch.arange(every.numel(), dtype=torch.float).view_as(every) * (rank + 1)
    (every * weights).sum().backward()
    bits = {kind: distributed.gather(torch.tensor([rank, 1 - rank]).to(kind)) for kind in (torch.bool, torch.bfloat16)}
    rows = torch.arange(3.0)[:, None] + 10 * rank
    rows.requires_grad_()
    send = [1, 2] if rank == 0 else [0, 3]  # nothing goes from 1 to 0
    receive = [1, 0] if rank == 0 else [2, 3]
    got = distributed.exchange(rows, send, receive)
    (got * (rank + 1)).sum().backward()
    with distributed.alone():
        inside = (distributed.world(), distributed.rank(), distributed.gather(own).shape[0])
    parameter, unused = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.full((2,), float(rank))
    distributed.average_gradients([parameter, unused])
    return {
        "world": world,
        "gathered": every.detach(),
        "grad": own.grad,
        "bits": bits,
        "exchanged": got.detach(),
        "exchanged_grad": rows.grad,
        "inside": inside,
        "largest": distributed.largest(rank, -rank, device=torch.device("cpu")),
        "mean": parameter.grad,
        "unused": unused.grad,
    }


def test_collectives_and_their_gradients(tmp_path: Path) -> None:
    first, second = together(tmp_path, 2, collectives)
    own = torch.arange(6.0).view(3, 2)
    for rank, found in enumerate((first, second)):
        assert found["world"] == 2
        assert torch.equal(found["gathered"], torch.cat([own, own + 10]))
        weights = torch.arange(12.0).view(6, 2)[3 * rank : 3 * rank + 3]
        assert torch.equal(found["grad"], weights * 3)  # what both processes made of it, added up
        assert found["bits"][torch.bool].tolist() == [False, True, True, False]
        assert found["bits"][torch.bfloat16].tolist() == [0, 1, 1, 0]
        assert found["inside"] == (1, rank, 3)
        assert found["largest"] == [1, 0]
        assert found["mean"].tolist() == [0.5, 0.5]
        assert found["unused"].tolist() == [0]
    assert first["exchanged"].flatten().tolist() == [0]
    assert second["exchanged"].flatten().tolist() == [1, 2, 10, 11, 12]
    assert first["exchanged_grad"].flatten().tolist() == [1, 2, 2]
    assert second["exchanged_grad"].flatten().tolist() == [2, 2, 2]


def votes() -> list[bool]:
    vote = distributed.Vote()
    return [vote(distributed.rank() == 1 and number == 1) for number in range(4)]


def test_one_yes_is_learnt_by_all_at_the_same_time(tmp_path: Path) -> None:
    assert together(tmp_path, 2, votes) == [[False, False, True, False]] * 2
    alone = distributed.Vote()
    assert [alone(yes) for yes in (False, True)] == [False, True]


def drawn() -> tuple[Tensor, Tensor, Tensor]:
    """The negatives that a process draws for itself."""
    torch.manual_seed(distributed.rank())
    model = tiny_model()
    batch = tiny_batch(3, 3 * distributed.rank(), 6)
    batch.negatives = None
    seen: list[Any] = []
    inner = model.mine_negatives
    model.mine_negatives = lambda *given: seen.append((given[3], inner(*given))) or seen[-1][1]  # type: ignore[method-assign]
    model(batch)
    everyone, (images, texts) = seen[0]
    return everyone.same, images, texts


def test_negatives_are_drawn_from_all_processes(tmp_path: Path) -> None:
    found = together(tmp_path, 2, drawn)
    for rank, (same, images, texts) in enumerate(found):
        ids = tiny_batch(6).image_id
        assert ids is not None
        assert same.tolist() == [[ids[3 * rank + row] == other for other in ids] for row in range(3)]
        rows = torch.arange(3)
        assert not same[rows, images].any()
        assert not same[rows, texts].any()
    others = [i // 3 != rank for rank, (_, *both) in enumerate(found) for drawn in both for i in drawn.tolist()]
    assert any(others)
    assert not all(others)


def test_codes_of_ids_are_the_same_everywhere_and_keep_kinds_apart() -> None:
    codes = _codes(["1", 1, "a", "b", "a", 2], 6).tolist()
    assert codes[2] == codes[4]
    assert len(set(codes)) == 5
    assert codes[1] == _codes(torch.tensor([1]), 1).item()
    assert _codes(["a"], 1).item() == codes[2]


def test_one_process_is_the_identity() -> None:
    rows = torch.ones(2, 3, requires_grad=True)
    assert distributed.gather(rows, grad=True) is rows
    assert not distributed.gather(rows).requires_grad
    assert distributed.largest(3, 4, device=torch.device("cpu")) == [3, 4]
    assert distributed.gather_objects("x") == ["x"]
    assert distributed.world() == 1


@pytest.mark.parametrize(
    "told",
    [
        {"WORLD_SIZE": "2"},
        {"OMPI_COMM_WORLD_SIZE": "4"},
        {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
    ],
)
def test_one_process_where_several_were_asked_for(monkeypatch: pytest.MonkeyPatch, told: dict[str, str]) -> None:
    for name in (*distributed.SIZES, "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    distributed.check_launch()
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=r"were requested.*torchrun"):
        distributed.check_launch()


def model_of_layers() -> ImageTextModel:
    model = tiny_model()
    sizes = {"image_size": 28, "width": WIDTH, "depth": 3, "heads": 2, "mlp_hidden": 24}
    torch.manual_seed(1)
    model.frontend.encoder = vision.build("eva", precision="fp32", **sizes).freeze()
    return model


def spread_out() -> tuple[int, int, int, bool]:
    """Numbers of parameters on this process: of frozen layers, all others; of the layers in full; whether the same."""
    model, whole = model_of_layers(), model_of_layers()
    distributed.shard_frozen(model, torch.device("cpu"))
    layers = [p for p in model.parameters() if isinstance(p, DTensor)]
    held = sum(p.to_local().numel() for p in layers)
    plain = sum(p.numel() for p in model.parameters() if not isinstance(p, DTensor))
    batch = tiny_batch(3)
    with distributed.alone():
        same = all(torch.allclose(model(batch)[name], loss) for name, loss in whole(batch).items())
    return held, plain, sum(p.numel() for p in layers), same


def test_frozen_layers_are_spread_over_processes(tmp_path: Path) -> None:
    """The layers of the tower; what learns is whole on each."""
    found = together(tmp_path, 2, spread_out)
    model = model_of_layers()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    assert sum(held for held, *_ in found) == found[0][2] > 0
    for held, plain, layers, same in found:
        assert held < 0.6 * layers
        assert trained <= plain == total - layers
        assert same
