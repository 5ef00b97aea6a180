"""Folders of InternVL and LLaVA-OneVision, against the classes and processors of transformers, tiny and random."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoTokenizer,
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)

import qformer
from qformer import resolution
from qformer.checkpoints.convert import convert_checkpoint
from qformer.checkpoints.hugging_face import write_transformers
from qformer.checkpoints.loading import open_checkpoint
from qformer.checkpoints.parts import LoadOptions
from qformer.config import Choice
from qformer.types import UsageError
from qformer.videos import Clip
from tests.test_cli import one_sentence
from tests.tiny import tiny_tokenizer

QUESTION, ANSWER = "what is this", "a red ball"
PIXELS: dict[str, Any] = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
INTERNVL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}<IMG_CONTEXT>\n"
    "{% elif c.type == 'video' %}<video>\n{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ONEVISION = (  # the turn of an answer begins with a space, and with a line break where one is to be generated
    "{% for m in messages %}<|im_start|>{{ m.role }} {% for c in m.content if c.type != 'text' %}<{{ c.type }}>\n"
    "{% endfor %}{% for c in m.content if c.type == 'text' %}{{ c.text }}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {"internvl": INTERNVL, "onevision": ONEVISION}
INTERNVL_WORDS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}


class Oracle(NamedTuple):
    """A tiny model of transformers, where it is saved, its tokenizer and its image processor."""

    model: Any
    folder: Path
    tokenizer: Any
    images: Any


def _tokenizer(name: str) -> Any:
    words = INTERNVL_WORDS if name == "internvl" else {"image_token": "<image>", "video_token": "<video>"}
    tokenizer = tiny_tokenizer("qwen2")
    tokenizer.add_tokens(["<|im_start|>", *words.values()], special_tokens=True)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        extra_special_tokens=words,
    )
    made.chat_template = TEMPLATES[name]
    return made


def _text(tokenizer: Any) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=len(tokenizer) + 3,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )


TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": 14,
}


def _internvl(tokenizer: Any) -> tuple[Any, Any]:
    tower = InternVLVisionConfig(**TOWER | {"image_size": 56}, attention_bias=True)
    config = InternVLConfig(
        vision_config=tower,
        text_config=_text(tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    size = {"height": 56, "width": 56}
    return InternVLForConditionalGeneration(config), GotOcr2ImageProcessorPil(size=size, max_patches=4, **PIXELS)


def _onevision(tokenizer: Any) -> tuple[Any, Any]:
    """3 x 3 patches a crop and a rest that is not read; more than two crops' worth of tokens are interpolated."""
    tower = SiglipVisionConfig(**TOWER | {"image_size": 44}, vision_use_head=False)
    pins = [[44 * rows, 44 * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)]
    config = LlavaOnevisionConfig(
        vision_config=tower,
        text_config=_text(tokenizer),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pins,
        vision_aspect_ratio="anyres_max_2",
    )
    size = {"height": 44, "width": 44}
    images = LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=pins, **PIXELS)
    return LlavaOnevisionForConditionalGeneration(config), images


@pytest.fixture(scope="module", params=["internvl", "onevision"])
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return make_oracle(request.param, tmp_path_factory.mktemp(request.param))


def make_oracle(name: str, folder: Path) -> Oracle:
    tokenizer = _tokenizer(name)
    model, images = (_internvl if name == "internvl" else _onevision)(tokenizer)
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():  # large, so that the pictures matter and some tokens are preferred
        weight.data = torch.randn(weight.shape, generator=generator) * 0.4
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    images.save_pretrained(folder)
    return Oracle(model, folder, tokenizer, images)


@pytest.fixture(scope="module")
def mine(oracle: Oracle) -> Any:
    return qformer.load(oracle.folder, "cpu")


def _picture(width: int, height: int, frames: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(width * height)
    shape = (frames, 3, height, width) if frames else (3, height, width)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


ROWS: dict[str, list[Any]] = {
    "square": [_picture(100, 100)],
    "wide": [_picture(150, 40)],
    "tall": [_picture(30, 170)],
    "small": [_picture(12, 9)],
    "pictures": [_picture(60, 40), _picture(30, 170)],
    "clip": [Clip(_picture(50, 34, 4), fps=1.0)],
    "picture and clip": [_picture(150, 40), Clip(_picture(34, 50, 2), fps=1.0)],
}


def _pil(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def _their_internvl(oracle: Oracle, shown: list[Any]) -> tuple[list[str], dict[str, Any]]:
    """What the processor writes for each picture or clip, and what it gives to the model."""
    words, pixels = [], []
    for one in shown:
        is_clip = isinstance(one, Clip)
        pictures = [_pil(frame) for frame in (one.frames if is_clip else [one])]
        made = oracle.images(pictures, crop_to_patches=not is_clip, return_tensors="pt")
        pixels.append(made["pixel_values"])
        tile = "<IMG_CONTEXT>" * 4
        frames = [f"Frame{number}: <img>{tile}</img>" for number in range(1, 1 + len(pictures))]
        words.append("\n".join(frames) if is_clip else f"<img>{tile * len(pixels[-1])}</img>")
    return words, {"pixel_values": torch.cat(pixels)}


def _their_onevision(oracle: Oracle, shown: list[Any]) -> tuple[list[str], dict[str, Any]]:
    words, inputs, model = [""] * len(shown), {}, oracle.model.model
    pictures = [_pil(one) for one in shown if not isinstance(one, Clip)]
    if pictures:
        inputs = dict(oracle.images([pictures], return_tensors="pt"))
        counts = iter(len(own) for own in model.get_image_features(**inputs).pooler_output)
        words = ["" if isinstance(one, Clip) else "<image>" * next(counts) for one in shown]
    for number, one in enumerate(shown):
        if isinstance(one, Clip):
            frames = [_pil(frame).resize((44, 44), Image.Resampling.BICUBIC) for frame in one.frames]
            clip = oracle.images([frames], do_resize=False, return_tensors="pt")["pixel_values"]
            inputs["pixel_values_videos"] = clip.flatten(0, 1)[None]
            words[number] = "<video>" * (len(frames) * 4 + 1)
    return words, inputs


def _their_inputs(oracle: Oracle, shown: list[Any]) -> dict[str, Any]:
    """Ids and pixels of a question about pictures and clips, as the processor of transformers makes them."""
    is_internvl = isinstance(oracle.model, InternVLForConditionalGeneration)
    words, inputs = (_their_internvl if is_internvl else _their_onevision)(oracle, shown)
    kinds = [{"type": "video" if isinstance(one, Clip) else "image"} for one in shown]
    content = [*kinds, {"type": "text", "text": QUESTION}]
    text = oracle.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    image = "<IMG_CONTEXT>" if is_internvl else "<image>"
    for number, kind in enumerate(kinds):  # in two steps, since what is put in holds the places' own words
        text = text.replace("<video>" if kind["type"] == "video" else image, f"[{number}]", 1)
    for number, word in enumerate(words):
        text = text.replace(f"[{number}]", word, 1)
    return {**inputs, "input_ids": torch.tensor([oracle.tokenizer(text)["input_ids"]])}


@torch.no_grad()
@pytest.mark.parametrize("row", ROWS)
def test_logits_and_texts_are_those_of_transformers(oracle: Oracle, mine: Any, row: str) -> None:
    inputs = _their_inputs(oracle, ROWS[row])
    asked = inputs["input_ids"].shape[1]
    answer = oracle.tokenizer(ANSWER, add_special_tokens=False, return_tensors="pt")["input_ids"]
    said = torch.cat([inputs["input_ids"], answer], dim=1)
    theirs = oracle.model(**inputs | {"input_ids": said}).logits[0]
    tiles = mine.frontend.tiles([ROWS[row]])
    prefix = mine.prefix(tiles)
    logits, _ = mine.llm.predict(*prefix, [ANSWER], [QUESTION])
    text = logits.shape[1] - len(mine.llm.chat.ending)
    assert len(mine.llm.chat.head) + prefix.embeds.shape[1] + text == said.shape[1]
    assert prefix.embeds.shape[1] == mine.count_tokens(tiles.plans[0])
    assert theirs.std() > 0.5
    torch.testing.assert_close(logits[0, : text + 1], theirs[-text - 1 :], atol=1e-4, rtol=0)
    written = oracle.model.generate(**inputs, do_sample=False, max_new_tokens=12)[0, asked:]
    given = mine.generate(tiles, QUESTION, num_beams=1, min_new_tokens=0, no_repeat_ngram_size=0, max_new_tokens=12)
    assert given == [oracle.tokenizer.decode(written, skip_special_tokens=True).strip()]


def test_rows_of_all_kinds_in_one_batch_are_answered_as_alone(mine: Any) -> None:
    tiles = mine.frontend.tiles(list(ROWS.values()))
    few = {"num_beams": 1, "max_new_tokens": 6}
    alone = [mine.answer(mine.frontend.tiles([row]), [QUESTION], **few)[0] for row in ROWS.values()]
    assert mine.answer(tiles, [QUESTION] * len(ROWS), **few) == alone
    assert len(set(alone)) >= 3


def test_text_alone_is_that_of_transformers(oracle: Oracle, mine: Any) -> None:
    ids = mine.llm.chat.head + tuple(mine.llm.chat.between)
    asked = [*ids, *oracle.tokenizer(QUESTION)["input_ids"], *mine.llm.chat.after]
    empty = torch.zeros(1, 0, mine.llm.width), torch.zeros(1, 0).bool()
    with torch.no_grad():
        written = oracle.model.generate(torch.tensor([asked]), do_sample=False, max_new_tokens=12)[0, len(asked) :]
        given = mine.llm.generate(*empty, [QUESTION], num_beams=1, min_new_tokens=0, max_new_tokens=12)
    assert mine.llm.decode(given) == [oracle.tokenizer.decode(written, skip_special_tokens=True).strip()]


def _weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def ours(oracle: Oracle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_checkpoint(str(oracle.folder), tmp_path_factory.mktemp("ours") / "x", "qformer", LoadOptions())


def test_written_back_bit_equal(oracle: Oracle, mine: Any, ours: Path, tmp_path: Path) -> None:
    back = convert_checkpoint(str(ours), tmp_path / "back", "transformers", LoadOptions())
    before, after = _weights(oracle.folder), _weights(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    kept, made = (json.loads((folder / "config.json").read_text()) for folder in (oracle.folder, back))
    assert {key for key in kept if kept[key] != made.get(key)} <= {"vision_config", "text_config"}
    images = type(oracle.images).from_pretrained(back).to_dict()
    assert {key: images[key] for key in oracle.images.to_dict()} == oracle.images.to_dict() | (
        {"crop_to_patches": True} if "crop_to_patches" in images else {}
    )
    tokenizer = AutoTokenizer.from_pretrained(back)
    assert tokenizer.chat_template == oracle.tokenizer.chat_template
    for name, word in INTERNVL_WORDS.items() if "crop_to_patches" in images else ():
        assert getattr(tokenizer, name) == word
    loaded = qformer.load(ours, "cpu").state_dict()
    assert loaded.keys() == mine.state_dict().keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in mine.state_dict().items())
    again = qformer.load(back, "cpu")
    assert again.frontend.strategy == mine.frontend.strategy
    assert again.llm.chat == mine.llm.chat


def test_without_a_chat_template_the_published_turns_are_taken(oracle: Oracle, mine: Any, tmp_path: Path) -> None:
    shutil.copytree(oracle.folder, tmp_path / "x")
    (tmp_path / "x" / "chat_template.jinja").unlink()
    made = qformer.load(tmp_path / "x", "cpu")
    head = oracle.tokenizer("<|im_start|>user\n")["input_ids"]
    assert (list(made.llm.chat.head), made.llm.chat.between) == (head, mine.llm.chat.between)
    assert made.frontend.strategy == mine.frontend.strategy


@pytest.mark.parametrize("form", ["names in memory", "shards", "files of a processor"])
def test_other_files_load(oracle: Oracle, mine: Any, tmp_path: Path, form: str) -> None:
    """Files have names of version 4, such as `language_model.model.norm.weight`, or those that models have now.

    Version 5 writes what a processor does to one file, version 4 its chat template to a file of its own.
    """
    shutil.copytree(oracle.folder, tmp_path / "x")
    if form == "files of a processor":
        images, template = (tmp_path / "x" / name for name in ("preprocessor_config.json", "chat_template.jinja"))
        own = {"image_processor": json.loads(images.read_text()), "processor_class": "Own"}
        (tmp_path / "x" / "processor_config.json").write_text(json.dumps(own))
        (tmp_path / "x" / "chat_template.json").write_text(json.dumps({"chat_template": template.read_text()}))
        images.unlink()
        template.unlink()
        assert qformer.load(tmp_path / "x", "cpu").frontend.strategy == mine.frontend.strategy
        assert qformer.load(tmp_path / "x", "cpu").llm.chat == mine.llm.chat
        return
    (tmp_path / "x" / "model.safetensors").unlink()
    if form == "shards":
        oracle.model.save_pretrained(tmp_path / "x", max_shard_size="20KB")
        assert len(list((tmp_path / "x").glob("*.safetensors"))) > 1
    else:
        tensors = oracle.model.state_dict()
        assert "model.language_model.norm.weight" in tensors.keys() - _weights(oracle.folder).keys()
        save_file(tensors, tmp_path / "x" / "model.safetensors", {"format": "pt"})
    loaded = qformer.load(tmp_path / "x", "cpu").state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in mine.state_dict().items())


def _break(folder: Path, fault: str) -> None:
    """Damage a copy of a folder."""
    config, images = folder / "config.json", folder / "preprocessor_config.json"
    weights = load_file(folder / "model.safetensors")
    name = "multi_modal_projector.linear_1.weight"
    if fault == "no processor":
        images.unlink()
    elif fault == "broken processor":
        images.write_text(images.read_text()[:-20])
    elif fault == "another size":
        images.write_text(re.sub('("(height|width)"): [0-9]+', r"\1: 28", images.read_text()))
    elif fault == "nearest pixels":
        images.write_text(json.dumps(json.loads(images.read_text()) | {"resample": 0}))
    elif fault.startswith("{{"):
        (folder / "chat_template.jinja").write_text(fault)
    elif fault in ("missing", "shape", "left over"):
        if fault == "missing":
            del weights[name]
        elif fault == "shape":
            weights[name] = weights[name][:, 1:].contiguous()
        else:
            weights["model.more"] = torch.zeros(1)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    else:
        key, value = json.loads(fault)
        config.write_text(json.dumps(json.loads(config.read_text()) | {key: value}))


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("no processor", "has no preprocessor_config.json, which says how .* cuts its pictures; put its own there"),
        ("broken processor", "cuts pictures|is not valid JSON"),
        ("another size", "are not of one system: resolution"),
        ("nearest pixels", "has resample 0, and .* 3; set it to that"),
        ("missing", "multi_modal_projector.linear_1.weight missing or left over"),
        ("left over", "model.more missing or left over"),
        ("shape", r"no whole model can be read .*\(of another size: model.multi_modal_projector.linear_1.weight\)"),
        ("{{ raise_exception('no') }}", r"chat template of the tokenizer .* fails \(TemplateError: no\); remove it"),
        ("{{ messages[0].content[-1].text }}", "which it was told to say once, 0 times"),
        ('["projector_hidden_act", "relu"]', "projector_hidden_act is relu, not gelu"),
        ('["vision_feature_layer", [-2, -1]]', "reads the layers"),
        ('["model_type", "llava_next"]', "holds a llava_next model; give a BLIP-2, or one of .*InternVL"),
    ],
)
def test_a_broken_folder_is_refused_in_one_sentence(oracle: Oracle, tmp_path: Path, fault: str, sentence: str) -> None:
    shutil.copytree(oracle.folder, tmp_path / "x")
    _break(tmp_path / "x", fault)
    with pytest.raises(UsageError, match=sentence) as error:
        qformer.load(tmp_path / "x", "cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"thumbnail": False, "newline": "frame"}, "has no place for the resolution.(thumbnail|newline) of this"),
        ({"markers": True}, "the markers of .* are no words of its language model"),
    ],
)
def test_what_has_no_place_in_transformers_is_named(
    oracle: Oracle, tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    opened = open_checkpoint(oracle.folder, {})
    chosen = opened.config.resolution
    known = {field.name for field in fields(resolution.chosen(chosen))}
    options = chosen.options | {key: value for key, value in change.items() if key in known}
    opened.config = opened.config.model_copy(update={"resolution": Choice(name=chosen.name, **options)})
    if "markers" in change:
        opened.parts.bridge["markers.0"] = torch.zeros(32)
    with pytest.raises(UsageError, match=sentence):
        write_transformers(opened, tmp_path)


def test_from_the_command_line(oracle: Oracle, mine: Any, run: Any, tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.png" for number in range(2)]
    pictures = [_picture(60, 40), _picture(30, 170)]
    for file, picture in zip(files, pictures, strict=True):
        _pil(picture).save(file)
    answers = mine.answer(mine.frontend.tiles(pictures), [QUESTION] * 2)
    said = "".join(f"{file}\t{answer}\n" for file, answer in zip(files, answers, strict=True))
    back, ours = tmp_path / "back", tmp_path / "ours"
    assert run("convert", str(oracle.folder), "-o", str(ours))[:2] == (0, f"{ours}\n")
    assert run("convert", str(ours), "-o", str(back), "--to", "transformers")[:2] == (0, f"{back}\n")
    assert run("ask", str(back), *map(str, files), QUESTION)[:2] == (0, said)
    assert run("caption", str(ours), str(files[0]))[0] == 0
    if isinstance(oracle.model, InternVLForConditionalGeneration):  # once is enough of what takes seconds
        plan = ("plan", str(ours / "config.yaml"), "data.train={name: scenes}", "data.batch=2", "--picture", "60x60")
        assert "GFLOP per image" in run(*plan)[1]
    (back / "preprocessor_config.json").unlink()
    code, _, err = run("ask", str(back), str(files[0]), QUESTION)
    assert code == 2
    assert "put its own there" in one_sentence(err)
