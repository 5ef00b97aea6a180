"""The one training loop. It is independent of the model, which returns named losses and their sum, `loss`.

W processes with batches of B train like one process with batches of W * B: each reads its share of the global batch,
gradients are averaged, and the models make sure that the mean over processes is the loss of the global batch.

A run writes everything to its folder: `config.yaml`, `metrics.jsonl`, `curves.png`, `skipped.jsonl`, TensorBoard events
and `checkpoints/`. Running the same command again resumes: batches and the learning rate are functions of the step, and
checkpoints hold optimizer, scaler and random states.
"""

from __future__ import annotations

import math
import os
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from accelerate.utils import set_seed
from rich.table import Table
from torch.nn.parallel import DistributedDataParallel

from qformer import compat, devices, distributed
from qformer.checkpoints import folder as checkpoint
from qformer.config import dump_config
from qformer.data.loader import Skipped, training_batches
from qformer.model.chunked import chunked_step
from qformer.progress import Bar, console
from qformer.schema import Config
from qformer.stages.optim import adamw, learning_rate
from qformer.stages.recompute import recompute_layers
from qformer.stages.resume import Stop, claimed, end, print_skipped, resume, save
from qformer.stages.run import Run, is_due, write_record
from qformer.stages.trainer_state import NonFiniteLoss
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console
    from torch import Tensor, nn
    from torch.utils.data import Dataset

    from qformer.data.loader import BatchRecord
    from qformer.types import Batch

ALONE_OR_TOGETHER = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
PATIENCE = timedelta(hours=2)  # for which processes wait while rank 0 evaluates and saves
ALONE = (
    "data.batch is 1: with a single image the contrastive loss is always 0 and ITM has no negative pair, so neither "
    "learns anything; set data.batch to 2 or more (train.accumulate does not help)"
)
PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


class Evaluate(Protocol):
    """Evaluates a model on held-out data, in eval mode; its random draws do not affect training."""

    def __call__(self, model: nn.Module, step: int) -> dict[str, float]: ...


def fit(
    model: nn.Module,
    batches: Dataset[BatchRecord],
    config: Config,
    evaluate: Evaluate | None = None,
    extra: Callable[[Path], object] | None = None,
    begin: Callable[[Run], object] | None = None,
) -> Path:
    """Train `model` until `config.train.steps` steps are done and return the last checkpoint.

    Args:
        batches: dataset whose item i is the i-th batch of the run.
        evaluate: called every `validate_every` steps and at the end.
        extra: writes additional files into each checkpoint folder.
        begin: called in every process before the first step of each start, when the run folder is claimed.

    Raises:
        NonFiniteLoss, NonFiniteWeights: the last good checkpoint stays the newest.
        SystemExit: with code 0, after a signal asked the run to end and the current step was saved.
        OSError: the last checkpoint could not be written.
        UsageError: the run folder belongs to another configuration or is in use, most of the data are bad, or the size
            of the data has changed since the run began.
    """
    accelerator = _accelerator(config, Path(config.run))
    console.quiet = distributed.rank() > 0
    with claimed(Path(config.run)):
        run = _start(model, config, extra, accelerator, getattr(batches, "extent", None))
        if begin is not None:
            begin(run)
            run.clock = time.perf_counter()
        return _fit(run, batches, evaluate)


def _fit(run: Run, batches: Dataset[BatchRecord], evaluate: Evaluate | None) -> Path:
    config = run.config
    train = config.train
    with Stop() as stop, Bar("{task.fields[losses]}", console=console, disable=distributed.rank() > 0) as progress:
        bar = progress.add_task(config.stage, total=train.steps, completed=run.step, losses="")
        first, last_batch = run.step * train.accumulate, train.steps * train.accumulate
        stream = training_batches(batches, config.data.workers, first, last_batch)
        vote = distributed.Vote()
        while run.step < train.steps:
            _train_step(run, stream)
            last = run.step == train.steps
            validates = evaluate is not None and (last or is_due(train.validate_every, run.step))
            if last or validates or run.step % train.log_every == 0 or is_due(train.save_every, run.step):
                progress.update(bar, losses=_log(run))
            if validates and evaluate is not None:
                _validate(run, evaluate, progress.console)
            saves = last or is_due(train.save_every, run.step)
            if saves:
                save(run, must=last)
            progress.update(bar, completed=run.step)
            if vote(stop.asked is not None) and not last:
                if not saves:
                    save(run, must=True)
                end(run, stop.asked)
    distributed.barrier()  # another process may not have received the last vote yet
    run.accelerator.end_training()
    print_skipped(run)
    return checkpoint.find(run.folder)


def _start(
    model: nn.Module, config: Config, extra: Callable[[Path], object] | None, accelerator: Accelerator, extent: Any
) -> Run:
    folder = Path(config.run)
    if distributed.world() > 1 and not hasattr(model, "count_targets"):
        raise UsageError(
            f"stage '{config.stage}' trains in one process, but {distributed.world()} were started; run it without "
            "torchrun"
        )
    set_seed(config.seed, device_specific=True)  # each process draws its own dropout and negatives
    describe(model)
    if _contrasts(config) and config.data.batch * distributed.world() == 1:
        console.print(ALONE, soft_wrap=True)
    if config.train.gradient_checkpointing:
        recompute_layers(model)
    optimizer = adamw(model, config.train)
    if shards(config):
        distributed.shard_frozen(model, accelerator.device)
        model, optimizer = accelerator.prepare_model(model, evaluation_mode=True), accelerator.prepare(optimizer)
    else:
        model, optimizer = accelerator.prepare(model, optimizer)
        assert distributed.world() == 1 or isinstance(model, DistributedDataParallel), "DDP must average the gradients"
    run = Run(config, folder, accelerator, model, optimizer, Skipped(folder, config.data.max_bad), extra, extent)
    resume(run)
    try:
        if distributed.rank() == 0 and run.step <= config.train.steps:
            (folder / checkpoint.CONFIG).write_text(dump_config(config), encoding="utf-8")
        accelerator.init_trackers("tensorboard")
    except OSError as error:
        raise UsageError(f"cannot write to the run folder '{folder}' ({error.strerror}); set run to another") from error
    return run


def _contrasts(config: Config) -> bool:
    """Return True if the loss contrasts the images of a batch with one another."""
    return config.stage == "stage1" or (config.stage == "vision" and config.data.train.name not in ("phrases", "views"))


def shards(config: Config) -> bool:
    """Return True if frozen layers are sharded over the processes."""
    return config.train.fsdp and distributed.world() > 1


def _accelerator(config: Config, folder: Path) -> Accelerator:
    compat.forget_precision()
    accelerator = Accelerator(
        # Without a GPU, accelerate joins the processes of torchrun only if `cpu` is set.
        cpu="LOCAL_RANK" in os.environ and not torch.accelerator.is_available(),
        mixed_precision=PRECISION[_precision(config)],
        log_with="tensorboard",
        project_dir=folder,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=PATIENCE),
            DistributedDataParallelKwargs(
                broadcast_buffers=False,  # all buffers are constants
                gradient_as_bucket_view=True,
                # Towers and connectors of others may have parts that no loss uses, and a batch of captions skips the
                # question reader or shows no marker of a resolution.
                find_unused_parameters=not all(
                    (
                        config.freeze_vision,
                        config.question is None,
                        config.has_qformer,
                        config.resolution.name == "fixed",
                        config.loss.itm and config.loss.itg,
                        config.train.bert_rate,
                    )
                ),
            ),
        ],
    )
    distributed.check_launch()
    if accelerator.distributed_type not in ALONE_OR_TOGETHER:
        raise UsageError(
            f"accelerate is configured for {accelerator.distributed_type.value}; start the processes with torchrun or "
            "accelerate's MULTI_GPU, and set train.fsdp=true to shard the frozen layers"
        )
    return accelerator


def _precision(config: Config) -> str:
    """Return the precision of a run, and print it with the reason if the device decides."""
    if config.train.precision != "auto":
        return config.train.precision
    device = torch.accelerator.current_accelerator(check_available=True)
    taken, why = devices.fastest_precision("cpu" if device is None else device.type)
    if os.environ.get("RANK", "0") == "0":  # the process group does not exist yet
        console.print(f"train.precision auto takes {taken}: {why}", soft_wrap=True)
    return taken


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
    batches = [_take(run, stream) for _ in range(train.accumulate)]
    if train.accumulate > 1:
        _share_targets(run, batches)
    for number, batch in enumerate(batches, start=1):
        losses = _backward(run, batch, last=number == train.accumulate)
        for name, value in losses.items():
            total[name] = total.get(name, torch.zeros_like(value.detach())) + value.detach() / train.accumulate
    if train.clip:
        run.accelerator.clip_grad_norm_(run.model.parameters(), train.clip)
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.step += 1
    run.pending.append((run.step, total))


def _backward(run: Run, batch: Batch, last: bool) -> dict[str, Tensor]:
    """Run both passes of a batch and return its losses; the `last` batch of a step averages the gradients."""
    train, accelerator = run.config.train, run.accelerator
    if not train.chunk:
        with nullcontext() if last else accelerator.no_sync(run.model):
            losses = run.model(batch)
            accelerator.backward(losses["loss"] / train.accumulate)
    else:
        losses = chunked_step(run.inner, batch, train.chunk, _scale(run), accelerator.autocast)
    if last and (train.chunk or shards(run.config)):  # otherwise DDP averages them in its backward pass
        distributed.average_gradients(run.inner.parameters())
    return losses


def _scale(run: Run) -> Callable[[Tensor], Tensor]:
    """Return a function that scales a loss as `accelerator.backward` does, divided by the batches of a step."""

    def scale(loss: Tensor) -> Tensor:
        loss = loss / run.config.train.accumulate
        return loss if run.accelerator.scaler is None else run.accelerator.scaler.scale(loss)

    return scale


def _take(run: Run, stream: Any) -> Batch:
    loaded = next(stream)
    try:
        run.skipped.add(loaded)
    except OSError as error:
        console.print(f"step {run.step}: the list of skipped samples could not be written ({error})")
    return loaded.batch


def _share_targets(run: Run, batches: list[Batch]) -> None:
    """Give every token of the step the same weight, whatever batch and process it is in."""
    count = getattr(run.inner, "count_targets", None)
    if count is not None:
        own = torch.tensor(float(sum(count(batch) for batch in batches)), device=run.accelerator.device)
        mean = distributed.total(own).clamp(min=1) / (distributed.world() * len(batches))
        for batch in batches:
            batch.targets = mean


def _log(run: Run) -> str:
    """Fetch the losses since the last call in one transfer; check, write and format them."""
    names = list(run.pending[0][1])
    own = torch.stack([torch.stack([losses[name].float() for name in names]) for _, losses in run.pending])
    values = (distributed.total(own) / distributed.world()).cpu()
    for (step, _), row in zip(run.pending, values, strict=True):
        named = dict(zip(names, row.tolist(), strict=True))
        for name, value in sorted(named.items(), key=lambda pair: pair[0] == "loss"):  # name a term before the sum
            if not math.isfinite(value):
                raise NonFiniteLoss(
                    f"the loss '{name}' is {value} at step {step}; lower train.lr, or use precision bf16 or fp32"
                )
    now = time.perf_counter()
    seconds = (now - run.clock) / len(run.pending)
    run.clock = now
    means = dict(zip(names, values.mean(dim=0).tolist(), strict=True))
    images = run.config.data.batch * run.config.train.accumulate * distributed.world() / seconds
    record = {
        "step": run.step,
        "lr": learning_rate(run.step - 1, run.config.train),
        **means,
        "images_per_second": images,
    }
    write_record(run, record, "train")
    run.pending.clear()
    return "  ".join(f"{name} {value:.3f}" for name, value in means.items())


def _validate(run: Run, evaluate: Evaluate, out: Console) -> None:
    """Evaluate in rank 0 while the others wait; with sharded layers all processes take part."""
    model = run.inner
    gpus = [run.accelerator.device] if run.accelerator.device.type == "cuda" else []
    if distributed.rank() == 0 or shards(run.config):
        model.eval()
        with distributed.alone(), torch.random.fork_rng(gpus), torch.no_grad():
            torch.manual_seed(run.config.seed)
            measured = evaluate(model, run.step)
        write_record(run, {"step": run.step, **measured}, "validation")
        if distributed.rank() == 0:
            out.print(f"step {run.step}: " + "  ".join(f"{name} {value:.3f}" for name, value in measured.items()))
    distributed.barrier()
    run.clock = time.perf_counter()
