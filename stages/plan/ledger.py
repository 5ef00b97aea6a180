"""Memory and FLOPs of a training step, counted while the real model runs on tensors without data.

`Ledger` sees every PyTorch operation, forward and backward. It books each new storage until it is freed, and the FLOPs
of matrix products, convolutions and attention (2 per multiply-add); all other operations are negligible. Counting the
real code means that no formula can get out of date. `AsOnGPU` replaces operations by those that a GPU would run.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from qformer import compat, distributed
from qformer.devices import DTYPES
from qformer.model.chunked import chunked_step
from qformer.model.image_text import ImageTextModel
from qformer.stages.optim import adamw
from qformer.vision import layers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from qformer.model.assembly import Bridge
    from qformer.schema import TrainConfig
    from qformer.types import Batch

PARTS = {
    "frontend.encoder": "image encoder",
    "llm": "language model",
    "frontend": "Q-Former",
    "qformer": "Q-Former",
    "connector.qformer": "Q-Former",
    "connector.projection": "Q-Former",
    "connector": "connector",
    "markers": "connector",
    "vision_proj": "Q-Former",
    "text_proj": "Q-Former",
    "itm_head": "Q-Former",
    "temp": "Q-Former",
}
OUTSIDE = "pairs and losses"
#: Functions that autocast computes in single precision on CUDA but not on the CPU.
SINGLE = {torch.layer_norm, F.layer_norm, torch.softmax, F.softmax, torch.log_softmax, F.log_softmax, F.normalize}


def part_of(name: str) -> str:
    """Find the part of the model that a module or parameter belongs to."""
    return next((part for prefix, part in PARTS.items() if name == prefix or name.startswith(f"{prefix}.")), OUTSIDE)


def _part_of_module(name: str, module: nn.Module) -> str:
    """Find the part of a module; a connector is that of its weights."""
    first = next((weight for weight, _ in module.named_parameters()), "") if name == "connector" else ""
    return part_of(f"{name}.{first}".strip("."))


@dataclass
class Step:
    """Memory and FLOPs of an optimizer step of one process, not the first one.

    Attributes:
        moments: the memory peak of each section of the step, weights included: (kind, part) -> bytes. A step is one
            section; with chunks, each pass over them is a section.
        flops: (phase, part, dtype) -> FLOPs of one batch.
    """

    moments: dict[str, Counter[tuple[str, str]]]
    flops: Counter[tuple[str, str, torch.dtype]]

    @property
    def held(self) -> Counter[tuple[str, str]]:
        """The bytes that are held at the memory peak of the step."""
        return max(self.moments.values(), key=lambda held: sum(held.values()))

    @property
    def peak(self) -> int:
        return sum(self.held.values())


@dataclass
class Ledger:
    """Accounts of live bytes and of FLOPs, by part of the model and phase of the step.

    Attributes:
        phase: the current phase, outside of backward passes.
        moment: the current section of the step; each section has its own peak.
        parts: the parts whose modules are running, the innermost last.
        saved_by: the part that saved the tensor which the backward pass reads now.
    """

    phase: str = "forward"
    moment: str = "step"
    parts: list[str] = field(default_factory=lambda: [OUTSIDE])
    saved_by: str = OUTSIDE
    held: Counter[tuple[str, str]] = field(default_factory=Counter)
    peaks: Counter[str] = field(default_factory=Counter)
    moments: dict[str, Counter[tuple[str, str]]] = field(default_factory=dict)
    flops: Counter[tuple[str, str, torch.dtype]] = field(default_factory=Counter)
    total: int = 0
    _live: dict[int, tuple[tuple[str, str], int]] = field(default_factory=dict)
    _formulas: dict[Any, Callable[..., int]] = field(default_factory=compat.flop_formulas)

    def see(self, operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Record a PyTorch operation; called by `compat.seeing_operations`."""
        for tensor in _tensors(out):
            self.book(tensor)
        count = self._formulas.get(operator)
        if count is not None:
            self.flops[*self.now(), next(_tensors(args)).dtype] += count(*args, **kwargs, out_val=out)

    def now(self) -> tuple[str, str]:
        """Return the phase and the part that are running."""
        if compat.is_backward():
            return "backward", self.saved_by
        return self.phase, self.parts[-1]

    def begin(self, moment: str) -> None:
        """Start the next section of the step; a name that was used before continues that section."""
        self.moment = moment
        self._note_peak()

    def _note_peak(self) -> None:
        if self.total > self.peaks[self.moment]:
            self.peaks[self.moment], self.moments[self.moment] = self.total, self.held.copy()

    def book(self, tensor: Tensor, kind: str | None = None, part: str | None = None) -> None:
        """Book the storage of a tensor if it is new; with a `kind` and a `part`, move it to that account."""
        storage = tensor.untyped_storage()
        key = id(storage)  # PyTorch keeps the same object while the storage lives
        if key not in self._live:
            entry = self.now() if kind is None or part is None else (kind, part)
            self._live[key] = entry, storage.nbytes()
            weakref.finalize(storage, self._free, key).atexit = False
            self.held[entry] += storage.nbytes()
            self.total += storage.nbytes()
            self._note_peak()
        elif kind is not None and part is not None:
            entry, size = self._live[key]
            self.held[entry] -= size
            self._live[key] = (kind, part), size
            self.held[kind, part] += size

    def _free(self, key: int) -> None:
        entry, size = self._live.pop(key)
        self.held[entry] -= size
        self.total -= size

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Track the running part: by its modules in the forward pass, by its saved tensors in the backward pass."""

        def pack(tensor: Tensor) -> tuple[str, Tensor]:
            return self.now()[1], tensor

        def unpack(saved: tuple[str, Tensor]) -> Tensor:
            self.saved_by = saved[0]
            return saved[1]

        hooks = []
        for name, module in model.named_modules():
            if (part := _part_of_module(name, module)) != OUTSIDE:
                hooks.append(module.register_forward_pre_hook(lambda *_, part=part: self.parts.append(part)))
                hooks.append(module.register_forward_hook(lambda *_: self.parts.pop() and None, always_call=True))
        for name, parameter in model.named_parameters():
            self.book(parameter, "weights", part := part_of(name))
            if parameter.requires_grad:
                enter = parameter.register_post_accumulate_grad_hook
                hooks.append(enter(lambda p, part=part: self.book(p.grad, "gradients", part)))
        try:
            with saved_tensors_hooks(pack, unpack):
                yield
        finally:
            for hook in hooks:
                hook.remove()


def _tensors(values: Any) -> Iterator[Tensor]:
    """Yield the tensors among the arguments or results of an operation, inside lists too."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


class AsOnGPU(TorchFunctionMode):
    """Operations as on a GPU: attention keeps no matrix, dropout keeps bytes, autocast leaves norms in single."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func is F.dropout and kwargs.get("training", True):
            return torch.native_dropout(args[0], kwargs.get("p", args[1] if len(args) > 1 else 0.5), True)[0]
        if func in SINGLE and torch.is_autocast_enabled("cpu"):
            args = [arg.float() if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args]
        return func(*args, **kwargs)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Call CUDA's memory-efficient kernel, float[B, heads, X, H / heads]; flash attention keeps as much memory."""
    if enable_gqa:
        repeat = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = query.new_zeros(attn_mask.shape).masked_fill(~attn_mask, -torch.inf)
        attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:3], key.shape[2])
    keeps = query.requires_grad or key.requires_grad
    return compat.efficient_attention(query, key, value, attn_mask, keeps, dropout_p, is_causal, scale=scale)


def run_step(model: Bridge, batch: Batch, train: TrainConfig, device: str) -> Step:
    """Run the second optimizer step of a run, when AdamW already has its state, over at most two of its batches.

    Args:
        model: an outline, in training mode.
        device: `cuda`, or `cpu` for the operations of this machine.
    """
    ledger = Ledger()
    model.zero_grad()
    optimizer = adamw(model, train)
    for group in optimizer.param_groups:
        group["foreach"] = device == "cuda"  # PyTorch's default on CUDA
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    batches = min(train.accumulate, 2)
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        torch.manual_seed(0)  # texts for an encoder-decoder are split at random
        stack.enter_context(ledger.watching(model))
        if device == "cuda":
            stack.enter_context(_halves_as_on_gpu())
            stack.enter_context(AsOnGPU())
        stack.enter_context(compat.seeing_operations(ledger.see))
        _first_update(model, optimizer, ledger)
        buckets = _buckets(model, train, ledger)
        for _ in range(batches):
            ledger.phase = "forward"
            _backward(model, batch, train, ledger)
        ledger.phase = "update"
        ledger.begin("update")
        if train.clip:
            nn.utils.clip_grad_norm_(parameters, train.clip)
        optimizer.step()
        model.zero_grad()
        del buckets
    flops = Counter({key: count // batches for key, count in ledger.flops.items()})
    return Step({moment: +held for moment, held in ledger.moments.items()}, flops)


def _backward(model: Bridge, batch: Batch, train: TrainConfig, ledger: Ledger) -> None:
    """Run the forward and backward passes of one batch, as `qformer.stages.loop` does."""
    dtype = None if train.precision == "fp32" else DTYPES[train.precision]

    def autocast() -> AbstractContextManager[Any]:
        return torch.autocast("cpu", dtype) if dtype else nullcontext()

    if not train.chunk:
        with autocast():
            losses = model(batch)
        (losses["loss"] / train.accumulate).backward()
        return
    number = math.ceil(len(batch) / train.chunk)
    order = ["embeddings"] * number + ["ITC"] * number + ["drawing"] + ["chunks"] * number + ["image encoder"] * number
    passes = iter(order)

    def forward() -> AbstractContextManager[Any]:
        ledger.begin(next(passes))
        return autocast()

    assert isinstance(model, ImageTextModel)
    chunked_step(model, batch, train.chunk, lambda loss: loss / train.accumulate, forward)


def _buckets(model: nn.Module, train: TrainConfig, ledger: Ledger) -> list[Tensor]:
    """Allocate the gradient buckets that DDP holds all the time when there are several processes.

    Gradients are views of the buckets, except with chunks, which bypass DDP and have gradients of their own.
    """
    if distributed.world() == 1 or train.fsdp:  # FSDP averages gradients in place
        return []
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    buckets = {name: torch.zeros_like(parameter) for name, parameter in trained.items()}
    for name, bucket in buckets.items():
        ledger.book(bucket, "gradients", part_of(name))
        if not train.chunk:
            trained[name].grad = bucket
    return list(buckets.values())


def _first_update(model: nn.Module, optimizer: torch.optim.Optimizer, ledger: Ledger) -> None:
    """Run one update, so that AdamW has its state."""
    ledger.phase = "update"
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for parameter in trained.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in trained.items():
        for tensor in optimizer.state[parameter].values():
            ledger.book(tensor, "AdamW", part_of(name))
    optimizer.zero_grad()


@contextmanager
def _halves_as_on_gpu() -> Iterator[None]:
    """Let layers stored in half precision compute in half precision, as on a GPU."""
    slow, layers.SLOW_IN_HALF = layers.SLOW_IN_HALF, frozenset()
    try:
        yield
    finally:
        layers.SLOW_IN_HALF = slow
