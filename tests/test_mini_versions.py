"""`mini:NAME` over time: what was trained on a former version of a tower finds that version, or says what to do."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import qformer
from qformer.checkpoints import folder as checkpoint
from qformer.files import digests, pretrained
from qformer.files.digests import digest
from qformer.files.pretrained import DIGITS, VERSIONS, shipped, tower
from qformer.files.tensors import read_tensors
from qformer.types import UsageError
from tests.commands import command, outcome
from tests.workspace import make_workspace

KINDS = ("vit", "bert", "opt")
GONE = ("mini:opt_canvases@fc205f36f327",)  # shipped for a few hours, and could not copy a box


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`towers/` with three tiny towers under the names of the shipped ones, and a stage one that was trained on two."""
    root = tmp_path_factory.mktemp("trained")
    make_workspace(root)
    for kind in KINDS:
        shutil.move(root / kind, root / "towers" / kind)
    values = {
        "stage": "stage1",
        "vision": {"name": "hf", "path": "mini:vit"},
        "resolution": {"name": "fixed", "size": 28},
        "data": {"batch": 4, "train": {"name": "jsonl", "path": f"{root}/captions.jsonl"}, "workers": 0},
        "train": {"steps": 2, "warmup": 1, "save_every": 1, "precision": "fp32"},
        "qformer": {"queries": 4},
        "text": {"bert": "mini:bert"},
        "loss": {"embed_width": 8},
    }
    (root / "stage1.yaml").write_text(yaml.safe_dump(values))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pretrained, "TOWERS", root / "towers")
        command("train", root / "stage1.yaml", f"run={root}/run")
    return root


@pytest.fixture
def space(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, whose towers can be renewed."""
    space = tmp_path / "space"
    shutil.copytree(trained, space)
    monkeypatch.setattr(pretrained, "TOWERS", space / "towers")
    for kind in KINDS:
        monkeypatch.setitem(VERSIONS, kind, (str(digest(f"mini:{kind}")),))
    return space


def renew(space: Path, kind: str, keep: Path | None) -> str:
    """Give `mini:KIND` other weights and return the former digest; `keep` is where the former version goes.

    Without it, this version of the package has never heard of the former one.
    """
    folder, former = space / "towers" / kind, str(digest(f"mini:{kind}"))
    if keep is not None:
        shutil.copytree(folder, keep / f"{kind}@{former[:DIGITS]}")
    weights = {name: tensor + 1 for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    digests._hash_weights.cache_clear()
    VERSIONS[kind] = (*(VERSIONS[kind] if keep is not None else ()), str(digest(f"mini:{kind}")))
    assert VERSIONS[kind][-1] != former
    return former


def images(model: qformer.ImageTextModel) -> torch.Tensor:
    torch.manual_seed(0)
    pixels = (255 * torch.rand(3, 28, 28)).byte()
    with torch.no_grad():
        return model.eval().embed_images(model.frontend.tiles([pixels]))[0]


def test_a_checkpoint_loads_the_version_it_was_trained_on(space: Path) -> None:
    before = images(qformer.load(space / "run"))
    former = renew(space, "vit", space / "towers")
    name = f"mini:vit@{former[:DIGITS]}"
    saved = checkpoint.read(space / "run")
    assert saved.config.vision.options["path"] == name
    assert saved.config.text.bert == "mini:bert"
    assert checkpoint.read_config(space / "run").vision.options["path"] == name
    assert torch.equal(images(qformer.load(space / "run")), before)
    assert f"\n{name} " in command("towers")


def test_what_is_written_again_names_the_former_version(space: Path) -> None:
    former = renew(space, "vit", space / "towers")
    name = f"mini:vit@{former[:DIGITS]}"
    command("convert", space / "run", "-o", space / "again")
    assert checkpoint.read(space / "again").config.vision.options["path"] == name
    assert checkpoint.read_meta(space / "again")["towers"][name] == former


def test_a_run_does_not_go_on_with_other_weights_unless_it_names_the_former_ones(space: Path) -> None:
    name = f"mini:vit@{renew(space, 'vit', space / 'towers')[:DIGITS]}"
    shutil.rmtree(space / "run" / "checkpoints" / "step-0000002")
    words = ("train", space / "stage1.yaml", f"run={space}/run")
    code, _, error = outcome(*words)
    assert (code, error.count("\n")) == (2, 1)
    assert f"vision.path was {name}, is mini:vit" in error
    command(*words, f"vision.path={name}")
    assert checkpoint.read(space / "run").meta["step"] == 2


def test_a_former_version_that_is_not_here_is_one_sentence(space: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    former = renew(space, "vit", None)
    monkeypatch.setitem(VERSIONS, "vit", (former, *VERSIONS["vit"]))
    code, _, error = outcome("caption", space / "run", space / "images" / "0.png")
    assert (code, error) == (
        2,
        f"qformer: the weights of the tower 'mini:vit@{former[:DIGITS]}' are not in this version of the package; "
        "use the version of qformer that trained with them\n",
    )


@pytest.mark.parametrize("same_name", [False, True])
def test_weights_that_nobody_knows_are_one_sentence(space: Path, same_name: bool) -> None:
    """Also if a folder has the name of the former version, but not its weights."""
    former = renew(space, "bert", None)
    if same_name:
        shutil.copytree(space / "towers" / "bert", space / "towers" / f"bert@{former[:DIGITS]}")
    code, _, error = outcome("index", space / "run", space / "images", "-o", space / "gallery")
    assert (code, error.count("\n")) == (2, 1)
    assert f"was trained on 'mini:bert' with other weights (digest {former}) than those of this version" in error
    assert checkpoint.read(space / "run", verify=False).config.text.bert == "mini:bert"


def test_a_name_can_say_which_version_of_today_it_means() -> None:
    for kind in ("bert", "vit", "opt", "t5"):
        assert digest(f"mini:{kind}") == VERSIONS[kind][-1], "a tower was renewed: append its digest to VERSIONS"
        assert tower(f"mini:{kind}@{VERSIONS[kind][-1][:DIGITS]}") == tower(f"mini:{kind}")
    with pytest.raises(UsageError, match="unknown shipped tower 'opt@0123456789ab': known are"):
        tower("mini:opt@0123456789ab")
    assert digest("mini:opt@0123456789ab") is None


def test_every_version_is_somewhere() -> None:
    """Of each former version there is a folder in the package, or, of those in `GONE`, a sentence."""
    for kind, versions in VERSIONS.items():
        for known in versions[:-1]:
            former = f"mini:{kind}@{known[:DIGITS]}"
            if former in GONE:
                with pytest.raises(UsageError, match="are not in this version of the package; use the version of"):
                    tower(former)
            else:
                assert digest(former) == known
    assert all(read_tensors(folder) for folder in shipped().values())
