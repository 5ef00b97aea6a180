"""A ViT trained on phrases about regions: what a region is, the loss, what the probes measure, and the whole run."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F

from qformer import stages
from qformer.config import BackboneConfig, parse_config
from qformer.scenes.phrases import VALUES, Phrases, phrase
from qformer.scenes.scenes import Scenes, draw
from qformer.stages.towers.build import build_language_model, train_tokenizer
from qformer.stages.towers.matching import ContrastiveViT
from qformer.stages.towers.phrases import PhraseBatches, PhraseTask, cells, linear_probe, probe_features
from qformer.types import UsageError
from qformer.vision import build

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("phrases")
    texts = [phrase(one) for i in range(200) for one in Phrases()[i][1]]
    config = BackboneConfig(kind="bert", width=32, layers=1, heads=2, vocab_size=200)
    torch.manual_seed(0)
    tokenizer = train_tokenizer("bert", texts, config.vocab_size)
    build_language_model(config, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def backbone(bert: str, **changes: Any) -> dict[str, Any]:
    sizes = {"kind": "vit", "width": 32, "layers": 1, "heads": 2, "image_size": 48, "patch_size": 8}
    return {**sizes, "text": bert, **changes}


def configuration(folder: Path, bert: str, **changes: Any) -> dict[str, Any]:
    return {
        "stage": "vision",
        "run": str(folder / "vit"),
        "backbone": backbone(bert, **changes),
        "data": {
            "train": {"name": "phrases"},
            "validation": {"name": "scenes", "split": "val"},
            "validation_size": 30,
            "batch": 8,
        },
        "train": {"steps": 2, "warmup": 1, "lr": 1e-3, "validate_every": 0, "save_every": 0},
    }


def tower(bert: str) -> ContrastiveViT:
    torch.manual_seed(0)
    return ContrastiveViT(BackboneConfig(**backbone(bert))).eval()


def test_a_batch_holds_the_pictures_of_its_scenes() -> None:
    phrases = Phrases(size=48, count=6)
    loaded = PhraseBatches(phrases, 4)[1]
    pictures = [phrases[i] for i in (4, 5, 0, 1)]
    assert loaded.batch.text == pictures
    assert loaded.keys == ["4", "5", "0", "1"]
    for tile, (scene, _) in zip(loaded.batch.tiles.pixels, pictures, strict=True):
        assert torch.equal(tile, torch.from_numpy(draw(scene, 48, 48)).permute(2, 0, 1))


def test_a_region_holds_its_object_whole_and_no_other() -> None:
    scenes = [Scenes("train").scene(i) for i in range(30)]
    found = cells(scenes, 6).unflatten(2, (6, 6))
    objects = [(image, item) for image, scene in enumerate(scenes) for item in scene.objects]
    assert len(found) == len(objects)
    for region, (image, item) in zip(found, objects, strict=True):
        assert region.sum() == region[image].sum() == 4
        rows, columns = region[image].nonzero(as_tuple=True)
        left, top, right, bottom = (6 * edge for edge in item.box())
        assert columns.min() <= left < right <= columns.max() + 1
        assert rows.min() <= top < bottom <= rows.max() + 1


def test_the_loss_is_the_cross_entropy_of_phrases_less_its_floor(bert: str) -> None:
    model = tower(bert)
    pixels = torch.rand(2, 3, 48, 48)
    regions = torch.zeros(3, 2, 36, dtype=torch.bool)
    regions[0, 0, [3, 4]] = regions[1, 0, [20]] = regions[2, 1, [0, 1, 6, 7]] = True
    text, true = ["red star", "large object"], torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.0, 1.0]])
    with torch.no_grad():
        tokens = model.tokens(pixels)[:, 1:]
        rows = torch.stack([tokens[0, [3, 4]].mean(0), tokens[0, 20], tokens[1, [0, 1, 6, 7]].mean(0)])
        expected = []
        for words, own in zip(text, true.T, strict=True):
            vector = model.embed_texts([words])[0][0].mean(dim=0)  # alone: padding must not change it
            scores = F.cosine_similarity(vector[None], model.image_proj(rows), dim=-1) * model.scale.exp()
            target = own / own.sum()
            expected.append(-(target * scores.log_softmax(0)).sum() - target.sum() * own.sum().log())
        assert float(model.grounded(pixels, regions, text, true)) == pytest.approx(float(sum(expected)) / 2, abs=1e-4)


def test_a_probe_finds_what_is_linear_and_nothing_else() -> None:
    torch.manual_seed(0)
    known, asked = torch.randn(400, 12), torch.randn(200, 12)
    rule = torch.randn(12, 3)
    assert linear_probe(known, (known @ rule).argmax(1), asked, (asked @ rule).argmax(1)) > 0.93
    assert linear_probe(known, torch.randint(3, (400,)), asked, torch.randint(3, (200,))) < 0.5


def test_a_probe_reads_the_tokens_around_the_centre() -> None:
    class Places:
        scale = torch.tensor(1.0)

        def tokens(self, pixels: torch.Tensor) -> torch.Tensor:  # every token tells its own row and column
            grid = torch.cartesian_prod(torch.arange(6.0), torch.arange(6.0))
            return torch.cat([torch.zeros(1, 2), grid]).expand(len(pixels), 37, 2)

    source = Scenes("train", size=48, count=20)
    features, _ = probe_features(Places(), source)["position"]  # type: ignore[arg-type]
    objects = [item for i in range(20) for item in source.scene(i).objects]
    assert len(features) == len(objects)
    for row, item in zip(features.unflatten(1, (4, 2)), objects, strict=True):
        middle = row.mean(dim=0) + 0.5  # in patches, from the upper left corner of the picture
        assert (middle - 6 * torch.tensor([item.y, item.x])).abs().max() <= 0.5 + 1e-6


@pytest.mark.slow
def test_a_run_saves_a_tower_and_reports_its_probes(tmp_path: Path, bert: str) -> None:
    folder = stages.train(parse_config(configuration(tmp_path, bert)))
    records = [json.loads(line) for line in (tmp_path / "vit" / "metrics.jsonl").read_text().splitlines()]
    assert {key for r in records for key in r if key.startswith("probe_")} == {f"probe_{key}" for key in VALUES}
    encoder = build("hf", path=str(folder))
    assert encoder.width == 32
    assert (tmp_path / "vit" / "curves.png").exists()


def test_a_grid_that_cells_do_not_divide(tmp_path: Path, bert: str) -> None:
    with pytest.raises(UsageError, match="a grid of 4 x 4 patches"):
        stages.train(parse_config(configuration(tmp_path, bert, image_size=32)))


def test_the_loss_falls(bert: str) -> None:
    task = PhraseTask(tower(bert), 6).train()
    batch = PhraseBatches(Phrases(size=48), 8)[0].batch
    optimizer = torch.optim.AdamW(task.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss = task(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
