"""`qformer compare`: tiny systems of two connectors on twelve photos with questions, and all that may go wrong."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qformer.config import Choice, load_config
from qformer.data import counting, sources
from qformer.data.base import order_of
from qformer.evaluation.vqa import accuracy
from qformer.metrics.paired import paired_difference
from qformer.stages import loop
from qformer.stages.compare import comparison, questions, report, runs, table, workers
from qformer.stages.compare.comparison import Settings, compare
from qformer.stages.compare.samples import Grayed, part_of
from qformer.stages.compare.systems import Refused, System, digest_config, read_systems, split_words
from qformer.stages.compare.table import Table, make_table
from qformer.types import Sample, UsageError
from qformer.videos.gray import GRAY
from tests.commands import outcome
from tests.workspace import make_workspace

CONNECTORS = "connector.name=mlp,avg_pool,merger"
SYSTEM = """
stage: stage2
run: {root}/run
vision: {{name: hf, path: {root}/vit}}
resolution: {{name: fixed, size: 42}}
connector: {{name: avg_pool, queries: 1}}
text: {{bert: {root}/bert}}
qformer: {{hidden_size: 16, heads: 2, intermediate_size: 24, layers: 2, queries: 2}}
llm: {{path: {root}/opt, max_tokens: 16}}
data:
  train: {{name: jsonl, path: {root}/questions.jsonl, where: {{split: train}}}}
  validation: {{name: jsonl, path: {root}/questions.jsonl, where: {{split: dev}}}}
  batch: 2
train: {{steps: 4, warmup: 1, lr: 1.0e-2, save_every: 2, log_every: 1}}
"""
KINDS = ("colour", "count", "word")
ANSWERS = {"colour": "red", "count": "two", "word": "star"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a question about each photo, two about the first of the held-out ones, and a system."""
    folder = make_workspace(tmp_path_factory.mktemp("compare"))
    records = []
    for number in range(12):
        kind = KINDS[number % 3]
        record = {"image": f"images/{number}.png", "question": f"what {kind} is it?", "answer": ANSWERS[kind]}
        record |= {"captions": [f"a {number} photo"], "question_type": kind, "choices": ["red", "two", "star"]}
        records.append(record | {"split": "dev" if number > 6 else "train"})
    records.append(records[7] | {"question": "how many cats are there?", "question_type": "count", "answer": "two"})
    (folder / "questions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "tiny.yaml").write_text(SYSTEM.format(root=folder))
    return folder


def settings(root: Path, folder: str, *over: str, **more: Any) -> Settings:
    options: dict[str, Any] = {"seeds": (0, 1), "blind": True, "folder": root / folder}
    return Settings(words=(str(root / "tiny.yaml"),), over=over or (CONNECTORS,), **(options | more))


@pytest.fixture(scope="module")
def found(root: Path) -> dict[str, Any]:
    """The comparison of two connectors, and of one that has no use for a grid of 3 x 3 patches."""
    return compare(settings(root, "found"))


def without_clock(table: Table) -> str:
    """The table without what was measured by the clock."""
    data = table.as_data()
    for row in data["rows"]:
        for key in ("first_token_seconds", "images_per_second"):
            row["cost"].pop(key, None)
    return json.dumps(data)


def entry(found: dict[str, Any], name: str) -> dict[str, Any]:
    return next(one for one in found["systems"] if one["name"] == name)


@pytest.mark.canary
def test_numbers_are_those_of_the_answers_that_are_kept(root: Path, found: dict[str, Any]) -> None:
    """Two answers of each seed are made right by hand; all shares are counted again from the files and the data."""
    lines = map(json.loads, (root / "questions.jsonl").read_text().splitlines())
    asked = [record for record in lines if record["split"] == "dev"]
    copied = shutil.copytree(root / "found", root / "edited")
    right = {"answers": (0, 5), "blind": (2,)}
    for view, numbers in right.items():
        for file in copied.glob(f"runs/*-0/{view}-*.jsonl"):
            head, *records = file.read_text().splitlines()
            for number in numbers:
                records[number] = json.dumps(json.loads(records[number]) | {"said": f"The {asked[number]['answer']}."})
            file.write_text("\n".join([head, *records]) + "\n")
    whole = compare(settings(root, "edited"))
    assert whole["questions"]["cluster"] == [0, 1, 2, 3, 4, 0]
    for row in make_table(whole).rows[:2]:
        shares: dict[str, list[list[float]]] = {"answers": [], "blind": []}
        for run in entry(whole, row.name)["runs"]:
            for view, scores in shares.items():
                (file,) = (copied / run["folder"]).glob(f"{view}-*.jsonl")
                said = [json.loads(line)["said"] for line in file.read_text().splitlines()[1:]]
                scores.append([accuracy(one, [record["answer"]]) for one, record in zip(said, asked, strict=True)])
        seen = torch.tensor(shares["answers"])
        counted = [number for number, record in enumerate(asked) if record["question_type"] == "count"]
        assert row.accuracy is not None
        assert row.blind is not None
        assert row.accuracy.mean == pytest.approx(seen.mean().item())
        assert row.accuracy.mean >= 2 / 12
        assert row.blind.mean == pytest.approx(torch.tensor(shares["blind"]).mean().item())
        assert row.skills["count"].mean == pytest.approx(seen[:, counted].mean().item())
        assert row.seeds == [0, 1]
        assert row.cost["tokens"] == {"mlp": 9, "avg_pool": 1}[row.name]


def test_what_cannot_be_built_stands_in_the_table(found: dict[str, Any]) -> None:
    table = make_table(found)
    assert [row.name for row in table.rows] == ["mlp", "avg_pool", "merger"]
    assert table.rows[2].note.startswith("refused: ")
    assert "3" in table.rows[2].note
    assert table.rows[1].difference is not None
    assert table.rows[0].difference is None


def test_the_same_comparison_gives_the_same_table_without_training(
    root: Path, found: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_train", "_ask"):
        monkeypatch.setattr(runs, name, lambda *_: pytest.fail("a finished run was touched"))
    assert json.dumps(compare(settings(root, "found"))) == json.dumps(found)


def test_a_killed_comparison_ends_with_the_same_table(
    root: Path, found: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the answers of the second run, and in the steps of the third behind a checkpoint."""
    answered, stepped = runs._answers, loop._train_step
    calls = {"answers": 0, "steps": 0}

    def answer(*given: Any) -> Any:
        calls["answers"] += 1
        if calls["answers"] == 4:  # blind answers of seed 0 of the second system
            raise KeyboardInterrupt
        return answered(*given)

    def step(run: Any, *given: Any) -> None:
        calls["steps"] += 1
        if calls["steps"] == 8 + 3:
            raise KeyboardInterrupt
        stepped(run, *given)

    monkeypatch.setattr(runs, "_answers", answer)
    monkeypatch.setattr(loop, "_train_step", step)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            compare(settings(root, "killed"))
    again = compare(settings(root, "killed"))
    assert calls["steps"] == 8 + 3 + 2 + 4, "nothing is trained twice"
    assert without_clock(make_table(again)) == without_clock(make_table(found))
    for file in (root / "found" / "runs").rglob("*.jsonl"):
        if file.name.startswith(("answers", "blind")):  # they begin with a checksum of the weights
            assert (root / "killed" / "runs" / file.parent.name / file.name).read_bytes() == file.read_bytes()


def test_a_run_that_diverges_is_a_row_that_says_so(root: Path) -> None:
    """It is not tried again; the other system has its numbers."""
    given = settings(root, "diverged", "train.lr=0.01,1e30", seeds=(0,), blind=False)
    table = make_table(compare(given))
    assert table.rows[0].accuracy is not None
    assert table.rows[1].accuracy is None
    assert table.rows[1].note.startswith("diverged: ")


def test_budgets_are_made_equal(root: Path, found: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """More steps for whom they are cheaper, or as many tokens as are asked for; nothing is trained here."""
    monkeypatch.setattr(comparison, "spread", lambda *_: None)
    flops = make_table(compare(settings(root, "found", mode="flops", seeds=(0,)))).rows
    assert flops[0].steps == 4
    assert flops[1].steps is not None
    assert flops[1].steps > 4
    assert flops[1].training_flops == pytest.approx(flops[0].training_flops, rel=0.15)
    assert flops[1].hash != flops[0].hash
    tokens = make_table(compare(settings(root, "found", mode="tokens", tokens=4.0, seeds=(0,)))).rows
    assert [row.cost["tokens"] for row in tokens[:2]] == [4, 4]
    assert tokens[1].hash not in (flops[1].hash, entry(found, "avg_pool")["hash"])


def test_choices_are_taken_by_their_losses(root: Path, found: dict[str, Any]) -> None:
    """The same runs are asked again in another way: nothing is trained."""
    whole = compare(settings(root, "found", seeds=(0,), blind=False, choose=True))
    run = entry(whole, "mlp")["runs"][0]
    before = entry(found, "mlp")["runs"][0]
    assert run["folder"] == before["folder"]
    assert run["seconds"] == before["seconds"]
    (file,) = [one for one in (root / "found" / run["folder"]).glob("answers-*.jsonl") if "losses" in one.read_text()]
    records = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    truths = ("two", "star", "red", "two", "star", "two")
    for record, truth, score in zip(records, truths, run["answers"], strict=True):
        best = min(range(3), key=record["losses"].__getitem__)
        assert record["said"] == ["red", "two", "star"][best]
        assert score == (record["said"] == truth)


def test_stage_one_is_trained_once_for_those_that_share_it(root: Path) -> None:
    """A Q-Former with and without it; the linear map of its towers stands beside its recall."""
    over = ("connector.name=qformer", "init=null,stage1", "train.lr=0.01", "stage1.train.steps=2", "qformer.queries=2")
    given = settings(root, "stages", *over, seeds=(0,), blind=False)
    whole = compare(given)
    table = make_table(whole)
    assert [row.stage_one_images for row in table.rows] == [0, 4]
    assert len(list((root / "stages" / "stage1").iterdir())) == 1
    assert table.retrieval[0].systems == ["init=stage1"]
    assert table.retrieval[0].linear is not None
    beaten = copy.deepcopy(whole)
    beaten["retrieval"][0]["linear"] = dict.fromkeys(table.retrieval[0].bridge, 1.01)
    assert make_table(beaten).retrieval[0].loses


def test_curves_are_of_the_questions_of_this_comparison(root: Path, found: dict[str, Any]) -> None:
    """The same runs are asked other questions: nothing is trained, and their curves are of the former ones."""
    other = f"data.validation={{name: jsonl, path: {root}/questions.jsonl, where: {{split: train}}}}"
    whole = compare(settings(root, "found", CONNECTORS, other, seeds=(0,), blind=False))
    run, before = entry(whole, "mlp")["runs"][0], entry(found, "mlp")["runs"][0]
    assert (run["folder"], run["seconds"]) == (before["folder"], before["seconds"])
    assert (len(run["answers"]), len(before["answers"])) == (7, 6)
    assert len(before["curve"]) == 4
    assert run["curve"] == []
    assert make_table(whole).rows[0].near is None


@pytest.mark.slow
def test_several_processes_give_the_same_table(root: Path, found: dict[str, Any]) -> None:
    again = compare(settings(root, "spread", processes=2))
    assert without_clock(make_table(again)) == without_clock(make_table(found))


def test_a_full_disk_is_one_sentence(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs, "_train", full)
    with pytest.raises(UsageError, match=r"No space left.*what is finished stays"):
        compare(settings(root, "full", seeds=(0,)))


def test_hashes_change_with_the_configuration_and_with_the_data(root: Path, tmp_path: Path) -> None:
    def hashes(*over: str) -> tuple[str, str]:
        given = settings(root, "none", "connector.name=mlp,avg_pool", *over)
        systems = read_systems(list(given.words), list(given.over), given.steps)
        one = systems["mlp"]
        assert isinstance(one, System)
        return digest_config(one.config), comparison.Shared.of(systems, given).digest

    lines = (root / "questions.jsonl").read_text()
    (root / "other.jsonl").write_text(lines.replace("what word", "which word"))
    same, first = hashes(), hashes("run=elsewhere", "data.features=tokens", "train.log_every=3", "qformer.queries=7")
    assert same == first
    assert hashes("train.lr=0.02")[0] != same[0]
    assert hashes("resolution.size=28")[0] != same[0]
    assert hashes("data.train.path=" + str(root / "other.jsonl"))[1] != same[1]
    (root / "other.jsonl").write_text(lines)
    assert hashes("data.train.path=" + str(root / "other.jsonl"))[1] == same[1]


def test_weights_that_replace_those_of_a_tower_are_another_system(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "opt", tmp_path / "opt")
    system = read_systems([str(root / "tiny.yaml")], [f"llm.path={tmp_path / 'opt'}", CONNECTORS])["mlp"]
    assert isinstance(system, System)
    before = digest_config(system.config)
    weights = tmp_path / "opt" / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    assert digest_config(system.config) != before


def test_weights_of_a_mixture_are_of_its_data(root: Path) -> None:
    def hashed(weight: int) -> str:
        part = f"{{name: jsonl, path: {root}/questions.jsonl, weight: %d}}"
        given = settings(root, "none", CONNECTORS, f"data.train={{name: mix, sources: [{part % 1}, {part % weight}]}}")
        return comparison.Shared.of(read_systems(list(given.words), list(given.over), 30), given).digest

    assert hashed(1) != hashed(50)


def test_questions_of_one_image_or_one_pair_are_one_cluster() -> None:
    """Two pairs about the same two pictures, a third picture twice, and a pair that joins two other ones."""
    images, pairs = ["a", "b", "a", "b", "c", "d", "e", "c"], [0, 0, 1, 1, None, 2, 2, None]
    assert questions._clusters(images, pairs) == [0, 0, 0, 0, 1, 2, 2, 1]


def test_a_long_override_is_no_file(root: Path) -> None:
    mix = "data.train={name: mix, sources: [" + ", ".join(["{name: scenes}"] * 40) + "]}"
    assert split_words([str(root / "tiny.yaml"), mix]) == ([str(root / "tiny.yaml")], [mix])


def test_a_stage_one_of_its_own_stays_so_under_another_budget(root: Path) -> None:
    over = ["init=stage1", "stage1.resolution.size=28", "connector.name=qformer", "qformer.queries=2,3"]
    system = read_systems([str(root / "tiny.yaml")], over)["queries=2"]
    assert isinstance(system, System)
    more = system.config.model_copy(update={"qformer": system.config.qformer.model_copy(update={"queries": 5})})
    first = system.with_config(more).stage_one
    assert first is not None
    assert (first.qformer.queries, first.resolution.options["size"]) == (5, 28)


def test_curves_of_a_held_out_file_that_has_changed_are_left_out(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "held.jsonl"
    lines = [json.loads(line) for line in (root / "questions.jsonl").read_text().splitlines()]
    lines = [line | {"image": str(root / line["image"])} for line in lines]
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines[:4]))
    given = settings(
        root, "held", CONNECTORS, f"data.validation={{name: jsonl, path: {file}}}", seeds=(0,), blind=False
    )
    before = entry(compare(given), "mlp")["runs"][0]
    file.write_text("".join(f"{json.dumps(line | {'question': 'and now?'})}\n" for line in lines[:4]))
    after = entry(compare(given), "mlp")["runs"][0]
    assert (before["folder"], len(before["curve"])) == (after["folder"], 4)
    assert (len(after["answers"]), after["curve"]) == (4, [])


def test_no_process_is_refused(root: Path) -> None:
    with pytest.raises(UsageError, match="processes is 0; give a whole number from 1"):
        compare(settings(root, "none", CONNECTORS, processes=0))


@pytest.mark.parametrize("accuracy", [float("nan"), -1.0, 7.0])
def test_a_curve_of_impossible_numbers_is_none(accuracy: float) -> None:
    assert table._near([{"step": 1, "accuracy": accuracy}]) is None


def test_axes_are_crossed(root: Path) -> None:
    """Options of a former name go, sizes of the image encoder come in, and nothing else changes."""
    path = str(root / "tiny.yaml")
    given = ["connector.name=pixel_shuffle_mlp,avg_pool", "resolution.name=fixed,uhd", "data.crop=[1, 1]"]
    systems = read_systems([path], given, steps=8)
    assert list(systems) == [
        *("pixel_shuffle_mlp/fixed", "pixel_shuffle_mlp/uhd", "avg_pool/fixed", "avg_pool/uhd"),
    ]
    cut, pooled = systems["pixel_shuffle_mlp/uhd"], systems["avg_pool/fixed"]
    assert isinstance(cut, System)
    assert isinstance(pooled, System)
    assert cut.config.connector.options == {"patch": 14}
    assert cut.config.resolution.options == {"size": 42, "patch": 14}
    assert pooled.config.connector.options == {"queries": 1}
    assert pooled.config.data.crop == (1, 1)
    assert (pooled.config.train.steps, pooled.config.train.warmup) == (8, 2)
    assert pooled.config.resolution == load_config(path).resolution


def test_options_of_one_connector_are_given_for_all_of_an_axis(root: Path) -> None:
    """Each connector keeps those that it knows, the one of the file as well."""
    given = [
        "connector={name: c_abstractor, queries: 1, hidden: 8}",
        "connector.name=mlp,c_abstractor,avg_pool,qformer",
    ]
    systems = read_systems([str(root / "tiny.yaml")], given)
    options = {name: one.config.connector.options for name, one in systems.items() if isinstance(one, System)}
    assert options == {
        "mlp": {"hidden": 8, "patch": 14},
        "c_abstractor": {"queries": 1, "hidden": 8},
        "avg_pool": {"queries": 1, "hidden": 8},
        "qformer": {},
    }


def test_a_system_twice_is_refused(root: Path) -> None:
    """An axis that a connector does not read would train it once more for nothing."""
    systems = read_systems([str(root / "tiny.yaml")], ["qformer.queries=2,4"])
    found = comparison._without_doubles(systems)
    assert isinstance(found["queries=2"], System)
    assert found["queries=4"] == Refused("nothing that it reads differs from 'queries=2'")


def test_gray_pictures_are_as_large_as_those_that_they_hide() -> None:
    shown = [torch.zeros(3, 20, 30, dtype=torch.uint8), torch.ones(3, 5, 7, dtype=torch.uint8)]
    hidden = Grayed([Sample(image=shown, key="a", image_id="a")])[0].image  # type: ignore[arg-type]
    assert [one.shape for one in hidden] == [(20, 30, 3), (5, 7, 3)]
    assert all((one == GRAY).all() for one in hidden)


def test_a_part_is_the_beginning_of_an_order() -> None:
    """It can be counted without being opened as somebody's class, and a source that is small enough stays itself."""
    whole = Choice.model_validate({"name": "scenes", "count": 50})
    part, drawn = part_of(whole, 10), sources.for_run(whole)
    shown = sources.for_run(part)
    order = order_of(drawn, (0,))
    assert [shown[place].key for place in range(len(shown))] == [drawn[order.at(place)].key for place in range(10)]
    assert counting.count(part.name, part.options) == (10, [])
    assert part_of(whole, 50) == whole


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{root}/tiny.yaml"], "a comparison needs two"),
        (["{root}/tiny.yaml", "--over", "connector.name=mlp"], "a comparison needs two"),
        (["{root}/tiny.yaml", "--over", "qformer.querys=1,2"], "did you mean 'queries'?"),
        (["{root}/tiny.yaml", "--over", "connector.querys=1,2"], "none of the 2 systems can be built"),
        (["{root}/tiny.yaml", "connector.name=mlp,avg_pool", "--reference", "mpl"], "did you mean 'mlp'?"),
        (["{root}/tiny.yaml", "connector.name=mlp,mlp"], "twice"),
        (["{root}/tiny.yaml", "connector.name=mlp,avg_pool", "stage=stage1"], "give one of stage2"),
        (["{root}/tiny.yaml", "connector.name=mlp,avg_pool", "data.validation=null"], "no held-out questions"),
        (["{root}/tiny.yaml", "train.steps=3,5"], "give --steps"),
        (["{root}/tiny.yaml", "connector.name=mlp,avg_pool", "stage1.train.lr=1"], "begin with init=stage1"),
        (["{root}/tiny.yaml", "connector.name=mlp,avg_pool", "--seeds", "0,0"], "different whole numbers"),
        (["{root}/tiny.yaml", "connector.name=mlp,avg_pool", "--tokens", "4"], "--mode tokens"),
        (["{root}/none.yaml", "{root}/tiny.yaml"], "no configuration at"),
        (["--report", "{root}"], "holds no comparison.json"),
        ([], "no systems to compare"),
    ],
)
def test_bad_input_is_one_sentence(root: Path, words: list[str], said: str) -> None:
    code, _, err = outcome("compare", *(word.format(root=root) for word in words), "-o", root / "bad")
    assert code == 2
    assert said in err
    assert err.count("\n") == 1


def test_data_without_questions_are_refused(root: Path) -> None:
    data = f"data.validation={{name: jsonl, path: {root}/captions.jsonl}}"
    code, _, err = outcome("compare", root / "tiny.yaml", data, "--over", "connector.name=mlp,avg_pool", "-o", root)
    assert code == 2
    assert "no question with an answer" in err


def test_the_report_is_made_from_the_file_alone(root: Path, found: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "comparison.json").write_text(json.dumps(found))
    code, out, err = outcome("compare", "--report", tmp_path, "--reference", "avg_pool", "--json")
    assert code == 0, err
    table = json.loads(out)
    assert table["reference"] == "avg_pool"
    assert table["rows"][0]["difference"]["mean"] == pytest.approx(-make_table(found).rows[1].difference.mean)  # type: ignore[union-attr]
    page = (tmp_path / "report.html").read_text()
    assert "merger" in page
    assert "data:image/png;base64" in page
    assert "http" not in page.replace("http-equiv", "")


def made_up() -> dict[str, Any]:
    """Answers that a comparison of one seed would leave of two pairs of twins."""
    run = {"seed": 0, "status": "trained", "reason": "", "folder": "", "seconds": 1.0, "answers_refused": 0}
    curve = [{"step": 2, "accuracy": 0.44, "loss": 2.0}, {"step": 4, "accuracy": 0.45}, {"step": 6, "accuracy": 0.5}]
    system = {"refused": None, "hash": "", "cost": None, "training_flops": None, "steps": 6, "images": 12}
    system |= {"stage_one_images": 0, "changes": {}}
    questions = {"cluster": [0, 0, 1, 1], "kind": ["count"] * 4, "shows": [""] * 4, "skills": [["counting"]] * 4}
    return {
        "mode": "published",
        "made_by": {},
        "reference": "a",
        "data": {"images": 12, "hash": ""},
        "questions": questions | {"pair": [0, 0, 1, 1]},
        "systems": [
            system | {"name": name, "runs": [run | {"answers": scores, "curve": curve}]}
            for name, scores in (("a", [1, 0, 1, 1]), ("b", [1, 0, 0, 1]))
        ],
        "retrieval": [],
    }


RECALLS = dict.fromkeys(("i2t_r1", "t2i_r1", "i2t_r10", "t2i_r10"), 0.5)
UNDATED = {"seed": 0, "status": "trained", "reason": "", "curve": [{"loss": 1.0}], "answers": [1, 1, 1, 0]}
OUTSIDE = {"seed": 0, "status": "trained", "reason": "", "curve": [], "answers": [1, 2, 1, 0]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mode": "best"}, "mode"),
        ({"questions": {"cluster": [0]}}, "questions.kind is missing"),
        ({"reference": 3}, "reference"),
        ({"systems": [{"name": "a", "refused": None, "runs": [{"seed": "0"}]}]}, "runs.0.seed"),
        ({"questions": made_up()["questions"] | {"cluster": [0, 0]}}, "other numbers of scores"),
        ({"systems": [made_up()["systems"][0] | {"runs": [OUTSIDE]}]}, "runs.0.answers.1"),
        ({"systems": [made_up()["systems"][0] | {"cost": {"tokens": 1.0}}]}, "cost.trained is missing"),
        ({"systems": [made_up()["systems"][0] | {"training_flops": float("nan")}]}, "training_flops"),
        ({"systems": [made_up()["systems"][0] | {"runs": [UNDATED]}]}, "curve.0.step is missing"),
        ({"retrieval": [{"systems": ["a"], "bridge": {"r1": 1.0}, "linear": None}]}, "bridge.i2t_r1 is missing"),
        ({"retrieval": [{"systems": ["a"], "bridge": RECALLS, "linear": {"i2t_r1": 1.0}}]}, "linear.t2i_r1 is missing"),
    ],
)
def test_a_file_of_a_stranger_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    (tmp_path / "comparison.json").write_text(json.dumps(made_up() | change))
    code, _, err = outcome("compare", "--report", tmp_path)
    assert code == 2
    assert said in err
    assert err.count("\n") == 1


def test_what_a_file_leaves_out_is_not_told(tmp_path: Path) -> None:
    """A system with a name alone has no numbers, and what a run does not say is nothing."""
    whole = made_up()
    whole["systems"].append({"name": "c", "refused": None})
    del whole["systems"][0]["runs"][0]["answers_refused"]
    (tmp_path / "comparison.json").write_text(json.dumps(whole))
    code, out, err = outcome("compare", "--report", tmp_path, "--json")
    assert code == 0, err
    rows = json.loads(out)["rows"]
    assert (rows[2]["accuracy"], rows[2]["note"], rows[0]["refused"]) == (None, "", 0)


def test_names_of_a_stranger_are_shown_as_they_are(tmp_path: Path) -> None:
    """They are no markup on the terminal, and no HTML on the page."""
    whole = made_up()
    whole["systems"][1]["name"] = "[b]x<i>"
    (tmp_path / "comparison.json").write_text(json.dumps(whole))
    code, out, err = outcome("compare", "--report", tmp_path)
    assert code == 0, err
    assert "[b]x<i>" in out
    assert "x<i>" not in (tmp_path / "report.html").read_text()


def test_twins_are_right_together() -> None:
    table = make_table(made_up())
    first, second = table.rows
    assert first.accuracy is not None
    assert (first.accuracy.mean, first.skills["twins"].mean) == (0.75, 0.5)
    assert second.skills["twins"].mean == 0
    assert second.difference is not None
    assert second.difference.mean == -0.25
    assert second.by_skill["twins"].mean == -0.5
    assert list(first.skills) == ["twins"], "a kind of all questions is no skill"


def test_skills_are_one_family() -> None:
    """Of two kinds one shows no difference, the other one of p 0.5: an image, half a one above it and half below."""
    whole = made_up()
    whole["questions"] |= {"kind": ["count", "count", "word", "word"], "pair": [None] * 4}
    other = make_table(whole).rows[1].by_skill
    assert list(other) == ["count", "word"]
    alone = paired_difference(np.array([[0, 1]]), np.array([[1, 1]]), np.zeros(2, int))
    assert alone.p == pytest.approx(0.5, abs=0.02)
    assert other["word"].p == pytest.approx(min(2 * alone.p, 1), abs=0.04)


def test_a_curve_that_ends_with_nothing_right_is_one_of_accuracy() -> None:
    whole = made_up()
    whole["systems"][0]["runs"][0]["curve"] = [{"step": 2, "accuracy": 0.0, "loss": 2.0}]
    table = make_table(whole)
    assert table.rows[0].near is None
    assert report._axis(table) == "held-out accuracy"


def test_nearness_is_of_the_final_accuracy() -> None:
    """0.45 is nine tenths of 0.5; 0.44 is not."""
    assert make_table(made_up()).rows[0].near == 4


def test_processes_begin_with_different_runs() -> None:
    turned = [workers._turned([0, 1, 2, 3, 4], number, 2) for number in (0, 1)]  # type: ignore[list-item]
    assert turned == [[0, 2, 4, 1, 3], [1, 3, 0, 2, 4]]
