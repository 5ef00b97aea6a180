"""A configuration is refused before weights or data are opened, with the path of the key that is wrong."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qformer import stages
from qformer.config import load_config
from qformer.data import sources
from qformer.data.arguments import choose_data
from qformer.fields import read_from
from qformer.stages.checking import check
from qformer.stages.plan.forecast import plan
from qformer.types import UsageError

CONFIGS = Path(__file__).parent.parent.parent / "configs"
QUICK = "configs/quickstart/stage1.yaml"  # hf, fixed, scenes


def refused(*overrides: str, path: str = QUICK) -> str:
    with pytest.raises(UsageError) as caught:
        check(load_config(path, [*overrides]))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_pass(path: Path) -> None:
    check(load_config(path))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("vision.pathh=x", "vision.pathh is not an option of 'hf': did you mean 'path'?"),
        ("vision.name=hff", "unknown vision 'hff'"),
        ("vision={name: hf}", "vision.path is required"),
        ("vision={name: hf, layer: last}", "vision.layer: "),  # what is wrong is told before what is missing
        ("vision={name: eva, heads: 7}", "vision: width 1408 does not divide into 7 heads"),
        ("vision={name: eva, depth: 0}", "vision.depth: input should be greater than 0"),
        ("vision={name: clip, width: true}", "vision.width: input should be a number, not true or false, but got True"),
        ("vision={name: eva, norm_eps: .inf}", "vision.norm_eps: input should be a finite number"),
        ("resolution.name=fixd", "unknown resolution 'fixd'"),
        ("resolution.sizee=3", "resolution.sizee is not an option of 'fixed': did you mean 'size'?"),
        ("resolution.size=0", "resolution.size is 0"),
        ("train={steps: 50, warmup: 1, keep_every: 10, save_every: 0}", "train.keep_every 10 keeps nothing"),
        ("train={steps: 50, warmup: 1, keep_every: 10, save_every: 7}", "train.keep_every 10 keeps nothing"),
        ("data.train.name=sceness", "unknown data.train 'sceness': did you mean 'scenes'?"),
        ("data.train.sizee=3", "data.train.sizee is not an option of 'scenes': did you mean 'size'?"),
        ("data.train.size=big", "data.train.size: input should be a valid integer"),  # and not data.train.size.int
        ("data.train.count=-1", "data.train: seed is 0 and count is -1"),
        ("data.train.prompt=3", "data.train.prompt is 3"),
        ("data.train={name: jsonl}", "data.train.path is required"),
        ("data.train={name: webdataset, path: a.tar, window: yes}", "data.train.window: input should be a number"),
        ("data.train={name: webdataset, path: a.tar, keep_gb: .nan}", "data.train.keep_gb: input should be a finite"),
        ("data.validation.splitt=val", "data.validation.splitt is not an option of 'scenes': did you mean 'split'?"),
        ("data.train={name: mix, sources: [{name: jsonl, pth: a}]}", "data.train.sources.0.pth is not an option"),
        ("data.train={name: mix, sources: [{name: scenes}, {path: a}]}", "data.train.sources.1.name is required"),
        ("data.train={name: mix, sources: [{name: scenes, weight: 0}]}", "data.train.sources.0.weight is 0"),
        ("train.lr=1e-6", "train.min_lr 2e-05 is above train.lr 1e-06"),
        ("text.max_tokens=2", "text.max_tokens 2 leaves no room for a word"),
        ("llm={path: x, max_tokens: 1}", "llm.max_tokens 1 leaves no room for a word"),
        ("backbone={kind: opt, max_tokens: 513}", "backbone.max_tokens 513 is more than the 512 positions of this opt"),
        ("vision.path=''", "vision.path is empty; give a value"),
        ("data.train={name: jsonl, path: ' '}", "data.train.path is empty; give a value"),
        ("data.train={name: jsonl, path: [a.jsonl, '']}", "data.train.path is empty; give a value"),
        ("run=''", "run: it is empty; give a value, or leave the key out, but got ''"),
        ("init=' '", "init: it is empty; give a value"),
        ("init=", "'init=' has no value; write one, or init=null for none"),
        ("text.bert=''", "text.bert: it is empty"),
        ("data.features=''", "data.features: it is empty"),
    ],
)
def test_what_is_refused(override: str, expected: str) -> None:
    assert expected in refused(override)


def test_towers_have_sources_of_their_own() -> None:
    vit, opt = "configs/mini/vit.yaml", "configs/mini/opt.yaml"
    assert "data.train.phrasess is not an option of 'phrases'" in refused("data.train.phrasess=3", path=vit)
    assert "phrases is 0" in refused("data.train.phrases=0", path=vit)
    assert "data.validation.split: " in refused("data.validation.split=vall", path=vit)
    assert "data.validation.taskk is not an option of 'stories'" in refused("data.validation.taskk=ask", path=opt)
    assert "unknown data.train 'stories'" in refused("data.train={name: stories}")  # which stage one does not read


def test_the_rate_of_the_warm_up_counts_where_there_is_one() -> None:
    assert "train.warmup_lr 1e-06 is above train.lr 5e-07" in refused("train.lr=5e-7", "train.min_lr=0")
    check(load_config(QUICK, ["train.lr=5e-7", "train.min_lr=0", "train.warmup=0"]))
    check(load_config(QUICK, ["train.lr=5e-7", "train.min_lr=5e-7", "train.warmup_lr=5e-7"]))


def test_a_trial_of_a_long_run_may_keep_nothing_for_good() -> None:
    check(load_config(QUICK, ["train={steps: 50, warmup: 1, keep_every: 500, save_every: 100}"]))
    check(load_config(QUICK, ["train={steps: 50, warmup: 1, keep_every: 20, save_every: 10}"]))


def test_stage_two_may_leave_out_what_its_start_says_of_the_encoder() -> None:
    path = "configs/quickstart/stage2.yaml"
    check(load_config(path, ["vision={name: hf, precision: fp16}"]))
    assert "vision.precisionn is not" in refused("vision={name: hf, precisionn: fp16}", path=path)
    assert "vision.path is required" in refused("vision={name: hf}", "init=null", path=path)


def test_nothing_is_opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither the files of a source, which are not there, nor a source that would be made of its options."""

    @dataclass
    class Opened:
        size: int

        def __post_init__(self) -> None:
            raise AssertionError("it was made")

    outsider = ModuleType("outsider")
    outsider.Opened = Opened  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "outsider", outsider)
    check(load_config(QUICK, ["data.train={name: coco, path: none.json, images: none}"]))
    check(load_config(QUICK, ["data.train={name: 'outsider:Opened', size: 3}"]))
    assert "data.train.sise is not an option" in refused("data.train={name: 'outsider:Opened', sise: 3}")


@pytest.mark.parametrize(
    "override", ["vision.name=evil:Class", "data.train={name: mix, sources: [{name: 'evil:Class'}]}"]
)
def test_code_that_is_not_trusted_is_named_and_not_imported(override: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def imported(name: str) -> Any:
        assert name != "evil"
        return real(name)

    monkeypatch.setattr("qformer.lookup.importlib.import_module", imported)
    with pytest.raises(UsageError, match="the checkpoint 'c' names 'evil:Class', which would be imported and run"):
        check(read_from(load_config(QUICK, [override]), "the checkpoint 'c'"))


def test_everything_that_takes_a_configuration_checks_it_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    wrong = load_config(QUICK, ["vision.pathh=x", "data.train={name: jsonl, path: none.jsonl}", "data.features=store"])
    for command in (stages.train, stages.fill_features, plan):
        with pytest.raises(UsageError, match=r"vision\.pathh is not an option"):
            command(wrong)
    with pytest.raises(UsageError, match=r"data\.pth is not an option of 'jsonl'"):
        choose_data(["pth=none.jsonl"])
    assert not list(tmp_path.iterdir())


def test_a_mix_says_the_same_when_it_is_made() -> None:
    with pytest.raises(UsageError, match=r"data\.sources\.0\.weight is True"):
        sources.build("mix", sources=[{"name": "scenes", "weight": True}])
