"""Access to private names of other libraries: one function for each, whose docstring says why it is needed.

None has a public counterpart. If a newer version of a library no longer has one, a `UsageError` names the library and
its version. Importing this module imports none of the libraries.
"""

from __future__ import annotations

from functools import cache, reduce
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from torch import Tensor

    from qformer.types import UsageError

#: Attributes of Gradio's queue that `demo` reads. These are public; the class and the path to the queue are not.
QUEUE = ("event_ids_to_events", "pending_event_ids_session", "pending_messages_per_session", "__len__")


def fake_mode() -> Any:
    """PyTorch's `FakeTensorMode`, in which tensors have a shape and a dtype but no data.

    PyTorch documents the class, but only as `torch._subclasses.FakeTensorMode`. The public alternative, the device
    `meta`, does not support autocast.

    Raises:
        UsageError: this version of PyTorch has no such class.
    """
    return _find("torch", "torch._subclasses.fake_tensor", "FakeTensorMode")(allow_non_fake_inputs=True)


def seeing_operations(see: Callable[[Any, tuple[Any, ...], dict[str, Any], Any], None]) -> AbstractContextManager[Any]:
    """A context that calls `see(operator, args, kwargs, out)` after each operation, backward passes included.

    PyTorch documents `TorchDispatchMode` only under `torch.utils._python_dispatch`. The public alternative,
    `torch.overrides.TorchFunctionMode`, sees calls from Python but no operation of a backward pass.

    Args:
        see: called after each operation with the operator, such as `torch.ops.aten.mm`, its arguments and its result.

    Raises:
        UsageError: this version of PyTorch has no such class.
    """
    base: Any = _find("torch", "torch.utils._python_dispatch", "TorchDispatchMode")

    class Seeing(base):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            out = func(*args, **kwargs)
            see(func.overloadpacket, args, kwargs, out)
            return out

    return Seeing()


def is_backward() -> bool:
    """Return True inside a backward pass, which is where gradient checkpointing recomputes layers.

    PyTorch's own checkpointing asks `torch._C._current_graph_task_id`; there is no public function for it.

    Raises:
        UsageError: this version of PyTorch has no such function.
    """
    return _find("torch", "torch", "_C._current_graph_task_id")() >= 0


def efficient_attention(*inputs: Any, scale: float | None) -> Tensor:
    """Attention by CUDA's memory-efficient kernel, for plans of a GPU's step: float[B, heads, X, H / heads].

    The public `scaled_dot_product_attention` chooses a kernel by device, and fake tensors claim to be on the CPU. So
    the operator is called by name, `torch.ops.aten._scaled_dot_product_efficient_attention`.

    Args:
        inputs: query, key, value, bias, compute_log_sumexp, dropout probability, is_causal.
        scale: factor of the logits; None for 1 / sqrt(width of a head).

    Raises:
        UsageError: this version of PyTorch has no such operator.
    """
    return _find("torch", "torch", "ops.aten._scaled_dot_product_efficient_attention")(*inputs, scale=scale)[0]


def flop_formulas() -> dict[Any, Callable[..., int]]:
    """PyTorch's FLOP formulas by operator, extended by attention on a CPU, which PyTorch lacks.

    The operators of flash attention have private names, `torch.ops.aten._scaled_dot_product_flash_attention...`.

    Returns:
        Operator, such as `torch.ops.aten.mm` -> a function of its arguments, and of its result as `out_val`.

    Raises:
        UsageError: this version of PyTorch has no such operators, or no formulas for them.
    """
    formulas = dict(_find("torch", "torch.utils.flop_counter", "flop_registry"))
    for end in ("", "_backward"):
        name = "ops.aten._scaled_dot_product_flash_attention"
        known = _find("torch", "torch", f"{name}{end}")
        if known not in formulas:
            raise _changed("torch", f"a formula in torch.utils.flop_counter for torch.{name}{end}")
        formulas[_find("torch", "torch", f"{name}_for_cpu{end}")] = formulas[known]
    return formulas


def kept_in_single(model: Any) -> list[str]:
    """Name suffixes of the layers that a transformers model keeps in fp32 and never quantizes, such as T5's `wo`.

    Model classes list them in `_keep_in_fp32_modules`, which the quantizers of transformers read. There is no public
    way to get them, except to quantize a model with bitsandbytes, which a plan must not require.

    Raises:
        UsageError: models of this version of transformers have no such attribute.
    """
    try:
        return sorted(model._keep_in_fp32_modules or ())
    except AttributeError as error:
        raise _changed("transformers", "PreTrainedModel._keep_in_fp32_modules") from error


def forget_precision() -> None:
    """Let the next `Accelerator` use another precision than an earlier run of this process.

    accelerate keeps the precision of the first `Accelerator` for the whole process and refuses another ("restart your
    runtime"). Its `AcceleratorState._reset_state`, which transformers' own trainer uses, clears that. If the method is
    missing, nothing is done: the first run works, and accelerate reports what it refuses.
    """
    from accelerate.state import AcceleratorState

    reset = getattr(AcceleratorState, "_reset_state", None)
    if reset is not None:
        reset()


def page_queue(page: Any) -> Any:
    """The queue of a Gradio page: its length, and its requests and messages by session (the names in `QUEUE`).

    Gradio keeps it in `Blocks._queue`. The public HTTP interface shows one session at a time, does not say who waits
    for a request, and cannot release what the queue keeps for visitors who have left.

    Args:
        page: Blocks whose method `queue`, which creates a new queue, has been called.

    Raises:
        UsageError: this version of Gradio has no such queue.
    """
    queue = getattr(page, "_queue", None)
    missing = [name for name in QUEUE if not hasattr(queue, name)]
    if missing:
        raise _changed("gradio", "Blocks._queue" if queue is None else f"Blocks._queue.{missing[0]}")
    return queue


@cache  # called at each operation
def _find(library: str, module: str, path: str) -> Any:
    """Get the attribute at `path` of a module."""
    try:
        return reduce(getattr, path.split("."), import_module(module))
    except (ImportError, AttributeError) as error:
        raise _changed(library, f"{module}.{path}") from error


def _changed(library: str, what: str) -> UsageError:
    from qformer.types import UsageError

    try:
        number = version(library)
    except PackageNotFoundError:
        number = "(of unknown version)"
    return UsageError(
        f"{library} {number} lacks {what}, without which this does not work; "
        f"install the {library} that constraints.txt names"
    )
