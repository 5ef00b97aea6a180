"""`qformer plan`: will it fit, how long, how much traffic - before anything is downloaded.

The real model of a configuration runs one step on tensors without numbers (`qformer/model/outline.py`), whose memory
and FLOPs are counted (`stages/ledger.py`). Texts are as long as they may be, pictures have 640 x 480 pixels.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.table import Table

from qformer import checkpoint, resolution
from qformer.data import sources
from qformer.model.image_text import ImageTextModel
from qformer.model.outline import outline, words
from qformer.resolution.base import cut_all
from qformer.types import Batch, Tiles, Tokens, UsageError
from stages import hardware
from stages.ledger import Step, part_of, run_step
from stages.loop import console
from stages.stage2 import inherit

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor
    from torch._subclasses.fake_tensor import FakeTensorMode

    from qformer.config import Config
    from qformer.model.loading import Bridge
    from qformer.vision.base import VisionEncoder

MOST = 4096  # samples per process; no larger batch is looked for
PICTURE = (3, 480, 640)
MEMORY = ("weights", "gradients", "AdamW", "activations", "temporary")
OTHERS = "other processes"
COLUMNS = {"weights": "weights", "gradients": "gradients", "AdamW": "AdamW", "forward": "activations"}
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Forecast:
    """What a run takes. Bytes, seconds and FLOPs; memory and traffic are those of one process.

    Attributes:
        parameters: of each part, `{"trained": n, "frozen": n}`.
        weights: bytes of each part by dtype.
        memory: what is held when there is most: part -> `weights`, `gradients`, `AdamW`, `activations` (kept for the
            backward pass) and `temporary`.
        tensors: their sum.
        peak: with what a process holds beside its tensors.
        fits: whether `peak` is within `limit`.
        largest_batch: per process; 0 where not even one sample fits.
        instead: where the batch does not fit, `data.batch` and `train.accumulate` that see as many samples in a step.
        flops: of one image: `forward` and `backward`, by part.
        images_per_second, days: of all processes together, at `efficiency`; None without a peak of the device.
        traffic: bytes that one process sends in a step.
        store: bytes of the image encoder's tokens of one image, and of all images if the data are here.
        notes: what was assumed.
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


@dataclass
class Subject:
    """An outlined model, and what is asked of it."""

    config: Config
    model: Bridge
    mode: FakeTensorMode
    device: str
    gpus: int

    @property
    def encoder(self) -> VisionEncoder:
        return self.model.frontend.encoder

    @property
    def trained(self) -> int:
        """Parameters that learn."""
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    def step(self, count: int) -> Step:
        """One step of `count` samples."""
        return run_step(self.model, self.batch(count), self.config.train, self.device)

    def batch(self, count: int) -> Batch:
        """So many samples, of texts as long as may be."""
        strategy = resolution.build(self.config.resolution.name, **self.config.resolution.options)
        cut = cut_all([torch.zeros(PICTURE, dtype=torch.uint8)], strategy)
        pixels: list[Tensor] = [self.mode.from_tensor(tile) for tile in cut.pixels]
        tiles = Tiles(pixels * count, cut.plans * count)
        if self.config.llm is not None and self.config.stage == "stage2":
            return Batch(tiles, [words(self.config.llm.max_tokens)] * count)
        shape = count, self.config.text.max_tokens
        return Batch(tiles, Tokens(torch.ones(shape, dtype=torch.long), torch.ones(shape, dtype=torch.bool)))

    def others(self, count: int) -> Counter[tuple[str, str]]:
        """What more a process holds because there are others: reducer, their embeddings, drawn images."""
        held: Counter[tuple[str, str]] = Counter()
        if self.gpus > 1:
            held["temporary", OTHERS] = 4 * self.trained
            held["forward", OTHERS] = sum(self.exchanged(count).values())
            if isinstance(self.model, ImageTextModel):  # both ways, the similarities and what their maximum keeps
                held["forward", OTHERS] += 3 * (self.gpus - 1) * count**2 * 4 * self.model.qformer.config.queries
        return held

    def exchanged(self, count: int) -> dict[str, int]:
        """Bytes that a process receives in one batch of stage one: for ITC from all, for ITM of the images it drew."""
        if not isinstance(self.model, ImageTextModel) or self.gpus == 1:
            return {}
        row = 4 * self.config.loss.embed_width * (self.model.qformer.config.queries + 1)
        text = 9 * self.config.text.max_tokens
        drawn = count * (self.gpus - 1) // self.gpus
        return {
            "ITC: embeddings of all": (self.gpus - 1) * count * row,
            "ITM: texts of all": (self.gpus - 1) * count * text,
            "ITM: tokens of drawn images": drawn * 4 * self.tokens() * self.encoder.width,
        }

    def tokens(self) -> int:
        """Tokens that the image encoder makes of one image."""
        tiles = self.batch(1).tiles.pixels
        return sum(self.encoder.extra + math.prod(self.encoder.grid(tile.shape[2], tile.shape[1])) for tile in tiles)

    def peak(self, count: int) -> int:
        """Bytes of a process, all counted."""
        tensors = _tensors(self.step(count), self.others(count))
        return tensors + hardware.reserve(self.device, tensors)


def plan(
    config: Config,
    gpu: str = "A100-80GB",
    gpus: int = 1,
    memory: str | None = None,
    efficiency: float = 0.4,
) -> Forecast:
    """What the training of a configuration takes, on so many processes with one GPU each.

    Args:
        gpu: a name of `hardware.GPUS`, or `cpu`.
        memory: of one of them, such as `80GB`; the GPU's own by default.
        efficiency: share of the peak FLOP/s that training reaches.

    Raises:
        UsageError: a GPU, amount or tower that is not known, or a stage that is not planned.
    """
    device = hardware.find(gpu)
    limit = int(hardware.parse_memory(memory) if memory else device.memory * 1e9)
    config, notes = _with_bridge(config)
    kind = "cpu" if gpu == hardware.CPU else "cuda"
    subject = Subject(config, *outline(config, kind), kind, gpus)
    step, others = subject.step(config.data.batch), subject.others(config.data.batch)
    tensors = _tensors(step, others)
    peak = tensors + hardware.reserve(kind, tensors)
    samples = config.data.batch * config.train.accumulate * gpus
    seconds = _seconds(step, config.data.batch, device, efficiency)
    speed = None if seconds is None else gpus / seconds
    images, unread = _images(config)
    largest = _largest(subject, config.data.batch, peak, limit)
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
        memory=_memory(step.held + others),
        tensors=tensors,
        peak=peak,
        limit=limit,
        fits=peak <= limit,
        largest_batch=largest,
        instead={} if peak <= limit or not largest else _instead(subject, limit),
        flops=_flops(step, config.data.batch),
        images_per_second=speed,
        days=None if speed is None else config.train.steps * samples / speed / 86400,
        traffic=_traffic(subject),
        store=_store(subject, images),
        images=images,
        notes=notes + unread,
    )


def _with_bridge(config: Config) -> tuple[Config, list[str]]:
    """Stage two's bridge as its `init` has it, if that is here."""
    if config.stage != "stage2" or config.init is None:
        return config, []
    try:
        start = checkpoint.read_config(config.init)
    except UsageError:
        return config, [f"init '{config.init}' is not here: the bridge is taken to be as this configuration says"]
    return inherit(config, start), []


def _tensors(step: Step, others: Counter[tuple[str, str]]) -> int:
    return step.peak + sum(others.values())


def _memory(held: Counter[tuple[str, str]]) -> dict[str, dict[str, int]]:
    table: dict[str, Counter[str]] = {}
    for (what, part), size in held.items():
        table.setdefault(part, Counter())[COLUMNS.get(what, "temporary")] += size
    return {part: dict(row) for part, row in table.items()}


def _parameters(model: Bridge) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for name, parameter in model.named_parameters():
        row = found.setdefault(part_of(name), {"trained": 0, "frozen": 0})
        row["trained" if parameter.requires_grad else "frozen"] += parameter.numel()
    return found


def _weights(model: Bridge) -> dict[str, dict[str, int]]:
    found: dict[str, Counter[str]] = {}
    for name, parameter in model.named_parameters():
        found.setdefault(part_of(name), Counter())[DTYPES[parameter.dtype]] += parameter.nbytes
    return {part: dict(row) for part, row in found.items()}


def _flops(step: Step, count: int) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {"forward": {}, "backward": {}}
    for (phase, part, _), flops in step.flops.items():
        found[phase][part] = found[phase].get(part, 0.0) + flops / count
    return found


def _seconds(step: Step, count: int, device: hardware.Device, efficiency: float) -> float | None:
    """Of one image on one device."""
    total = 0.0
    for (_, _, dtype), flops in step.flops.items():
        rate = device.rate(dtype)
        if rate is None:
            return None
        total += flops / count / rate / efficiency
    return total


def _traffic(subject: Subject) -> dict[str, int]:
    """Bytes a process sends per step; a ring passes all-reduced data around twice, gathered data once."""
    if subject.gpus == 1:
        return {}
    batches, count = subject.config.train.accumulate, subject.config.data.batch
    return {"gradients": 2 * (subject.gpus - 1) * 4 * subject.trained // subject.gpus} | {
        name: batches * size for name, size in subject.exchanged(count).items()
    }


def _store(subject: Subject, images: int | None) -> dict[str, int]:
    """Tokens in fp16, or in int8 with a scale in fp16 for each token."""
    tokens, width = subject.tokens(), subject.encoder.width
    each = {"fp16": 2 * tokens * width, "int8": tokens * (width + 2)}
    return each | {f"{name}, all": size * images for name, size in each.items() if images is not None}


def _images(config: Config) -> tuple[int | None, list[str]]:
    """How many samples the training data have, if they are here."""
    if "path" in config.data.train.options and not Path(str(config.data.train.options["path"])).exists():
        return None, [f"data '{config.data.train.options['path']}' are not here: their number is not known"]
    return len(sources.build(config.data.train.name, **config.data.train.options)), []


def _largest(subject: Subject, count: int, peak: int, limit: int) -> int:
    """The largest batch that fits. Memory grows nearly in a line; the line is corrected until two neighbours agree."""
    known = {count: peak}
    guess = max(count // 2, 1) if count > 1 else 2
    while True:
        known[guess] = subject.peak(guess)
        fits = max([size for size, needed in known.items() if needed <= limit], default=0)
        over = min([size for size, needed in known.items() if needed > limit], default=MOST + 1)
        if over - fits <= 1 or fits >= MOST:
            return fits
        (a, at_a), (b, at_b) = sorted(known.items(), key=lambda pair: abs(pair[1] - limit))[:2]
        slope = max((at_b - at_a) / (b - a), 1.0)
        guess = min(max(int(a + (limit - at_a) // slope), fits + 1), over - 1)


def _instead(subject: Subject, limit: int) -> dict[str, int]:
    """The fewest batches of a step that fit; from the second on the gradients of the first are there."""
    config = subject.config
    train = config.train.model_copy(update={"accumulate": 2 * config.train.accumulate})
    slower = replace(subject, config=config.model_copy(update={"train": train}))
    largest = _largest(slower, config.data.batch, slower.peak(config.data.batch), limit)
    if not largest:
        return {}
    parts = math.ceil(config.data.batch / largest)
    return {"data.batch": math.ceil(config.data.batch / parts), "train.accumulate": parts * config.train.accumulate}


def show(forecast: Forecast, as_json: bool = False) -> None:
    """Print a forecast as tables that end with whether it fits, or as JSON."""
    if as_json:
        print(json.dumps(asdict(forecast), indent=1))
        return
    memory = Table(
        "GB of one process",
        *MEMORY,
        "sum",
        title=f"{forecast.stage}, batch {forecast.batch} per process, when most is held",
    )
    for part, row in forecast.memory.items():
        memory.add_row(part, *(_gb(row.get(column, 0)) for column in MEMORY), _gb(sum(row.values())))
    memory.add_row("beside tensors", *[""] * len(MEMORY), _gb(forecast.peak - forecast.tensors))
    console.print(memory)
    parts = Table("part", "trained", "frozen", "stored as", "forward", "backward", title="parameters; GFLOP per image")
    for part, count in forecast.parameters.items():
        stored = ", ".join(f"{_gb(size)} GB {dtype}" for dtype, size in forecast.weights[part].items())
        flops = (f"{forecast.flops[phase].get(part, 0) / 1e9:,.1f}" for phase in ("forward", "backward"))
        parts.add_row(part, *(f"{count[kind] / 1e6:,.1f} M" for kind in ("trained", "frozen")), stored, *flops)
    console.print(parts)
    for line in _lines(forecast):
        console.print(line, highlight=False, soft_wrap=True)


def _lines(forecast: Forecast) -> Iterator[str]:
    """What is said below the tables; the verdict comes last."""
    if forecast.images_per_second is not None:
        yield (
            f"time: {forecast.images_per_second:,.0f} images/s on {forecast.gpus} x {forecast.gpu} in "
            f"{forecast.precision} at {forecast.efficiency:.0%} of their peak; {forecast.steps:,} steps of "
            f"{forecast.samples_per_step:,} take {forecast.days:,.2f} days"
        )
    for name, size in forecast.traffic.items():
        yield f"sent by a process in a step, {name}: {size / 1e6:,.1f} MB"
    for name, size in forecast.store.items():
        amount = f"{size / 1e9:,.1f} GB" if name.endswith("all") else f"{size / 1e3:,.0f} kB an image"
        yield f"stored tokens of the image encoder, {name}: {amount}"
    for note in forecast.notes:
        yield f"note: {note}"
    needed = f"{_gb(forecast.peak)} of {_gb(forecast.limit)} GB"
    if forecast.fits:
        yield f"[green]fits[/green]: {needed}; the largest batch that fits is {_at_most(forecast.largest_batch)}"
    elif forecast.largest_batch:
        yield f"[red]does not fit[/red]: {needed}; the largest batch that fits is {forecast.largest_batch}"
        if forecast.instead:
            overrides = " ".join(f"{key}={value}" for key, value in forecast.instead.items())
            fewer = "; ITC and hard negatives then see fewer" if forecast.stage == "stage1" else ""
            yield f"as many samples in a step: {overrides}{fewer}"
    else:
        yield f"[red]does not fit[/red]: {needed}, nor does a batch of one; take smaller towers or a larger GPU"


def _at_most(batch: int) -> str:
    return f"{MOST} or more" if batch >= MOST else str(batch)


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f}"
