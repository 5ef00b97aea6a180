"""`qformer convert`: prints what it wrote, or says in one sentence what is wrong and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import URLError

import pytest
import torch

from qformer.files import releases
from qformer.files.tensors import read_tensors
from tests.golden.golden import bert_tokenizer, read
from tests.test_cli import one_sentence
from tests.their_blip2 import make

if TYPE_CHECKING:
    from collections.abc import Callable

    Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("theirs")
    make("opt", folder)
    return folder


@pytest.fixture(scope="module")
def retrieval(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("itr")
    make("itr", folder)
    return folder


def refused(run: Run, expected: str, *arguments: str) -> None:
    code, out, err = run("convert", *arguments)
    assert (code, out) == (2, "")
    assert expected in one_sentence(err)
    assert not list(Path().glob("*.partial"))


def test_it_prints_the_path(run: Run, theirs: Path) -> None:
    assert run("convert", str(theirs), "-o", "made/ours")[:2] == (0, "made/ours\n")
    assert Path("made/ours/config.yaml").is_file()
    assert run("convert", "made/ours", "--output", "a.pth", "--to", "lavis")[:2] == (0, "a.pth\n")
    assert run("convert", "made/ours", "-o", "back", "--to", "transformers")[:2] == (0, "back\n")
    told = ("--heads", "2", "--vision-heads", "2", "--llm", "made/ours/llm", "--tokenizer", "made/ours/llm")
    assert run("convert", "a.pth", "-o", "again", "--to", "transformers", *told)[:2] == (0, "again\n")
    known = read_tensors(theirs)
    for folder in ("back", "again"):
        made = read_tensors(folder)
        assert made.keys() == known.keys()
        assert all(torch.equal(made[name], known[name]) for name in known)


def test_a_flipped_bit_is_named_unless_nothing_is_to_be_checked(run: Run, theirs: Path) -> None:
    """What is kept inside counts, too; the option holds for one command."""
    assert run("convert", str(theirs), "-o", "flipped")[0] == 0
    file = next(Path("flipped").glob("vision*"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    refused(run, f"{file.name} is not as it was written", "flipped", "-o", "x.pth", "--to", "lavis")
    assert run("convert", "flipped", "-o", "x.pth", "--to", "lavis", "--no-verify")[:2] == (0, "x.pth\n")
    refused(run, f"{file.name} is not as it was written", "flipped", "-o", "y.pth", "--to", "lavis")


def test_a_file_of_lavis_without_its_tower(run: Run, tmp_path: Path) -> None:
    golden = read("stage1_a")
    kept = {name: tensor for name, tensor in golden.weight.items() if not name.startswith("visual_encoder.")}
    eva = {name.removeprefix("visual_encoder."): t for name, t in golden.weight.items() if name not in kept}
    torch.save({"model": kept}, "bare.pth")
    torch.save(eva, "eva.pth")
    bert_tokenizer("a").save_pretrained("bert")
    refused(run, "give the encoder's file with vision", "bare.pth", "-o", "x")
    told = ("--heads", "4", "--vision", "eva.pth", "--vision-heads", "3", "--tokenizer", "bert")
    assert run("convert", "bare.pth", "-o", "whole", *told)[:2] == (0, "whole\n")
    assert read_tensors("whole/vision.safetensors").keys() == eva.keys()


def test_wrong_usage(run: Run, theirs: Path) -> None:
    Path("exists").mkdir()
    Path("kept.pth").write_text("kept")
    Path("notes.txt").write_text("words")
    source = str(theirs)
    refused(run, "'exists' exists; give another path with -o, or remove it", source, "-o", "exists")
    refused(run, "'kept.pth' exists", source, "-o", "kept.pth", "--to", "lavis")
    assert Path("kept.pth").read_text() == "kept"
    refused(run, "no checkpoint at 'none'; give a run folder", "none", "-o", "x")
    refused(run, "no checkpoint at 'none.pth'", "none.pth", "-o", "x")
    refused(run, "no checkpoint at 'exists'", "exists", "-o", "x")
    refused(run, "'no/such' is not a local checkpoint, not the name of a release", "no/such", "-o", "x")
    refused(run, "'notes.txt' is not a checkpoint, is damaged, or holds code", "notes.txt", "-o", "x")
    assert sorted(path.name for path in Path().iterdir()) == ["exists", "kept.pth", "notes.txt"]


def test_what_cannot_be_written_leaves_nothing_behind(run: Run, retrieval: Path) -> None:
    expected = "the bridge does not fit BLIP-2: missing qformer.lm_head.bias, "
    refused(run, expected, str(retrieval), "-o", "x", "--to", "lavis")
    assert not list(Path().iterdir())
    torch.save({"model": read("stage1_a").weight}, "stage1.pth")
    told = ("--heads", "4", "--vision-heads", "3", "--tokenizer", "no/tokenizer")
    for form in ("qformer", "transformers"):
        refused(run, "no/tokenizer", "stage1.pth", "-o", "x", *told, "--to", form)
    assert [path.name for path in Path().iterdir()] == ["stage1.pth"]


@pytest.mark.parametrize(
    "arguments", [("a",), ("a", "-o", "x", "--to", "hf"), ("a", "-o", "x", "--heads", "0"), ("a", "-o", "x", "--nope")]
)
def test_typers_own_errors_exit_with_two(run: Run, arguments: tuple[str, ...]) -> None:
    code, out, err = run("convert", *arguments)
    assert (code, out) == (2, "")
    assert "Usage" in err
    assert "Traceback" not in err


def test_a_release_without_a_network(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(torch.hub, "download_url_to_file", fails)
    place = tmp_path / "torch" / "hub" / "checkpoints" / "blip2_pretrained.pth"
    expected = f"get {releases.SITE}blip2_pretrained.pth where there is a network and put it at {place}"
    refused(run, expected, "blip2_pretrained", "-o", "x")
