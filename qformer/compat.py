"""Private names of other libraries: all that the product uses of them, each behind one function that says why.

None has a public counterpart. Where a newer version of a library has dropped one, `UsageError` says so in a sentence
that names the library and its version. Importing this module loads none of the libraries.
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

#: What `demo` reads of Gradio's queue. These names are public, those of its class and of the way to it are not.
QUEUE = ("event_ids_to_events", "pending_event_ids_session", "pending_messages_per_session", "__len__")


def fake_mode() -> Any:
    """A mode of PyTorch (`torch._subclasses.FakeTensorMode`) in which tensors have a shape and a dtype but no numbers.

    PyTorch documents the class, but only under this name. Its public relative, the device `meta`, knows no autocast.

    Raises:
        UsageError: this PyTorch has no such class there.
    """
    return _find("torch", "torch._subclasses.fake_tensor", "FakeTensorMode")(allow_non_fake_inputs=True)


def seeing_operations(see: Callable[[Any, tuple[Any, ...], dict[str, Any], Any], None]) -> AbstractContextManager[Any]:
    """A context in which `see(operator, args, kwargs, out)` is told of each operation, also those of backward passes.

    PyTorch's `TorchDispatchMode` is documented under `torch.utils._python_dispatch` alone. What is public
    (`torch.overrides.TorchFunctionMode`) sees the calls that Python makes, and none of a backward pass.

    Args:
        see: called after each operation with the operator, such as `torch.ops.aten.mm`, and what it returned.

    Raises:
        UsageError: this PyTorch has no such class there.
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
    """Whether this is called within a backward pass; layers that are computed again in it are.

    PyTorch answers it by `torch._C._current_graph_task_id`, as its own checkpointing asks; no public name does.

    Raises:
        UsageError: this PyTorch has no such function there.
    """
    return _find("torch", "torch", "_C._current_graph_task_id")() >= 0


def efficient_attention(*inputs: Any, scale: float | None) -> Tensor:
    """Attention by CUDA's memory-efficient kernel, as an outline of a GPU's step has it: float[B, heads, X, H / heads].

    The public `scaled_dot_product_attention` chooses by device, and tensors without numbers claim to be on the CPU. So
    PyTorch's operator is called by its name, `torch.ops.aten._scaled_dot_product_efficient_attention`.

    Args:
        inputs: query, key, value, bias, whether what the backward pass needs is kept, share of dropout, is causal.
        scale: None: the root of the width of a head, inverted.

    Raises:
        UsageError: this PyTorch has no such operator.
    """
    return _find("torch", "torch", "ops.aten._scaled_dot_product_efficient_attention")(*inputs, scale=scale)[0]


def flop_formulas() -> dict[Any, Callable[..., int]]:
    """PyTorch's formulas of FLOPs by operator, and those of attention on a CPU, which it lacks.

    Flash attention has the private names `torch.ops.aten._scaled_dot_product_flash_attention...`.

    Returns:
        Operator, such as `torch.ops.aten.mm` -> a function of its arguments, and of its result as `out_val`.

    Raises:
        UsageError: this PyTorch has no such operators, or no formulas for them.
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
    """The ends of names of layers that a transformers model keeps in fp32 and that are never quantised, as T5's `wo`.

    Families say so in `_keep_in_fp32_modules`, which the quantisers of transformers read; nothing public tells it, and
    bitsandbytes, with which one could quantise a model and look, is not needed for a plan.

    Raises:
        UsageError: models of this transformers have no such attribute.
    """
    try:
        return sorted(model._keep_in_fp32_modules or ())
    except AttributeError as error:
        raise _changed("transformers", "PreTrainedModel._keep_in_fp32_modules") from error


def forget_precision() -> None:
    """Let the next `Accelerator` have a precision of its own, where a run before it in this process had another.

    accelerate keeps the precision of the first for the whole process and refuses another ("restart your runtime");
    its `AcceleratorState._reset_state` takes that back, as it is used in transformers' own trainer. Where there is no
    such method, nothing is done: the first run works, and accelerate says itself what it refuses.
    """
    from accelerate.state import AcceleratorState

    reset = getattr(AcceleratorState, "_reset_state", None)
    if reset is not None:
        reset()


def page_queue(page: Any) -> Any:
    """The queue of a page of Gradio: `len`, its requests and messages by session (the names of `QUEUE`).

    Gradio keeps it in `Blocks._queue`. It is public only over HTTP, one session at a time, and says there neither who
    waits for a request nor lets go of what it keeps for visitors who have left.

    Args:
        page: Blocks, after its method `queue`, which makes a new one.

    Raises:
        UsageError: this Gradio has no such queue.
    """
    queue = getattr(page, "_queue", None)
    missing = [name for name in QUEUE if not hasattr(queue, name)]
    if missing:
        raise _changed("gradio", "Blocks._queue" if queue is None else f"Blocks._queue.{missing[0]}")
    return queue


@cache  # asked at each operation
def _find(library: str, module: str, path: str) -> Any:
    """What stands at `path` in a module."""
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
