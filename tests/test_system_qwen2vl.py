"""Folders of Qwen2-VL, against the class of transformers on tiny random models: logits, greedy text and weights."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil

import qformer
from qformer.checkpoints.loading import open_checkpoint
from qformer.checkpoints.qwen2vl import to_theirs
from qformer.connectors.base import Prefix
from qformer.language_schema import LLMConfig
from qformer.llm.base import CausalLM
from qformer.llm.loading import equip
from qformer.types import Tiles, UsageError
from qformer.videos import Clip, read_video
from qformer.vision.qwen2vl import patchify
from tests.clips import write_clip
from tests.commands import command
from tests.tiny import tiny_llm, tiny_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

SPECIAL = ("<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TURNS = (
    "{% for message in messages %}{% if loop.first %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}<|im_start|>"
    "{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
)
HEAD, TAIL = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
QUESTION, ANSWER = "what is this", "a red bus"
WRITING = {"max_new_tokens": 8}
CLIPS = {"fps": 1.0, "min_frames": 4, "max_frames": 12, "size": {"shortest_edge": 784, "longest_edge": 4 * 784}}


class Oracle(NamedTuple):
    """A tiny model of transformers, where it is saved, and its tokens."""

    model: Any
    folder: Path
    tokenizer: Any


def make_oracle(folder: Path, tied: bool) -> Oracle:
    tokenizer = tiny_tokenizer("qwen2")
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    tokenizer.chat_template = TURNS
    _, start, end, image, video = tokenizer.convert_tokens_to_ids(list(SPECIAL))
    rope = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [1, 1, 2]}
    text = {"vocab_size": len(tokenizer) + 3, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 1, "intermediate_size": 24, "max_position_embeddings": 512, "rope_parameters": rope}
    tower = {"depth": 2, "embed_dim": 16, "num_heads": 2, "hidden_size": 16, "mlp_ratio": 2, "patch_size": 14}
    config = Qwen2VLConfig(
        text_config=text | {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id},
        vision_config=tower,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(min_pixels=4 * 784, max_pixels=12 * 784).save_pretrained(folder)
    (folder / "video_preprocessor_config.json").write_text(json.dumps(CLIPS))
    return Oracle(model, folder, tokenizer)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return make_oracle(tmp_path_factory.mktemp("qwen2vl"), tied=False)


@pytest.fixture(scope="module")
def mine(oracle: Oracle) -> Any:
    return qformer.load(oracle.folder, "cpu")


def _rows() -> list[Any]:
    """A picture, two, and a clip with more time steps than rows or columns, behind which the rules differ."""
    draw = torch.Generator().manual_seed(1)
    one, other = (torch.randint(0, 256, (3, h, w), generator=draw).byte() for h, w in ((60, 90), (30, 300)))
    return [one, [one, other], Clip(torch.randint(0, 256, (8, 3, 60, 60), generator=draw).byte(), 1.0)]


def _theirs(oracle: Oracle, rows: list[Any], tiles: Tiles | None, said: str = "") -> dict[str, Tensor]:
    """What their processor makes of rows and the question; without `tiles`, whose plans are of clips, of text alone."""
    processor = Qwen2VLImageProcessorPil.from_pretrained(oracle.folder)
    texts, given, clips, grids = list[str](), list[Tensor](), list[Tensor](), list[tuple[int, int, int]]()
    for number, row in enumerate(rows):
        seen = ""
        if isinstance(row, Clip):
            assert tiles is not None
            own = tiles[number : number + 1]
            frames = torch.cat([tile if tile.ndim == 4 else tile[None] for tile in own.pixels]).float() / 255
            mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
            clips.append(patchify((frames - mean) / std))
            grids.append((len(own.pixels), frames.shape[2] // 14, frames.shape[3] // 14))
            seen = f"<|vision_start|>{'<|video_pad|>' * (len(clips[-1]) // 4)}<|vision_end|>"
        elif row is not None:
            for picture in row if isinstance(row, list) else [row]:
                given.append(picture)
                (grid,) = processor(images=[picture], return_tensors="pt")["image_grid_thw"]
                seen += f"<|vision_start|>{'<|image_pad|>' * (int(grid.prod()) // 4)}<|vision_end|>"
        texts.append(HEAD + seen + QUESTION + TAIL + said)
    ids = [torch.tensor(oracle.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    padded = pad_sequence([row.flip(0) for row in ids], batch_first=True, padding_value=0).flip(1)
    mask = pad_sequence([torch.ones(len(row)).long() for row in ids], batch_first=True).flip(1)
    config = oracle.model.config
    kinds = ((padded == config.image_token_id) + 2 * (padded == config.video_token_id)).int() * mask.int()
    found = {"input_ids": padded, "attention_mask": mask, "mm_token_type_ids": kinds}
    if given:
        found |= dict(processor(images=given, return_tensors="pt"))
    if clips:
        found |= {"pixel_values_videos": torch.cat(clips), "video_grid_thw": torch.tensor(grids)}
    oracle.model.model.rope_deltas = None  # which it keeps from call to call
    return found


def _with_text_alone(prefix: Prefix) -> Prefix:
    """The rows of a prefix, and one that shows nothing."""
    assert prefix.places is not None
    parts = ((prefix.embeds, 0.0), (prefix.mask, False), (prefix.places, -1))
    return Prefix(*(torch.cat([part, torch.full_like(part[:1], fill)]) for part, fill in parts))


@contextmanager
def _as_in_transformers(mine: Any) -> Iterator[None]:
    """What follows a clip is numbered as there."""
    mine.llm.clip_ids = "transformers"
    try:
        yield
    finally:
        mine.llm.clip_ids = "paper"


@torch.no_grad()
def _agree(oracle: Oracle, mine: Any, rows: list[Any], tiles: Tiles | None, prefix: Prefix) -> None:
    """Logits behind the question and the answer, and greedy text, are those of transformers."""
    asked = [QUESTION] * len(rows)
    theirs = oracle.model(**_theirs(oracle, rows, tiles, ANSWER)).logits
    logits, _ = mine.llm.predict(*prefix, [ANSWER] * len(rows), asked, places=prefix.places)
    count = len(oracle.tokenizer(ANSWER, add_special_tokens=False)["input_ids"])
    front = len(oracle.tokenizer(QUESTION + TAIL, add_special_tokens=False)["input_ids"])
    assert theirs.std() > 0.5
    for row in range(len(rows)):  # ours begin one before the question, theirs end with the answer
        known = theirs[row, -1 - front - count :]
        torch.testing.assert_close(logits[row, : len(known)], known, atol=1e-4, rtol=0)
    given = _theirs(oracle, rows, tiles)
    said = oracle.model.generate(**given, **WRITING, do_sample=False, pad_token_id=0)[:, given["input_ids"].shape[1] :]
    ids = mine.llm.generate(*prefix, asked, prefix.places, num_beams=1, **WRITING)
    written = mine.llm.decode(ids)
    assert written == [oracle.tokenizer.decode(row, skip_special_tokens=True).strip() for row in said]


@pytest.mark.parametrize("number", [0, 1, 2], ids=["picture", "pictures", "clip"])
def test_the_folder_is_transformers(oracle: Oracle, mine: Any, number: int) -> None:
    rows = _rows()[number : number + 1]
    tiles = mine.frontend.tiles(rows)
    prefix = mine.prefix(tiles)
    assert prefix.mask.sum(dim=1).tolist() == [plan.tokens + plan.markers for plan in tiles.plans]
    with _as_in_transformers(mine):
        _agree(oracle, mine, rows, tiles, prefix)
    if number == 2:
        assert [tile.frames for tile in tiles.plans[0].tiles] == [(0, 1), (2, 3), (4, 5), (6, 7)]  # 1 fps, of 8 s
        with pytest.raises(AssertionError, match="not close"):
            _agree(oracle, mine, rows, tiles, prefix)


def test_a_batch_of_all_and_text_alone_is_transformers(oracle: Oracle, mine: Any) -> None:
    """Rows of unequal length, which transformers pads on the left."""
    rows = _rows()
    tiles = mine.frontend.tiles(rows)
    with _as_in_transformers(mine):
        _agree(oracle, mine, [*rows, None], tiles, _with_text_alone(mine.prefix(tiles)))
    only = Prefix(torch.zeros(1, 0, 16), torch.zeros(1, 0).bool(), None)
    _agree(oracle, mine, [None], None, only)


def _weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def test_written_back_bit_equal(tmp_path: Path) -> None:
    """In bfloat16 and with a tied head, as published, and by names of the folders on the hub; from the command line."""
    theirs, ours, back = tmp_path / "theirs", tmp_path / "ours", tmp_path / "back"
    given = make_oracle(theirs, tied=True)
    given.model.to(torch.bfloat16).save_pretrained(theirs)
    command("convert", theirs, "-o", ours)
    command("convert", ours, "-o", back, "--to", "transformers")
    before, after = _weights(theirs), _weights(back)
    assert {"visual.patch_embed.proj.weight", "model.norm.weight"} <= before.keys() == after.keys()
    assert "lm_head.weight" not in before
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    kept, made = (json.loads((folder / "config.json").read_text()) for folder in (theirs, back))
    for values in (made, made["text_config"], made["vision_config"], kept):
        values.pop("dtype", None)  # which transformers repeats in the sections, or not
    assert made == kept
    again = Qwen2VLForConditionalGeneration.from_pretrained(back)
    assert again.config.tie_word_embeddings
    processors = [Qwen2VLImageProcessorPil.from_pretrained(folder).to_dict() for folder in (theirs, back)]
    assert processors[0] == processors[1]
    opened, converted, returned = (qformer.load(folder, "cpu") for folder in (theirs, ours, back))
    state = opened.state_dict()
    for other in (converted, returned):
        assert other.frontend.strategy == opened.frontend.strategy
        assert other.llm.chat == opened.llm.chat
        assert other.llm.chat
        assert state.keys() == other.state_dict().keys()
        assert all(torch.equal(state[key], tensor) for key, tensor in other.state_dict().items())
    strategy = opened.frontend.strategy
    assert (strategy.min_tokens, strategy.max_tokens, strategy.frame_tokens) == (4, 12, (1, 4))
    assert (strategy.fps, strategy.min_frames, strategy.max_frames) == (1.0, 4, 12)


def test_shards_newer_names_and_one_file_of_the_processor(oracle: Oracle, mine: Any, tmp_path: Path) -> None:
    oracle.tokenizer.save_pretrained(tmp_path)
    oracle.model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    pictures = json.loads((oracle.folder / "preprocessor_config.json").read_text())
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": pictures, "video_processor": CLIPS}))
    sharded = qformer.load(tmp_path, "cpu")
    for shard in tmp_path.glob("model-*"):
        shard.unlink()
    (tmp_path / "model.safetensors.index.json").unlink()
    save_file(
        {name: tensor.contiguous() for name, tensor in oracle.model.state_dict().items()},
        tmp_path / "model.safetensors",
    )
    newer = qformer.load(tmp_path, "cpu")
    for other in (sharded, newer):
        assert all(torch.equal(mine.state_dict()[name], tensor) for name, tensor in other.state_dict().items())
        assert other.frontend.strategy == mine.frontend.strategy


def test_what_belongs_to_qwen2vl_alone(oracle: Oracle) -> None:
    model, tokenizer = tiny_llm("opt")
    with pytest.raises(UsageError, match=r"llm\.clip_ids is 'transformers', but a opt model has no ids of time"):
        equip(CausalLM(model, tokenizer), LLMConfig(path="opt", clip_ids="transformers"))
    config = open_checkpoint(oracle.folder, {}).config
    with pytest.raises(UsageError, match="has a language model of its own, and this checkpoint a opt, for which"):
        to_theirs(config, None, model.config)


def test_commands(oracle: Oracle, mine: Any, tmp_path: Path) -> None:
    photos = []
    for name, size in (("one.png", (90, 60)), ("other.png", (40, 80))):
        photos.append(tmp_path / name)
        Image.effect_noise(size, 60).convert("RGB").save(photos[-1])
    rows = [*map(str, photos)]
    greedy = ("--beams", "1", "--max-new-tokens", "8")
    said = command("ask", oracle.folder, *rows, "--together", QUESTION, *greedy).strip()
    assert said.endswith(mine.answer(mine.frontend.tiles([rows]), [QUESTION], num_beams=1, max_new_tokens=8)[0])
    lines = command("caption", oracle.folder, *rows, *greedy).splitlines()
    texts = mine.generate(mine.frontend.tiles(rows), num_beams=1, max_new_tokens=8)
    assert lines == [f"{photo}\t{text}" for photo, text in zip(photos, texts, strict=True)]


@pytest.mark.slow
def test_a_run_with_its_parts_is_planned_trained_and_written_for_transformers(oracle: Oracle, tmp_path: Path) -> None:
    config = tmp_path / "trained.yaml"
    config.write_text(
        f"stage: stage2\nrun: {tmp_path}/run\nvision: {{name: qwen2vl, weights: {oracle.folder}, width: 16, depth: 2, "
        f"heads: 2, mlp_hidden: 32}}\nresolution: {{name: qwen2vl}}\nconnector: {{name: merger}}\n"
        f"llm: {{path: {oracle.folder}, template: auto, clip_ids: transformers}}\n"
        "data: {train: {name: scenes, size: 60}, batch: 2}\ntrain: {steps: 1, warmup: 0, validate_every: 0}\n"
    )
    assert json.loads(command("plan", config, "--json"))["parameters"]["connector"]["trained"] > 0
    command("train", config)
    run = qformer.load(tmp_path / "run", "cpu")
    assert run.llm.clip_ids == "transformers"
    assert run.llm.has_places
    command("convert", tmp_path / "run", "-o", tmp_path / "back", "--to", "transformers")
    again = qformer.load(tmp_path / "back", "cpu")
    assert all(torch.equal(run.state_dict()[name], tensor) for name, tensor in again.state_dict().items())


def test_a_video_from_the_command_line(oracle: Oracle, mine: Any, tmp_path: Path) -> None:
    file = write_clip(tmp_path / "clip.mp4", frames=20, fps=4)
    tiles = mine.frontend.tiles([read_video(file, mine.frontend.strategy.sample)])
    assert [tile.frames for tile in tiles.plans[0].tiles] == [(0, 1), (2, 3)]  # of 5 seconds 4 frames, in pairs
    (text,) = mine.generate(tiles, num_beams=1, max_new_tokens=8)
    assert command("caption", oracle.folder, file, "--beams", "1", "--max-new-tokens", "8") == f"{file}\t{text}\n"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"config.json": {"model_type": "qwen2_5_vl"}}, "holds a qwen2_5_vl model; give a BLIP-2, or one of"),
        (
            {"config.json": {"vision_config": {"hidden_act": "silu"}}},
            "vision_config.hidden_act is silu, not quick_gelu",
        ),
        ({"config.json": {"vision_config": {"embed_dim": 24}}}, "no whole model can be read"),
        ({"preprocessor_config.json": {"image_mean": [0.5, 0.5, 0.5]}}, r"has image_mean \[0.5, 0.5, 0.5\]"),
        ({"preprocessor_config.json": None}, "does not say how large the pictures"),
        ({"video_preprocessor_config.json": "[]"}, "video_preprocessor_config.json' is no JSON object"),
        ({"model.safetensors": "visual.merger.mlp.2.bias"}, "model.visual.merger.mlp.2.bias missing or left over"),
        ({"tokenizer.json": None, "tokenizer_config.json": None}, "tokenizer"),
    ],
    ids=str,
)
def test_another_model_is_refused_in_one_sentence(
    oracle: Oracle, tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    for file in oracle.folder.iterdir():
        if file.name not in changes:
            (tmp_path / file.name).symlink_to(file)
    for name, change in changes.items():
        if isinstance(change, dict):
            values = json.loads((oracle.folder / name).read_text())
            for key, value in change.items():
                values[key] = values[key] | value if isinstance(value, dict) else value
            (tmp_path / name).write_text(json.dumps(values))
        elif name == "model.safetensors":
            kept = {key: tensor for key, tensor in _weights(oracle.folder).items() if key != change}
            save_file(kept, tmp_path / name, {"format": "pt"})
        elif change is not None:
            (tmp_path / name).write_text(change)
    with pytest.raises(UsageError, match=sentence) as found:
        qformer.load(tmp_path, "cpu")
    assert "\n" not in str(found.value)
