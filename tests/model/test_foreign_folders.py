"""`qformer.load` of folders of transformers: what they may leave out, what is refused, and in which dtype they load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Blip2ForConditionalGeneration

import qformer
from qformer.checkpoints import convert as export
from qformer.checkpoints import parts
from qformer.model.vision_language import VisionLanguageModel
from qformer.types import UsageError
from tests.their_blip2 import PROMPTS, both, make
from tests.tiny import save_tiny_llm

WORDS, HEAD = "language_model.model.decoder.embed_tokens.weight", "language_model.lm_head.weight"


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("theirs")
    for kind in ("opt", "flan-t5", "itr"):
        make(kind, root / kind)
    return root


def changed(folder: Path, target: Path, tensors: dict[str, Tensor | None] | None = None, **values: Any) -> Path:
    """A copy of a folder with other tensors (None: without), or with values of its configuration replaced."""
    target.mkdir(exist_ok=True)
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    held = load_file(folder / "model.safetensors") | (tensors or {})
    save_file({name: tensor for name, tensor in held.items() if tensor is not None}, target / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    for section, more in values.items():
        config[section] = config[section] | more if isinstance(more, dict) else more
    (target / "config.json").write_text(json.dumps(config))
    return target


def refused(expected: str, path: Any, **options: Any) -> None:
    with pytest.raises(UsageError) as caught:
        qformer.load(path, device="cpu", **options)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@torch.no_grad()
def test_tied_tables_may_stand_under_either_name_or_both(theirs: Path, tmp_path: Path) -> None:
    held = load_file(theirs / "opt" / "model.safetensors")
    table = held.get(WORDS, held.get(HEAD))
    assert table is not None
    known = qformer.load(theirs / "opt", device="cpu").llm.model.state_dict()
    for number, names in enumerate(
        ({WORDS: table, HEAD: None}, {WORDS: None, HEAD: table}, {WORDS: table, HEAD: table.clone()})
    ):
        model = qformer.load(changed(theirs / "opt", tmp_path / str(number), names), device="cpu").llm.model
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert all(torch.equal(tensor, known[name]) for name, tensor in model.state_dict().items())
    refused(
        f"missing lm_head.weight, {WORDS.removeprefix('language_model.')}; left over nothing",
        changed(theirs / "opt", tmp_path / "none", {WORDS: None, HEAD: None}),
    )


def test_what_is_missing_left_over_and_misshapen(theirs: Path, tmp_path: Path) -> None:
    gone = ["language_projection.bias", "qformer.encoder.layer.1.attention.attention.key.bias"]
    gone += ["vision_model.encoder.layers.0.self_attn.qkv.bias", "vision_model.embeddings.class_embedding"]
    more = ["qformer.encoder.layer.1.crossattention.attention.key.bias", "vision_model.encoder.layers.0.extra"]
    path = changed(theirs / "opt", tmp_path / "gone", dict.fromkeys(gone) | {name: torch.ones(2) for name in more})
    refused(f"missing {', '.join(sorted(gone))}; left over {', '.join(sorted(more))};", path)
    path = changed(theirs / "opt", tmp_path / "wide", {"query_tokens": torch.ones(1, 4, 18)})
    refused("does not fit BLIP-2: connector.qformer.embeddings.norm.weight is [16] instead of [18]", path)
    name = "language_model.model.decoder.layers.0.fc1.bias"
    refused(
        "has another size: model.decoder.layers.0.fc1.bias",
        changed(theirs / "opt", tmp_path / "fc1", {name: torch.ones(3)}),
    )
    path = changed(theirs / "opt", tmp_path / "lm", {name: None, "language_model.model.extra": torch.ones(1)})
    refused(f"missing {name.removeprefix('language_model.')}; left over model.extra;", path)
    name = "vision_model.encoder.layers.0.mlp.fc2.bias"
    refused("holds an image encoder of another size", changed(theirs / "opt", tmp_path / "eva", {name: torch.ones(3)}))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("vision_config", "hidden_act", "quick_gelu"),
        ("qformer_config", "hidden_act", "relu"),
    ],
)
def test_what_no_tensor_tells_must_be_as_in_blip2(
    theirs: Path, tmp_path: Path, section: str, key: str, value: Any
) -> None:
    for kind in ("opt", "itr"):
        path = changed(theirs / kind, tmp_path / kind, **{section: {key: value}})
        refused(f"{section}.{key} is {value}", path)


@torch.no_grad()
def test_the_eps_of_the_qformer_is_that_of_the_folder(theirs: Path, tmp_path: Path) -> None:
    model = qformer.load(
        changed(theirs / "opt", tmp_path / "eps", qformer_config={"layer_norm_eps": 0.5}), device="cpu"
    )
    assert {module.eps for module in model.connector.modules() if isinstance(module, torch.nn.LayerNorm)} == {0.5}


@torch.no_grad()
def test_the_eps_of_the_encoder_is_that_of_the_folder(theirs: Path, tmp_path: Path) -> None:
    """Folders made before July 2023 may say 1e-5, which transformers had by default."""
    folder = changed(theirs / "opt", tmp_path / "eps", vision_config={"layer_norm_eps": 0.1})
    model = qformer.load(folder, device="cpu")
    assert {module.eps for module in model.frontend.modules() if isinstance(module, torch.nn.LayerNorm)} == {0.1}
    tiles, image = both("opt")
    prefix = Blip2ForConditionalGeneration.from_pretrained(folder).eval().get_image_features(image).pooler_output
    assert torch.allclose(model.prefix(tiles)[0], prefix, atol=1e-5)
    again = export.convert_checkpoint(str(folder), tmp_path / "again", "transformers", parts.LoadOptions())
    assert json.loads((again / "config.json").read_text())["vision_config"]["layer_norm_eps"] == 0.1


def test_other_folders(theirs: Path, tmp_path: Path) -> None:
    refused("holds a opt model; give a BLIP-2", save_tiny_llm(tmp_path / "opt", "opt"))
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text((theirs / "opt" / "config.json").read_text())
    refused(f"'{empty}' holds none of model.safetensors, pytorch_model.bin and", empty)
    (empty / "config.json").write_text("{}")
    refused(f"'{empty}' is not a local checkpoint", empty)
    refused(
        "'Salesforce/blip2-opt-2.7b' is not a local checkpoint, not the name of a release, and not available",
        "Salesforce/blip2-opt-2.7b",
    )
    refused("no checkpoint at 'runs/none/here'", "runs/none/here")
    text = tmp_path / "notes.txt"
    text.write_text("words")
    refused(f"'{text}' is not a checkpoint, is damaged, or holds code", text)
    torch.save({"model": {"weight": torch.ones(2)}}, tmp_path / "other.pth")
    refused("these tensors are no BLIP-2 of LAVIS", tmp_path / "other.pth")
    bare = changed(theirs / "opt", tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    with pytest.raises(UsageError, match="tokenizer"):
        qformer.load(bare, device="cpu")
    assert isinstance(qformer.load(bare, device="cpu", tokenizer=str(theirs / "opt")), VisionLanguageModel)


@torch.no_grad()
def test_the_dtype_of_the_language_model(theirs: Path) -> None:
    tiles, _ = both("opt")
    for dtype, expected in (
        ("bf16", torch.bfloat16),
        ("fp32", torch.float32),
        ("auto", torch.float32),
        (None, torch.float32),
    ):
        model = qformer.load(theirs / "opt", device="cpu", dtype=dtype)
        assert {p.dtype for p in model.llm.parameters()} == {expected}
        assert {p.dtype for p in model.connector.parameters()} == {torch.float32}
        assert model.generate(tiles, PROMPTS, num_beams=1, max_new_tokens=2)
    refused("dtype is 'fp8'; known are auto, bf16, fp16, fp32", theirs / "opt", dtype="fp8")


@torch.no_grad()
def test_the_configuration_says_how_flan_t5_computes_its_gelu(theirs: Path) -> None:
    """The original took erf, transformers the tanh form; a folder of theirs is loaded as theirs."""
    acts = {
        type(m.act).__name__ for m in qformer.load(theirs / "flan-t5", device="cpu").llm.modules() if hasattr(m, "act")
    }
    assert acts == {"NewGELUActivation"}
