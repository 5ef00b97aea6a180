"""Costs of a system: tokens, parameters and operations that are counted, seconds that are measured here.

The operations are counted while the real modules run (`stages/plan/ledger.py`): for a row until its first token, and
for training steps on the data of the configuration.
"""

from __future__ import annotations

import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qformer import compat, devices, resolution
from qformer.checkpoints import folder as checkpoint
from qformer.data import counting, sources
from qformer.data.loader import Batches
from qformer.data.texts import clean_question
from qformer.devices import DTYPES
from qformer.figures.cost import PARTS
from qformer.files.packing import pack
from qformer.llm.prompts import vqa_prompt
from qformer.model.assembly import build_image_text, build_vision_language
from qformer.model.chunked import chunked_step
from qformer.model.image_text import ImageTextModel
from qformer.model.vision_language import VisionLanguageModel
from qformer.resolution import Limited
from qformer.stages.optim import adamw
from qformer.stages.plan.first_token import count_operations
from qformer.stages.plan.ledger import Ledger, run_step
from qformer.stages.recompute import recompute_layers
from qformer.types import BadSample, Tiles, UsageError
from qformer.videos.rows import cut_row, read_row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor

    from qformer.data_schema import FeaturesConfig
    from qformer.model.assembly import Bridge
    from qformer.schema import Config, TrainConfig
    from qformer.types import Batch, Sample
    from qformer.videos import Clip

    Clock = Callable[[], float]

BATCHES = 4  # of the training data whose operations are counted
TIMED = {"batches": 2, "rows": 12}  # whose time is taken
ROUNDS = 2  # of which the fastest counts


@dataclass(frozen=True)
class Cost:
    """Costs of a system. Operations are FLOPs, two per multiply-add.

    Attributes:
        tokens: mean number of vectors that the language model reads in place of what a row shows, markers included:
            as planned, which is what the model was seen to produce.
        trained: number of parameters that are trained.
        encoder_flops, connector_flops, prefill_flops: of one row, forward, with its own prompt; the mean of the rows.
        step_flops: of one training step, backward through the frozen language model included, and without the image
            encoder where its tokens are stored.
        stored_flops: of encoding every picture that it reads of a store once; 0 without a store.
        before_flops: of the whole run that this one starts from, such as stage one, and of those before it; without
            what is counted in `stored_flops`.
        first_token_seconds: from a row in memory to the first token, cutting included; on this machine, of a CPU the
            seconds that one thread computes.
        images_per_second: in training, without the reading of data; likewise.
        peak_bytes: all tensors at the peak of a training step, weights included.
    """

    tokens: float
    trained: int
    encoder_flops: float
    connector_flops: float
    prefill_flops: float
    step_flops: float
    stored_flops: float
    before_flops: float
    first_token_seconds: float
    images_per_second: float
    peak_bytes: int

    def training_flops(self, steps: int) -> float:
        """All operations of a training of so many steps, stage one and the store included."""
        return self.before_flops + self.stored_flops + steps * self.step_flops


@dataclass(frozen=True)
class Row:
    """A row: what it shows, read but not cut; the question about it, or ""; and the prompt behind it."""

    shown: list[Tensor | Clip]
    question: str
    prompt: str


@dataclass(frozen=True)
class Steps:
    """Training steps of a configuration: the means of `BATCHES` batches; see `Cost`."""

    step_flops: float
    stored_flops: float
    images_per_second: float
    peak_bytes: int


def measure_cost(
    config: Config, model: VisionLanguageModel, rows: Sequence[Sample], stage_one: Config | None = None
) -> Cost:
    """Count and measure what a system takes. The model and the state of random numbers stay as they are.

    Operations and tokens do not depend on the machine; `first_token_seconds` and `images_per_second` do, and on what
    else it does meanwhile.

    Args:
        config: of stage two, with the data of its training.
        model: with an image encoder; trained or not.
        rows: what is evaluated, each with a question, or else captioned. Those that cannot be read are left out.
        stage_one: configuration of stage one; by default that of `config.init`.

    Raises:
        UsageError: no row can be read, `init` is not there, the size of a store's data is unknown, or a connector
            makes another number of tokens than it plans.
    """
    training = model.training
    known = _read(model, rows)
    started = None if stage_one is not None or config.init is None else checkpoint.read_config(config.init)
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            model.eval()
            tokens, flops = _count(model, known)
            with _clock(device) as clock:
                seconds = _first_token(model, known, clock)
            steps = measure_steps(config, model)
        finally:
            model.zero_grad()
            model.train(training)
        before = before_flops(stage_one or started, _stores(config))
    return Cost(
        tokens=tokens,
        trained=sum(one.numel() for one in model.parameters() if one.requires_grad),
        encoder_flops=flops["encoder"],
        connector_flops=flops["connector"],
        prefill_flops=flops["prefill"],
        step_flops=steps.step_flops,
        stored_flops=steps.stored_flops,
        before_flops=before,
        first_token_seconds=seconds,
        images_per_second=steps.images_per_second,
        peak_bytes=steps.peak_bytes,
    )


def _stores(config: Config) -> dict[str, int]:
    """The folder of the stored tokens of a configuration, and how many pictures it reads there; empty without one."""
    return {} if config.data.features is None else {config.data.features.path: _pictures(config)}


def before_flops(config: Config | None, filled: Mapping[str, int] | None = None) -> float:
    """Operations of a whole run of stage one or two, and of those that it starts from; 0 for None.

    Args:
        filled: pictures by folder of a store that are counted elsewhere: two stages that read one fill it once.

    Raises:
        UsageError: as of `measure_cost`, or its towers cannot be used.
    """
    if config is None:
        return 0.0
    build = build_image_text if config.stage == "stage1" else build_vision_language
    steps = measure_steps(config, build(config)[0])
    known = dict(filled or {})
    own = config.train.steps * steps.step_flops
    for store, pictures in _stores(config).items():
        own += steps.stored_flops * max(1 - known.get(store, 0) / pictures, 0)
        known[store] = max(known.get(store, 0), pictures)
    return own + before_flops(None if config.init is None else checkpoint.read_config(config.init), known)


def _read(model: VisionLanguageModel, rows: Sequence[Sample]) -> list[Row]:
    """Read the rows that can be read.

    Raises:
        UsageError: there are none.
    """
    found, last = [], "there are none"
    for sample in rows:
        question = clean_question(sample.question or "")
        prompt = vqa_prompt(question, "paper", model.llm.wording) if question else model.prompt
        try:
            shown = read_row(sample.image, model.frontend.strategy)
            cut_row(shown, model.frontend.strategy)
        except BadSample as bad:
            last = str(bad)
            continue
        found.append(Row(shown, question, prompt))
    if not found:
        raise UsageError(f"none of the {len(rows)} rows can be used to measure a system ({last}); give others")
    return found


def _count(model: VisionLanguageModel, rows: Sequence[Row]) -> tuple[float, dict[str, float]]:
    """Mean tokens of the rows, and mean operations by part. Rows of one plan and one length are counted once."""
    known: dict[object, dict[str, float]] = {}
    tokens, total = 0, dict.fromkeys(PARTS, 0.0)
    for row in rows:
        tiles = cut_row(row.shown, model.frontend.strategy)
        planned, length = model.count_tokens(tiles.plans[0]), model.llm.count_tokens(row.prompt)
        asked = row.question if model.connector.tokenizer is not None else ""  # it is read, and its length counts
        key = (tuple(tile.size for tile in tiles.plans[0].tiles), planned, length, asked)
        if key not in known:
            operations, made = count_operations(model, tiles, row.prompt, row.question)
            if made != planned:
                raise UsageError(
                    f"the connector {type(model.connector).__name__} plans {planned} tokens of a row and makes {made}; "
                    "correct its `count_part`"
                )
            known[key] = {part: float(sum(operations[part].values())) for part in PARTS}
        tokens += planned
        total = {part: total[part] + known[key][part] for part in PARTS}
    return tokens / len(rows), {part: value / len(rows) for part, value in total.items()}


@torch.no_grad()
def _first_token(model: VisionLanguageModel, rows: Sequence[Row], clock: Clock) -> float:
    """Mean over some rows of the seconds until the first token, of each the fastest of `ROUNDS`."""
    count = min(TIMED["rows"], len(rows))
    some = [rows[len(rows) * number // count] for number in range(count)]
    best = [float("inf")] * count
    for _ in range(ROUNDS + 1):  # the first warms up, and may be the fastest all the same
        for number, row in enumerate(some):
            start = clock()
            seen = model.prefix(cut_row(row.shown, model.frontend.strategy), [row.question])
            options = seen.placing | {"num_beams": 1, "max_new_tokens": 1, "min_new_tokens": 0}
            model.llm.generate(*seen, [row.prompt], **options)
            best[number] = min(best[number], clock() - start)
    return sum(best) / count


@contextmanager
def _clock(device: torch.device) -> Iterator[Clock]:
    """A clock for a device: of a CPU the seconds that one thread computes, which other processes hardly change."""
    threads = torch.get_num_threads()

    def wait() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    if device.type != "cpu":
        yield wait if device.type == "cuda" else time.perf_counter
        return
    torch.set_num_threads(1)
    try:
        yield time.process_time
    finally:
        torch.set_num_threads(threads)


def measure_steps(config: Config, model: Bridge) -> Steps:
    """Count and time training steps of a model on the first batches of its data; its weights stay as they are.

    Raises:
        UsageError: the data cannot be used, or the number of pictures in a store is unknown.
    """
    strategy = resolution.chosen(config.resolution, config.limits)
    if isinstance(model, VisionLanguageModel):  # rows that it has no room for are skipped in training
        strategy = Limited(strategy, check=model.room(model.max_tokens))
    batches = Batches(sources.for_run(config.data.train), strategy, config.data, config.seed)
    features, device = config.data.features, next(model.parameters()).device
    train = _still(config.train, device.type)
    encoder = flops = seconds = peak = 0.0
    model.train()
    with _recomputing(model) if train.gradient_checkpointing else nullcontext():
        for number in range(BATCHES):
            batch = batches[number].batch
            if features is not None:
                batch, own = _with_tokens(model, batch, features)
                encoder += own / len(batch)
            step = run_step(model, batch, train, "cpu")
            flops, peak = flops + train.accumulate * sum(step.flops.values()), max(peak, step.peak)
            if number < TIMED["batches"]:
                with _clock(device) as clock:
                    seconds += _time_step(model, batch, train, clock)
    stored = 0.0 if features is None else _pictures(config) * features.crops * encoder / BATCHES
    return Steps(flops / BATCHES, stored, TIMED["batches"] * config.data.batch / seconds, int(peak))


@torch.no_grad()
def _with_tokens(model: Bridge, batch: Batch, features: FeaturesConfig) -> tuple[Batch, float]:
    """The batch as a store gives it, with tokens in place of pixels; and the operations of encoding it."""
    ledger = Ledger()
    with compat.seeing_operations(ledger.see):
        seen = model.frontend.encode_tiles(batch.tiles)
    rows = [pack(row.cpu(), features.dtype) for row in seen.rows]
    return replace(batch, tiles=Tiles([], batch.tiles.plans, rows)), float(sum(ledger.flops.values()))


def _time_step(model: Bridge, batch: Batch, train: TrainConfig, clock: Clock) -> float:
    """Seconds of a training step of one batch, the fastest of `ROUNDS`."""
    optimizer, device = adamw(model, train), next(model.parameters()).device.type
    dtype = None if train.precision == "fp32" else DTYPES[train.precision]

    def autocast() -> AbstractContextManager[Any]:
        return nullcontext() if dtype is None else torch.autocast(device, dtype)

    best = float("inf")
    for _ in range(ROUNDS):
        start = clock()
        if train.chunk and isinstance(model, ImageTextModel):
            chunked_step(model, batch, train.chunk, lambda loss: loss, autocast)
        else:
            with autocast():
                losses = model(batch)
            losses["loss"].backward()
        if train.clip:
            nn.utils.clip_grad_norm_(model.parameters(), train.clip)
        optimizer.step()
        optimizer.zero_grad()
        best = min(best, clock() - start)
    return best


def _still(train: TrainConfig, device: str) -> TrainConfig:
    """The options of training with a rate of 0, at which AdamW changes no weight, and a precision of its own."""
    precision = devices.fastest_precision(device)[0] if train.precision == "auto" else train.precision
    return train.model_copy(update={"lr": 0.0, "precision": precision})


def _pictures(config: Config) -> int:
    """Number of samples that a configuration reads of its store, which can hold more for longer runs.

    Raises:
        UsageError: it is unknown.
    """
    found, notes = counting.count(config.data.train.name, config.data.train.options)
    if found is None:
        raise UsageError(f"the operations of filling a store are unknown: {'; '.join(notes)}; leave data.features out")
    return min(found, config.train.steps * config.train.accumulate * config.data.batch)


@contextmanager
def _recomputing(model: nn.Module) -> Iterator[None]:
    """Let layers recompute what they do not keep, as with `train.gradient_checkpointing`, for a while."""
    before = {module: vars(module).get("forward") for module in model.modules()}
    recompute_layers(model)
    try:
        yield
    finally:
        for module, forward in before.items():
            if "forward" in vars(module) and forward is None:
                del module.forward
            elif forward is not None:
                module.forward = forward
