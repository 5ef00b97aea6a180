"""All of Qwen2-VL put together here, against the whole model of transformers: logits and greedy text."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from qformer import resolution
from qformer.llm.base import CausalLM
from qformer.llm.loading import without_tower
from qformer.model import connectors
from qformer.model.frontend import FrontEnd
from qformer.model.vision_language import VisionLanguageModel
from qformer.types import Plan
from qformer.videos import Clip
from qformer.vision import options
from qformer.vision.qwen2vl import build_from, patchify
from tests.tiny import tiny_tokenizer

SPECIAL = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
PROMPT = "what is it?"
WRITING = {"max_new_tokens": 6, "min_new_tokens": 6}


@pytest.fixture(scope="module")
def pair() -> tuple[Any, VisionLanguageModel]:
    """Theirs, random, and ours with its weights."""
    tokenizer = tiny_tokenizer("qwen2")
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    start, end, image, video = tokenizer.convert_tokens_to_ids(list(SPECIAL))
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
    )
    torch.manual_seed(0)
    theirs = Qwen2VLForConditionalGeneration(config).eval()
    for weight in theirs.parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=0.3)
    state = {name.removeprefix("model.visual."): t for name, t in theirs.state_dict().items() if ".visual." in name}
    sizes = {"image_size": 56, "patch_size": 14, "width": 16, "depth": 2, "heads": 2, "mlp_hidden": 32}
    encoder = build_from(options.Qwen2VLConfig(**sizes, precision="fp32"), state, "theirs").freeze()  # type: ignore[arg-type]
    merger = connectors.build("merger", 16, 16)
    merger.load_state_dict({n.removeprefix("merger."): t for n, t in state.items() if n.startswith("merger.")})
    llm = CausalLM(without_tower(copy.deepcopy(theirs)), tokenizer)
    return theirs, VisionLanguageModel(FrontEnd(encoder, resolution.build("qwen2vl")), merger, llm).eval()


def as_theirs(model: VisionLanguageModel, plan: Plan, pixels: list[Tensor], video: bool) -> dict[str, Tensor]:
    """What their processor would make of one row and the prompt."""
    start, end, *pads = model.llm.tokenizer.convert_tokens_to_ids(list(SPECIAL))
    ids, kinds, patches, grids = list[int](), list[int](), [], []
    for part in plan.parts or (plan,):
        (rows, columns), steps = part.fine or (0, 0), len(part.tiles)
        ids += [start, *[pads[video]] * part.tokens, end]
        kinds += [0, *[1 + video] * part.tokens, 0]
        own, pixels = pixels[:steps], pixels[steps:]
        frames = torch.cat([one if one.ndim == 4 else one[None] for one in own]).float() / 255
        encoder = model.frontend.encoder
        patches.append(patchify((frames - encoder.mean) / encoder.std))
        grids.append((steps, 2 * rows, 2 * columns))
    ids += model.llm.tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    kinds += [0] * (len(ids) - len(kinds))
    names = ("pixel_values_videos", "video_grid_thw") if video else ("pixel_values", "image_grid_thw")
    given = dict(zip(names, (torch.cat(patches), torch.tensor(grids)), strict=True))
    kinds_given = torch.tensor([kinds]).int()
    return given | {
        "input_ids": torch.tensor([ids]),
        "mm_token_type_ids": kinds_given,
        "attention_mask": torch.ones(1, len(ids)).long(),
    }


@torch.no_grad()
def test_pictures_and_clips_as_in_transformers(pair: tuple[Any, VisionLanguageModel]) -> None:
    """One picture, two, and a clip with no more steps than rows, whose ids are the same by both rules."""
    theirs, model = pair
    draw = torch.Generator().manual_seed(1)
    first, second = (torch.randint(0, 256, (3, h, w), generator=draw).byte() for h, w in ((60, 90), (30, 100)))
    clip = Clip(torch.randint(0, 256, (4, 3, 60, 60), generator=draw).byte(), 2.0, sampled=True)
    rows: list[Any] = [first, [first, second], clip]
    tiles = model.frontend.tiles(rows)
    prefix = model.prefix(tiles)
    assert prefix.mask.sum(dim=1).tolist() == [plan.tokens + plan.markers for plan in tiles.plans]
    for number, row in enumerate(rows):
        own = tiles[number : number + 1]
        given = as_theirs(model, own.plans[0], own.pixels, video=isinstance(row, Clip))
        theirs.model.rope_deltas = None
        expected = theirs(**given).logits[0, -1]
        part = prefix.select([number])
        step, start, _ = model.llm.begin(*part, [PROMPT], 3, part.places)
        torch.testing.assert_close(step(start, torch.arange(1))[0], expected, atol=1e-4, rtol=1e-4)
        theirs.model.rope_deltas = None
        said = theirs.generate(**given, **WRITING, do_sample=False, pad_token_id=0)[0, given["input_ids"].shape[1] :]
        written = model.llm.generate(*part, [PROMPT], part.places, num_beams=1, **WRITING)[0]
        assert written.tolist() == said.tolist()
