"""`qformer plan`: a forecast of memory, time and traffic, before anything is downloaded.

The real model of a configuration runs one step (`stages/plan/rehearsal.py`) on tensors without data (`outline.py`),
while its memory and FLOPs are counted (`ledger.py`). Texts have the maximal length, and images have 640 x 480 pixels
unless another size is given.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from qformer.checkpoints import folder as checkpoint
from qformer.data import counting
from qformer.devices import DTYPES, fastest_precision
from qformer.progress import console
from qformer.stages.checking import check
from qformer.stages.inherit import inherit
from qformer.stages.plan import beside, hardware
from qformer.stages.plan.ledger import part_of
from qformer.stages.plan.outline import OutlinedLinear
from qformer.stages.plan.rehearsal import PICTURE, Subject, polynomial
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qformer.model.assembly import Bridge
    from qformer.schema import Config
    from qformer.stages.plan.ledger import Step

MOST_GPUS = 1_000_000
MOST = 4096  # samples per process; the search for the largest batch ends here
MEMORY = ("weights", "gradients", "AdamW", "activations", "temporary")
COLUMNS = {"weights": "weights", "gradients": "gradients", "AdamW": "AdamW", "forward": "activations"}
WORTH_A_WORD = 5_000_000  # bytes, of a part stored in a dtype
STORED = {dtype: name for name, dtype in DTYPES.items()} | {torch.int8: "int8", torch.uint8: "nf4"}


@dataclass(frozen=True)
class Forecast:
    """The resources that a run needs, in bytes, seconds and FLOPs; memory and traffic are per process.

    Attributes:
        parameters: part -> `{"trained": n, "frozen": n}`.
        weights: part -> dtype -> bytes.
        memory: bytes at the memory peak: part -> `weights`, `gradients`, `AdamW`, `activations` (kept for the backward
            pass) and `temporary`.
        tensors: the sum of `memory`.
        peak: `tensors` plus the memory of the process outside its tensors.
        fits: True if `peak` is within `limit`.
        largest_batch: the largest batch per process that fits; 0 if not even one sample does.
        instead: if the batch does not fit, settings that fit and keep the samples per step: `train.chunk`, or
            `data.batch` and `train.accumulate`.
        flops: FLOPs of one image: `forward` and `backward`, by part.
        images_per_second, days: for all processes together, at `efficiency`; None if the device has no known peak.
        traffic: bytes that one process sends, and also receives, in a step.
        store: bytes of the stored tokens of one image, in all the crops of `data.features`.
        images: the number of images; None if counting them takes a pass over the data.
        notes: the assumptions.
        beside: the cost of an image beside that of another configuration (`stages/plan/beside.py`), if there is one.
    """

    stage: str
    gpu: str
    gpus: int
    precision: str
    efficiency: float
    batch: int
    samples_per_step: int
    steps: int
    parameters: dict[str, dict[str, int]]
    weights: dict[str, dict[str, int]]
    memory: dict[str, dict[str, int]]
    tensors: int
    peak: int
    limit: int
    fits: bool
    largest_batch: int
    instead: dict[str, int]
    flops: dict[str, dict[str, float]]
    images_per_second: float | None
    days: float | None
    traffic: dict[str, int]
    store: dict[str, int]
    images: int | None
    notes: list[str]
    beside: dict[str, Any] | None = None


def plan(
    config: Config,
    gpu: str = "A100-80GB",
    gpus: int = 1,
    memory: str | None = None,
    efficiency: float = 0.4,
    trust: bool = False,
    picture: tuple[int, int] = PICTURE,
) -> Forecast:
    """Forecast the training of a configuration on `gpus` processes with one GPU each.

    Args:
        gpu: a name in `hardware.GPUS`, an unambiguous part of one, or `cpu`.
        memory: memory of one GPU, such as `80GB`; the default is that of the table.
        efficiency: share of the peak FLOP/s that training reaches.
        trust: allow running the code that `init` names for its image encoder.
        picture: (width, height) of every image, before it is cut.

    Raises:
        UsageError: an unknown GPU or tower, a number or amount out of range, or a stage that has no forecast.
    """
    gpu = hardware.full_name(gpu)
    _check_amounts(gpus, efficiency)
    limit = int(hardware.parse_memory(memory) if memory else hardware.find(gpu).memory * 1e9)
    config, notes = _with_bridge(_with_precision(check(config), gpu), trust)
    subject = Subject.of(config, "cpu" if gpu == hardware.CPU else "cuda", gpus, picture)
    step, peak = subject.step(config.data.batch), subject.peak(config.data.batch)
    samples = config.data.batch * config.train.accumulate * gpus
    seconds = _seconds(step, config.data.batch, hardware.find(gpu), efficiency)
    speed = None if seconds is None else gpus / seconds
    images, uncounted = counting.count(config.data.train.name, config.data.train.options)
    with console.status("looking for the largest batch that fits"):
        largest = _largest(subject, config.data.batch, limit)
        instead = {} if peak <= limit else _instead(subject, limit, largest)
    return Forecast(
        stage=config.stage,
        gpu=gpu,
        gpus=gpus,
        precision=config.train.precision,
        efficiency=efficiency,
        batch=config.data.batch,
        samples_per_step=samples,
        steps=config.train.steps,
        parameters=_parameters(subject.model),
        weights=_weights(subject.model),
        memory=_memory(step.held),
        tensors=step.peak,
        peak=peak,
        limit=limit,
        fits=peak <= limit,
        largest_batch=largest,
        instead=instead,
        flops=_flops(step, config.data.batch),
        images_per_second=speed,
        days=None if speed is None else config.train.steps * samples / speed / 86400,
        traffic=_traffic(subject, step.received),
        store=_store(subject),
        images=images,
        notes=notes + uncounted,
    )


def _with_precision(config: Config, gpu: str) -> Config:
    """Replace `train.precision: auto` by what it takes on a GPU of the table, or on this CPU."""
    if config.train.precision != "auto":
        return config
    on_cpu = gpu == hardware.CPU
    taken = fastest_precision("cpu")[0] if on_cpu else "bf16" if hardware.find(gpu).has_bf16 else "fp16"
    return config.model_copy(update={"train": config.train.model_copy(update={"precision": taken})})


def _check_amounts(gpus: int, efficiency: float) -> None:
    if not 1 <= gpus <= MOST_GPUS:
        raise UsageError(f"gpus is {gpus}; give a number from 1 to {MOST_GPUS:,}")
    if not 0 < efficiency <= 1:
        raise UsageError(f"efficiency is {efficiency}; give a share of the peak above 0, up to 1")


def _with_bridge(config: Config, trust: bool) -> tuple[Config, list[str]]:
    """Apply the bridge settings of `init` in stage two, if it exists on this machine; returns notes as well."""
    if config.stage != "stage2" or config.init is None:
        return config, []
    try:
        start = checkpoint.read_config(config.init, trust)
    except UsageError:
        return config, [f"init '{config.init}' is not on this machine: the bridge settings of this configuration apply"]
    return inherit(config, start), []


def _memory(held: Counter[tuple[str, str]]) -> dict[str, dict[str, int]]:
    table: dict[str, Counter[str]] = {}
    for (what, part), size in held.items():
        table.setdefault(part, Counter())[COLUMNS.get(what, "temporary")] += size
    return {part: dict(row) for part, row in table.items()}


def _parameters(model: Bridge) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    packed = {f"{name}.weight": m.count for name, m in model.named_modules() if isinstance(m, OutlinedLinear)}
    for name, parameter in model.named_parameters():
        row = found.setdefault(part_of(name), {"trained": 0, "frozen": 0})
        row["trained" if parameter.requires_grad else "frozen"] += packed.get(name, parameter.numel())
    return found


def _weights(model: Bridge) -> dict[str, dict[str, int]]:
    found: dict[str, Counter[str]] = {}
    for name, parameter in model.named_parameters():
        found.setdefault(part_of(name), Counter())[STORED[parameter.dtype]] += parameter.nbytes
    return {part: dict(row) for part, row in found.items()}


def _flops(step: Step, count: int) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {"forward": {}, "backward": {}}
    for (phase, part, _), flops in step.flops.items():
        found[phase][part] = found[phase].get(part, 0.0) + flops / count
    return found


def _seconds(step: Step, count: int, device: hardware.Device, efficiency: float) -> float | None:
    """Compute the seconds per image on one device; None if its peak is unknown."""
    total = 0.0
    for (_, _, dtype), flops in step.flops.items():
        rate = device.rate(dtype)
        if rate is None:
            return None
        total += flops / count / rate / efficiency
    return total


def _traffic(subject: Subject, received: Counter[str]) -> dict[str, int]:
    """Compute the bytes that a process sends per step; a ring all-reduce of gradients sends them twice."""
    if subject.gpus == 1:
        return {}
    around = 2 * (subject.gpus - 1) * 4 * subject.trained // subject.gpus
    batches = subject.config.train.accumulate
    return {"gradients of weights": around} | {what: batches * size for what, size in received.items() if size}


def _store(subject: Subject) -> dict[str, int]:
    """Compute the bytes of all stored crops of an image in fp16, and in int8 with an fp16 scale per token."""
    features = subject.config.data.features
    tokens, width = subject.tokens() * (1 if features is None else features.crops), subject.encoder.width
    return {"fp16": 2 * tokens * width, "int8": tokens * (width + 2)}


def _largest(subject: Subject, count: int, limit: int) -> int:
    """Find the largest batch that fits: a polynomial through the known sizes gives each guess, until one is right."""
    known = {size: subject.peak(size) for size in {count, count // 2 or 2}}  # one size would say nothing of others
    while True:
        fits = max([size for size, needed in known.items() if needed <= limit], default=0)
        over = min([size for size, needed in known.items() if needed > limit], default=MOST + 1)
        if over - fits <= 1 or fits >= MOST:
            return min(fits, MOST)
        near = sorted(known, key=lambda size: abs(known[size] - limit))[:3]
        guess = max(_last_below(near, [known[size] for size in near], limit, fits, over), 1)
        if guess == fits:  # the next size would not fit
            return fits
        known[guess] = subject.peak(guess)


def _last_below(sizes: list[int], needs: list[int], limit: int, fits: int, over: int) -> int:
    """Find the last size from `fits` to before `over` where the curve through these points stays within `limit`."""
    while over - fits > 1:
        middle = (fits + over) // 2
        fits, over = (middle, over) if polynomial(sizes, needs, middle) <= limit else (fits, middle)
    return fits


def _instead(subject: Subject, limit: int, largest: int) -> dict[str, int]:
    """Find settings that fit with the same samples per step: chunks in stage one, or more and smaller batches."""
    config = subject.config
    chunk = min(config.train.chunk or config.data.batch, max(largest, 1)) // 2 if config.stage == "stage1" else 0
    while chunk:
        chunk = 1 << (chunk.bit_length() - 1)
        if subject.with_train(chunk=chunk).peak(config.data.batch) <= limit:
            return {"train.chunk": chunk}
        chunk //= 4
    # From the second batch of a step on, the gradients of the first one take memory.
    slower = subject.with_train(accumulate=2 * config.train.accumulate)
    size = _largest(slower, config.data.batch, limit) if largest else 0
    if not size:
        return {}
    parts = math.ceil(config.data.batch / size)
    return {"data.batch": math.ceil(config.data.batch / parts), "train.accumulate": parts * config.train.accumulate}


def show(forecast: Forecast, as_json: bool = False) -> None:
    """Print a forecast as tables with the verdict at the end, or as JSON."""
    if as_json:
        print(json.dumps(asdict(forecast), indent=1))
        return
    title = f"{forecast.stage}, batch {forecast.batch} per process: GB at the peak"
    memory = _table(title, "", *MEMORY, "sum")
    for part, row in forecast.memory.items():
        memory.add_row(part, *(_gb(row.get(column, 0)) for column in MEMORY), _gb(sum(row.values())))
    memory.add_row("not tensors", *[""] * len(MEMORY), _gb(forecast.peak - forecast.tensors))
    console.print(memory)
    parts = _table("parameters, GB stored, GFLOP per image", "", "trained", "frozen", "stored", "forward", "backward")
    for part, count in forecast.parameters.items():
        kept = forecast.weights[part].items()
        stored = ", ".join(f"{_gb(size)} {dtype}" for dtype, size in kept if size >= WORTH_A_WORD or len(kept) == 1)
        flops = (f"{forecast.flops[phase].get(part, 0) / 1e9:,.1f}" for phase in ("forward", "backward"))
        parts.add_row(part, *(f"{count[kind] / 1e6:,.1f} M" for kind in ("trained", "frozen")), stored, *flops)
    console.print(parts)
    for line in _lines(forecast):
        console.print(line, highlight=False)


def _table(title: str, first: str, *numbers: str) -> Table:
    """Make a table that is narrow enough for a terminal of 80 columns."""
    table = Table(first, title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _verdict(verdict: str, color: str, told: str) -> Text:
    return Text.assemble((verdict, f"bold {color}"), f": {told}")


def _lines(forecast: Forecast) -> Iterator[str | Text]:
    """Write the lines below the tables; the verdict comes last."""
    if forecast.images_per_second is not None:
        yield (
            f"time: {forecast.images_per_second:,.0f} images/s on {forecast.gpus} x {forecast.gpu} in "
            f"{forecast.precision} at {forecast.efficiency:.0%} of their peak; {forecast.steps:,} steps of "
            f"{forecast.samples_per_step:,} take {forecast.days:,.2f} days"
        )
    if forecast.traffic:
        parts = ", ".join(f"{name} {size / 1e6:,.1f}" for name, size in forecast.traffic.items())
        yield f"MB that each process sends and receives in a step: {parts}"
    stored = f"stored tokens of the image encoder: {_of_images(forecast.store, 1)} per image"
    if forecast.images is not None:
        stored += f"; {_of_images(forecast.store, forecast.images)} for all {forecast.images:,}"
    yield stored
    yield from beside.lines(forecast.beside)
    for note in forecast.notes:
        yield f"note: {note}"
    needed = f"{_gb(forecast.peak)} GB needed, {_gb(forecast.limit)} GB available"
    if forecast.fits:
        largest = f"{MOST} or more" if forecast.largest_batch >= MOST else str(forecast.largest_batch)
        yield _verdict("fits", "green", f"{needed}; the largest data.batch that fits is {largest}")
    elif not forecast.largest_batch:
        told = f"{needed}, nor does a batch of one; use smaller towers or a larger GPU"
        yield _verdict("does not fit", "red", told)
    else:
        told = f"{needed}; the largest data.batch that fits is {forecast.largest_batch}"
        yield _verdict("does not fit", "red", told)
    if forecast.instead:
        overrides = " ".join(f"{key}={value}" for key, value in forecast.instead.items())
        fewer = forecast.stage == "stage1" and "train.chunk" not in forecast.instead
        yield f"settings that fit, with the same samples per step: {overrides}" + (
            "; ITC and hard negatives then see fewer samples at once" if fewer else ""
        )


def _of_images(store: dict[str, int], count: int) -> str:
    return ", ".join(f"{decimal(count * size)} in {name}" for name, size in store.items())


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f}"
