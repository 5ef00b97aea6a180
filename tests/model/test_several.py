"""Rows that show several pictures or a clip: cut by their strategy, encoded, numbered and answered as one by one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qformer.files.packing import pack
from qformer.llm.base import CausalLM
from qformer.llm.loading import without_tower
from qformer.model.connectors import Connector
from qformer.model.frontend import FrontEnd
from qformer.model.vision_language import VisionLanguageModel
from qformer.resolution.base import ResolutionStrategy, cut
from qformer.types import BadSample, Batch, Plan, Tile, Tiles, UsageError
from qformer.videos import Clip
from qformer.vision.base import VisionEncoder
from tests.tiny import tiny_llm

if TYPE_CHECKING:
    from collections.abc import Sequence

WIDTH = 12


@dataclass(frozen=True)
class Pairs(ResolutionStrategy):
    """A picture is one tile of 2 x 2 or, if it is wide, 2 x 3 patches; of several pictures each is 1 x 2; of a clip
    every other frame is taken, and two of them are a tile."""

    exact: ClassVar[bool] = True

    def plan(self, width: int, height: int) -> Plan:
        return self._one(width, height, 2, 3 if width > height else 2)

    def plan_many(self, sizes: Sequence[tuple[int, int]]) -> Plan:
        return self.plan(*sizes[0]) if len(sizes) == 1 else Plan.join([self._one(*size, 1, 2) for size in sizes])

    def plan_video(self, width: int, height: int, frames: int) -> Plan:
        one = self._one(width, height, 2, 2)
        pairs = [(first, min(first + 1, frames - 1)) for first in range(0, frames, 2)]
        tiles = tuple(replace(one.tiles[0], frames=pair) for pair in pairs)
        return replace(one, tiles=tiles, overview=None, tokens=4 * len(pairs))

    def sample(self, total: int, fps: float) -> list[int]:
        return list(range(0, total, 2))

    def _one(self, width: int, height: int, rows: int, columns: int) -> Plan:
        size = (14 * columns, 14 * rows)
        return Plan(
            (width, height), (Tile(size, size, (0, 0), (0, 0, *size)),), (1, 1), 0, rows * columns, fine=(rows, columns)
        )


class Patches(VisionEncoder):
    """A Linear over patches of 14 of two frames; a picture is two equal ones."""

    temporal_patch = 2

    def __init__(self) -> None:
        super().__init__(width=WIDTH, patch_size=14, image_size=28, extra=0)
        self.project = nn.Linear(2 * 3 * 14 * 14, WIDTH)

    def encode(self, pixels: Tensor) -> Tensor:
        pixels = pixels[:, None].expand(-1, 2, -1, -1, -1) if pixels.ndim == 4 else pixels
        return self.project(F.unfold(pixels.flatten(1, 2), 14, stride=14).transpose(1, 2))


class FrameByFrame(VisionEncoder):
    """The same of single frames."""

    def __init__(self) -> None:
        super().__init__(width=WIDTH, patch_size=14, image_size=28, extra=0)
        self.project = nn.Linear(3 * 14 * 14, WIDTH)

    def encode(self, pixels: Tensor) -> Tensor:
        return self.project(F.unfold(pixels, 14, stride=14).transpose(1, 2))


class Whole(Connector):
    """A Linear for each patch."""

    patch = 14
    keeps_grid = True

    def __init__(self, width: int, llm_width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, llm_width)

    def project(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        projected: Tensor = self.linear(tokens)
        return projected.unflatten(1, grid)


@pytest.fixture
def model() -> VisionLanguageModel:
    torch.manual_seed(0)
    tiny, tokenizer = tiny_llm("qwen2_vl")
    llm = CausalLM(without_tower(tiny), tokenizer)
    frontend = FrontEnd(Patches().freeze(), Pairs())
    model = VisionLanguageModel(frontend, Whole(WIDTH, llm.width), llm)
    nn.init.normal_(model.connector.linear.weight, std=0.5)
    return model.eval()


def picture(width: int, height: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed)).byte()


def clip(frames: int, seed: int = 5, **options: Any) -> Clip:
    return Clip(torch.stack([picture(40, 40, seed + frame) for frame in range(frames)]), 8.0, **options)


def shown() -> list[Any]:
    """A wide picture, two pictures, a clip of three kept frames, a picture and a clip, and a row of one picture."""
    return [
        picture(60, 30),
        [picture(30, 30, 1), picture(50, 20, 2)],
        clip(6),
        [picture(30, 60, 3), clip(4)],
        (picture(30, 30, 4),),
    ]


def test_rows_are_cut_as_planned(model: VisionLanguageModel) -> None:
    tiles = model.frontend.tiles(shown())
    assert tiles.counts == [1, 2, 2, 2, 1]
    assert [len(plan.parts) for plan in tiles.plans] == [0, 2, 0, 2, 0]
    shapes = [(3, 28, 42), *[(3, 14, 28)] * 2, *[(2, 3, 28, 28)] * 2, (3, 28, 28), (2, 3, 28, 28), (3, 28, 28)]
    assert [tuple(pixels.shape) for pixels in tiles.pixels] == shapes
    for image, row in (((30, 30, 1), 1), ((50, 20, 2), 2)):
        alone = Pairs()._one(*image[:2], 1, 2)
        assert torch.equal(tiles.pixels[row], cut(picture(*image), alone)[0])
    kept = [Pairs().plan(40, 40)] * 3
    frames = [cut(picture(40, 40, 5 + frame), plan)[0] for frame, plan in zip((0, 2, 4), kept, strict=True)]
    assert torch.equal(tiles.pixels[3], torch.stack([frames[0], frames[1]]))
    assert torch.equal(tiles.pixels[4], torch.stack([frames[2], frames[2]]))  # an odd frame stands twice
    chosen = clip(6).frames[[0, 2, 4]]
    again = model.frontend.tiles([Clip(chosen, 8.0, sampled=True)])  # is not sampled once more
    assert all(map(torch.equal, again.pixels, tiles.pixels[3:5]))


def test_refusals(model: VisionLanguageModel) -> None:
    with pytest.raises(UsageError, match="a row shows nothing; give a list of at least one"):
        model.frontend.tiles([[]])
    with pytest.raises(BadSample, match=r"missing: nowhere.png \(number 2 of the 2 shown\)"):
        model.frontend.tiles([[picture(30, 30), "nowhere.png"]])


def test_the_prefix_is_as_long_as_planned_and_knows_its_places(model: VisionLanguageModel) -> None:
    tiles = model.frontend.tiles(shown())
    prefix = model.prefix(tiles)
    counts = [6, 4, 8, 8, 4]
    assert prefix.mask.sum(dim=1).tolist() == counts == [plan.tokens for plan in tiles.plans]
    assert [sum(map(model.count_tokens, plan.parts or (plan,))) for plan in tiles.plans] == counts
    assert prefix.places is not None
    assert prefix.places[0, :6].tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 1, 2]]
    assert prefix.places[1, :4].tolist() == [[0, 0, 0], [0, 0, 1]] * 2
    assert [place[0] for place in prefix.places[2].tolist()] == [0] * 4 + [1] * 4
    assert prefix.places[0, 6:].eq(-1).all()
    asked = model.prefix(tiles[:2], [["what?", "who?"], ["where?"]])
    assert asked.places is not None
    assert torch.equal(asked.places[:, :6], prefix.places[[0, 0, 1], :6])
    model.connector.keeps_grid = False  # its tokens are text to the language model
    assert model.prefix(tiles).places is None


def test_clips_and_pictures_in_one_batch_are_answered_as_one_by_one(model: VisionLanguageModel) -> None:
    """Together, alone, streamed, and in a batch of training; numbered by time, row and column each way."""
    rows, options = shown(), {"num_beams": 1, "max_new_tokens": 5, "min_new_tokens": 5}
    questions = ["what is it?", "how many cats are there?", "a", "who is on the bus?", "what?"]
    tiles = model.frontend.tiles(rows)
    together = model.answer(tiles, questions, **options)
    pairs = zip(rows, questions, strict=True)
    alone = [model.answer(model.frontend.tiles([row]), [asked], **options)[0] for row, asked in pairs]
    assert together == alone
    said = "".join(model.stream_answer(model.frontend.tiles([rows[2]]), questions[2], **options))
    assert said == together[2]
    assert model.generate(tiles, **options) == [
        model.generate(model.frontend.tiles([row]), **options)[0] for row in rows
    ]
    batch = Batch(tiles, ["a cat", "two people", "a red bus", "a", "dogs"])
    losses = [model(Batch(tiles[row : row + 1], batch.text[row : row + 1])) for row in range(5)]  # type: ignore[arg-type]
    counts = [model.count_targets(Batch(tiles[row : row + 1], batch.text[row : row + 1])) for row in range(5)]  # type: ignore[arg-type]
    mean = sum(loss["lm"] * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(model(batch)["lm"], mean)
    model.llm.has_places = False  # with plain positions another loss
    assert abs(float(model(batch)["lm"].detach()) - float(mean.detach())) > 1e-3  # type: ignore[union-attr]


def test_a_clip_of_equal_frames_is_the_picture(model: VisionLanguageModel) -> None:
    """Of the tower: a pair of one frame gives the tokens of the picture."""
    still = picture(40, 40)
    pair = model.frontend(model.frontend.tiles([Clip(still[None].repeat(4, 1, 1, 1), 8.0)]))
    torch.testing.assert_close(pair.rows[0], model.frontend(model.frontend.tiles([still])).rows[0])


@pytest.mark.parametrize("temporal", [1, 2])
def test_stored_tokens_of_frame_pairs_are_those_of_the_frames(model: VisionLanguageModel, temporal: int) -> None:
    """Of an encoder of pairs, and of one that reads frames one by one, in every row and in the precision of a store."""
    torch.manual_seed(1)
    encoder = model.frontend.encoder if temporal == 2 else FrameByFrame().freeze()
    frontend = FrontEnd(encoder, Pairs())
    tiles = frontend.tiles(shown())
    direct = frontend.encode_tiles(tiles)
    stored = frontend.encode_tiles(Tiles([], tiles.plans, [pack(row, "fp16") for row in direct.rows]))
    assert stored.lengths == direct.lengths
    assert (stored.grids, stored.plans) == (direct.grids, direct.plans)
    torch.testing.assert_close(stored.packed.float(), direct.packed, atol=1e-3, rtol=1e-3)
    prefix, again = (model.connector(visual) for visual in (direct, stored))
    assert torch.equal(prefix.mask, again.mask)
    torch.testing.assert_close(prefix.embeds, again.embeds, atol=1e-2, rtol=1e-2)


def test_it_trains_on_mixed_rows(model: VisionLanguageModel) -> None:
    batch = Batch(model.frontend.tiles(shown()), ["a cat", "two people", "a red bus", "a", "dogs"])
    optimizer = torch.optim.Adam(model.connector.parameters(), lr=0.05)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = model(batch)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
