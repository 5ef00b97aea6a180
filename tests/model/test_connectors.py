"""Connectors by contract: one from outside trains, resumes, loads and answers; what it produces is what was planned."""

from __future__ import annotations

import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

import qformer
from qformer import stages
from qformer.checkpoints.convert import convert_checkpoint
from qformer.checkpoints.parts import LoadOptions
from qformer.config import Choice, dump_config, load_config, parse_config
from qformer.evaluation.attention import query_maps
from qformer.model import connectors
from qformer.model.assembly import build_vision_language
from qformer.model.connectors import Connector, Prefix, QFormerConnector
from qformer.model.vision_language import VisionLanguageModel
from qformer.schema import Config
from qformer.stages.checking import check
from qformer.stages.inherit import inherit
from qformer.stages.plan.outline import outline
from qformer.trust import Untrusted
from qformer.types import Batch, Plan, UsageError, VisualTokens
from tests.commands import outcome
from tests.linear_connector import LinearConnector, TallInTwo
from tests.test_cli import one_sentence
from tests.workspace import config, make_workspace

LINEAR, TALL = (f"{kind.__module__}:{kind.__name__}" for kind in (LinearConnector, TallInTwo))
FIXTURES = Path(__file__).parent.parent / "fixtures"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("connectors"))


def settings(root: Path, **changes: Any) -> Config:
    """Stage two with the connector from outside, from nothing."""
    parts = {"vision": {"name": "hf", "path": str(root / "vit")}, "resolution": {"name": TALL}}
    return config(root, "stage2", **({"connector": {"name": LINEAR}, "init": None} | parts | changes))


def images(root: Path) -> list[Path]:
    """A flat one and a tall one."""
    return [root / "images" / f"{number}.png" for number in (0, 9)]


def test_a_connector_from_outside_is_trained_and_used(root: Path, tmp_path: Path) -> None:
    """From a file, in two goes; the same bits as in one, and no LayerNorm stands before it."""
    values = settings(root, run=str(tmp_path / "halves"), connector={"name": LINEAR, "start": "2e-1"})
    file = tmp_path / "stage2.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(dump_config(values))))
    assert yaml.safe_load(file.read_text())["connector"] == {"name": LINEAR, "start": "2e-1"}
    last = stages.train(check(load_config(file)))
    whole = (last / "model.safetensors").read_bytes()
    shutil.rmtree(last)  # as if the run had been stopped after step 2
    again = stages.train(load_config(file))
    assert (again / "model.safetensors").read_bytes() == whole

    with pytest.raises(Untrusted, match=r"names 'tests\.linear_connector:"):
        qformer.load(again, device="cpu")
    model = qformer.load(again, device="cpu", trust=True)
    assert isinstance(model, VisionLanguageModel)
    assert isinstance(model.connector, LinearConnector)
    assert 0.15 < model.connector.scale.item() < 0.25
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"connector.{name}" for name in ("linear.weight", "linear.bias", "newline", "scale")}

    tiles = model.frontend.tiles(images(root))
    assert len(model.generate(tiles, max_new_tokens=3)) == 2
    assert list(map(len, model.answer(tiles, [["what is it?", "is it red?"], ["what is it?"]]))) == [2, 1]
    assert len(model.self_ask(tiles)) == 2
    short: dict[str, Any] = {"num_beams": 1, "max_new_tokens": 3}
    assert "".join(model.stream(tiles[:1], **short)) == model.generate(tiles[:1], **short)[0]
    outlined, _ = outline(load_config(file), "cpu")
    assert outlined.state_dict().keys() == model.state_dict().keys()

    with pytest.raises(UsageError, match=f"LAVIS and transformers have no place for the connector of .*'{LINEAR}'"):
        convert_checkpoint(str(again), tmp_path / "converted", "lavis", LoadOptions(), trust=True)
    own = convert_checkpoint(str(again), tmp_path / "own", "qformer", LoadOptions(), trust=True)
    copied = qformer.load(own, device="cpu", trust=True)
    assert isinstance(copied, VisionLanguageModel)
    assert torch.equal(copied.prefix(tiles).embeds, model.prefix(tiles).embeds)
    with pytest.raises(UsageError, match="has no queries"):
        query_maps(model, Image.open(images(root)[0]))


def test_planned_counted_and_produced_are_the_same(root: Path) -> None:
    """Of images with one tile and with two; a row for each question is its image's."""
    model, _ = build_vision_language(settings(root))
    tiles = model.frontend.tiles(images(root))
    prefix = model.prefix(tiles, [["what is it?", ""], ["what is it?"]])
    assert [plan.tokens for plan in tiles.plans] == [model.count_tokens(plan) for plan in tiles.plans] == [6, 10]
    assert prefix.mask.sum(dim=1).tolist() == [6, 6, 10]
    assert torch.equal(prefix.embeds[0], prefix.embeds[1])
    connector = model.connector
    tokens = [model.frontend.encoder(tile[None] / 255)[0] for tile in tiles.pixels]
    skipped = model.frontend.encoder.extra
    assert skipped == 1
    first, second = (connector.scale * connector.linear(rows[skipped:]) for rows in tokens[1:])
    end = connector.newline[None]
    expected = torch.cat([first[:2], end, first[2:], end, second, end])
    torch.testing.assert_close(prefix.embeds[2], expected, atol=1e-5, rtol=1e-5)

    losses = model(Batch(tiles, ["a cat", "a dog on the beach"]))
    losses["loss"].backward()
    assert all(parameter.grad is not None for parameter in connector.parameters())


def test_pictures_of_one_row_stand_one_after_the_other() -> None:
    """A plan with `parts`; each part is ordered by itself, and two tokens may stand for a patch."""
    torch.manual_seed(0)
    connector, asked = LinearConnector(5, 4), []

    class Listening(LinearConnector):
        per_patch = 2

        def project(self, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
            return super().project(tokens[:, ::2], grid)

        def sequence(self, tiles: Any, plan: Plan) -> torch.Tensor:
            asked.append(plan)
            return super().sequence(tiles, plan)

    flat, tall = TallInTwo().plan(40, 30), TallInTwo().plan(40, 39)
    both = replace(tall, tiles=tall.tiles + flat.tiles, tokens=tall.tokens + flat.tokens, parts=(tall, flat))
    grids = [(2, 2), (1, 3), (2, 2), (2, 2)]
    lengths = [1 + rows * columns for rows, columns in grids]
    rows = [torch.randn(length, 5) for length in lengths]
    prefix = connector(VisualTokens(rows, grids, 1, [both, flat]))
    assert [plan.tokens for plan in (both, flat)] == [connector.count_tokens(plan) for plan in (both, flat)] == [16, 6]
    assert prefix.mask.sum(dim=1).tolist() == [16, 6]
    apart = connector(VisualTokens(rows, grids, 1, [tall, flat, flat]))
    torch.testing.assert_close(prefix.embeds[0], torch.cat([apart.embeds[0], apart.embeds[1][:6]]))

    listening = Listening(5, 4)
    listening.load_state_dict(connector.state_dict())
    doubled = [torch.cat([row[:1], row[1:].repeat_interleave(2, dim=0)]) for row in rows]
    torch.testing.assert_close(
        listening(VisualTokens(doubled, grids, 1, [both, flat], per_patch=2)).embeds, prefix.embeds
    )
    assert asked == [tall, flat, flat]


def test_a_prefix_is_the_pair_that_callers_know() -> None:
    embeds, mask, places = torch.rand(2, 3, 4), torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 3, 3).long()
    prefix = Prefix(embeds, mask, places)
    one, other = prefix
    assert one is prefix[0] is prefix.embeds
    assert other is prefix[1] is prefix.mask
    assert len(prefix) == 2
    assert Prefix(embeds, mask).places is None
    chosen = prefix.select(torch.tensor([1, 1, 0]))
    assert torch.equal(chosen.embeds, embeds[[1, 1, 0]])
    assert chosen.places is not None
    assert chosen.places.shape == (3, 3, 3)
    assert torch.equal(pickle.loads(pickle.dumps(prefix)).places, places)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "qfomer"}, "unknown connector 'qfomer': did you mean 'qformer'"),
        ({"name": LINEAR, "star": 2}, f"connector.star is not an option of '{LINEAR}': did you mean 'start'"),
        ({"name": LINEAR, "start": "much"}, r"connector.start: input should be a valid number.*, but got 'much'"),
        ({"name": LINEAR, "patch": True}, "connector.patch: input should be a number, not true or false, but got True"),
        ({"name": LINEAR, "patch": 7}, "patches of 7 pixels, but this image encoder has patches of 14"),
        ({"name": "torch.nn:Linear"}, "connector 'torch.nn:Linear' is no connector; make it a subclass of"),
        ({"name": "nowhere:Linear"}, "connector 'nowhere:Linear' cannot be imported"),
    ],
)
def test_a_connector_that_cannot_be_is_refused(root: Path, options: dict[str, Any], message: str) -> None:
    wrong = settings(root, connector=options)
    if options.get("patch") != 7:  # which only an encoder tells
        with pytest.raises(UsageError, match=message):
            check(wrong)
    with pytest.raises(UsageError, match=message):
        build_vision_language(wrong)


def test_building_by_name() -> None:
    built = connectors.build(LINEAR, 12, 16, start=3)
    assert isinstance(built, LinearConnector)
    assert built.scale.item() == 3
    assert built.linear.weight.shape == (16, 12)
    with pytest.raises(Untrusted, match=f"the checkpoint 'c' names '{LINEAR}', which would be imported and run"):
        connectors.chosen(Choice(name=LINEAR).read_from("the checkpoint 'c'"), 12, 16)
    with pytest.raises(UsageError, match="'qformer' is made from the sections of a configuration"):
        connectors.build("qformer", 12, 16)
    with pytest.raises(UsageError, match="does not say how many tokens"):
        Connector().count_tokens(TallInTwo().plan(40, 30))


def test_stage_one_trains_a_qformer_alone(root: Path) -> None:
    file = root / "stage1.yaml"
    file.write_text(dump_config(config(root, "stage1")) + f"connector: {{name: '{LINEAR}'}}\n")
    message = f"connector.name is '{LINEAR}', but 'stage1' trains a Q-Former; give it to stage2, or leave it out"
    code, _, err = outcome("train", file)
    assert code == 2
    assert message in one_sentence(err)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question": {"max_tokens": 9}}, f"question is an option of the connector 'qformer', and this is '{LINEAR}'"),
        ({"llm": {"visual_scale": 2}}, "llm.visual_scale is for the projection of the connector 'qformer'"),
        ({"connector": {"name": "qformer", "queries": 3}}, "connector.queries is not an option of 'qformer'"),
        (
            {"connector": {"name": "qformer", "question": {}}, "question": {"max_tokens": 9}},
            "question is given twice, by itself and as connector.question",
        ),
        ({"connector": {"name": "qformer", "question": {"max_token": 9}}}, "did you mean 'max_tokens'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(root: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        settings(root, **changes)


def test_the_question_is_an_option_of_the_connector_and_was_a_section(root: Path) -> None:
    """Both spellings are the same configuration, which is written as it always was."""
    asked: dict[str, Any] = {"max_tokens": 12}
    old = config(root, "stage2", question=asked)
    new = config(root, "stage2", connector={"name": "qformer", "question": asked})
    assert new == old
    assert new.question is not None
    assert new.question.max_tokens == 12
    assert new.model_dump() == old.model_dump()
    written = dump_config(new)
    assert written == dump_config(old)
    assert "connector" not in yaml.safe_load(written)
    assert parse_config(yaml.safe_load(written)) == new


@pytest.mark.parametrize("name", ["stage1", "stage2", "t5"])
def test_what_an_old_run_wrote_is_written_again(name: str) -> None:
    (file,) = (FIXTURES / name / "checkpoints").glob("*2/config.yaml")
    read = load_config(file)
    assert read.connector == Choice(name="qformer")
    assert dump_config(read) == file.read_text()


def test_a_connector_is_taken_from_the_run_that_init_names(root: Path) -> None:
    start = settings(root, connector={"name": LINEAR, "start": 2})
    assert inherit(config(root, "stage2"), start).connector == start.connector
    assert inherit(config(root, "stage2", connector={"name": LINEAR}), start).connector == start.connector
    louder = config(root, "stage2")
    assert louder.llm is not None
    louder = louder.model_copy(update={"llm": louder.llm.model_copy(update={"visual_scale": 8.0})})
    with pytest.raises(UsageError, match=r"llm.visual_scale is 8.0, which only the connector 'qformer' uses"):
        inherit(louder, start)  # its checkpoints could not be read again
    for changes, message in (
        ({"connector": {"name": LINEAR, "start": 3}}, "section 'connector' differs from that of init"),
        ({"connector": {"name": "qformer"}}, "section 'connector' differs from that of init"),
        ({"question": {"max_tokens": 9}}, "question is an option of the connector 'qformer', and that of init"),
    ):
        with pytest.raises(UsageError, match=message):
            inherit(config(root, "stage2", **changes), start)
    with pytest.raises(UsageError, match=r"is a run of stage1, whose Q-Former the connector .* has no use for"):
        inherit(config(root, "stage2", connector={"name": LINEAR}), config(root, "stage1"))
    asks = config(root, "stage2", question={"max_tokens": 9})
    taken = inherit(config(root, "stage2", connector={"name": "qformer"}), asks)
    assert taken.question == asks.question


def test_a_qformer_is_the_connector_unless_another_is_named(root: Path) -> None:
    parts: dict[str, Any] = {"connector": {"name": "qformer"}, "qformer": {"hidden_size": 16, "layers": 2, "heads": 2}}
    model, sized = build_vision_language(settings(root, **parts))
    assert isinstance(model.connector, QFormerConnector)
    assert model.connector.reader is model.connector.qformer
    assert sized.qformer.encoder_width == 12
    assert isinstance(model.frontend.norm, torch.nn.LayerNorm)
