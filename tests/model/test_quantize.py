"""Quantised language models answer what the full ones answer, let gradients through, and say what is missing."""

from __future__ import annotations

import builtins
import logging
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import import_utils

import qformer
from qformer.checkpoints.convert import convert_checkpoint
from qformer.checkpoints.parts import LoadOptions
from qformer.config import parse_config
from qformer.llm import quantize as quantizing
from qformer.llm.base import LanguageModel
from qformer.llm.loading import load_language_model
from qformer.llm.quantize import is_quantized, nbytes, targets
from qformer.scenes.stories import Stories
from qformer.stages.plan import forecast as planning
from qformer.stages.plan.outline import outline
from qformer.stages.plan.rehearsal import Subject
from qformer.types import UsageError
from tests.their_blip2 import PROMPTS, both, make
from tests.tiny import LLM_KINDS, save_tiny_llm
from tests.workspace import config, make_workspace

KINDS = ("int8", "nf4")
TEXTS = ["a cat", "two people riding a red bus", "dogs"]
ASKED = 120


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("llms")
    for kind in LLM_KINDS:
        save_tiny_llm(root / kind, kind)
    return root


def visual(llm: LanguageModel) -> tuple[Tensor, Tensor]:
    prefix = torch.randn(3, 5, llm.width, generator=torch.Generator().manual_seed(7))
    return prefix, torch.tensor([[1, 1, 1, 1, 1], [0, 1, 0, 1, 0], [0, 0, 0, 0, 1]]).bool()


def answers(llm: LanguageModel) -> list[str]:
    """To questions about scenes that are described where a picture would stand."""
    stories = Stories("test", count=ASKED)
    asked = [story for story in (stories[i] for i in range(ASKED)) if story.kind not in ("describe", "self-ask")]
    ids = llm.tokenizer([story.description for story in asked], add_special_tokens=False)["input_ids"]
    lengths = torch.tensor([len(row) for row in ids])
    table = llm.model.get_input_embeddings()
    prefix = pad_sequence([table(torch.tensor(row)) for row in ids], batch_first=True)
    mask = torch.arange(prefix.shape[1]) < lengths[:, None]
    prompts = [story.prompt for story in asked]
    return llm.decode(llm.generate(prefix, mask, prompts, num_beams=1, max_new_tokens=8))


@pytest.mark.canary
@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_answers_are_those_of_full_precision(kind: str) -> None:
    """The shipped models, which answer 98 of 100 such questions correctly; wrong or empty answers differ."""
    full = load_language_model(f"mini:{kind}")
    wanted = answers(full)
    assert all(wanted)
    for quantize, least in (("int8", 0.95), ("nf4", 0.85)):
        llm = load_language_model(f"mini:{kind}", quantize=quantize)
        said = answers(llm)
        assert sum(a == b for a, b in zip(said, wanted, strict=True)) >= least * len(wanted), quantize
        assert nbytes(llm.model) < (0.4 if quantize == "int8" else 0.3) * nbytes(full.model)


def gradient(llm: LanguageModel, prefix: Tensor, mask: Tensor, texts: list[str]) -> tuple[float, Tensor]:
    """Loss per token and its gradient at the visual tokens, after a call without gradients; weights get none."""
    llm.generate(prefix, mask, texts, num_beams=1, max_new_tokens=2)
    prefix = prefix.clone().requires_grad_()
    total, count = llm.loss(prefix, mask, texts, texts)
    (total / count).backward()
    assert prefix.grad is not None
    assert torch.equal(prefix.grad.abs().sum(dim=2) > 0, mask)
    assert not [weight for weight in llm.parameters() if weight.requires_grad or weight.grad is not None]
    return float(total.detach() / count), prefix.grad


@pytest.mark.parametrize("quantize", KINDS)
@pytest.mark.parametrize("kind", LLM_KINDS)
def test_every_family_computes_with_the_weights_that_are_kept(tiny: Path, kind: str, quantize: str) -> None:
    """Loss and gradient are those of the same weights unpacked; int8 rounds what it multiplies, too."""
    llm = load_language_model(tiny / kind, quantize=quantize)
    loss, grad = gradient(llm, *visual(llm), TEXTS)
    unpacked = load_language_model(tiny / kind, quantize=quantize)
    unpacked.model.dequantize()
    assert not any(is_quantized(module) for module in unpacked.modules())
    unpacked.model.to(torch.float32).requires_grad_(False)
    wanted, wanted_grad = gradient(unpacked, *visual(llm), TEXTS)
    assert loss == pytest.approx(wanted, rel=1e-4 if quantize == "nf4" else 0.1)
    if quantize == "nf4":
        torch.testing.assert_close(grad, wanted_grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_gradients_of_trained_models_point_the_same_way(kind: str) -> None:
    full = load_language_model(f"mini:{kind}")
    ids = full.tokenizer(["a large red circle at the top left"] * 3, add_special_tokens=False, return_tensors="pt")
    prefix = full.model.get_input_embeddings()(ids["input_ids"]).detach()
    texts = ["a large red circle at the top left", "a red circle", "a large circle at the top left"]
    mask = torch.ones(prefix.shape[:2]).bool()
    _, wanted = gradient(full, prefix, mask, texts)
    for quantize, least in (("int8", 0.97), ("nf4", 0.8)):
        _, grad = gradient(load_language_model(f"mini:{kind}", quantize=quantize), prefix, mask, texts)
        assert torch.cosine_similarity(grad.flatten(), wanted.flatten(), dim=0) > least, quantize


@pytest.mark.parametrize("kind", LLM_KINDS)
def test_what_is_skipped(tiny: Path, kind: str) -> None:
    """The output embedding and T5's `wo` alone; OPT's `project_in`, which visual tokens pass, is quantised."""
    full, llm = load_language_model(tiny / kind).model, load_language_model(tiny / kind, quantize="nf4").model
    linear = {name for name, module in full.named_modules() if type(module).__name__ in ("Linear", "Conv1D")}
    done = {name for name, module in llm.named_modules() if is_quantized(module)}
    assert done == {name for name, _ in targets(full)}
    assert {name.rpartition(".")[2] for name in linear - done} == {"lm_head", *(["wo"] if "t5" in kind else [])}
    assert ("model.decoder.project_in" in done) == (kind == "opt-projected")


@pytest.mark.parametrize("quantize", KINDS)
def test_untied_output_embeddings_stay_untied(tiny: Path, quantize: str) -> None:
    full, llm = (
        load_language_model(tiny / "flan-t5").model,
        load_language_model(tiny / "flan-t5", quantize=quantize).model,
    )
    assert torch.equal(llm.lm_head.weight, full.lm_head.weight)
    assert not torch.equal(llm.lm_head.weight, llm.shared.weight)


def test_4_bit_layers_are_not_repacked(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU with AVX512-BF16 a validation would otherwise take the gradient away."""
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    fresh = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4")
    assert fresh.support_avx512bf16_for_cpu
    llm = load_language_model(tiny / "opt", quantize="nf4")
    prefix, mask = visual(llm)
    llm.generate(prefix, mask, TEXTS, num_beams=1, max_new_tokens=2)
    llm.loss(prefix.requires_grad_(), mask, TEXTS)[0].backward()
    assert prefix.grad is not None
    assert prefix.grad.abs().sum() > 0


def test_only_the_noise_is_silenced(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    llm = load_language_model(tiny / "opt", quantize="int8")
    llm.loss(*visual(llm), TEXTS)
    logger = logging.getLogger(bitsandbytes.matmul.__module__)
    logger.warning("MatMul8bitLt: inputs will be cast from %s to float16 during quantization", torch.float32)
    logger.warning("something else")
    assert [r.getMessage() for r in caplog.records if r.name.startswith("bitsandbytes")] == ["something else"]


@pytest.mark.parametrize("kind", ["opt", "t5", "flan-t5"])
def test_checkpoints_of_every_form(tmp_path: Path, kind: str) -> None:
    """A folder of transformers, whose language model is in it, and ours made from it."""
    make(kind, tmp_path / "theirs")
    convert_checkpoint(str(tmp_path / "theirs"), tmp_path / "ours", "qformer", LoadOptions())
    full = qformer.load(tmp_path / "theirs", device="cpu")
    for quantize in KINDS:
        said = []
        for form in ("theirs", "ours"):
            model: Any = qformer.load(tmp_path / form, device="cpu", quantize=quantize)
            assert any(is_quantized(module) for module in model.llm.modules())
            assert not any(is_quantized(module) for module in [*model.frontend.modules(), *model.connector.modules()])
            assert torch.equal(model.prefix(both(kind)[0])[0], full.prefix(both(kind)[0])[0])
            said.append(model.generate(both(kind)[0], PROMPTS, num_beams=1, max_new_tokens=6))
        assert said[0] == said[1]


def test_unquantised_again(tmp_path: Path) -> None:
    """What was trained with a quantised language model may be loaded with a full one."""
    make("opt", tmp_path / "theirs")
    folder = convert_checkpoint(str(tmp_path / "theirs"), tmp_path / "ours", "qformer", LoadOptions())
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("quantize: none", "quantize: nf4"))
    as_saved: Any = qformer.load(folder, device="cpu")
    full: Any = qformer.load(folder, device="cpu", quantize="none")
    assert any(is_quantized(module) for module in as_saved.llm.modules())
    assert not any(is_quantized(module) for module in full.llm.modules())


def test_refusals(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="quantize is 'int4'; did you mean 'int8'"):
        load_language_model(tiny / "opt", quantize="int4")
    make("itr", tmp_path / "itr")
    with pytest.raises(UsageError, match="has no language model to quantise to int8; leave quantize out"):
        qformer.load(tmp_path / "itr", device="cpu", quantize="int8")
    load_language_model(tiny / "opt", quantize="int8").model.save_pretrained(tmp_path / "done")
    load_language_model(tiny / "opt").tokenizer.save_pretrained(tmp_path / "done")
    assert any(is_quantized(module) for module in load_language_model(tmp_path / "done").modules())
    with pytest.raises(UsageError, match="is already quantized; leave quantize out"):
        load_language_model(tmp_path / "done", quantize="nf4")


def test_without_bitsandbytes(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizing, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="int8 needs bitsandbytes, which is not installed; run: pip install"):
        load_language_model(tiny / "opt", quantize="int8")
    load_language_model(tiny / "opt")  # which needs none


def test_a_broken_or_old_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def broken(name: str, *args: Any, **options: Any) -> Any:
        if name == "bitsandbytes":
            raise OSError("libcudart.so.13: cannot open shared object file")
        return real(name, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(builtins, "__import__", broken)
        with pytest.raises(UsageError, match=r"does not run on this machine \(libcudart.so.13: cannot open"):
            quantizing.check("nf4")
    with monkeypatch.context() as patched:
        patched.setattr(bitsandbytes, "supported_torch_devices", {"npu"})
        with pytest.raises(UsageError, match=r"does not run on this machine .*leave quantize out"):
            quantizing.check("nf4")
    monkeypatch.setattr(import_utils, "is_bitsandbytes_available", lambda: False)
    monkeypatch.setattr("transformers.utils.is_bitsandbytes_available", lambda: False)
    with pytest.raises(UsageError, match=r"needs bitsandbytes [\d.]+ or newer, but .* is installed"):
        quantizing.check("nf4")


@pytest.mark.parametrize(
    ("kind", "quantize"), [("opt", "nf4"), pytest.param("flan-t5", "int8", marks=pytest.mark.slow)]
)
def test_plans_count_what_is_kept(tmp_path: Path, kind: str, quantize: str) -> None:
    """Parameters as of the full model, bytes as of the quantised one, and a step that runs through it."""
    root = make_workspace(tmp_path)
    settings = config(
        root, "stage2", llm={"path": str(root / kind)}, init=None, vision={"name": "hf", "path": str(root / "vit")}
    )
    values = settings.model_dump(exclude_unset=True)
    values["llm"]["quantize"] = quantize
    full, packed = (Subject.of(chosen, "cpu", 1) for chosen in (settings, parse_config(values)))
    assert planning._parameters(packed.model) == planning._parameters(full.model)
    real = load_language_model(root / kind, quantize=quantize).model
    layers = sum(is_quantized(module) for module in real.modules())
    tables = 16 * 4 * layers if quantize == "nf4" else 0  # each keeps the 16 values of nf4
    buffers = sum(buffer.nbytes for buffer in real.buffers())
    stored = planning._weights(packed.model)["language model"]
    assert sum(stored.values()) == nbytes(real) - tables - buffers
    assert quantize in stored
    step = packed.step(2)
    assert step.flops == full.step(2).flops
    assert step.held["weights", "language model"] == sum(stored.values())


def test_the_plan_of_a_large_model() -> None:
    """OPT-6.7b: 6.44 billion weights in layers, of which 4.5 bits are kept each, and 0.22 billion in 16 bits."""
    values = {"stage": "stage2", "run": "x", "llm": {"path": "facebook/opt-6.7b", "quantize": "nf4"}}
    values |= {"data": {"train": {"name": "none"}, "batch": 1}, "train": {"steps": 1, "warmup": 0}}
    with torch.device("meta"):
        model, _ = outline(parse_config(values), "cuda")
    stored = sum(parameter.nbytes for parameter in model.llm.parameters())  # type: ignore[union-attr]
    assert stored == pytest.approx(6.44e9 * 4.5 / 8 + 0.22e9 * 2, rel=0.01)


@pytest.mark.parametrize("quantize", KINDS)
def test_adapters_can_be_put_in(tiny: Path, quantize: str) -> None:
    peft = pytest.importorskip("peft")
    llm = load_language_model(tiny / "opt", quantize=quantize)
    llm.model = peft.get_peft_model(llm.model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    adapters = [weight for weight in llm.parameters() if weight.requires_grad]
    assert adapters
    layers = [module for module in llm.modules() if type(module).__name__ in ("Linear8bitLt", "Linear4bit")]
    assert {type(layer).__module__.partition(".")[0] for layer in layers} >= {"peft"}
    for name, weight in llm.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight)
    llm.loss(*visual(llm), TEXTS)[0].backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in adapters)
