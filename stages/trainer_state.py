"""The trainer state in `trainer.pt`, everything that resuming needs besides weights: collected, checked and restored.

State that does not fit the run is rejected before any of it is loaded: PyTorch itself accepts state of any shape and
fails at the next step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qformer import distributed
from qformer.checkpoints import folder as checkpoint
from qformer.checkpoints.weights import trained_tensors
from qformer.files import soundness
from qformer.types import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from qformer.stages.run import Run

SCALER = {"scale": float, "growth_factor": float, "backoff_factor": float, "growth_interval": int}


class NonFiniteLoss(RuntimeError):
    """A loss is NaN or infinite; the message names the step and the term."""


class NonFiniteWeights(RuntimeError):
    """A weight or its optimizer state is NaN or infinite; the message names the step and the weight."""


def collect(run: Run) -> dict[str, Any]:
    """Collect the optimizer and scaler of this process, and the random states and unlogged losses of all processes."""
    scaler, device = run.accelerator.scaler, run.accelerator.device
    own = {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "pending": [(step, {name: loss.cpu() for name, loss in losses.items()}) for step, losses in run.pending],
    }
    return {
        "optimizer": run.optimizer.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
        "processes": distributed.gather_objects(own),
        "extent": run.extent,
    }


def check_finite(run: Run) -> None:
    """Check that losses and weights are finite before they are saved; all processes must call this.

    Raises:
        NonFiniteLoss: a loss that is not logged yet is NaN or infinite.
        NonFiniteWeights: a weight or its optimizer state is NaN or infinite.
    """
    fault = _loss_not_finite(run) or _weight_not_finite(run)
    fault = next(filter(None, distributed.gather_objects(fault)), None)
    if fault is not None:
        kind, what = fault
        before = checkpoint.newest(run.folder)
        kept = "nothing was saved" if before is None else f"it was not saved, '{before.name}' is the newest checkpoint"
        remedy = "lower train.lr, set train.clip, or use precision bf16 or fp32"
        raise kind(f"{what}; {kept}: {remedy}")


def _loss_not_finite(run: Run) -> tuple[type[RuntimeError], str] | None:
    for step, losses in run.pending:
        if name := soundness.not_finite(losses):
            return NonFiniteLoss, f"the loss '{name}' is {losses[name].item()} at step {step}"
    return None


def _weight_not_finite(run: Run) -> tuple[type[RuntimeError], str] | None:
    weights = trained_tensors(run.inner)
    if name := soundness.not_finite(weights):
        return NonFiniteWeights, f"the weight '{name}' is NaN or infinite after step {run.step}"
    names = {id(parameter): name for name, parameter in weights.items()}
    kept = {
        f"{names.get(id(parameter), '?')} ({key})": value
        for parameter, state in run.optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }
    if name := soundness.not_finite(kept):
        return NonFiniteWeights, f"the optimizer state of '{name}' is NaN or infinite after step {run.step}"
    return None


def restore(run: Run, trainer: dict[str, Any], found: Path) -> None:
    """Restore the state that `collect` returned.

    Args:
        trainer: the state, as read from the checkpoint `found`.

    Raises:
        UsageError: the number of processes or the size of the data differs, or (`Damaged`) the state is malformed.
    """
    processes = trainer.get("processes")
    if processes is None and "random" in trainer:  # written by a version that had one process only
        processes = [{"cpu": trainer["random"], "cuda": None, "pending": []}]
    if not isinstance(processes, list) or not processes:
        raise checkpoint.damaged_trainer(found, "it lacks the states of the processes")
    if len(processes) != distributed.world():
        raise UsageError(
            f"the run '{run.folder}' was trained by {len(processes)} processes, not {distributed.world()}; "
            f"start {len(processes)} processes, or begin another run with init set to this one"
        )
    before = trainer.get("extent")  # checkpoints of earlier versions lack it
    if before is not None and before != run.extent:
        raise UsageError(
            f"data.train has {run.extent} samples or shards, but had {before} when the run '{run.folder}' began, so "
            "the order of the samples would change; restore the data, or begin another run with init set to this one"
        )
    own, scaler = processes[distributed.rank()], trainer.get("scaler")
    if fault := _process_fault(own) or _optimizer_fault(run, trainer.get("optimizer")) or _scaler_fault(scaler):
        raise checkpoint.damaged_trainer(found, fault)
    try:
        torch.set_rng_state(own["cpu"])
    except RuntimeError as error:  # the bytes are not a generator state
        raise checkpoint.damaged_trainer(found, "its random state is not valid") from error
    device = run.accelerator.device
    if device.type == "cuda" and own["cuda"] is not None:
        torch.cuda.set_rng_state(own["cuda"], device)
    run.optimizer.load_state_dict(trainer["optimizer"])
    if scaler is not None and run.accelerator.scaler is not None:
        run.accelerator.scaler.load_state_dict(scaler)
    run.pending = [(step, {name: loss.to(device) for name, loss in losses.items()}) for step, losses in own["pending"]]


def _process_fault(own: Any) -> str | None:
    if not isinstance(own, dict) or not {"cpu", "cuda", "pending"} <= own.keys():
        return "the state of a process lacks cpu, cuda or pending"
    for name in ("cpu", "cuda"):
        is_state = isinstance(own[name], Tensor) and own[name].dtype == torch.uint8 and own[name].ndim == 1
        if not is_state and not (name == "cuda" and own[name] is None):
            return f"the random state {name} is not a tensor of bytes"
    if len(own["cpu"]) != len(torch.get_rng_state()):
        return f"the random state cpu has {len(own['cpu'])} bytes"
    if not isinstance(own["pending"], list) or not all(map(_is_pending, own["pending"])):
        return "pending is not a list of steps with their losses"
    return None


def _is_pending(pair: Any) -> bool:
    if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], int)):
        return False
    losses = pair[1]
    return isinstance(losses, dict) and all(isinstance(value, Tensor) and not value.ndim for value in losses.values())


def _optimizer_fault(run: Run, saved: Any) -> str | None:
    """Find how the optimizer state differs from what this run would save; only the learning rate can differ."""
    if not (isinstance(saved, dict) and isinstance(saved.get("state"), dict)):
        return "it lacks the state of the optimizer"
    mine, theirs = run.optimizer.state_dict()["param_groups"], saved.get("param_groups")
    if not (isinstance(theirs, list) and len(theirs) == len(mine)):
        return f"the optimizer does not have the {len(mine)} groups of this run"
    for number, (own, group) in enumerate(zip(mine, theirs, strict=True)):
        if not isinstance(group, dict) or "params" not in group:
            return f"group {number} of the optimizer has no params"
        for key in own.keys() & group.keys() - {"lr"}:  # newer versions of PyTorch add keys
            if group[key] != own[key] and _listed(group[key]) != _listed(own[key]):
                return f"{key} of group {number} of the optimizer is {group[key]!r} instead of {own[key]!r}"
    parameters = [parameter for group in run.optimizer.param_groups for parameter in group["params"]]
    for number, state in saved["state"].items():
        if not isinstance(number, int) or not 0 <= number < len(parameters):
            return f"the optimizer has a state {number!r}, which belongs to no weight"
        if fault := _state_fault(state, parameters[number]):
            return f"the optimizer's state {number} {fault}"
    return None


def _listed(value: Any) -> Any:
    """Turn a tuple into a list, since some versions of PyTorch save lists."""
    return list(value) if isinstance(value, tuple) else value


def _state_fault(state: Any, parameter: Tensor) -> str | None:
    if not isinstance(state, dict) or not {"step", "exp_avg", "exp_avg_sq"} <= state.keys():
        return "lacks step, exp_avg or exp_avg_sq"
    if not isinstance(state["step"], Tensor) or state["step"].numel() != 1:
        return "has a step that is not a number"
    for key in ("exp_avg", "exp_avg_sq"):
        value = state[key]
        if not (isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point()):
            return f"has an {key} that does not fit its weight"
    if name := soundness.not_finite(state):
        return f"has a {name} that is NaN or infinite"
    return None


def _scaler_fault(scaler: Any) -> str | None:
    if scaler is None or scaler == {}:
        return None
    if not isinstance(scaler, dict):
        return "the scaler has no keys"
    wrong = [key for key, kind in SCALER.items() if not isinstance(scaler.get(key), kind)]
    return f"{wrong[0]} of the scaler is {scaler.get(wrong[0])!r}" if wrong else None
