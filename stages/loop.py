"""The one training loop. It knows nothing of what is trained: a model returns named losses and their sum, `loss`.

Everything that a run writes stands in its folder: `config.yaml`, `metrics.jsonl`, `curves.png`, `skipped.jsonl`,
TensorBoard events and `checkpoints/`. Running the same command again resumes: batches are a function of the step, the
learning rate too, and checkpoints hold optimizer, scaler and random states.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from qformer import checkpoint
from qformer.config import Config, dump_config
from qformer.data.loader import Skipped, training_batches
from qformer.model.loading import load_trained, trained_tensors
from qformer.types import UsageError
from stages import pictures
from stages.optim import adamw, learning_rate

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn
    from torch.utils.data import Dataset

    from qformer.data.loader import Loaded

console = Console()
PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
#: What may differ between the configuration of a checkpoint and that of the command that resumes it.
MAY_CHANGE = {
    "": {"run"},  # a run folder may have been moved
    "data": {"workers", "max_bad"},
    "train": {"log_every", "validate_every", "save_every", "keep_last"},
}


class Evaluate(Protocol):
    """Measures a model on held-out data; it is called in eval mode, and its random draws do not reach the training."""

    def __call__(self, model: nn.Module, step: int) -> dict[str, float]: ...


class NonFiniteLoss(RuntimeError):
    """A loss is NaN or infinite; the message names the step and the term."""


@dataclass
class Run:
    """A training run in progress. `step` counts finished optimizer steps."""

    config: Config
    folder: Path
    accelerator: Accelerator
    model: nn.Module
    optimizer: Any
    skipped: Skipped
    extra: Callable[[Path], object] | None
    step: int = 0
    pending: list[tuple[int, dict[str, Tensor]]] = field(default_factory=list)
    clock: float = field(default_factory=time.perf_counter)


def fit(
    model: nn.Module,
    batches: Dataset[Loaded],
    config: Config,
    evaluate: Evaluate | None = None,
    extra: Callable[[Path], object] | None = None,
) -> Path:
    """Train `model` for `config.train.steps` steps, or what is left of them; returns the last checkpoint.

    Args:
        batches: dataset whose item i is the i-th batch of the run.
        evaluate: called every `validate_every` steps and at the end.
        extra: writes further files into each checkpoint folder.

    Raises:
        NonFiniteLoss: and the last good checkpoint stays the newest.
        UsageError: the run folder belongs to another configuration, or most of the data are bad.
    """
    run = _start(model, config, extra)
    train = config.train
    with _progress() as progress:
        bar = progress.add_task(config.stage, total=train.steps, completed=run.step, losses="")
        first, last_batch = run.step * train.accumulate, train.steps * train.accumulate
        stream = training_batches(batches, config.data.workers, first, last_batch)
        while run.step < train.steps:
            _train_step(run, stream)
            last = run.step == train.steps
            validates = evaluate is not None and (last or _every(train.validate_every, run.step))
            if last or validates or run.step % train.log_every == 0 or _every(train.save_every, run.step):
                progress.update(bar, losses=_log(run))
            if validates and evaluate is not None:
                _validate(run, evaluate, progress.console)
            if last or _every(train.save_every, run.step):
                _save(run)
            progress.update(bar, completed=run.step)
    run.accelerator.end_training()
    if run.skipped.kinds:
        console.print(f"skipped: {run.skipped.summary()}; listed in {run.skipped.path}")
    return checkpoint.find(run.folder)


def _start(model: nn.Module, config: Config, extra: Callable[[Path], object] | None) -> Run:
    folder = Path(config.run)
    AcceleratorState._reset_state()  # else the precision of the first run in a process would be that of all
    accelerator = Accelerator(
        mixed_precision=PRECISION[config.train.precision], log_with="tensorboard", project_dir=folder
    )
    if accelerator.num_processes > 1:
        raise UsageError(
            f"started as {accelerator.num_processes} processes, but training runs in one; use plain python"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to the run folder '{folder}' ({error.strerror}); set run to another") from error
    set_seed(config.seed)
    describe(model)
    optimizer = adamw(model, config.train)
    model, optimizer = accelerator.prepare(model, optimizer)
    run = Run(config, folder, accelerator, model, optimizer, Skipped(folder, config.data.max_bad), extra)
    _resume(run)
    run.skipped.forget_from(run.step * config.train.accumulate)
    (folder / checkpoint.CONFIG).write_text(dump_config(config), encoding="utf-8")
    accelerator.init_trackers("tensorboard")
    return run


def describe(model: nn.Module) -> None:
    """Print what is frozen and what is trained, in millions of parameters."""
    table = Table("part", "trained", "frozen", title=type(model).__name__)
    for name, part in model.named_children():
        trained = sum(p.numel() for p in part.parameters() if p.requires_grad)
        table.add_row(
            name, f"{trained / 1e6:.2f} M", f"{(sum(p.numel() for p in part.parameters()) - trained) / 1e6:.2f} M"
        )
    console.print(table)


def _train_step(run: Run, stream: Any) -> None:
    """One optimizer step over `accumulate` batches."""
    train = run.config.train
    run.model.train()
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(run.step, train) * group["scale"]
    total: dict[str, Tensor] = {}
    for _ in range(train.accumulate):
        loaded = next(stream)
        run.skipped.add(loaded)
        losses = run.model(loaded.batch)
        run.accelerator.backward(losses["loss"] / train.accumulate)
        for name, value in losses.items():
            total[name] = total.get(name, torch.zeros_like(value.detach())) + value.detach() / train.accumulate
    if train.clip:
        run.accelerator.clip_grad_norm_(run.model.parameters(), train.clip)
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.step += 1
    run.pending.append((run.step, total))


def _log(run: Run) -> str:
    """Fetch the losses since the last call, once; check, write and show them."""
    names = list(run.pending[0][1])
    values = torch.stack([torch.stack([losses[name].float() for name in names]) for _, losses in run.pending]).cpu()
    for (step, _), row in zip(run.pending, values, strict=True):
        for name, value in zip(names, row.tolist(), strict=True):
            if not torch.isfinite(torch.tensor(value)) and name != "loss":
                raise NonFiniteLoss(
                    f"the loss '{name}' is {value} at step {step}; lower train.lr, or use precision bf16 or fp32"
                )
    now = time.perf_counter()
    seconds = (now - run.clock) / len(run.pending)
    run.clock = now
    means = dict(zip(names, values.mean(dim=0).tolist(), strict=True))
    images = run.config.data.batch * run.config.train.accumulate / seconds
    record = {
        "step": run.step,
        "lr": learning_rate(run.step - 1, run.config.train),
        **means,
        "images_per_second": images,
    }
    _write(run, record, "train")
    run.pending.clear()
    return "  ".join(f"{name} {value:.3f}" for name, value in means.items())


def _validate(run: Run, evaluate: Evaluate, out: Console) -> None:
    model = run.accelerator.unwrap_model(run.model)
    model.eval()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(run.config.seed)
        measured = evaluate(model, run.step)
    _write(run, {"step": run.step, **measured}, "validation")
    out.print(f"step {run.step}: " + "  ".join(f"{name} {value:.3f}" for name, value in measured.items()))
    run.clock = time.perf_counter()


def _write(run: Run, record: dict[str, float], kind: str) -> None:
    with (run.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"kind": kind, **record}) + "\n")
    run.accelerator.log({f"{kind}/{name}": value for name, value in record.items() if name != "step"}, step=run.step)


def _save(run: Run) -> None:
    model = run.accelerator.unwrap_model(run.model)
    scaler = run.accelerator.scaler
    trainer = {
        "optimizer": run.optimizer.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
        "random": torch.get_rng_state(),
        "cuda_random": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    meta = {
        "parameters": sum(tensor.numel() for tensor in trained_tensors(model).values()),
        "skipped": dict(run.skipped.kinds),
    }
    checkpoint.save(
        run.folder, run.step, run.config, trained_tensors(model), meta, trainer, run.extra, run.config.train.keep_last
    )
    pictures.curves(run.folder, run.config)


def _resume(run: Run) -> None:
    """Continue from the newest checkpoint of the run folder, if it has one."""
    found = checkpoint.newest(run.folder)
    if found is None:
        return
    saved = checkpoint.read(found)
    if differs := _differences(saved.config.model_dump(), run.config.model_dump()):
        raise UsageError(
            f"the run '{run.folder}' was started with another configuration ({'; '.join(differs)}); "
            "set run to another folder, or remove this one"
        )
    load_trained(run.accelerator.unwrap_model(run.model), saved.tensors, found)
    trainer = checkpoint.read_trainer(found)
    run.optimizer.load_state_dict(trainer["optimizer"])
    if trainer["scaler"] is not None and run.accelerator.scaler is not None:
        run.accelerator.scaler.load_state_dict(trainer["scaler"])
    torch.set_rng_state(trainer["random"])
    if torch.cuda.is_available() and trainer["cuda_random"]:
        torch.cuda.set_rng_state_all(trainer["cuda_random"])
    run.step = int(saved.meta["step"])
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


def _every(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[losses]}"),
        console=console,
    )
