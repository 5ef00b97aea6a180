"""Links between slices: what a Q-Former's queries read of the other tiles, by the place of each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

import qformer
from qformer import stages
from qformer.checkpoints.convert import convert_checkpoint
from qformer.checkpoints.parts import LoadOptions
from qformer.config import dump_config, parse_config
from qformer.connectors.places import WAVES, waves_of
from qformer.evaluation.attention import answer_relevance, query_maps
from qformer.model.connectors import QFormerConnector
from qformer.model.image_text import ImageTextModel
from qformer.model.qformer import QFormer
from qformer.model.vision_language import VisionLanguageModel
from qformer.schema import Config, QFormerConfig
from qformer.stages.inherit import inherit
from qformer.types import Plan, Tile, UsageError, VisualTokens
from tests.slices import Slices
from tests.tiny import tiny_tokenizer
from tests.workspace import config, make_workspace

SIZES = {"hidden_size": 16, "layers": 2, "heads": 2, "intermediate_size": 24, "queries": 3, "encoder_width": 6}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
LINKS: list[Any] = ["joint", "per_slice"]
RESOLUTION = {"name": f"{Slices.__module__}:{Slices.__name__}", "least": 35, "size": 28}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("links"))


def connector(links: Any, placed: float = 0.5, tokenizer: Any = None) -> QFormerConnector:
    """Lively weights, places too unless they are to stay zero."""
    torch.manual_seed(0)
    words = {} if tokenizer is None else {"vocab_size": len(tokenizer), "max_positions": 16}
    qformer = QFormer(QFormerConfig(**SIZES, **words))
    made = QFormerConnector(qformer if tokenizer else qformer.drop_text(), 5, 1.0, tokenizer, 16, links)
    for name, weight in made.named_parameters():
        if "norm" in name:
            continue
        torch.nn.init.normal_(weight, std=placed if "place_" in name else 0.4)
    return made.eval()


def seen(same: bool = False, order: tuple[int, ...] = (0, 1, 2)) -> VisualTokens:
    """One picture of two halves and the whole, then one of a single tile; `same`: equal tokens in all of the first."""
    torch.manual_seed(1)
    plans = [Slices().plan(40, 40), Slices(least=50).plan(40, 40)]
    tiles = [torch.randn(5, 6) for _ in range(3)]
    rows = [tiles[0 if same else number] for number in order]
    return VisualTokens([*rows, torch.randn(5, 6)], [(2, 2)] * 4, 1, plans)


def read(made: QFormerConnector, visual: VisualTokens, image: int = 0) -> Tensor:
    prefix = made(visual)
    row: Tensor = prefix.embeds[image][prefix.mask[image]]
    assert len(row) == made.count_tokens(visual.plans[image])
    return row


def test_places_tell_tiles_and_frames_apart() -> None:
    square = Tile((56, 28), (56, 28), (0, 0), (0, 0, 28, 28))
    tiles = [
        square,
        replace(square, box=(28, 0, 56, 28)),
        replace(square, content=(28, 28)),
        replace(square, frames=(3,)),
    ]
    padded = Tile((56, 28), (56, 56), (0, 14), (0, 14, 28, 42))
    assert len({tuple(waves_of(tile)) for tile in tiles}) == 4
    assert waves_of(padded) == waves_of(square)  # the same part of the picture
    assert len(waves_of(square)) == WAVES


@pytest.mark.parametrize("links", LINKS)
def test_places_start_at_zero(links: Any) -> None:
    """Then slices with equal tokens give equal rows, and their order means nothing."""
    qformer = QFormer(QFormerConfig(**SIZES)).drop_text()
    fresh = QFormerConnector(qformer, 5, links=links)
    places = {name: weight for name, weight in fresh.named_parameters() if "place_" in name}
    assert list(places) == [f"qformer.place_{what}.weight" for what in ("tokens", "queries")[: LINKS.index(links) + 1]]
    assert not any(weight.any() for weight in places.values())
    made = connector(links, placed=0.0)
    first = read(made, seen()).unflatten(0, (-1, 3))
    for rows in (read(made, seen(order=(1, 0, 2))).unflatten(0, (-1, 3)), first[:1].expand_as(first)):
        torch.testing.assert_close(rows, first, **CLOSE)


def test_slices_differ_and_their_order_changes_the_result() -> None:
    """With places, of equal tokens too; each slice's rows depend on the tokens of the others."""
    joint, each = (connector(links) for links in LINKS)
    assert read(joint, seen()).shape == (3, 5)
    assert read(each, seen()).shape == (9, 5)
    slices = read(each, seen(same=True)).unflatten(0, (3, 3))
    assert (slices[0] - slices[1]).abs().max() > 0.05
    assert (slices[1] - slices[2]).abs().max() > 0.05
    for made in (joint, each):
        assert (read(made, seen()) - read(made, seen(order=(1, 0, 2)))).abs().max() > 0.05
        changed = seen()
        changed.rows[2] = changed.rows[2] + 1
        assert (read(made, seen()) - read(made, changed)).abs().amax(dim=1).min() > 1e-3
        torch.testing.assert_close(read(made, seen(), 1), read(made, changed, 1))
    alone = connector("none")
    changed = seen()
    changed.rows[2] = changed.rows[2] + 1
    torch.testing.assert_close(read(alone, seen())[:6], read(alone, changed)[:6])


def test_joint_queries_read_the_tokens_of_all_tiles_as_of_one() -> None:
    made = connector("joint")
    visual = seen()
    placed = made.qformer.place_tokens
    assert placed is not None
    tokens = torch.cat([row + place for row, place in zip(visual.rows[:3], placed(visual), strict=False)])
    torch.testing.assert_close(read(made, visual), made.projection(made.qformer.encode_image(tokens[None])[0]), **CLOSE)


@pytest.mark.parametrize("links", LINKS)
def test_several_pictures_and_questions(links: Any) -> None:
    """Each picture of a row is linked by itself; questions get the rows of each alone; markers find their place."""
    tokenizer: Any = tiny_tokenizer("bert")
    made = connector(links, tokenizer=tokenizer)
    visual = seen()
    both = replace(visual, plans=[Plan.join(visual.plans)], counts=[])
    torch.testing.assert_close(read(made, both), torch.cat([read(made, visual), read(made, visual, 1)]), **CLOSE)
    asked = [["what is this", ""], ["a dog"]]
    rows = made(visual, asked)
    sets = made.count_tokens(visual.plans[0]), made.count_tokens(visual.plans[1])
    assert rows.mask.sum(dim=1).tolist() == [sets[0], sets[0], sets[1]]
    torch.testing.assert_close(rows.embeds[1], read(made, visual), **CLOSE)
    for row, (image, question) in enumerate([(0, "what is this"), (0, ""), (1, "a dog")]):
        alone = made(visual.select([image]), [[question]]).embeds[0]
        torch.testing.assert_close(rows.embeds[row][: len(alone)], alone, **CLOSE)
    assert (rows.embeds[0] - rows.embeds[1]).abs().max() > 0.01

    marked = made(visual, None, lambda text: torch.full((5,), float(len(text))))
    comma, end = torch.ones(5), torch.full((5,), 12.0)
    first = marked.embeds[0][marked.mask[0]]
    assert len(first) == sets[0] + visual.plans[0].markers
    places = [number for number, row in enumerate(first) if torch.equal(row, comma) or torch.equal(row, end)]
    assert places == ([3, 4] if links == "joint" else [3, 7])
    kept = [number for number in range(len(first)) if number not in places]
    torch.testing.assert_close(first[kept], read(made, visual), **CLOSE)


def linked(root: Path, stage: str, links: str, **changes: Any) -> Config:
    return config(root, stage, connector={"name": "qformer", "links": links}, resolution=RESOLUTION, **changes)


def test_stages_one_and_two_with_links(root: Path, tmp_path: Path) -> None:
    """ITM and ITG of stage one learn the places; stage two takes them along, and links otherwise if it is told so."""
    short = {"train": {"steps": 2, "save_every": 2, "warmup": 1}}
    one = linked(root, "stage1", "joint", run=str(tmp_path / "one"), **short)
    assert yaml.safe_load(dump_config(one))["connector"] == {"name": "qformer", "links": "joint"}
    first = qformer.load(stages.train(one), device="cpu", trust=True)
    assert isinstance(first, ImageTextModel)
    assert first.qformer.place_tokens is not None
    learned = first.qformer.place_tokens.weight
    assert learned.any()
    tiles = first.frontend.tiles([root / "images" / f"{number}.png" for number in (0, 9)])
    before = first.match_scores(tiles, ["a cat", "a dog"])
    with torch.no_grad():
        learned.mul_(-200)
    after = first.match_scores(tiles, ["a cat", "a dog"])
    assert (before - after).abs().max() > 1e-4

    two = linked(root, "stage2", "per_slice", init=str(tmp_path / "one"), run=str(tmp_path / "two"), **short)
    assert inherit(two, one).links == "per_slice"
    assert inherit(config(root, "stage2", init=str(tmp_path / "one")), one).links == "joint"
    last = stages.train(two)
    second = qformer.load(last, device="cpu", trust=True)
    assert isinstance(second, VisionLanguageModel)
    assert isinstance(second.connector, QFormerConnector)
    assert second.connector.links == "per_slice"
    assert second.connector.qformer.place_queries is not None
    assert second.connector.qformer.place_queries.weight.any()
    assert isinstance(second.frontend.norm, torch.nn.LayerNorm)
    prefix = second.prefix(tiles)
    assert prefix.mask.sum(dim=1).tolist() == [second.count_tokens(plan) for plan in tiles.plans] == [3, 9 + 2]
    assert len(second.generate(tiles, max_new_tokens=3)) == 2
    with pytest.raises(UsageError, match="read all tiles of an image together"):
        query_maps(second, Image.open(root / "images" / "9.png"))
    words, relevance = answer_relevance(second, Image.open(root / "images" / "9.png"), "what is it?", "a cat")
    assert len(words) == 2
    assert relevance.sum().item() == pytest.approx(1, abs=1e-4)
    with pytest.raises(UsageError, match="has links between slices"):
        convert_checkpoint(str(last), tmp_path / "converted", "lavis", LoadOptions(), trust=True)
    own = convert_checkpoint(str(last), tmp_path / "own", "qformer", LoadOptions(), trust=True)
    copied = qformer.load(own, device="cpu", trust=True)
    assert isinstance(copied, VisionLanguageModel)
    assert torch.equal(copied.prefix(tiles).embeds, prefix.embeds)


def test_what_cannot_be_is_refused(root: Path) -> None:
    with pytest.raises(UsageError, match=r"connector\.links is 'some'; give one of none, joint, per_slice"):
        linked(root, "stage2", "some")
    plain = linked(root, "stage2", "none")
    assert "connector" not in yaml.safe_load(dump_config(plain))
    assert parse_config(yaml.safe_load(dump_config(plain))).links == "none"
