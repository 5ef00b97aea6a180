"""Folders of whole systems that `qformer convert` writes, opened by transformers' processors, which need torchvision.

Torchvision is no dependency: these tests run where it is installed in the build that fits torch.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

import qformer
from qformer.checkpoints.convert import convert_checkpoint
from qformer.checkpoints.parts import LoadOptions
from qformer.videos import Clip
from qformer.vision.base import CLIP_MEAN, CLIP_STD
from qformer.vision.qwen2vl import patchify
from tests import test_system_qwen2vl, test_systems, test_systems_of_tiles

pytestmark = pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed")
QUESTION = "what is this"
SYSTEMS = ("llava", "onevision", "internvl", "qwen2vl")
#: Resizing by torchvision differs from Pillow's in the last bit or two; of enlarged pictures most.
LEVELS = 2.01


def _picture(width: int, height: int, frames: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(width * height)
    shape = (frames, 3, height, width) if frames else (3, height, width)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


ROWS: dict[str, list[Any]] = {
    "wide": [_picture(150, 40)],
    "tall": [_picture(30, 170)],
    "small": [_picture(12, 9)],
    "pictures": [_picture(60, 40), _picture(30, 170)],
    "clip": [Clip(_picture(60, 60, 4), fps=1.0)],
    "picture and clip": [_picture(150, 40), Clip(_picture(34, 50, 2), fps=1.0)],
}


@pytest.fixture(scope="module", params=SYSTEMS)
def system(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Any, Any]:
    """Name of a system, its processor and its model of transformers by a folder that was written here, and ours."""
    folder, name = tmp_path_factory.mktemp(request.param), request.param
    if name == "llava":
        source: Any = test_systems.make_llava(folder / "source", list(CLIP_MEAN), list(CLIP_STD))
    elif name == "qwen2vl":
        source = test_system_qwen2vl.make_oracle(folder / "source", tied=False)
    else:
        source = test_systems_of_tiles.make_oracle(name, folder / "source")
    ours = convert_checkpoint(str(source.folder), folder / "ours", "qformer", LoadOptions())
    written = convert_checkpoint(str(ours), folder / "written", "transformers", LoadOptions())
    mine: Any = qformer.load(ours, "cpu")
    mine.llm.clip_ids = "transformers"
    return (
        name,
        AutoProcessor.from_pretrained(written),
        AutoModelForImageTextToText.from_pretrained(written).eval(),
        mine,
    )


def _prompt(name: str, processor: Any, kinds: list[str]) -> str:
    if name == "llava":  # published without a template of its own
        return f"USER: {'<image>' * len(kinds)}\n{QUESTION} ASSISTANT:"
    if name == "qwen2vl":  # whose test template shows no pictures
        shown = "".join(f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in kinds)
        return test_system_qwen2vl.HEAD + shown + QUESTION + test_system_qwen2vl.TAIL
    content = [*({"type": kind} for kind in kinds), {"type": "text", "text": QUESTION}]
    turn = {"role": "user", "content": content}
    text: str = processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
    return text


def _levels(name: str, theirs: dict[str, Tensor], tiles: Any, encoder: Any) -> list[float]:
    """Largest difference of each tile's pixels, in levels of 255; of what was shown as pictures, or else of a clip."""
    mean, std = encoder.mean.reshape(3, 1, 1), encoder.std.reshape(3, 1, 1)
    own = [(tile.float() / 255 - mean) / std for tile in tiles.pixels]
    pixels = theirs["pixel_values" if "pixel_values" in theirs else "pixel_values_videos"]
    if name == "qwen2vl":  # patches of all, and nothing of a tile
        patches = torch.cat([patchify(tile if tile.ndim == 4 else tile.expand(2, -1, -1, -1)) for tile in own])
        return [float((pixels - patches[: len(pixels)]).abs().max() * std.max()) * 255]
    rows = pixels.flatten(0, pixels.ndim - 4)
    return [float(((one - other) * std).abs().max()) * 255 for one, other in zip(rows, own, strict=False)]


@torch.no_grad()
@pytest.mark.parametrize("row", ROWS)
def test_processors_of_transformers_make_our_tiles_and_texts(system: tuple[str, Any, Any, Any], row: str) -> None:
    name, processor, model, mine = system
    shown = ROWS[row]
    clips = [one.frames for one in shown if isinstance(one, Clip)]
    if name == "llava" and clips:
        pytest.skip("transformers has no clips for it")
    pictures = [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in shown if not isinstance(one, Clip)]
    given: dict[str, Any] = {"images": [pictures]} if pictures else {}
    given |= {"videos": clips, "do_sample_frames": False} if clips else {}
    kinds = ["video" if isinstance(one, Clip) else "image" for one in shown]
    inputs = processor(text=[_prompt(name, processor, kinds)], return_tensors="pt", **given)
    tiles = mine.frontend.tiles([shown])
    found = _levels(name, inputs, tiles, mine.frontend.encoder)
    assert found
    assert max(found) < LEVELS
    few = {"max_new_tokens": 12}
    written = model.generate(**inputs, do_sample=False, **few)[0, inputs["input_ids"].shape[1] :]
    said = mine.generate(tiles, QUESTION, num_beams=1, min_new_tokens=0, no_repeat_ngram_size=0, **few)
    assert said == [processor.tokenizer.decode(written, skip_special_tokens=True).strip()]
