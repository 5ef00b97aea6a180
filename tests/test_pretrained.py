"""Models of others: none of their code runs, whoever answers at the terminal, and no file elsewhere is read."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor, AutoTokenizer

from qformer import vision
from qformer.config import load_config
from qformer.files import pretrained
from qformer.files.pretrained import tower
from qformer.files.tensors import read_tensors
from qformer.llm.loading import load_language_model
from qformer.model.bert import read_bert, read_tokenizer
from qformer.retrieval.embedders import load_embedder
from qformer.stages.plan.outline import outline_language_model
from qformer.types import UsageError

ROOT = Path(__file__).parent.parent
KINDS = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoProcessor", "AutoTokenizer")
CODE: dict[str, Any] = {kind: f"evil.{kind}" for kind in KINDS} | {"AutoTokenizer": ["evil.AutoTokenizer", None]}


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for models with code beside them that would leave a file `ran`; somebody says yes to every question."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path


def model(place: Path, shipped: str, file: str = "config.json", **changes: Any) -> Path:
    """A shipped tower with changes in one of its files, and code that those may name."""
    folder = place / "model"
    shutil.copytree(tower(f"mini:{shipped}"), folder)
    classes = "".join(f"class {kind}: pass\n" for kind in CODE)
    (folder / "evil.py").write_text(f"open({str(place / 'ran')!r}, 'w').close()\n{classes}")
    said = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps(said | changes))
    return folder


@pytest.mark.parametrize(
    ("load", "shipped", "changes"),
    [
        (load_language_model, "opt", {"model_type": "evil", "auto_map": CODE}),
        (lambda path: vision.build("hf", path=str(path)), "vit", {"model_type": "evil", "auto_map": CODE}),
        (lambda path: read_bert(str(path)), "bert", {"model_type": "evil", "auto_map": CODE}),
        (lambda path: load_embedder(str(path), "cpu"), "vit", {"model_type": "evil", "auto_map": CODE}),
        (
            read_tokenizer,  # of a model that has none in transformers
            "vit",
            {
                "file": "tokenizer_config.json",
                "tokenizer_class": "Evil",
                "auto_map": {"AutoTokenizer": ["evil.T", None]},
            },
        ),
        (
            lambda path: pretrained.read(AutoProcessor, path),
            "bert",
            {"file": "processor_config.json", "processor_class": "Evil", "auto_map": CODE},
        ),
    ],
    ids=["language", "vision", "bert", "ranker", "tokenizer", "processor"],
)
def test_nobody_is_asked_whether_code_may_run(evil: Path, load: Any, shipped: str, changes: dict[str, Any]) -> None:
    folder = model(evil, shipped, **changes)
    with pytest.raises(UsageError) as caught:
        load(folder)
    assert f"'{folder}' needs code of its own, which is not run; give a model" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (evil / "ran").exists()


def test_a_model_without_weights_runs_no_code_either(evil: Path) -> None:
    """Of a type that transformers knows, but not as a language model."""
    folder = model(evil, "vit", auto_map=CODE)
    config = load_config("configs/quickstart/stage2.yaml", [f"llm.path={folder}"])
    with pytest.raises(UsageError, match="which generates no text"):
        outline_language_model(config, "cpu")
    assert not (evil / "ran").exists()


def test_code_beside_a_model_that_transformers_knows_is_passed_over(evil: Path) -> None:
    assert load_language_model(model(evil, "opt", auto_map=CODE)).width
    assert not (evil / "ran").exists()


@pytest.mark.parametrize("kind", [AutoProcessor, AutoTokenizer, AutoModel])
def test_what_transformers_raises_is_one_sentence(tmp_path: Path, kind: Any) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert", "vocab_size": "many"')
    for path, where in ((tmp_path, f"the folder '{tmp_path}'"), ("no/such", "'no/such', which is neither a folder")):
        with pytest.raises(UsageError) as caught:
            pretrained.read(kind, path, "no model in {where} ({reason}); give one")
        assert str(caught.value).startswith(f"no model in {where}")
        assert str(caught.value).endswith("); give one")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../other.safetensors", "sub/x.safetensors", "..", "", "C:x", "a\\b", "a\0b"])
def test_an_index_names_files_of_its_own_folder(tmp_path: Path, name: str) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    folder = tmp_path / "folder"
    folder.mkdir()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UsageError) as caught:
        read_tensors(folder)
    assert f"'{index}' names {name!r}, but an index may name files of its own folder only" in str(caught.value)
    index.write_text(json.dumps({"weight_map": {"a": str(tmp_path / "other.safetensors")}}))
    with pytest.raises(UsageError, match="may name files of its own folder only"):
        read_tensors(folder)


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
def test_transformers_is_not_asked_to_read_a_file_elsewhere(tmp_path: Path, form: str) -> None:
    """Its folder works with an index of its own; led out of the folder, nothing is loaded."""
    folder = model(tmp_path, "opt")
    (weights,) = folder.glob("*.safetensors")
    tensors = read_tensors(weights)
    weights.unlink()
    if form == "model.safetensors":
        save_file(tensors, folder / "one.safetensors", metadata={"format": "pt"})
    else:
        torch.save(tensors, folder / "one.bin")
    index, suffix = folder / f"{form}.index.json", form.split(".")[1]
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, f"one.{suffix}")}))
    assert load_language_model(folder).width
    shutil.move(folder / f"one.{suffix}", tmp_path)
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, f"../one.{suffix}")}))
    with pytest.raises(UsageError, match=r"names '\.\./one\.\w+', but an index"):
        load_language_model(folder)
    index.write_text("{")
    with pytest.raises(UsageError, match=r"index\.json' is damaged"):
        load_language_model(folder)


def test_links_of_the_hub_s_cache_are_plain_names(tmp_path: Path) -> None:
    """There every file of a snapshot is a link to a blob elsewhere."""
    folder, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    folder.mkdir()
    blobs.mkdir()
    save_file({"a": torch.ones(1)}, blobs / "1f")
    (blobs / "2e").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    (folder / "model-1.safetensors").symlink_to(blobs / "1f")
    (folder / "model.safetensors.index.json").symlink_to(blobs / "2e")
    assert read_tensors(folder)["a"].item() == 1


@pytest.mark.parametrize("inside", [False, True])
def test_weights_that_a_configuration_names_lie_beside_it(tmp_path: Path, inside: bool) -> None:
    named = {"transformers_weights": "sub/x.safetensors.index.json"}
    folder = model(tmp_path, "opt", **({"text_config": named} if inside else named))
    with pytest.raises(UsageError, match=r"names the weights 'sub/x\.safetensors\.index\.json'"):
        load_language_model(folder)


@pytest.mark.parametrize("key", ["vocab", "merges"])
def test_words_of_a_tokenizer_are_in_its_own_files(tmp_path: Path, key: str) -> None:
    (tmp_path / "secret").write_text("one\ntwo\n")
    folder = model(tmp_path, "bert", "tokenizer_config.json", **{key: str(tmp_path / "secret")})
    with pytest.raises(UsageError, match=f"takes its {key} from '"):
        read_tokenizer(folder)


def test_every_call_of_transformers_says_that_no_code_may_run() -> None:
    """`from_pretrained` and `from_config` wherever they stand in the product."""
    silent = []
    for file in (file for package in ("qformer", "stages", "demo") for file in (ROOT / package).rglob("*.py")):
        nodes = list(ast.walk(ast.parse(file.read_text())))
        calls = [node for node in nodes if isinstance(node, ast.Call)]
        safe = [call.func for call in calls if "trust_remote_code=False" in ast.unparse(call).split("(", 1)[1]]
        for node in nodes:
            if isinstance(node, ast.Attribute) and node.attr in ("from_pretrained", "from_config") and node not in safe:
                silent.append(f"{file.name}:{node.lineno}")
    assert not silent


def test_loading_says_nothing_of_its_own(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """No report of tensors that are left over, no bar; and what was set before holds again afterwards."""
    from transformers import AutoModel
    from transformers.utils import logging

    folder = tmp_path / "vit"
    shutil.copytree(tower("mini:vit"), folder)
    tensors = read_tensors(folder)
    save_file(tensors | {"spare.weight": torch.zeros(2)}, folder / "model.safetensors", {"format": "pt"})
    logging.set_verbosity_warning()
    logging.enable_progress_bar()
    pretrained.read(AutoModel, folder)
    assert capfd.readouterr() == ("", "")
    assert caplog.text == ""
    assert logging.get_verbosity() == logging.WARNING
    assert logging.is_progress_bar_enabled()
    AutoModel.from_pretrained(folder)  # as it would be
    assert "Loading weights" in capfd.readouterr().err
    assert "spare.weight" in caplog.text
