"""Costs of the first token: formulas against counted operations, rates, and the costs of a configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from qformer import devices
from qformer.config import load_config
from qformer.figures import cost
from qformer.figures.cost import Cost, Machine, in_words, usual
from qformer.resolution import build
from qformer.stages.plan import first_token
from qformer.types import UsageError
from tests.commands import command, outcome


def machine(rate: float = 1e12) -> Machine:
    return Machine("made up", lambda dtype: rate if dtype == torch.bfloat16 else rate / 4, torch.bfloat16)


def test_seconds_are_operations_by_the_rate_of_their_dtype() -> None:
    counts = {"encoder": {torch.bfloat16: 3e12}, "connector": {torch.float32: 1e12}, "prefill": {torch.bfloat16: 2e12}}
    found = Cost.of(counts, machine())
    assert (found.encoder, found.connector, found.prefill) == (3000, 1000, 2000)
    assert found.seconds == pytest.approx(3 + 4 + 2)
    assert found.machine == "made up: 1 TFLOP/s in bf16, 0.25 TFLOP/s in fp32"


def test_the_usual_model_by_hand() -> None:
    """One tile of 28 x 28: 4 patches and 32 tokens; ViT-g is counted by hand in tests/demo/test_look.py."""
    found = usual(build("fixed", size=28).plan(1, 1), machine())
    assert found.connector == pytest.approx(2 * 4 * (1408 * 3584 + 3584 * 3584) / 1e9)
    layer = 32 * (2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18944) + 2 * 32 * 32 * 3584
    assert found.prefill == pytest.approx(2 * (28 * layer + 3584 * 152064) / 1e9)
    assert found.seconds == pytest.approx((found.encoder + found.connector + found.prefill) / 1e3)
    plan = build("internvl").plan(640, 480)
    assert usual(plan, machine()).prefill > 100 * found.prefill / 2  # 3,328 tokens and 2 markers


def test_formulas_are_what_the_real_modules_do(tmp_path: Path) -> None:
    """Of two layers of each tower; operations are linear in the layers, but for patches and logits."""
    sizes = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 2, "vocab_size": 1000}
    heads = {"num_attention_heads": 28, "num_key_value_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", **sizes, **heads}))
    words = ["vision={name: eva, depth: 2}", "resolution={name: internvl, size: 56}", "connector={name: mlp}"]
    read = first_token.Reader(load_config("configs/system_internvl15_full.yaml", [*words, f"llm.path={tmp_path}"]))
    plan = read.plan(300, 200)
    found = Cost.of(read.operations(300, 200), machine())
    tokens = read.tokens(plan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "LAYERS", 2)
        patch.setattr(cost, "VOCABULARY", 1000)
        patch.setattr(cost.VIT_G, "depth", 2)
        expected = usual(plan, machine())
        prefill = cost._prefill(tokens + plan.markers + 2) / 1e9  # BOS and the end of the text
    assert found.encoder == pytest.approx(expected.encoder, rel=0.01)
    assert found.connector == pytest.approx(expected.connector, rel=0.01)
    assert found.prefill == pytest.approx(prefill, rel=0.02)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    file = tmp_path / "photo.png"
    Image.new("RGB", (240, 120), (200, 30, 30)).save(file)
    return file


def shown(*words: Any) -> Any:
    return json.loads(command("tiles", *words, "--json"))


def test_a_configuration_has_its_own_tokens_and_costs(photo: Path, tmp_path: Path) -> None:
    names = ["configs/system_llava15.yaml", "configs/system_blip2.yaml"]
    options = [word for name in names for word in ("--config", name)]
    llava, blip2 = shown(photo, *options)
    assert [one["config"] for one in (llava, blip2)] == names
    assert (llava["strategy"], llava["sizes"], llava["tokens"]) == ("pad_square", [[120, 120]], 36)
    assert (blip2["strategy"], blip2["sizes"], blip2["tokens"]) == ("fixed", [[120, 120]], 8)
    assert llava["gflops"] == blip2["gflops"] > 0  # the mini ViT on one tile
    assert llava["first_token_seconds"] > 0
    assert llava["estimated"].startswith("this machine, measured: ")
    command("tiles", photo, *options, "-o", tmp_path / "both.png")
    assert Image.open(tmp_path / "both.png").width > 1200
    (smaller,) = shown(photo, *options[:2], "resolution.size=60")
    assert smaller["tokens"] == 9


def test_a_gpu_is_taken_at_a_share_of_its_peak(photo: Path) -> None:
    (fast,) = shown(photo, "--strategy", "uhd", "--gpu", "h200")
    (slow,) = shown(photo, "--strategy", "uhd", "--gpu", "t4")
    assert fast["estimated"] == "H200, 0.4 of its peak: 396 TFLOP/s in bf16"
    assert slow["estimated"] == "T4, 0.4 of its peak: 26 TFLOP/s in fp16"
    work = fast["gflops"] + fast["connector_gflops"] + fast["prefill_gflops"]
    assert fast["first_token_seconds"] == pytest.approx(work / 395_760, rel=0.01)
    assert slow["first_token_seconds"] == pytest.approx(work / 26_000, rel=0.01)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "configs/system_uhd.yaml"], "system_uhd.yaml"),
        (["--config", "configs/system_oryx.yaml", "--all"], "--config brings its own strategy"),
        (["--config", "configs/stage1_small.yaml"], "'stage1', which writes no text"),
        (["--gpu", "h300"], "unknown GPU 'h300'"),
        (["--gpu", "cpu"], "leave --gpu out"),
    ],
)
def test_wrong_usage(photo: Path, words: list[str], message: str) -> None:
    code, _, err = outcome("tiles", photo, *words)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_the_rate_is_measured_in_each_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert 1e8 < devices.matmul_rate(torch.device("cpu"), dtype) < 1e16
    with pytest.raises(UsageError, match="unknown GPU"):
        first_token.gpu("no such thing")


def test_seconds_in_words() -> None:
    assert [in_words(seconds) for seconds in (0.00123, 0.0456, 0.2, 1.26, 9.96, 1234.5)] == [
        "1.2 ms",
        "46 ms",
        "200 ms",
        "1.3 s",
        "10 s",
        "1,234 s",
    ]
