"""Published systems in folders of transformers, against its own classes on tiny random models."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
)

import qformer
from qformer.checkpoints.convert import convert_checkpoint
from qformer.checkpoints.loading import open_checkpoint
from qformer.checkpoints.parts import LoadOptions
from qformer.checkpoints.systems import SYSTEMS
from qformer.checkpoints.whole import require_decoder, write_system
from qformer.stages.plan import forecast
from qformer.types import Tiles, UsageError
from qformer.videos import Clip
from qformer.vision.base import CLIP_MEAN, CLIP_STD
from tests.commands import outcome
from tests.test_cli import one_sentence
from tests.tiny import tiny_tokenizer

QUESTION, ANSWER = "what is this", " a red ball"


class Oracle(NamedTuple):
    """A tiny model of transformers, where it is saved, and its tokens."""

    model: Any
    folder: Path
    tokenizer: Any


def _text(tokenizer: Any) -> dict[str, Any]:
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return {**ids, **sizes, "vocab_size": len(tokenizer) + 3, "max_position_embeddings": 512}


def _save(model: Any, tokenizer: Any, folder: Path) -> Oracle:
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():  # large, so that the pictures matter and some tokens are preferred
        weight.data = torch.randn(weight.shape, generator=generator) * 0.3
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Oracle(model, folder, tokenizer)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return make_llava(tmp_path_factory.mktemp("llava"), [0.4, 0.5, 0.6], [0.2, 0.3, 0.4])


def make_llava(folder: Path, mean: list[float], std: list[float]) -> Oracle:
    tokenizer = tiny_tokenizer("llama")
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    clip = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
    )
    word = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=clip, text_config=LlamaConfig(**_text(tokenizer)), image_token_id=word)
    CLIPImageProcessorPil(image_mean=mean, image_std=std).save_pretrained(folder)
    return _save(LlavaForConditionalGeneration(config), tokenizer, folder)


def _pixels(tiles: Tiles, mean: list[float], std: list[float]) -> Tensor:
    pixels = torch.stack(tiles.pixels).float() / 255
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _pictures() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = [(3, 40, 60), (3, 70, 30), (4, 3, 32, 48)]
    return [torch.randint(0, 256, size, generator=generator, dtype=torch.uint8) for size in sizes]


def _rows() -> dict[str, Any]:
    one, other, frames = _pictures()
    return {"picture": one, "pictures": [one, other], "clip": Clip(frames, fps=1.0)}


@pytest.mark.parametrize("row", ["picture", "pictures", "clip"])
def test_llava_is_transformers(llava: Oracle, row: str) -> None:
    mine: Any = qformer.load(llava.folder, "cpu")
    tiles = mine.frontend.tiles([_rows()[row]])
    pixels = _pixels(tiles, [0.4, 0.5, 0.6], [0.2, 0.3, 0.4])
    word = llava.model.config.image_token_id
    head = _ids(llava.tokenizer, "<s>USER: ") + [word] * 4 * len(pixels)
    asked = head + _ids(llava.tokenizer, f"\n{QUESTION} ASSISTANT:")
    said = [*asked, *_ids(llava.tokenizer, ANSWER)]
    with torch.no_grad():
        theirs = llava.model(input_ids=torch.tensor([said]), pixel_values=pixels).logits[0, len(head) - 1 :]
        logits, _ = mine.llm.predict(*mine.prefix(tiles), [ANSWER], [QUESTION])
        written = llava.model.generate(
            input_ids=torch.tensor([asked]), pixel_values=pixels, do_sample=False, max_new_tokens=12
        )[0, len(asked) :]
    assert theirs.std() > 0.5
    torch.testing.assert_close(logits[0, : len(theirs)], theirs, atol=1e-4, rtol=0)
    text = mine.generate(tiles, QUESTION, num_beams=1, min_new_tokens=0, no_repeat_ngram_size=0, max_new_tokens=12)
    assert text == [llava.tokenizer.decode(written, skip_special_tokens=True).strip()]


def _weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", ["llava"])
def test_written_back_bit_equal(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    oracle: Oracle = request.getfixturevalue(name)
    ours, back, given = tmp_path / "ours", tmp_path / "back", LoadOptions()
    convert_checkpoint(str(oracle.folder), ours, "qformer", given)
    convert_checkpoint(str(ours), back, "transformers", given)
    before, after = _weights(oracle.folder), _weights(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    kept, made = (json.loads((folder / "config.json").read_text()) for folder in (oracle.folder, back))
    assert {key for key in kept if kept[key] != made.get(key)} <= {"vision_config", "text_config"}
    again = type(oracle.model).from_pretrained(back)
    assert again.config.image_token_id == oracle.model.config.image_token_id
    both = [qformer.load(path, "cpu").state_dict() for path in (oracle.folder, ours)]
    assert both[0].keys() == both[1].keys()
    assert all(torch.equal(both[0][key], both[1][key]) for key in both[0])


def test_the_written_processor_makes_our_tiles(tmp_path: Path) -> None:
    """Pictures are padded to a square, as in the released code; its other settings count the tokens of a picture."""
    made = make_llava(tmp_path / "theirs", list(CLIP_MEAN), list(CLIP_STD))
    back = convert_checkpoint(str(made.folder), tmp_path / "back", "transformers", LoadOptions())
    tiles = qformer.load(back, "cpu").frontend.tiles(_pictures()[:2])
    images = LlavaImageProcessorPil.from_pretrained(back)
    pictures = [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in _pictures()[:2]]
    pixels = images(pictures, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, _pixels(tiles, list(CLIP_MEAN), list(CLIP_STD)), atol=1e-5, rtol=0)
    own = json.loads((back / "processor_config.json").read_text())
    assert own == {
        "processor_class": "LlavaProcessor",
        "patch_size": 14,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    }


def test_a_folder_is_planned_once_it_is_converted(
    llava: Oracle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of transformers is told what to do; one of ours needs no path of its configuration, and no data."""
    code, _, err = outcome("plan", llava.folder)
    assert (code, "run qformer convert" in one_sentence(err)) == (2, True)
    convert_checkpoint(str(llava.folder), tmp_path / "ours", "qformer", LoadOptions())
    monkeypatch.setattr(forecast, "_largest", lambda *_: 1)  # thousands of images of a tiny model would fit
    code, out, err = outcome("plan", tmp_path / "ours", "data.batch=1", "--gpu", "cpu", "--json")
    assert code == 0, err
    found = json.loads(out)
    connector = (16 + 1) * 32 + (32 + 1) * 32 + 32  # two linear layers, and LLaVA's newline
    assert found["parameters"]["connector"]["trained"] == connector
    assert any("this model was trained elsewhere" in note for note in found["notes"])


def test_a_checkpoint_without_a_tensor_does_not_fit_its_own_system(llava: Oracle, tmp_path: Path) -> None:
    opened = open_checkpoint(llava.folder, {})
    del opened.parts.bridge["connector.mlp.0.bias"]
    with pytest.raises(
        UsageError, match=r"does not fit LLaVA-1\.5: missing connector\.mlp\.0\.bias; left over nothing;"
    ):
        write_system(opened, tmp_path)


def test_a_language_model_of_another_kind_has_no_place() -> None:
    opened: Any = SimpleNamespace(source="run", llm=SimpleNamespace(model_type="opt"))
    opened.parts = SimpleNamespace(llm={"model.decoder.embed_tokens.weight": torch.zeros(1)})
    with pytest.raises(UsageError, match=r"takes a language model like Llama or Qwen2, and that of 'run' .* 'opt'"):
        require_decoder(opened, SYSTEMS["llava"])


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("projector_hidden_act", "relu", "projector_hidden_act is relu, not gelu"),
        ("vision_feature_layer", [-2, -1], "reads the layers"),
        ("model_type", "idefics3", "holds a idefics3 model"),
    ],
)
def test_another_model_is_refused_in_one_sentence(
    llava: Oracle, tmp_path: Path, key: str, value: Any, sentence: str
) -> None:
    values = json.loads((llava.folder / "config.json").read_text()) | {key: value}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UsageError, match=sentence):
        qformer.load(tmp_path, "cpu")
