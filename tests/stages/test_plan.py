"""What a run takes: counted on tensors without numbers, held against runs with numbers and against the paper."""

from __future__ import annotations

import gc
import json
import re
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
import yaml
from torch.nn.parallel import DistributedDataParallel

from qformer import distributed, stages, vision
from qformer.config import load_config, parse_config
from qformer.devices import fastest_precision
from qformer.model.chunked import chunked_step
from qformer.model.image_text import ImageTextModel
from qformer.model.qformer import QFormer
from qformer.schema import Config
from qformer.stages.optim import adamw
from qformer.stages.plan import forecast as planning
from qformer.stages.plan import hardware
from qformer.stages.plan.forecast import plan
from qformer.stages.plan.ledger import OUTSIDE, Step
from qformer.stages.plan.outline import outline
from qformer.stages.plan.rehearsal import Subject, negatives
from qformer.types import Batch, Tiles, Tokens, UsageError
from tests.processes import together
from tests.workspace import config, make_workspace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DAY = 86400
EVA = {"name": "eva", "image_size": 56, "width": 64, "depth": 3, "heads": 4, "mlp_hidden": 128}


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("space"))


def small(space: Path, **changes: Any) -> Config:
    """Stage one with an EVA and a Q-Former of a few million weights."""
    values = {
        "resolution": {"name": "fixed", "size": 56},
        "qformer": {
            "queries": 8,
            "dropout": 0.1,
            "hidden_size": 128,
            "heads": 4,
            "intermediate_size": 512,
            "layers": 2,
        },
        "data": {"batch": 24},
    }
    settings = config(space, "stage1", **(values | changes)).model_dump(exclude_unset=True)
    return parse_config(settings | {"vision": EVA})


def step_of(settings: Config, device: str = "cpu", count: int | None = None) -> Step:
    return Subject.of(settings, device, 1).step(count or settings.data.batch)


def real(settings: Config) -> Any:
    """The same model with numbers; the sizes of the Q-Former are those of the configuration, not of a BERT."""
    encoder = vision.build(settings.vision.name, **settings.vision.options)
    if settings.freeze_vision:
        encoder.freeze()
    tokenizer = type("Tokenizer", (), {"bos_token_id": 1})()
    sizes = outline(settings, "cpu")[0].qformer.config
    return ImageTextModel(encoder, QFormer(sizes), tokenizer, settings.loss, settings.text.max_tokens).train()


def a_real_step(settings: Config, folder: str) -> tuple[int, Counter[str]]:
    """Of a later step: bytes of tensors when there are most, by torch.profiler, and bytes received by collectives.

    A tensor that a thread of gloo frees last is not seen to be freed, so the profiler's sum may grow for ever: what
    a step adds is counted from its start, and what stands between steps by how much goes with the model.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        received = real_steps(settings, 5)
        gc.collect()
    trace = Path(folder) / f"trace-{distributed.rank()}.json"
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    totals = sorted((e["ts"], e["args"]["Total Allocated"]) for e in events if e.get("name") == "[memory]")
    steps = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("name") == "a step")

    def held(time: float) -> int:
        return [total for at, total in totals if at <= time][-1]

    between = held(steps[-1][1]) - totals[-1][1]
    added = [max(total for at, total in totals if start <= at <= end) - held(start) for start, end in steps]
    return between + min(added[1:]), received


def real_steps(settings: Config, steps: int) -> Counter[str]:
    count, train, world = settings.data.batch, settings.train, distributed.world()
    model = real(settings)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True) if world > 1 else model
    optimizer = adamw(model, train)
    shape = count, settings.text.max_tokens
    batch = Batch(
        Tiles.from_pixels(torch.zeros(count, 3, 56, 56, dtype=torch.uint8)),
        Tokens(torch.ones(shape, dtype=torch.long), torch.ones(shape, dtype=torch.bool)),
    )
    if world > 1 or train.chunk:
        drawn = (negatives(count, world, train.chunk) + distributed.rank() * count) % (world * count)
        batch.negatives = drawn, drawn
    for _ in range(steps):
        with torch.profiler.record_function("a step"), counted_collectives() as received:
            for number in range(train.accumulate):
                if train.chunk:
                    chunked_step(model, batch, train.chunk)
                    continue
                with wrapped.no_sync() if world > 1 and number + 1 < train.accumulate else nullcontext():
                    with torch.autocast("cpu", torch.bfloat16, enabled=train.precision == "bf16"):
                        losses = wrapped(batch)
                    losses["loss"].backward()
            if train.chunk:
                distributed.average_gradients(model.parameters())
            optimizer.step()
            optimizer.zero_grad()
    return received


@contextmanager
def counted_collectives() -> Iterator[Counter[str]]:
    """What our own collectives receive from other processes."""
    received: Counter[str] = Counter()
    all_gather, all_to_all, rank = dist.all_gather, dist.all_to_all_single, distributed.rank()

    def gather(found: list[torch.Tensor], own: torch.Tensor, **options: Any) -> Any:
        received["gathered"] += sum(part.nbytes for part in found) - own.nbytes
        return all_gather(found, own, **options)

    def exchange(found: torch.Tensor, own: torch.Tensor, receive: list[int], send: list[int], **options: Any) -> Any:
        received["exchanged"] += found.shape[1] * (sum(receive) - receive[rank])
        return all_to_all(found, own, receive, send, **options)

    dist.all_gather, dist.all_to_all_single = gather, exchange
    try:
        yield received
    finally:
        dist.all_gather, dist.all_to_all_single = all_gather, all_to_all


@pytest.mark.parametrize(
    "train",
    [
        {},
        pytest.param({"chunk": 8}, marks=pytest.mark.slow),
        *(pytest.param(e, marks=pytest.mark.weekly) for e in ({"precision": "bf16"}, {"accumulate": 2})),
    ],
    ids=str,
)
def test_memory_is_that_of_a_real_step(space: Path, tmp_path: Path, train: dict[str, Any]) -> None:
    settings = small(space, train=train)
    assert step_of(settings).peak == pytest.approx(a_real_step(settings, str(tmp_path))[0], rel=0.02)


TOGETHER = [
    {},
    {"train": {"chunk": 12}},
    {"loss": {"gather_grad": "full"}, "freeze_vision": False, "train": {"accumulate": 2}},
]


@pytest.mark.slow
@pytest.mark.parametrize("changes", TOGETHER, ids=str)
def test_memory_and_traffic_are_those_of_real_processes(space: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Two of them over gloo, each with the plan's negatives."""
    settings = small(space, **changes)
    peak, received = together(tmp_path, 2, a_real_step, settings, str(tmp_path))[0]
    planned = Subject(settings, *outline(settings, "cpu"), "cpu", 2).step(24)
    assert planned.peak == pytest.approx(peak, rel=0.03)
    batches = settings.train.accumulate
    gathered = planned.received["embeddings"] + planned.received["texts and ids"]
    assert batches * gathered == received["gathered"]
    assert batches * (planned.received.total() - gathered) == received["exchanged"]


@pytest.mark.slow
def test_a_large_batch_in_chunks_is_not_run_and_yet_right(space: Path) -> None:
    settings = small(space, train={"chunk": 4})
    subject = Subject(settings, *outline(settings, "cpu"), "cpu", 2)
    known, real = subject.step(24), subject._run(24)
    assert known.peak == pytest.approx(real.peak, rel=0.002)
    assert known.received["embeddings"] == real.received["embeddings"]
    one = 4 * 17 * 64  # so many different images are drawn, on average and rounded
    assert known.received["tokens of drawn images"] == pytest.approx(real.received["tokens of drawn images"], abs=one)
    assert sum(known.flops.values()) == pytest.approx(sum(real.flops.values()), rel=0.002)
    plain = step_of(small(space))
    assert known.peak < plain.peak
    assert sum(known.flops.values()) > sum(plain.flops.values())  # the Q-Former reads twice


def test_the_books_add_up(space: Path) -> None:
    settings = small(space, train={"accumulate": 2})
    step = step_of(settings)
    assert sum(step.held.values()) == step.peak
    trained = sum(p.numel() for p in real(settings).parameters() if p.requires_grad)
    held = {what: sum(size for (kind, _), size in step.held.items() if kind == what) for what, _ in step.held}
    assert held["AdamW"] == pytest.approx(8 * trained, rel=0.001)
    assert held["gradients"] == 4 * trained  # of the first of two batches, while the second is on its way
    assert held["weights"] > 4 * trained  # those of the encoder, too
    one = step_of(small(space))
    assert one.peak < step.peak
    assert one.flops == step.flops  # per batch


def test_flops_of_the_image_encoder_are_those_of_its_matrices(space: Path) -> None:
    """2 per multiplication and addition: patches, qkv, attention, projection, feed-forward."""
    step = step_of(small(space), "cuda", 2)
    tokens, width, inner = 17, 64, 128
    block = 2 * tokens * width * (3 * width + width + 2 * inner) + 4 * tokens**2 * width
    patches = 2 * 16 * 3 * 14 * 14 * width
    counted = {key[:2]: flops for key, flops in step.flops.items()}
    assert counted["forward", "image encoder"] == 2 * (3 * block + patches)
    assert ("backward", "image encoder") not in counted  # it is frozen
    assert counted["backward", "Q-Former"] == pytest.approx(2 * counted["forward", "Q-Former"], rel=0.05)


@pytest.mark.parametrize("llm", ["opt", "flan-t5"])
def test_a_frozen_language_model_passes_gradients_through_and_makes_none(space: Path, llm: str) -> None:
    settings = config(
        space, "stage2", llm={"path": str(space / llm)}, vision={"name": "hf", "path": str(space / "vit")}
    )
    step = step_of(settings, "cuda")
    counted = {key[:2]: flops for key, flops in step.flops.items()}
    ratio = counted["backward", "language model"] / counted["forward", "language model"]
    assert 0.9 < ratio < 1.8  # matrices once, for the inputs, and attention 2.5 times; for weights, too, it were 2.2
    assert ("gradients", "language model") not in step.held


def test_a_trained_encoder_keeps_its_activations(space: Path) -> None:
    frozen, trained = step_of(small(space)), step_of(small(space, freeze_vision=False))
    assert trained.held["forward", "image encoder"] > 5 * frozen.held["forward", "image encoder"]
    assert trained.held["AdamW", "image encoder"] > 0


def test_a_gpu_keeps_no_attention_matrices_and_bytes_for_dropout(space: Path) -> None:
    settings = small(space, train={"precision": "bf16"})
    assert step_of(settings, "cuda").peak < 0.8 * step_of(settings, "cpu").peak


@pytest.mark.slow
def test_the_largest_batch_fits_and_one_more_does_not(space: Path) -> None:
    settings = small(space)
    at_24 = plan(settings, "T4").peak
    tight = plan(settings, "T4", memory=f"{(at_24 - 3e6) / 1e9}GB")
    assert not tight.fits
    assert 0 < tight.largest_batch < 24
    subject = Subject(settings, *outline(settings, "cuda"), "cuda", 1)
    assert subject.peak(tight.largest_batch) <= tight.limit < subject.peak(tight.largest_batch + 1)
    assert [*tight.instead] == ["train.chunk"]
    in_chunks = small(space, train={"chunk": tight.instead["train.chunk"]})
    assert Subject(in_chunks, *outline(in_chunks, "cuda"), "cuda", 1).peak(24) <= tight.limit
    assert plan(settings, "T4", memory="0.5GB").largest_batch == 0


def test_several_processes_send_and_hold_more(space: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "_largest", lambda *_: 1)
    one, many = plan(small(space), "T4"), plan(small(space), "T4", gpus=4)
    trained = many.parameters["Q-Former"]["trained"]
    assert one.traffic == {}
    assert many.traffic["gradients of weights"] == 2 * 3 * 4 * trained // 4
    assert many.traffic["embeddings"] == 3 * 24 * 4 * 8 * (8 + 1)  # 8 queries and the text, 8 wide
    assert many.traffic["texts and ids"] == 3 * 24 * (32 * (8 + 1) + 8 + 8 + 8)  # words and mask; image, draw, tile
    assert many.traffic["tokens of drawn images"] == 3 * 5 * 4 * 17 * 64  # 6 draws from each, 5 differ
    assert many.peak > one.peak
    assert many.samples_per_step == 96
    assert many.images_per_second == pytest.approx(4 * (one.images_per_second or 0), rel=0.01)


def test_store_and_number_of_images(space: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "_largest", lambda *_: 1)
    forecast = plan(small(space), "T4")
    assert forecast.images == 8  # of the split
    assert forecast.store == {"fp16": 2 * 17 * 64, "int8": 17 * 66}
    crops = load_config("configs/stage1_vitg.yaml", ["data.features={path: store, crops: 3}"])
    subject: Any = SimpleNamespace(config=crops, tokens=lambda: 17, encoder=SimpleNamespace(width=64))
    assert planning._store(subject) == {"fp16": 3 * 2 * 17 * 64, "int8": 3 * 17 * 66}


@pytest.mark.slow
def test_the_bridge_of_stage_two_is_that_of_its_start(space: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "_largest", lambda *_: 1)
    before = plan(config(space, "stage2", vision={"name": "hf", "path": str(space / "vit")}), "cpu")
    assert any("is not on this machine" in note for note in before.notes)
    stages.train(config(space, "stage1"))
    after = plan(config(space, "stage2"), "cpu")
    assert after.notes == []
    assert after.parameters["Q-Former"]["trained"] < before.parameters["Q-Former"]["trained"] / 100
    assert after.days is None  # a CPU has no peak


#: Of runs on 16 A100-40G: steps, images in one, days that the paper stays below (section 3.4), whether it is planned to
#: fit with texts of 32 tokens.
PAPER = [
    pytest.param("stage1_vitg", 250_000, 1680, 6, True, marks=pytest.mark.slow),
    pytest.param("stage2_opt2.7b", 80_000, 1920, 3, True, marks=pytest.mark.weekly),
    pytest.param("stage2_opt6.7b", 80_000, 1920, 3, False, marks=pytest.mark.weekly),
    pytest.param("stage2_flant5xl", 80_000, 1520, 3, True, marks=pytest.mark.weekly),
    pytest.param("stage2_flant5xxl", 80_000, 1520, 3, False, marks=pytest.mark.slow),
]
EFFICIENCY = 0.3


@pytest.mark.parametrize(("name", "steps", "samples", "limit", "fits"), PAPER)
def test_the_papers_own_cost(
    name: str, steps: int, samples: int, limit: float, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At this share of the peak everything takes less than the paper says; the least shares are in docs/plan.md."""
    monkeypatch.setattr(planning, "_largest", lambda *_: 0)
    forecast = plan(load_config(f"configs/{name}.yaml"), "A100-40GB", gpus=16, efficiency=EFFICIENCY)
    assert (forecast.steps, forecast.samples_per_step) == (steps, samples)
    assert forecast.days is not None
    each = sum(flops for phase in forecast.flops.values() for flops in phase.values())
    assert forecast.days * DAY == pytest.approx(steps * samples * each / (16 * 312e12 * EFFICIENCY))
    assert limit / 3 < forecast.days < limit
    assert forecast.fits == fits


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gpu": "A100-40G"}, "unknown GPU 'A100-40G': did you mean 'A100-40GB'"),
        ({"memory": "much"}, "'much' is not an amount of memory; give it in GB, such as 80GB"),
        ({"memory": "-3GB"}, "'-3GB' is not an amount of memory"),
    ],
)
def test_what_cannot_be_planned_for(space: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan(small(space), **arguments)


def test_a_gpu_without_bf16(space: Path) -> None:
    with pytest.raises(UsageError, match="does not support bf16; use --precision fp16"):
        plan(small(space, train={"precision": "bf16"}), "V100")
    for gpu, taken in (("V100", "fp16"), ("H200", "bf16"), ("cpu", fastest_precision("cpu")[0])):
        assert planning._with_precision(small(space, train={"precision": "auto"}), gpu).train.precision == taken


def test_amounts_of_memory() -> None:
    assert hardware.parse_memory("80GB") == hardware.parse_memory("80") == 80e9
    assert hardware.parse_memory("24 GiB") == 24 * 2**30


@pytest.mark.slow
def test_the_command(space: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    Path("c.yaml").write_text(yaml.safe_dump(small(space).model_dump(mode="json", exclude_unset=True)))
    code, out, said = run(
        "plan", "c.yaml", "--gpu", "T4", "--gpus", "2", "--json", "--precision", "fp16", "data.batch=6"
    )
    assert code == 0, said
    told = json.loads(out)
    assert (told["batch"], told["precision"], told["fits"]) == (6, "fp16", True)
    code, out, _ = run("plan", "c.yaml", "--gpu", "T4", "--memory", "0.62GB")
    assert code == 0
    assert "does not fit: " in out
    assert "train.chunk=" in out
    assert "images/s on 1 x T4" in out
    code, out, _ = run("plan", "c.yaml", "--memory", "0.1GB")
    assert "nor does a batch of one" in out
    code, out, _ = run("plan", "c.yaml", "--gpu", "cpu", "data.batch=2")
    assert "fits: " in out
    assert "images/s" not in out
    assert run("plan", "c.yaml", "--gpu", "T5")[0] == 2


def test_nothing_is_left_of_a_plan(space: Path) -> None:
    """The model can be asked again, with the same answer."""
    settings = small(space)
    model, mode = outline(settings, "cuda")
    first, other, again = (Subject(settings, model, mode, "cuda", 1).step(n) for n in (24, 12, 24))
    assert first == again
    assert other.peak < first.peak
    assert OUTSIDE in {part for _, part in first.held}


@pytest.mark.slow
def test_spread_layers_and_recomputed_activations_take_less(space: Path) -> None:
    """Of frozen layers a share stays, and two of them whole; what is computed twice is not kept."""
    one, spread = plan(small(space), "T4", gpus=4), plan(small(space, train={"fsdp": True}), "T4", gpus=4)
    subject = Subject.of(small(space), "cuda", 4)
    layers = [sum(p.nbytes for p in layer.parameters()) for _, layer in distributed.frozen_layers(subject.model)]
    assert len(layers) == EVA["depth"]
    held = [{part: row.get("weights", 0) for part, row in forecast.memory.items()} for forecast in (one, spread)]
    fewer = {part: size - held[1].get(part, 0) for part, size in held[0].items()}
    assert {part: size for part, size in fewer.items() if size} == {"image encoder": sum(layers) * 3 // 4}
    assert spread.traffic["frozen layers"] == sum(layers) * 3 // 4

    plain, twice = (step_of(small(space, train={"gradient_checkpointing": on}), "cuda") for on in (False, True))
    kept, again = (sum(n for (kind, _), n in step.held.items() if kind == "forward") for step in (plain, twice))
    assert again < 0.6 * kept
    forward, both = (
        Counter({phase: sum(n for (p, *_), n in step.flops.items() if p == phase) for phase in ("forward", "backward")})
        for step in (plain, twice)
    )
    assert both["forward"] == forward["forward"]
    assert both["backward"] > 1.2 * forward["backward"]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("a100 40gb", "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("A100_80", "A100-80GB"),
        ("h100 pcie", "H100-PCIe"),
        ("4090", "RTX4090"),
        ("rtx 3090", "RTX3090"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("RTX A6000", "A6000"),
        ("a10", "A10"),
        ("l4", "L4"),
        ("Tesla T4", "T4"),
        ("CPU", "cpu"),
    ],
)
def test_a_gpu_is_found_by_the_name_that_people_give_it(name: str, meant: str) -> None:
    assert hardware.full_name(name) == meant


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a100", "'a100' can mean A100-40GB or A100-80GB; give one of them"),
        ("H100", "'H100' can mean H100-80GB or H100-PCIe"),
        ("l40", "unknown GPU 'l40': did you mean 'L40S'?"),  # has half the rate of an L40S
        ("4070 ti", "unknown GPU '4070 ti'"),
        ("nvidia", "unknown GPU 'nvidia'"),
        ("", "unknown GPU ''"),
    ],
)
def test_a_gpu_that_may_be_another_is_not_guessed(name: str, said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        hardware.full_name(name)


def test_the_number_of_processes_costs_nothing(space: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred thousand would send and hold what the exchange says, and none of it is made here."""
    settings, world = small(space, data={"batch": 6}), 100_000
    model, mode = outline(settings, "cuda")
    few, many = (Subject(settings, model, mode, "cuda", gpus).step(6) for gpus in (50, world))
    for what in ("embeddings", "texts and ids"):
        assert many.received[what] * 49 == few.received[what] * (world - 1)
    assert many.received["tokens of drawn images"] == few.received["tokens of drawn images"]  # another's to each text
    similarities = 4 * 6 * 8 * 6 * (world - 50)  # of 6 texts with 8 queries of all images
    assert many.peak - few.peak > similarities
    monkeypatch.setattr(planning, "_largest", lambda *_: 1)
    for wrong, said in (({"gpus": 0}, "gpus is 0"), ({"gpus": -1}, "gpus is -1"), ({"efficiency": 0.0}, "efficiency")):
        with pytest.raises(UsageError, match=said):
            plan(settings, "t4", **wrong)


def test_a_process_on_a_cpu_has_its_program_beside_the_tensors() -> None:
    assert hardware.reserve("cpu", 0) == 470_000_000  # Python, PyTorch, transformers; and what the first step loads
