"""What the product uses of other libraries' private names still does what it is used for.

When one of these fails, a library has changed: the message names it, its version and where to look.
"""

from __future__ import annotations

import inspect
import subprocess
import sys
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F

from qformer import compat
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FUNCTIONS = sorted(
    name for name, value in vars(compat).items() if inspect.isfunction(value) and value.__module__ == compat.__name__
)


@contextmanager
def unchanged(library: str, look: str) -> Iterator[None]:
    """Any error inside says that the library has changed, and where to look."""
    try:
        yield
    except Exception as error:
        raise AssertionError(
            f"{library} {version(library)} has changed what qformer/compat.py uses of it: look at {look} "
            f"({type(error).__name__}: {error})"
        ) from error


def test_fake_mode() -> None:
    with unchanged("torch", "torch._subclasses.fake_tensor.FakeTensorMode"):
        with compat.fake_mode() as mode:
            table = torch.empty(1 << 20, 1 << 20, device="cpu")  # 4 TB, were there numbers
        row = mode.from_tensor(torch.zeros(3, 1 << 20))
        with torch.autocast("cpu", torch.bfloat16):
            out = row @ table
        assert (out.shape, out.dtype, out.device.type) == ((3, 1 << 20), torch.bfloat16, "cpu")
        assert (out + torch.ones(1 << 20)).shape == out.shape  # tensors with numbers may be mixed with them
        assert table.untyped_storage().nbytes() == 4 << 40


def test_seeing_operations() -> None:
    seen: list[Any] = []
    with unchanged("torch", "torch.utils._python_dispatch.TorchDispatchMode"):
        x, weight = torch.ones(2, 3), torch.ones(3, 4, requires_grad=True)
        with compat.seeing_operations(lambda operator, args, _kwargs, out: seen.append((operator, args, out))):
            (x @ weight).sum().backward()
        products = [(args[0].shape, out.shape) for operator, args, out in seen if operator is torch.ops.aten.mm]
        assert products == [((2, 3), (2, 4)), ((3, 2), (3, 4))]  # forward, and the gradient of the weight
        torch.ones(2) + 1
        assert not [operator for operator, *_ in seen if operator is torch.ops.aten.add]  # it has ended


def test_is_backward() -> None:
    found = []
    with unchanged("torch", "torch._C._current_graph_task_id"):
        x = torch.ones(2, requires_grad=True)
        x.register_hook(lambda _: found.append(compat.is_backward()))
        y = (x * 2).sum()
        assert not compat.is_backward()
        y.backward()
        assert found == [True]
        assert not compat.is_backward()


def test_efficient_attention() -> None:
    with unchanged("torch", "torch.ops.aten._scaled_dot_product_efficient_attention"), compat.fake_mode():
        query, key = torch.empty(2, 4, 9, 16), torch.empty(2, 4, 30, 16)
        mixed = compat.efficient_attention(query, key, key, torch.empty(2, 4, 9, 30), True, 0.1, False, scale=None)
        assert (mixed.shape, mixed.dtype) == (query.shape, query.dtype)


def test_flop_formulas() -> None:
    with unchanged("torch", "torch.utils.flop_counter.flop_registry and torch.ops.aten._scaled_dot_product_flash*"):
        formulas, counts = compat.flop_formulas(), []

        def see(operator: Any, args: Any, kwargs: Any, out: Any) -> None:
            if operator in formulas:
                counts.append(formulas[operator](*args, **kwargs, out_val=out))

        x = torch.randn(2, 4, 8, 16, requires_grad=True)
        with compat.seeing_operations(see):
            F.scaled_dot_product_attention(x, x, x).sum().backward()
        product = 2 * 2 * 4 * 8 * 8 * 16
        assert counts == [2 * product, 5 * product]  # backward: the scores once more, and four gradients


def test_kept_in_single() -> None:
    from transformers import OPTConfig, OPTForCausalLM, T5Config, T5ForConditionalGeneration

    with unchanged("transformers", "PreTrainedModel._keep_in_fp32_modules, which its quantizers read"):
        with torch.device("meta"):
            t5 = T5ForConditionalGeneration(T5Config(d_model=8, d_ff=8, num_layers=1, vocab_size=9))
            opt = OPTForCausalLM(OPTConfig(hidden_size=12, ffn_dim=8, num_hidden_layers=1, vocab_size=9))
        assert compat.kept_in_single(t5) == ["wo"]
        assert compat.kept_in_single(opt) == []


def test_forget_precision() -> None:
    from accelerate import Accelerator

    with unchanged("accelerate", "accelerate.state.AcceleratorState._reset_state"):
        for precision in ("bf16", "no"):
            compat.forget_precision()
            assert Accelerator(mixed_precision=precision, cpu=True).mixed_precision == precision
        with pytest.raises(ValueError, match="already been initialized"):  # else the function is not needed any more
            Accelerator(mixed_precision="bf16", cpu=True)
        compat.forget_precision()


def test_page_queue() -> None:
    import gradio

    with unchanged("gradio", "gradio.blocks.Blocks._queue and gradio.queueing.Queue"):
        with gradio.Blocks() as page:
            gradio.Button()
        page.queue(max_size=3)
        queue = compat.page_queue(page)
        assert (len(queue), queue.max_size) == (0, 3)
        assert [dict(getattr(queue, name)) for name in compat.QUEUE[:-1]] == [{}] * 3


def test_each_function_is_tested() -> None:
    assert FUNCTIONS
    assert not [name for name in FUNCTIONS if not name.startswith("_") and f"test_{name}" not in globals()]


@pytest.mark.parametrize(
    ("library", "place", "call", "named"),
    [
        ("torch", "torch._subclasses.fake_tensor.FakeTensorMode", compat.fake_mode, "FakeTensorMode"),
        (
            "torch",
            "torch.utils._python_dispatch.TorchDispatchMode",
            lambda: compat.seeing_operations(print),
            "TorchDispatchMode",
        ),
        ("torch", "torch._C._current_graph_task_id", compat.is_backward, "_current_graph_task_id"),
        ("torch", "torch.utils.flop_counter.flop_registry", compat.flop_formulas, "flop_registry"),
        ("transformers", "", lambda: compat.kept_in_single(object()), "_keep_in_fp32_modules"),
        ("gradio", "", lambda: compat.page_queue(object()), "Blocks._queue"),
    ],
)
def test_what_is_gone_is_told_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, library: str, place: str, call: Callable[[], Any], named: str
) -> None:
    compat._find.cache_clear()
    if place:
        monkeypatch.delattr(place)
    with pytest.raises(UsageError) as told:
        call()
    assert str(told.value).startswith(f"{library} {version(library)} lacks ")
    assert named in str(told.value)
    assert "\n" not in str(told.value)


def test_formulas_that_are_gone_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    compat._find.cache_clear()
    monkeypatch.setattr("torch.utils.flop_counter.flop_registry", {})
    with pytest.raises(UsageError, match=r"^torch \S+ lacks a formula in torch.utils.flop_counter for torch.ops.aten."):
        compat.flop_formulas()
    compat._find.cache_clear()


def test_a_first_run_needs_nothing_of_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("accelerate.state.AcceleratorState._reset_state")
    compat.forget_precision()


def test_a_failure_names_the_library_and_where_to_look() -> None:
    with pytest.raises(AssertionError, match=rf"^torch {version('torch')}.* look at torch\._C ".replace("+", r"\+")):  # noqa: SIM117
        with unchanged("torch", "torch._C"):
            assert torch.ones(1) == 2


def test_importing_it_loads_no_library() -> None:
    code = "import sys, qformer.compat; print({'torch', 'transformers', 'accelerate', 'gradio'} & set(sys.modules))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "set()"
