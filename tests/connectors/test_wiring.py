"""Every connector of the table in stage two: trained, saved, loaded, captioning, asked; and markers around tiles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import qformer
from qformer import stages
from qformer.config import dump_config, load_config
from qformer.llm.loading import load_language_model
from qformer.llm.plain_text import single_token
from qformer.model.assembly import build_vision_language
from qformer.model.connectors import CONNECTORS
from qformer.model.vision_language import VisionLanguageModel
from qformer.schema import Config
from qformer.stages.checking import check
from qformer.stages.plan.outline import outline
from qformer.stages.plan.rehearsal import Subject
from qformer.types import Batch, UsageError
from tests.commands import outcome
from tests.slices import Slices
from tests.test_cli import one_sentence
from tests.workspace import config, make_workspace

SLICES = f"{Slices.__module__}:{Slices.__name__}"
OPTIONS: dict[str, dict[str, Any]] = {
    "mlp": {"hidden": 8},
    "pixel_shuffle_mlp": {"version": "v1"},
    "resampler": {"queries": 4, "heads": 2},
    "spatial_resampler": {"queries": 4},
    "compressor": {"patch": 14, "inner": 4},
    "merger": {},
    "avg_pool": {"queries": 4},
    "c_abstractor": {"queries": 4, "hidden": 8, "depth": 1, "side": 4},
    "token_packer": {},
}
#: Tokens of two slices and the whole, each of 4x4 patches, without their two markers.
LENGTHS = {"mlp": 48, "compressor": 2 + 2 + 3 * 4 * 5} | dict.fromkeys(
    ("pixel_shuffle_mlp", "resampler", "spatial_resampler", "merger", "avg_pool", "c_abstractor", "token_packer"), 12
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("wiring"))


def settings(root: Path, name: str, **changes: Any) -> Config:
    values: dict[str, Any] = {
        "vision": {"name": "hf", "path": str(root / "vit")},
        "resolution": {"name": SLICES, "size": 56, "least": 35},
        "connector": {"name": name} | OPTIONS.get(name, {}),
        "init": None,
    }
    return config(root, "stage2", **(values | changes))


def images(root: Path) -> list[Path]:
    """A low one, which is one tile, and a taller one."""
    return [root / "images" / f"{number}.png" for number in (0, 9)]


@pytest.mark.parametrize("name", OPTIONS)
def test_every_connector_trains_is_loaded_and_answers(name: str, root: Path, tmp_path: Path) -> None:
    """The weights come back as they were, markers too; the towers stay frozen; what was planned is produced."""
    run = {"run": str(tmp_path / "run"), "train": {"steps": 2, "save_every": 2, "warmup": 1}}
    values = settings(root, name, data={"validation": None}, **run)
    file = tmp_path / "stage2.yaml"
    file.write_text(dump_config(values))
    last = stages.train(check(load_config(file)))
    model = qformer.load(last, device="cpu", trust=True)
    assert isinstance(model, VisionLanguageModel)
    assert type(model.connector) is type(build_vision_language(values)[0].connector)
    assert model.frontend.norm is None
    torch.manual_seed(0)
    fresh = build_vision_language(values)[0]
    trained = {part: weight for part, weight in model.named_parameters() if weight.requires_grad}
    assert all(part.startswith(("connector.", "markers.")) for part in trained)
    assert "markers.0" in trained
    assert "markers.1" not in trained
    moved = [
        part for part, weight in fresh.named_parameters() if part in trained and not torch.equal(weight, trained[part])
    ]
    assert "connector.pos_embed" not in trained
    assert set(moved) > {"markers.0"}

    tiles = model.frontend.tiles(images(root))
    prefix = model.prefix(tiles)
    one, sliced = tiles.plans
    assert prefix.mask.sum(dim=1).tolist() == [model.count_tokens(one), model.count_tokens(sliced)]
    assert model.count_tokens(sliced) == model.connector.count_tokens(sliced) + 2 == LENGTHS[name] + 2
    assert len(model.generate(tiles, max_new_tokens=3)) == 2
    assert list(map(len, model.answer(tiles, [["what is it?", "is it red?"], ["what is it?"]]))) == [2, 1]
    again = qformer.load(last, device="cpu", trust=True)
    assert torch.equal(again.prefix(tiles).embeds, prefix.embeds)


def test_a_gradient_reaches_connector_and_markers_alone(root: Path) -> None:
    """The newline of an MLP is for other plans; that of the compressor is always there."""
    for name in OPTIONS:
        model, _ = build_vision_language(settings(root, name))
        model(Batch(model.frontend.tiles(images(root)), ["a cat", "a dog"]))["loss"].backward()
        reached = {part for part, weight in model.named_parameters() if weight.grad is not None}
        trained = {part for part, weight in model.named_parameters() if weight.requires_grad}
        assert reached == trained - {"connector.image_newline"} | (reached if name == "compressor" else set()), name
        assert not any(part.startswith(("llm.", "frontend.")) for part in reached)


def test_markers_are_tokens_or_trained_vectors(root: Path) -> None:
    model, _ = build_vision_language(settings(root, "avg_pool"))
    tiles = model.frontend.tiles(images(root)[1:])
    row = model.prefix(tiles).embeds[0]
    embed, comma = model.llm.model.get_input_embeddings(), model.llm.tokenizer.convert_tokens_to_ids(",")
    assert model.llm.tokenizer.decode([comma]) == ","
    torch.testing.assert_close(row[4], embed(torch.tensor(comma)))
    torch.testing.assert_close(row[9], model.markers[0])
    plain = model.connector(model.frontend(tiles)).embeds[0]
    assert torch.equal(row[[0, 1, 2, 3, 5, 6, 7, 8, *range(10, 14)]], plain)
    with pytest.raises(UsageError, match="the marker '<img>' is no token of this language model"):
        model.markers.vector("<img>", model.llm)


class Pieces:
    """A tokenizer with a piece for a space in front of words, as of T5 and Llama."""

    unk_token_id = 0
    words = ("<unk>", "_", ",", "_a", "<0x0A>", "<|im|>")

    def convert_tokens_to_ids(self, text: str) -> int:
        return self.words.index(text) if text in self.words else 0

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": {",": [1, 2], "\n": [1, 4], "a": [3], "b": [1, 0], "a,": [3, 2]}[text]}

    def decode(self, ids: list[int]) -> str:
        return "".join(self.words[i] for i in ids).replace("_", " ").replace("<0x0A>", "\n")


def test_the_one_token_of_a_text(root: Path) -> None:
    known: Any = Pieces()
    found = {text: single_token(known, text) for text in (",", "\n", "<|im|>", "a", "b", "a,")}
    assert found == {",": 2, "\n": 4, "<|im|>": 5, "a": 3, "b": None, "a,": None}
    for kind in ("opt", "flan-t5"):
        tokenizer: Any = load_language_model(str(root / kind)).tokenizer
        token = single_token(tokenizer, ",")
        assert token is not None
        assert tokenizer.convert_ids_to_tokens(token) == ","
        assert single_token(tokenizer, "<img>") is None


@pytest.mark.parametrize("name", ["spatial_resampler", "compressor", "c_abstractor", "token_packer"])
def test_a_plan_outlines_the_same_model(name: str, root: Path) -> None:
    values = settings(root, name)
    outlined, _ = outline(values, "cpu")
    real, _ = build_vision_language(values)
    assert {part: weight.shape for part, weight in outlined.connector.state_dict().items()} == {
        part: weight.shape for part, weight in real.connector.state_dict().items()
    }


@pytest.mark.parametrize("name", ["qformer", "mlp"])
def test_a_plan_names_the_part_between_the_towers(name: str, root: Path) -> None:
    sizes = {"queries": 3, "hidden_size": 16, "layers": 1, "heads": 2}
    values = settings(root, name, qformer=sizes, resolution={"name": "fixed", "size": 28})
    subject = Subject.of(values, "cpu", 1)
    counted = {part for _, part, _ in subject.step(2).flops}
    assert counted == {"image encoder", "Q-Former" if name == "qformer" else "connector", "language model"}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mlp", {"connector": {"name": "mlp", "patch": 20}}, "patches of 20 pixels, .* patches of 14; set its patch"),
        ("compressor", {"connector": {"name": "compressor"}}, "patches of 16 pixels, .* patches of 14"),
        (
            "mlp",
            {"connector": {"name": "mlp", "adapters": 2}},
            "reads 2 tokens of a patch, but this image encoder makes 1",
        ),
        ("resampler", {"connector": {"name": "resampler", "queries": 5}}, "is 5; .* such as 4 or 9"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(name: str, changes: dict[str, Any], message: str, root: Path) -> None:
    with pytest.raises(UsageError, match=message):
        build_vision_language(settings(root, name, **changes))


def test_odd_grids_are_refused_before_training(root: Path, tmp_path: Path) -> None:
    values = settings(root, "merger", resolution={"name": "fixed", "size": 42}, run=str(tmp_path / "run"))
    file = tmp_path / "odd.yaml"
    file.write_text(dump_config(values))
    code, _, err = outcome("train", file)
    assert code == 2
    assert "PatchMerger joins 2x2 patches, but a tile has 3x3" in one_sentence(err)


@pytest.mark.parametrize("name", [name for name in CONNECTORS if name != "qformer"])
def test_stage_one_trains_a_qformer_alone(name: str, root: Path, tmp_path: Path) -> None:
    file = tmp_path / "stage1.yaml"
    file.write_text(dump_config(config(root, "stage1")) + f"connector: {{name: {name}}}\n")
    with pytest.raises(UsageError, match=f"connector.name is '{name}', but 'stage1' trains a Q-Former"):
        load_config(file)
