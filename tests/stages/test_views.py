"""Views of canvases, and the image encoders that learn from them: what their parts compute, and what is read back."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import combinations
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from transformers import AutoProcessor, CLIPModel

from qformer import stages, vision
from qformer.canvases.canvas import SHAPES, Canvas, CanvasObject, held_out
from qformer.canvases.layout import are_apart
from qformer.canvases.source import Canvases
from qformer.config import BackboneConfig, load_config, shipped
from qformer.files.records import Metrics, read_lines
from qformer.retrieval.embedders import load_embedder
from qformer.stages.towers.canvas_views import (
    VALUES,
    Views,
    cut_out,
    properties,
    window,
    written,
)
from qformer.stages.towers.crowds import draw_crowd
from qformer.stages.towers.encoders import build_encoder, save_rope, ship_encoder, start_encoder
from qformer.stages.towers.global_clip import GlobalClip
from qformer.stages.towers.labels import LabeledTower, overlaps
from qformer.stages.towers.masked import MaskedViT
from qformer.stages.towers.views import Collected, around, features, train_on_views
from qformer.types import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from qformer.vision.qwen2vl import Qwen2VLViT

STAR = CanvasObject("star", "red", 50.0, 60.0, 36, word="cat")
ARROW = CanvasObject("arrow", "blue", 150.0, 40.0, 24, direction="left", hollow=True)
CANVAS = Canvas(200, 120, (STAR, ARROW), 140, edges=("green", None, None, "white"))
SMALL: dict[str, Any] = {"width": 32, "layers": 1, "heads": 2, "image_size": 120, "patch_size": 20}


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (3, height, width), dtype=torch.uint8, generator=generator)


# --- what is seen -----------------------------------------------------------------------------------------------------


def test_properties_of_an_object() -> None:
    known = properties(CANVAS, ARROW)
    assert known == {
        "size": "small",
        "colour": "blue",
        "shape": "arrow",
        "position": CANVAS.position(ARROW),
        "direction": "left",
        "state": "hollow",
    }
    assert "size" not in properties(CANVAS, ARROW, sized=False)
    assert properties(CANVAS, STAR)["word"] == "cat"
    assert "direction" not in properties(CANVAS, STAR)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_crowd_is_of_its_split_and_no_object_lies_on_another(split: str) -> None:
    rng = np.random.default_rng(0)
    crowds = [draw_crowd(rng, split, 120, 160) for _ in range(40)]
    assert {held_out(crowd) for crowd in crowds} == {split == "test"}
    assert sum(len(crowd.objects) for crowd in crowds) / 40 > 4
    shapes = Counter(item.shape for crowd in crowds for item in crowd.objects)
    assert min(shapes[shape] for shape in SHAPES) > 5
    for crowd in crowds:
        assert len({item.pair for item in crowd.objects}) == len(crowd.objects), "a caption would call them alike"
        for a, b in combinations(crowd.objects, 2):
            assert are_apart(a.box[:2], a.side, b.box[:2], b.side)
        boxes = np.array([item.box for item in crowd.objects])
        assert boxes.min() >= 0
        assert boxes[:, 2].max() <= 120
        assert boxes[:, 3].max() <= 160


def test_a_piece_holds_the_objects_and_edges_that_are_whole() -> None:
    piece = cut_out(CANVAS, 20, 0, 110, 110)
    assert [(item.shape, item.x, item.y) for item in piece.objects] == [("star", 30.0, 60.0)]
    assert piece.edges == (None, None, None, None)
    assert cut_out(CANVAS, 0, 0, 110, 120).edges == ("green", None, None, "white")
    assert not cut_out(CANVAS, 33, 0, 110, 110).objects, "the star is cut, and so is the arrow"


@pytest.mark.parametrize("size", [120, None])
def test_boxes_lie_where_objects_are_drawn(size: int | None) -> None:
    """The ground is gray, so that whatever has a color is an object or an edge."""
    views = Views(size=size)
    scales = set()
    for number in range(100):
        view = views[number]
        height, width = view.pixels.shape[:2]
        assert (height, width) == (120, 120) if size else not (height % 20 or width % 20)
        assert len(view.boxes) == len(view.objects) == len(view.canvas.objects)
        assert not size or len(view.objects)
        assert view.caption
        scales.add(round(width / view.canvas.width, 2))
        for (left, top, right, bottom), item in zip(view.boxes, view.canvas.objects, strict=True):
            assert -1e-9 <= left < right <= width + 1e-9
            assert -1e-9 <= top < bottom <= height + 1e-9
            inside = view.pixels[round(top) : round(bottom), round(left) : round(right)].astype(int)
            different = (abs(inside - view.canvas.ground).max(axis=2) > 25).mean()
            assert different > 0.08, item
    assert len(scales) > 5
    assert 1.0 in scales
    assert np.array_equal(views[7].pixels, Views(size=size)[7].pixels)
    assert views[7].objects == Views(size=size)[7].objects


def test_a_view_is_of_its_split() -> None:
    """Whole canvases at their own size show what the canvases of that split show."""
    views, canvases = Views("test", size=None, mixed=False, patch=1), Canvases("test")
    for number in range(5):
        shown = [replace(item, word=None) for item in views[number].canvas.objects]
        assert shown == [replace(item, word=None) for item in canvases.canvas(number).objects]


@pytest.mark.parametrize("number", [165, 263, 366])
def test_a_piece_shows_nothing_that_is_held_out(number: int) -> None:
    """Its thirds are not those of its canvas; these pieces showed shapes of one third in an order that is held out."""
    assert not held_out(Views(mixed=False)[number].canvas)


def test_words_are_written_where_there_is_room() -> None:
    crowd = tuple(replace(STAR, x=30.0 + 40 * i, word=None) for i in range(12))
    canvas = Canvas(520, 120, (*crowd, ARROW, STAR, replace(STAR, hollow=True, word=None)), 140)
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(50):
        objects = written(canvas, rng).objects
        words = [item.word for item in objects if item.word]
        assert len(set(words)) == len(words)
        assert objects[13].word == "cat"
        assert objects[12].word is None
        assert objects[14].word is None
        shares.append((len(words) - 1) / 12)
    assert 0.5 < sum(shares) / 50 < 0.7


def test_a_window_holds_an_object_and_stays_on_the_canvas() -> None:
    rng = np.random.default_rng(0)
    for number in range(50):
        canvas = Canvases().canvas(number)
        left, top = window(canvas, 100, 120, rng)
        assert 0 <= left <= canvas.width - 100
        assert 0 <= top <= canvas.height - 120
        assert cut_out(canvas, left, top, 100, 120).objects


def test_views_that_cannot_be_made() -> None:
    with pytest.raises(UsageError, match="size is 40"):
        Views(size=40)
    with pytest.raises(UsageError, match="count is 0"):
        Views(count=0)


# --- what encoders compute --------------------------------------------------------------------------------------------


def test_overlaps_are_pixels() -> None:
    got = overlaps(torch.tensor([[10.0, 0.0, 30.0, 20.0], [0.0, 20.0, 60.0, 25.5]]), (2, 3), 20)
    assert got.tolist() == [[200, 200, 0, 0, 0, 0], [0, 0, 0, 110, 110, 110]]


def test_labels_are_read_from_the_mean_token_of_a_box() -> None:
    """The losses by hand: each property over the objects that have it, the number over the pictures."""
    torch.manual_seed(0)
    tower = LabeledTower(BackboneConfig(kind="rope", **SMALL)).eval()
    pictures = [picture(120, 120), picture(80, 160)]
    boxes = [torch.tensor([[0.0, 0.0, 20.0, 20.0], [30.0, 0.0, 50.0, 20.0]]), torch.tensor([[0.0, 0.0, 160.0, 80.0]])]
    objects = [[{"shape": "star"}, {"shape": "moon", "colour": "red"}], [{"shape": "arrow"}]]
    with torch.no_grad():
        got = tower(pictures, boxes, objects)
        first, second = tower.patches(pictures)
        rows = torch.stack([first[0], (first[1] + first[2]) / 2, second.mean(dim=0)])
        shapes = torch.tensor([VALUES["shape"].index(shape) for shape in ("star", "moon", "arrow")])
        torch.testing.assert_close(got["shape"], F.cross_entropy(tower.classifiers["shape"](rows), shapes))
        red = torch.tensor([VALUES["colour"].index("red")])
        torch.testing.assert_close(got["colour"], F.cross_entropy(tower.classifiers["colour"](rows[1:2]), red))
        means = torch.stack([first.mean(dim=0), second.mean(dim=0)])
        torch.testing.assert_close(got["count"], F.cross_entropy(tower.counter(means), torch.tensor([2, 1])))
    assert {key for key, loss in got.items() if loss} == {"shape", "colour", "count"}


@pytest.mark.parametrize("kind", ["vit", "rope"])
def test_an_encoder_goes_on_from_a_vit(kind: Any, tmp_path: Path) -> None:
    """Without its table of positions, rotation and final norm, a ViT computes what the other form does."""
    torch.manual_seed(0)
    former = LabeledTower(BackboneConfig(kind="vit", **SMALL)).eval()
    former.save(tmp_path)
    config = BackboneConfig(kind=kind, start=str(tmp_path), **SMALL)
    encoder: Any = LabeledTower(config).encoder.eval()
    pixels = torch.rand(1, 3, 20, 20)  # one patch, for which places do not matter
    given: Any = former.encoder
    with torch.no_grad():
        if kind == "vit":
            torch.testing.assert_close(encoder(pixels), given(pixels))
            return
        vit = given.tower
        vit.embeddings.position_embeddings.zero_()
        vit.embeddings.patch_embeddings.projection.bias.zero_()
        hidden = vit.embeddings(2 * pixels - 1, interpolate_pos_encoding=True)[:, 1:]  # without CLS
        for layer in vit.layers:
            hidden = layer(hidden)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        torch.testing.assert_close(encoder.encode(2 * pixels - 1), hidden, atol=0.02, rtol=0.02)  # quick GELU


def test_an_encoder_that_cannot_go_on(tmp_path: Path) -> None:
    LabeledTower(BackboneConfig(kind="vit", **SMALL)).save(tmp_path)
    other = build_encoder(BackboneConfig(kind="rope", **{**SMALL, "width": 64}))
    with pytest.raises(UsageError, match="has other sizes"):
        start_encoder(other, str(tmp_path))
    with pytest.raises(UsageError, match=r"start of an image encoder is for the source views"):
        load_config(shipped()["mini/vit.yaml"], ["backbone.start=mini:vit"])


@pytest.mark.parametrize("kind", ["vit", "rope"])
def test_pictures_together_equal_pictures_one_by_one(kind: Any) -> None:
    torch.manual_seed(0)
    tower = LabeledTower(BackboneConfig(kind=kind, **SMALL)).eval()
    pictures = [picture(*size, seed) for seed, size in enumerate([(120, 120), (240, 160), (120, 120), (480, 120)])]
    with torch.no_grad():
        together, alone = tower.patches(pictures), [tower.patches([one])[0] for one in pictures]
    for got, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_at_the_size_of_its_table_a_vit_of_any_size_is_a_plain_one() -> None:
    torch.manual_seed(0)
    tower = LabeledTower(BackboneConfig(kind="vit", **SMALL)).eval()
    encoder: Any = tower.encoder
    pixels = picture(120, 120)
    with torch.no_grad():
        plain = encoder.tower(pixel_values=pixels[None].float() / 127.5 - 1).last_hidden_state[0, 1:]
        torch.testing.assert_close(tower.patches([pixels])[0], plain)


def test_masked_patches_alone_are_the_targets() -> None:
    """The loss by hand, over the hidden half; what is hidden changes no prediction, only the targets."""
    torch.manual_seed(0)
    tower = MaskedViT(BackboneConfig(kind="vit", mask=0.5, **SMALL)).eval()
    pixels = picture(120, 120)
    noise = torch.rand(1, 36)
    hidden = noise[0].argsort()[18:]
    with torch.no_grad():
        found = tower.model(pixel_values=pixels[None].float() / 127.5 - 1, noise=noise)
        assert found.mask[0].nonzero().flatten().tolist() == sorted(hidden.tolist())
        patches = F.unfold(pixels[None].float() / 127.5 - 1, 20, stride=20)[0].T  # (36, 3 * 20 * 20), channels first
        patches = patches.view(36, 3, 20, 20).permute(0, 2, 3, 1).flatten(1)
        targets = (patches - patches.mean(dim=1, keepdim=True)) / (patches.var(dim=1, keepdim=True) + 1e-6).sqrt()
        expected = (found.logits[0] - targets)[hidden].square().mean()
        torch.testing.assert_close(tower([pixels], noise), expected)
        changed = pixels.clone()
        row, column = divmod(int(hidden[0]), 6)
        changed[:, 20 * row : 20 * row + 20, 20 * column : 20 * column + 20] = picture(20, 20, 1)
        torch.testing.assert_close(
            tower.model(pixel_values=changed[None].float() / 127.5 - 1, noise=noise).logits, found.logits
        )
        assert not torch.isclose(tower([changed], noise), expected)


def test_a_masked_vit_knows_places() -> None:
    """Two equal patches have different tokens, and two hidden ones different predictions."""
    torch.manual_seed(0)
    tower = MaskedViT(BackboneConfig(kind="vit", mask=0.5, **SMALL)).eval()
    tokens = tower.patches([torch.full((3, 120, 120), 100, dtype=torch.uint8)])[0]
    assert (torch.cdist(tokens, tokens) + 10 * torch.eye(36)).min() > 0.05
    with torch.no_grad():
        logits = tower.model(pixel_values=torch.zeros(1, 3, 120, 120), noise=torch.arange(36.0)[None]).logits[0, 18:]
    assert (torch.cdist(logits, logits) + 10 * torch.eye(18)).min() > 0.01


def test_equal_captions_share_the_target_of_a_clip() -> None:
    torch.manual_seed(0)
    text = ["a red star", "a blue circle", "a red star"]
    clip = GlobalClip(BackboneConfig(kind="clip", vocab_size=300, max_tokens=20, **SMALL), text).eval()
    pictures = [picture(120, 120, seed) for seed in range(3)]
    with torch.no_grad():
        tokens = clip.tokenizer(text, padding=True, return_tensors="pt")
        image = clip.model.get_image_features(pixel_values=clip._normalized(pictures))
        words = clip.model.get_text_features(**tokens)
        image, words = (getattr(rows, "pooler_output", rows) for rows in (image, words))
        logits = clip.model.logit_scale.exp() * F.normalize(image, dim=1) @ F.normalize(words, dim=1).T
        targets = torch.tensor([[0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]])
        losses = [-(targets * F.log_softmax(table, dim=1)).sum(dim=1).mean() for table in (logits, logits.T)]
        torch.testing.assert_close(clip(pictures, text), (losses[0] + losses[1]) / 2)


# --- what probes read -------------------------------------------------------------------------------------------------


def test_four_tokens_around_a_place() -> None:
    grid = torch.arange(12.0).view(3, 4, 1)
    assert around(grid, 1.6, 1.1).tolist() == [1, 2, 5, 6]
    assert around(grid, 0.1, 2.9).tolist() == [4, 5, 8, 9], "at the border the nearest four"


class Places:
    """Tokens that hold their own column and row."""

    def patches(self, pictures: list[Tensor]) -> list[Tensor]:
        found = []
        for shown in pictures:
            rows, columns = shown.shape[1] // 20, shown.shape[2] // 20
            found.append(torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float())
        return found


def test_features_are_of_the_place_of_each_object() -> None:
    views = [Views(size=None)[i] for i in range(6)]
    got = features(cast("Any", Places()), views)
    objects = [(view, number) for view in views for number in range(len(view.objects))]
    assert got["colour"][0].shape == (len(objects), 8)
    for row, (view, number) in zip(got["colour"][0], objects, strict=True):
        left, top, right, bottom = view.boxes[number]
        center = torch.tensor([(top + bottom) / 40 - 0.5, (left + right) / 40 - 0.5])  # in patches from a middle
        assert (row.view(4, 2) - center).abs().max() <= 1.5
    assert got["count"][1].tolist() == [len(view.objects) - 1 for view in views]


def test_labels_are_by_property() -> None:
    collected = Collected()
    collected.add(torch.zeros(2), properties(CANVAS, ARROW))
    collected.add(torch.ones(2), properties(CANVAS, STAR))
    got = collected.stacked()
    assert got["direction"][1].tolist() == [3]
    assert got["state"][1].tolist() == [1, 0]
    assert got["word"][0].tolist() == [[1, 1]]
    assert "count" not in got


# --- what is written and read back ------------------------------------------------------------------------------------


def test_a_saved_vit_and_mae_give_the_same_tokens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    towers: list[Any] = [
        LabeledTower(BackboneConfig(kind="vit", **SMALL)).eval(),
        MaskedViT(BackboneConfig(kind="vit", mask=0.5, **SMALL)).eval(),
    ]
    pixels = picture(120, 120)
    for number, tower in enumerate(towers):
        tower.save(tmp_path / str(number))
        encoder = vision.build("hf", path=str(tmp_path / str(number)))
        with torch.no_grad():
            torch.testing.assert_close(encoder(pixels[None] / 255)[0, 1:], tower.patches([pixels])[0])


def test_a_saved_tower_of_qwen_s_form_gives_the_same_tokens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tower = LabeledTower(BackboneConfig(kind="rope", **SMALL)).eval()
    tower.save(tmp_path / "own")
    ship_encoder("rope", tmp_path / "own", tmp_path / "half")
    sizes = {"patch_size": 20, "image_size": 120, "width": 32, "heads": 2, "depth": 1, "mlp_hidden": 128}
    encoder = vision.build("qwen2vl", weights=str(tmp_path / "own"), **sizes)
    half = vision.build("qwen2vl", weights=str(tmp_path / "half"), **sizes)
    pixels = picture(80, 160)
    with torch.no_grad():
        torch.testing.assert_close(encoder(pixels[None] / 255)[0], tower.patches([pixels])[0])
        torch.testing.assert_close(half(pixels[None] / 255)[0], tower.patches([pixels])[0], atol=0.01, rtol=0.01)
    save_rope(cast("Qwen2VLViT", encoder), tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "own" / "config.json").read_text()


def test_a_saved_clip_is_read_by_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    text = ["a red star", "a hollow blue circle at the top"]
    clip = GlobalClip(BackboneConfig(kind="clip", vocab_size=300, max_tokens=20, **SMALL), text).eval()
    pixels = picture(120, 120)
    clip.save(tmp_path)
    model, processor = CLIPModel.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(model, CLIPModel)
    inputs = processor(text=text, images=pixels, return_tensors="pt", padding=True)
    with torch.no_grad():
        tokens = clip.tokenizer(text, padding=True, return_tensors="pt")
        expected = clip.model(pixel_values=clip._normalized([pixels]), **tokens).logits_per_image
        torch.testing.assert_close(model(**inputs).logits_per_image, expected, atol=1e-4, rtol=1e-4)
        scores = load_embedder(str(tmp_path), "cpu")([pixels], [text])
        torch.testing.assert_close(torch.tensor(scores) * model.logit_scale.exp(), expected, atol=1e-4, rtol=1e-4)
        encoder = vision.build("hf", path=str(tmp_path))
        torch.testing.assert_close(encoder(pixels[None] / 255)[0, 1:], clip.patches([pixels])[0])


# --- recipes ----------------------------------------------------------------------------------------------------------

FEW = ["train.warmup=1", "train.precision=fp32", "data.batch=4", "data.validation=null"]
TINY = ["backbone.width=32", "backbone.layers=1", "backbone.heads=2"]


@pytest.mark.parametrize("name", ["vit_rope", "clip", "ssl"])
def test_a_recipe_goes_on_where_it_stopped(name: str, tmp_path: Path) -> None:
    """Four steps at once, and two and then two more, have the same losses."""
    start = ["backbone.start=null"] if name.startswith("vit") else []
    losses = []
    for run, stops in (("once", [4]), ("twice", [2, 4])):
        for steps in stops:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("qformer.stages.towers.views.TEXTS", 50)
                if steps < stops[-1]:
                    patch.setattr("qformer.stages.loop.Stop", Ended)
                options = [f"run={tmp_path / run}", "train.steps=4", "train.log_every=1", *FEW, *TINY, *start]
                config = load_config(shipped()[f"mini/{name}.yaml"], options)
                if steps < stops[-1]:
                    with pytest.raises(SystemExit):
                        stages.train(config)
                else:
                    stages.train(config)
        losses.append([line["loss"] for line in read_lines(tmp_path / run / "metrics.jsonl", Metrics)])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4


class Ended:
    """A signal that came before the first step."""

    asked = "SIGTERM"

    def __enter__(self) -> Ended:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def test_recipes_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="a clip trains a text tower of its own"):
        BackboneConfig(kind="clip", text="mini:bert", **SMALL)
    with pytest.raises(ValidationError, match="mask is for a vit"):
        BackboneConfig(kind="rope", mask=0.5, **SMALL)
    path = shipped()["mini/ssl.yaml"]
    config = load_config(path, [f"run={tmp_path}", "data.train.size=null"])
    with pytest.raises(UsageError, match=r"trained on views of backbone\.image_size 120"):
        train_on_views(config, cast("BackboneConfig", config.backbone))
    native = load_config(shipped()["mini/vit_native.yaml"], [f"run={tmp_path}", "backbone.text=mini:bert"])
    with pytest.raises(UsageError, match="needs no text tower"):
        train_on_views(native, cast("BackboneConfig", native.backbone))
    config = load_config(path, [f"run={tmp_path}", "data.train={name: scenes}", "data.validation=null"])
    with pytest.raises(UsageError, match="give the source views"):
        stages.train(config)
