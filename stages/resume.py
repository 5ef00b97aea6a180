"""How a run is saved and goes on: checkpoints hold optimizer, scaler and the random states of every process."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from qformer import checkpoint, distributed
from qformer.model.loading import load_trained, trained_tensors
from qformer.types import UsageError
from stages import pictures

if TYPE_CHECKING:
    from pathlib import Path

    from stages.loop import Run

console = Console()
#: What may differ between the configuration of a checkpoint and that of the command that resumes it.
MAY_CHANGE = {
    "": {"run"},  # a run folder may have been moved
    "data": {"workers", "max_bad"},
    "train": {"log_every", "validate_every", "save_every", "keep_last"},
}


def save(run: Run) -> None:
    """Write a checkpoint of this step: rank 0 does, and the others wait."""
    model = run.accelerator.unwrap_model(run.model)
    scaler = run.accelerator.scaler
    random = {"cpu": torch.get_rng_state(), "cuda": None}
    if run.accelerator.device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(run.accelerator.device)
    trainer = {
        "optimizer": run.optimizer.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
        "random": distributed.gather_objects(random),
    }
    kinds: Counter[str] = sum(distributed.gather_objects(run.skipped.kinds), Counter())
    if distributed.rank() == 0:
        tensors = trained_tensors(model)
        meta = {"parameters": sum(tensor.numel() for tensor in tensors.values()), "skipped": dict(kinds)}
        checkpoint.save(run.folder, run.step, run.config, tensors, meta, trainer, run.extra, run.config.train.keep_last)
        pictures.curves(run.folder, run.config)
    distributed.barrier()


def resume(run: Run) -> None:
    """Continue from the newest checkpoint of the run folder, if it has one.

    Raises:
        UsageError: it is of another configuration or number of processes, or not all processes see it.
    """
    found = checkpoint.newest(run.folder)
    if len(set(distributed.gather_objects(None if found is None else found.name))) > 1:
        raise UsageError(f"the processes see different files in '{run.folder}'; set run to a folder that they share")
    if found is None:
        return
    saved = checkpoint.read(found)
    if differs := _differences(saved.config.model_dump(), run.config.model_dump()):
        raise UsageError(
            f"the run '{run.folder}' was started with another configuration ({'; '.join(differs)}); "
            "set run to another folder, or remove this one"
        )
    trainer = checkpoint.read_trainer(found)
    if len(trainer["random"]) != distributed.world():
        raise UsageError(
            f"the run '{run.folder}' was trained by {len(trainer['random'])} processes, not {distributed.world()}; "
            "start as many, or begin another run with init set to this one"
        )
    load_trained(run.accelerator.unwrap_model(run.model), saved.tensors, found)
    run.optimizer.load_state_dict(trainer["optimizer"])
    if trainer["scaler"] is not None and run.accelerator.scaler is not None:
        run.accelerator.scaler.load_state_dict(trainer["scaler"])
    random = trainer["random"][distributed.rank()]
    torch.set_rng_state(random["cpu"])
    if run.accelerator.device.type == "cuda" and random["cuda"] is not None:
        torch.cuda.set_rng_state(random["cuda"], run.accelerator.device)
    run.step = int(saved.meta["step"])
    if distributed.rank() == 0:
        _forget_after(run.folder / "metrics.jsonl", run.step)
    console.print(f"resuming {run.folder} at step {run.step}")


def _differences(saved: dict[str, Any], now: dict[str, Any], path: str = "") -> list[str]:
    """Keys whose values differ and may not, as `key was a, is b`."""
    found = []
    for key in sorted(saved.keys() | now.keys()):
        a, b = saved.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{path}{key}.")
        elif a != b and key not in MAY_CHANGE.get(path.rstrip("."), ()):
            found.append(f"{path}{key} was {a}, is {b}")
    return found


def _forget_after(metrics: Path, step: int) -> None:
    """Drop the records of steps that will be done again."""
    if metrics.is_file():
        lines = [
            line
            for line in metrics.read_text(encoding="utf-8").splitlines()
            if line and json.loads(line)["step"] <= step
        ]
        metrics.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
