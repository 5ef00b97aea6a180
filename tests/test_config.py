"""The schema refuses what cannot work, in one sentence that names the key; what it accepts survives a round trip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from qformer.config import anchor, dump_config, load_config, parse_config, shipped
from qformer.schema import Config
from qformer.types import UsageError


def values(**changes: Any) -> dict[str, Any]:
    """A small valid configuration of stage one with changes at the top level."""
    data = {"train": {"name": "jsonl", "path": "captions.jsonl", "where": {"split": "train"}}}
    return {"stage": "stage1", "run": "runs/x", "data": data, "train": {"steps": 100, "warmup": 10}} | changes


def written(tmp_path: Path, content: dict[str, Any] | str | bytes) -> Path:
    path = tmp_path / "config.yaml"
    data = yaml.safe_dump(content) if isinstance(content, dict) else content
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def refused(content: dict[str, Any]) -> str:
    with pytest.raises(UsageError) as caught:
        parse_config(content)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"sed": 1}, "unknown configuration key 'sed': did you mean 'seed'?"),
        ({"qformer": {"hiden_size": 8}}, "'qformer.hiden_size': did you mean 'hidden_size'?"),
        ({"llm": {"path": "x", "promt": ""}}, "'llm.promt': did you mean 'prompt'?"),
        ({"backbone": {"kind": "t5", "widht": 1}}, "'backbone.widht': did you mean 'width'?"),
        ({"data": {"train": {"name": "jsonl"}, "batches": 3}}, "'data.batches': did you mean 'batch'?"),
        ({"train": {"stps": 10}}, "'train.stps': did you mean 'steps'?"),
        ({"train": {"steps": 10, "warmup": 1, "zzz": 3}}, "'train.zzz': known are accumulate, "),
    ],
)
def test_unknown_keys_name_the_nearest(change: dict[str, Any], expected: str) -> None:
    assert expected in refused(values(**change))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"seed": "one"}, "seed: "),
        ({"seed": -1}, "seed: "),
        ({"seed": 1 << 32}, "seed: "),
        ({"run": 3}, "run: "),
        ({"stage": "stage3"}, "got 'stage3'"),
        ({"qformer": 3}, "qformer: "),
        ({"qformer": {"layers": 0}}, "qformer.layers: "),
        ({"qformer": {"dropout": 1.5}}, "got 1.5"),
        ({"train": {"steps": 2.5}}, "train.steps: "),
        ({"train": {"steps": 10, "warmup": 1, "lr": "fast"}}, "got 'fast'"),
        (
            {"train": {"steps": 10, "warmup": 1, "lr": "inf"}},
            "a finite number, but got 'inf'",
        ),
        ({"train": {"steps": 10, "warmup": 1, "clip": float("nan")}}, "train.clip: input should be a finite number"),
        ({"train": {"steps": True}}, "train.steps: input should be a number, not true or false, but got True"),
        ({"train": {"steps": 9, "warmup": 1, "betas": [False, 0.9]}}, "train.betas: input should be a number, not"),
        ({"qformer": {"layer_norm_eps": 0}}, "qformer.layer_norm_eps: input should be greater than 0"),
        ({"train": {"steps": 10, "warmup": 1, "precision": "fp8"}}, "train.precision: "),
        ({"train": {"warmup": 1}}, "train.steps is required"),
        ({"vision": {"path": "x"}}, "vision.name is required"),
        ({"data": {}}, "data.train is required"),
        ({"data": {"train": "captions.jsonl"}}, "data.train: "),
        ({"data": {"train": {"name": "jsonl"}, "crop": [0.5]}}, "data.crop"),
        ({"data": {"train": {"name": "jsonl"}, "batch": 0}}, "data.batch: "),
        ({"loss": {"temperature": 0}}, "loss.temperature: "),
        ({"loss": {"gather_grad": "both"}}, "loss.gather_grad: "),
    ],
)
def test_wrong_types_and_values_name_the_key(change: dict[str, Any], expected: str) -> None:
    assert expected in refused(values(**change))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"qformer": {"hidden_size": 100, "heads": 12}}, "qformer.hidden_size 100 does not divide into 12 heads"),
        ({"stage": "stage2"}, "add llm.path"),
        ({"stage": "vision"}, "stage 'vision' needs a backbone section"),
        ({"stage": "language"}, "stage 'language' needs a backbone section"),
        ({"stage": "vision", "backbone": {"kind": "opt"}}, "stage 'vision' cannot train backbone.kind 'opt'"),
        ({"stage": "language", "backbone": {"kind": "vit"}}, "stage 'language' cannot train backbone.kind 'vit'"),
        ({"stage": "vision", "backbone": {"kind": "vit"}}, "add backbone.text"),
        ({"stage": "language", "backbone": {"kind": "opt", "width": 10, "heads": 4}}, "backbone.width 10 does not"),
        ({"train": {"steps": 10, "warmup": 10}}, "train.warmup 10 is not below train.steps 10"),
        ({"train": {"steps": 100}}, "train.warmup 2000 is not below train.steps 100"),
        ({"data": {"train": {"name": "jsonl"}, "crop": [0.9, 0.5]}}, "data.crop is [0.9, 0.5]"),
        ({"data": {"train": {"name": "jsonl"}, "crop": [0, 0.5]}}, "data.crop is [0.0, 0.5]"),
    ],
)
def test_impossible_combinations_are_refused_before_anything_is_loaded(change: dict[str, Any], expected: str) -> None:
    assert expected in refused(values(**change))


@pytest.mark.parametrize(
    "change",
    [
        {"stage": "stage2", "llm": {"path": "opt"}},
        {"stage": "language", "backbone": {"kind": "t5"}},
        {"stage": "vision", "backbone": {"kind": "vit", "text": "bert"}},
        {"train": {"steps": 10, "warmup": 9}},
        {"train": {"steps": 1, "warmup": 0}},
        {"data": {"train": {"name": "scenes"}, "crop": [1, 1], "flip": 0}},
    ],
)
def test_combinations_at_the_border_are_accepted(change: dict[str, Any]) -> None:
    parse_config(values(**change))


def test_yaml_numbers_that_are_strings_become_floats(tmp_path: Path) -> None:
    text = "stage: stage1\nrun: r\ndata: {train: {name: jsonl}}\ntrain: {steps: 9, warmup: 1, lr: 1e-4}\n"
    assert yaml.safe_load(text)["train"]["lr"] == "1e-4"  # the trap
    config = load_config(written(tmp_path, text))
    assert config.train.lr == 1e-4
    assert load_config(written(tmp_path, text), ["train.min_lr=2e-6"]).train.min_lr == 2e-6


def test_overrides(tmp_path: Path) -> None:
    path = written(tmp_path, values(init="runs/old", qformer={"layers": 3}))
    config = load_config(
        path,
        [
            "train.steps=50",
            "data.crop=[0.25, 1]",
            "init=null",
            "llm.path=models/opt",
            'llm.prompt="a photo of"',
            "data.validation.name=jsonl",
            "data.validation.where={split: val}",
            "data.train.path=other=name.jsonl",
            "qformer.heads=4",
        ],
    )
    assert config.train.steps == 50
    assert config.train.warmup == 10  # its neighbours stay
    assert config.data.crop == (0.25, 1.0)
    assert config.init is None
    assert config.llm is not None
    assert (config.llm.path, config.llm.prompt) == ("models/opt", "a photo of")
    assert config.data.validation is not None
    assert config.data.validation.options == {"where": {"split": "val"}}
    assert config.data.train.options == {"path": "other=name.jsonl", "where": {"split": "train"}}
    assert (config.qformer.layers, config.qformer.heads) == (3, 4)


def test_a_path_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    sources = [{"name": "folder", "path": "~/photos"}, {"name": "webdataset", "path": ["~/a.tar", "b~/c.tar"]}]
    mixed = values(data={"train": {"name": "mix", "sources": sources}})
    config = load_config(written(tmp_path, mixed), ["data.validation={name: jsonl, path: ~/val.jsonl}"])
    paths = [part["path"] for part in config.data.train.options["sources"]]
    assert paths == ["/home/somebody/photos", ["/home/somebody/a.tar", "b~/c.tar"]]
    assert config.data.validation is not None
    assert config.data.validation.options["path"] == "/home/somebody/val.jsonl"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps", "'train.steps' is not an override; write key=value"),
        ("=3", "'=3' is not an override"),
        ("train.stps=3", "'train.stps': did you mean 'steps'?"),
        ("data.crop=[1", "is not YAML"),
        ("seed.deeper=3", "seed: "),
    ],
)
def test_wrong_overrides(tmp_path: Path, override: str, expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_config(written(tmp_path, values()), [override])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a: [1, 2", "is not YAML"),
        (b"\xff\xfe\x00binary", "is not YAML"),
        ("- a\n- b\n", "holds list, not the keys of a configuration"),
        ("just words", "holds str, not the keys of a configuration"),
        ("", "stage is required"),
        ("on: 1\n" + yaml.safe_dump(values()), "keys should be strings"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, content: str | bytes, expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_config(written(tmp_path, content))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_shipped_configurations_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The product's own commands read those, whatever stands in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs/quickstart").mkdir(parents=True)
    (tmp_path / "configs/quickstart/stage1.yaml").write_text("of: the user")
    assert {"stage1_vitg.yaml", "mini/opt.yaml"} < set(shipped())
    assert load_config(shipped()["quickstart/stage1.yaml"]).stage == "stage1"


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(UsageError, match="no configuration at"):
            load_config(path)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"stage": "stage2", "llm": {"path": "opt", "prompt": "a photo of"}, "init": "runs/stage1"},
        {"stage": "vision", "backbone": {"kind": "vit", "text": "bert"}, "seed": 7},
        {"vision": {"name": "hf", "path": "vit", "layer": -2}, "qformer": {"layer_norm_eps": 1e-12}},
    ],
)
def test_round_trip(tmp_path: Path, change: dict[str, Any]) -> None:
    config = parse_config(values(**change))
    again = load_config(written(tmp_path, dump_config(config)))
    assert again == config
    assert again.model_dump() == config.model_dump()
    assert again.vision.options == config.vision.options
    assert "layer_norm_eps" in dump_config(config)  # defaults included


def test_a_configuration_cannot_be_changed_once_read() -> None:
    config = parse_config(values())
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3
    assert isinstance(config, Config)


def test_the_defaults_are_the_papers() -> None:
    config = parse_config(values(train={"steps": 250_000}))
    assert (config.qformer.queries, config.qformer.hidden_size, config.loss.embed_width) == (32, 768, 256)
    assert (config.train.lr, config.train.min_lr, config.train.warmup) == (1e-4, 1e-5, 2000)
    assert (config.train.weight_decay, config.train.betas) == (0.05, (0.9, 0.98))


def test_anchored_towers_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder becomes absolute; a hub id, and a section that nothing was set in, stay as they are."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vit").mkdir()
    values = {
        "stage": "stage2",
        "run": "r",
        "vision": {"name": "hf", "path": "vit", "layer": -2},
        "llm": {"path": "facebook/opt-125m"},
        "data": {"train": {"name": "scenes"}},
        "train": {"steps": 10, "warmup": 1},
    }
    anchored = anchor(parse_config(values))
    assert anchored.vision.options == {"path": str(tmp_path / "vit"), "layer": -2}
    assert anchored.llm is not None
    assert anchored.llm.path == "facebook/opt-125m"
    assert "text" not in anchored.model_fields_set


def test_a_t5_whose_decoder_is_deeper_than_its_encoder_is_refused() -> None:
    with pytest.raises(UsageError, match=r"decoder_layers 2 is more than backbone\.layers 1"):
        load_config("configs/mini/t5.yaml", ["backbone.layers=1"])


def test_questions_and_adapters_are_stage_two_s() -> None:
    shipped = load_config("configs/finetune_vqa_lora_small.yaml")
    assert shipped.question is not None
    assert shipped.llm is not None
    assert shipped.llm.lora is not None
    assert yaml.safe_load(dump_config(shipped))["llm"]["lora"] == {"rank": 8, "alpha": 16.0, "dropout": 0.05}
    with pytest.raises(UsageError, match="question is for stage2"):
        load_config("configs/quickstart/stage1.yaml", ["question={}"])
    with pytest.raises(UsageError, match=r"unknown configuration key 'llm.lora.rnk': did you mean 'rank'"):
        load_config("configs/finetune_vqa_lora_small.yaml", ["llm.lora.rnk=2"])


def test_the_run_that_questions_start_from_is_found_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one").mkdir()
    monkeypatch.chdir(tmp_path)
    config = anchor(load_config("configs/finetune_vqa_lora_small.yaml", ["question.init=one"]))
    assert config.question is not None
    assert config.question.init == str(tmp_path / "one")


@pytest.mark.parametrize("betas", [[0.9, 1.0], [1, 0.98], [-0.1, 0.9], [0.9, 1.5]])
def test_betas_that_adam_refuses_are_refused_here(betas: list[float]) -> None:
    train = {"steps": 10, "warmup": 1, "betas": betas}
    data = {"train": {"name": "jsonl", "path": "x"}}
    with pytest.raises(UsageError, match=r"train\.betas\.[01]: input should be (less|greater) than"):
        parse_config({"stage": "stage1", "run": "r", "data": data, "train": train})
