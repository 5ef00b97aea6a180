"""Collective operations among processes. In a single process they are identities and need no process group.

Gradients are those of the *sum* of the losses of all processes: the backward pass of `gather` and `exchange` sums the
gradients of all processes, unscaled. Data-parallel training then averages losses and gradients over processes, so a
loss that is a mean over the rows of one process becomes the mean over the global batch.

Our collectives use a process group of their own. Data-parallel training starts others during the backward pass, whose
order can differ between processes, so they must not share a group.
"""

from __future__ import annotations

import math
import os
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

_alone = False
_group_of: tuple[Any, Any] = (None, None)  # the world group, and our own group of the same processes

#: Environment variables in which launchers pass the number of processes, in the order in which they are read.
SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


def world() -> int:
    """W, the number of processes that train together."""
    return 1 if _alone or not dist.is_initialized() else dist.get_world_size()


def rank() -> int:
    """Rank of this process, from 0. Rank 0 writes, logs and shows progress."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """Rank of this process on its machine, which is also the number of its GPU; known before the group exists."""
    return int(os.environ.get("LOCAL_RANK", 0))


def check_launch() -> None:
    """Refuse to run alone if several processes were requested: they would train separately and overwrite each other.

    `accelerate launch --cpu --num_processes 2` starts a single process without a message; the only sign of it is that
    the address of the process group is set.

    Raises:
        UsageError: the environment announces several processes, but there is no process group.
    """
    if world() > 1:
        return
    name = next(
        (name for name in SIZES if os.environ.get(name, "1").isdecimal() and int(os.environ.get(name, 1)) > 1), ""
    )
    if name:
        asked = f"{os.environ[name]} processes ({name})"
    elif {"ACCELERATE_USE_CPU", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys() and "LOCAL_RANK" not in os.environ:
        asked = "several processes (accelerate launch)"
    else:
        return
    raise UsageError(
        f"{asked} were requested, but this process runs alone; use 'torchrun --nproc-per-node N -m qformer ...'"
    )


@contextmanager
def joined() -> Iterator[None]:
    """Context in which the processes started by torchrun form a group over CPUs; a single process needs none.

    Raises:
        UsageError: several processes were requested, but there is no process group.
    """
    starts = int(os.environ.get("WORLD_SIZE", 1)) > 1 and "MASTER_ADDR" in os.environ and not dist.is_initialized()
    if starts:
        dist.init_process_group("gloo", timeout=timedelta(days=1))  # one process may have much more work than another
    check_launch()
    try:
        yield
    finally:
        if starts:
            dist.destroy_process_group()


@contextmanager
def alone() -> Iterator[None]:
    """Context in which W is 1 while the rank stays the same, such as for the evaluation of held-out data."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def gather(rows: Tensor, grad: bool = False) -> Tensor:
    """Gather rows [B, ...], of the same shape on every process, to [W * B, ...] in the order of ranks.

    With `grad`, the gradient of a process's own rows is the sum of the gradients of all processes.
    """
    if world() == 1:
        return rows if grad else rows.detach()
    return _Gather.apply(rows) if grad else _gather(rows.detach())


def exchange(rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
    """Send rows to each process and receive rows from each; gradients flow back to the sender.

    Args:
        rows: [sum(send), ...]: first the rows for rank 0, then those for rank 1, and so on.
        send, receive: W numbers of rows.

    Returns:
        [sum(receive), ...]: first the rows from rank 0, and so on.
    """
    return _Exchange.apply(rows, list(send), list(receive))


def total(values: Tensor) -> Tensor:
    """Sum over processes."""
    if world() == 1:
        return values
    values = values.detach().clone()
    dist.all_reduce(values, group=_group())
    return values


def largest(*numbers: int, device: torch.device) -> list[int]:
    """Maximum over processes of each number; with several processes, this waits for the device."""
    if world() == 1:
        return list(numbers)
    values = torch.tensor(numbers, device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX, group=_group())
    return values.tolist()


def gather_objects(item: Any) -> list[Any]:
    """Gather a small object of every process, in the order of ranks, to all processes."""
    if world() == 1:
        return [item]
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, item, group=_group())
    return found


def collect_objects(item: Any) -> list[Any]:
    """Gather an object of every process, in the order of ranks, to rank 0; the others get an empty list."""
    if world() == 1:
        return [item]
    found: list[Any] = [None] * world() if rank() == 0 else []
    dist.gather_object(item, found or None, dst=0, group=_group())
    return found


def barrier() -> None:
    """Wait for all processes."""
    if world() > 1:
        dist.barrier(group=_group())


class Vote:
    """Logical OR over processes, delayed by one call so that no process has to wait for it.

    All processes get the same answer at the same call. A single process gets its own answer at once.
    """

    def __init__(self) -> None:
        # Over the CPUs: reading a result from a GPU would wait for all the work that is queued on it.
        self._group = dist.new_group(backend="gloo") if world() > 1 else None
        self._pending: tuple[Tensor, Any] | None = None

    def __call__(self, yes: bool) -> bool:
        if self._group is None:
            return yes
        before, vote = self._pending, torch.tensor(int(yes))
        self._pending = vote, dist.all_reduce(vote, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        if before is None:
            return False
        before[1].wait()
        return bool(before[0])


def shard_frozen(model: nn.Module, device: torch.device) -> None:
    """Keep 1 / W of every frozen transformer layer on each process, and gather a layer while it computes (FSDP2).

    Trained parameters, and those outside the layers, such as embeddings, are not sharded. Everything is moved to
    `device` layer by layer, so a model that is built on the CPU never has to fit on the device as a whole.
    """
    inside: set[nn.Module] = set()
    for _, layer in frozen_layers(model):
        fully_shard(layer, mesh=init_device_mesh(device.type, (world(),)))
        inside.update(layer.modules())
    for module in model.modules():
        if module not in inside:
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                tensor.data = tensor.data.to(device)


def frozen_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Find the outermost transformer layers without trained parameters, with their names."""
    found: list[tuple[str, nn.Module]] = []
    inside: set[nn.Module] = set()
    for name, blocks in model.named_modules():
        if isinstance(blocks, nn.ModuleList) and blocks not in inside:
            for number, layer in enumerate(blocks):
                inside.update(layer.modules())
                if not any(parameter.requires_grad for parameter in layer.parameters()):
                    found.append((f"{name}.{number}", layer))
    return found


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average every gradient over processes, in pieces of 25 MB; a missing gradient counts as zero."""
    if world() == 1:
        return
    piece: list[Tensor] = []
    for parameter in parameters:
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            piece.append(parameter.grad)
            if sum(grad.nbytes for grad in piece) >= 25 << 20:
                _average(piece)
                piece = []
    _average(piece)


def _average(grads: list[Tensor]) -> None:
    if grads:
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat, group=_group())
        for grad, mean in zip(grads, (flat / world()).split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(mean.view_as(grad))


def _group() -> Any:
    """Create our group at the first use, which is the same call on every process."""
    global _group_of
    if _group_of[0] is not dist.group.WORLD:
        _group_of = dist.group.WORLD, dist.new_group()
    return _group_of[1]


def _gather(rows: Tensor) -> Tensor:
    sent = _bytes(rows)
    found = [torch.empty_like(sent) for _ in range(world())]
    dist.all_gather(found, sent, group=_group())
    return torch.cat(found).view(rows.dtype).view(world() * len(rows), *rows.shape[1:])


def _exchange(rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
    sent = _bytes(rows)
    found = sent.new_empty(sum(receive), sent.shape[1])
    dist.all_to_all_single(found, sent, receive, send, group=_group())
    return found.view(rows.dtype).view(sum(receive), *rows.shape[1:])


def _bytes(rows: Tensor) -> Tensor:
    """[B, ...] -> uint8[B, bytes of a row]: not every backend moves every dtype."""
    return rows.contiguous().view(len(rows), math.prod(rows.shape[1:])).view(torch.uint8)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.count = len(rows)
        return _gather(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        equal = [ctx.count] * world()
        return _exchange(grad, equal, equal).unflatten(0, (world(), ctx.count)).sum(dim=0)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        ctx.counts = receive, send
        return _exchange(rows, send, receive)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _exchange(grad, *ctx.counts), None, None
