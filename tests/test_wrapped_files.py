"""Files as people save them: state dicts under other keys, names with prefixes, older folders, numbered positions."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qformer.checkpoints import hugging_face, parts
from qformer.checkpoints.convert import convert_checkpoint
from qformer.checkpoints.lavis import from_lavis, tower
from qformer.checkpoints.parts import LoadOptions
from qformer.files.tensors import read_tensors
from qformer.types import UsageError
from tests.golden.golden import read
from tests.their_blip2 import make

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def same(made: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], expected[name]) for name in expected)


def inside(name: str, part: str) -> str:
    """As FSDP or `torch.compile` of a part of the model name its tensors: `Qformer._orig_mod.bert. ...`."""
    first, _, rest = name.partition(".")
    return f"{first}.{part}.{rest}" if rest else name


WRAPPED: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "lightning": lambda held: {
        "epoch": 3,
        "state_dict": {f"model.{name}": tensor for name, tensor in held.items()},
        "optimizer_states": [{"state": {0: torch.ones(2)}}],
    },
    "ddp": lambda held: {"model": {f"module.{name}": tensor for name, tensor in held.items()}},
    "compiled ddp": lambda held: {"state_dict": {f"module._orig_mod.{name}": held[name] for name in held}},
    "deepspeed": lambda held: {"module": {f"_forward_module.{name}": held[name] for name in held}, "dp_world_size": 8},
    "fsdp": lambda held: {
        f"_fsdp_wrapped_module.{inside(name, '_fsdp_wrapped_module._checkpoint_wrapped_module')}": held[name]
        for name in held
    },
    "parts compiled": lambda held: {"model_state_dict": {inside(name, "_orig_mod"): held[name] for name in held}},
    "nested": lambda held: {"state_dict": {"model": {f"net.model.module.{name}": held[name] for name in held}}},
}


@pytest.mark.parametrize("how", WRAPPED)
@pytest.mark.parametrize("name", ["stage1_a", "opt_a"])
def test_files_of_lavis_wrapped_by_training(tmp_path: Path, name: str, how: str) -> None:
    held = dict(read(name).weight)
    torch.save(WRAPPED[how](held), tmp_path / "saved.pth")
    made, expected = from_lavis(read_tensors(tmp_path / "saved.pth")), from_lavis(held)
    for part in ("bridge", "vision", "llm"):
        same(getattr(made, part), getattr(expected, part))
    towers = expected.vision | {"norm.weight": torch.ones(24)}
    torch.save(WRAPPED[how](towers), tmp_path / "eva.pth")
    same(tower(read_tensors(tmp_path / "eva.pth")), expected.vision)


def test_what_is_there_twice_or_beside_is_named(tmp_path: Path) -> None:
    held = dict(read("opt_a").weight)
    torch.save(held | {"module.ln_vision.weight": held["ln_vision.weight"]}, tmp_path / "twice.pth")
    with pytest.raises(UsageError, match=r"twice.pth' holds '.*ln_vision.weight' twice, wrapped and not"):
        read_tensors(tmp_path / "twice.pth")
    beside = {f"model.{name}": tensor for name, tensor in held.items()} | {"teacher.query_tokens": torch.ones(1)}
    with pytest.raises(UsageError, match=r"missing nothing; left over teacher\.query_tokens;"):
        from_lavis(beside)


def test_a_state_dict_under_a_name_of_its_own(tmp_path: Path) -> None:
    held = dict(read("opt_a").weight)
    torch.save({"ema": {f"net.{name}": held[name] for name in held}, "epoch": 3, "adam": {0: 1}}, tmp_path / "ema.pth")
    same(from_lavis(read_tensors(tmp_path / "ema.pth")).bridge, from_lavis(held).bridge)
    torch.save({"mine": held, "yours": held}, tmp_path / "two.pth")
    with pytest.raises(UsageError, match=r"does not hold tensors by name \(mine, yours\); give"):
        read_tensors(tmp_path / "two.pth")
    torch.save({"model": held, "args": argparse.Namespace(lr=1)}, tmp_path / "args.pth")
    with pytest.raises(UsageError, match=r"holds code .*: argparse.Namespace; save the state dict alone"):
        read_tensors(tmp_path / "args.pth")


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("itm_head.weight", lambda held: held.fill_(torch.nan), "the weight 'itm_head.weight' in .* holds NaN or inf"),
        ("visual_encoder.pos_embed", lambda held: held / 0, "the weight 'pos_embed' in .* holds NaN or infinity"),
        ("itm_head.weight", lambda held: held.T, r"itm_head.weight is \[32, 2\] instead of \[2, 32\]"),
        ("text_proj.bias", lambda held: held.to(torch.int8), "text_proj.bias as int8"),
        ("query_tokens", lambda held: held[0], r"query_tokens has the shape \[\d+, 32\] instead of"),
        ("text_proj.weight", lambda held: held[:, 1:], r"text_proj.weight is \[\d+, 31\] instead of \[\d+, 32\]"),
    ],
)
def test_weights_that_cannot_be_are_named(
    tmp_path: Path, name: str, change: Callable[[Tensor], Tensor], expected: str
) -> None:
    """Before anything is converted."""
    held = dict(read("stage1_a").weight)
    torch.save({"model": held | {name: change(held[name].clone())}}, tmp_path / "odd.pth")
    with pytest.raises(UsageError, match=expected):
        convert_checkpoint(
            str(tmp_path / "odd.pth"), tmp_path / "made", "qformer", LoadOptions(heads=2, vision_heads=3)
        )
    assert not (tmp_path / "made").exists()


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("theirs") / "opt"
    make("opt", folder)
    return folder


@pytest.mark.parametrize("shards", [1, 2])
def test_folders_of_older_transformers(opt: Path, tmp_path: Path, shards: int) -> None:
    """`pytorch_model.bin`, or shards and an index of it; with the buffers that numbered positions then."""
    held = load_file(opt / "model.safetensors")
    numbers = {"qformer.embeddings.position_ids": torch.arange(40)[None]}
    numbers["language_model.model.decoder.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    folder = tmp_path / "old"
    folder.mkdir()
    for file in opt.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    names = [*(held | numbers)]
    if shards == 1:
        torch.save(held | numbers, folder / "pytorch_model.bin")
    else:
        places = {name: f"pytorch_model-0000{place % 2 + 1}-of-00002.bin" for place, name in enumerate(names)}
        for shard in {*places.values()}:
            torch.save({n: (held | numbers)[n] for n in names if places[n] == shard}, folder / shard)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    made = convert_checkpoint(str(folder), tmp_path / "made", "transformers", LoadOptions())
    same(
        read_tensors(made),
        read_tensors(convert_checkpoint(str(opt), tmp_path / "known", "transformers", LoadOptions())),
    )
    wrong = hugging_face.from_transformers
    with pytest.raises(UsageError, match=r"left over qformer.embeddings.position_ids"):
        wrong(held | {"qformer.embeddings.position_ids": torch.arange(40).flip(0)}, "opt", 2)


def test_a_head_of_t5_that_is_its_embedding_is_written_once(tmp_path: Path) -> None:
    """T5 ties the two, and files of torch hold both."""
    make("t5", tmp_path / "t5")
    held = load_file(tmp_path / "t5" / "model.safetensors")
    held["language_model.lm_head.weight"] = held["language_model.shared.weight"].clone()
    (tmp_path / "t5" / "model.safetensors").unlink()
    torch.save(held, tmp_path / "t5" / "pytorch_model.bin")
    ours = convert_checkpoint(str(tmp_path / "t5"), tmp_path / "ours", "qformer", LoadOptions())
    lavis = convert_checkpoint(str(tmp_path / "t5"), tmp_path / "t5.pth", "lavis", LoadOptions())
    given = LoadOptions(heads=3, vision_heads=3, llm=str(ours / "llm"), tokenizer=str(ours / "llm"))
    again = convert_checkpoint(str(lavis), tmp_path / "again", "qformer", given)
    theirs = convert_checkpoint(str(ours), tmp_path / "theirs", "transformers", LoadOptions())
    for folder in (ours / "llm", again / "llm", theirs):
        kept = load_file(folder / "model.safetensors")
        assert [name for name in kept if name.endswith(("shared.weight", "lm_head.weight"))] == [
            name for name in kept if name.endswith("shared.weight")
        ]


@pytest.mark.parametrize("name", ["opt_a", "t5_a"])
def test_spare_tables_of_a_language_model_that_is_left_out(name: str) -> None:
    """LAVIS leaves frozen weights out by their first name alone, so that others of an embedding stay in the file."""
    held, tables = dict(read(name).weight), ("embed_tokens.weight", "lm_head.weight")
    kept = {n: tensor for n, tensor in held.items() if not n.startswith((f"{name[:-2]}_model.", "visual_encoder."))}
    spare = {n: tensor for n, tensor in held.items() if n.startswith(f"{name[:-2]}_model.") and n.endswith(tables)}
    assert spare
    made = from_lavis(kept | spare)
    assert not made.llm
    same(made.bridge, from_lavis(kept).bridge)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"heads": 0}, "qformer.heads: input should be greater than 0, but got 0"),
        ({"heads": 3}, "qformer.hidden_size 16 does not divide into 3 heads"),
        ({"heads": 2, "vision_heads": 0}, "width 24 does not divide into 0 heads"),
        ({"heads": 2, "vision_heads": 5}, "width 24 does not divide into 5 heads"),
    ],
)
def test_heads_that_cannot_be_are_refused(opt: Path, tmp_path: Path, given: dict[str, int], expected: str) -> None:
    lavis = convert_checkpoint(str(opt), tmp_path / "opt.pth", "lavis", LoadOptions())
    with pytest.raises(UsageError, match=expected):
        convert_checkpoint(
            str(lavis), tmp_path / "made", "qformer", LoadOptions(llm=str(opt), tokenizer=str(opt), **given)
        )
    assert not (tmp_path / "made").exists()


def test_a_width_that_is_no_multiple_of_the_usual_head_is_asked_about() -> None:
    assert [parts.usual_heads(width, 64, "heads") for width in (16, 64, 128, 768)] == [1, 1, 2, 12]
    with pytest.raises(UsageError, match="width of 96 is no multiple of the usual 64 of a head; say how many with h"):
        parts.usual_heads(96, 64, "heads")


@pytest.mark.parametrize("kind", ["opt", "itr"])
@pytest.mark.parametrize("form", ["qformer", "transformers"])
def test_a_tokenizer_of_more_words_than_the_model_is_refused(tmp_path: Path, kind: str, form: Any) -> None:
    from transformers import AutoTokenizer

    make(kind, tmp_path / kind)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / kind)
    tokenizer.add_tokens([f"more{number}" for number in range(9)])
    tokenizer.save_pretrained(tmp_path / "words")
    with pytest.raises(UsageError, match=r"words' has \d+ words, and the model in '.*' \d+; give the one"):
        convert_checkpoint(
            str(tmp_path / kind), tmp_path / "made", form, LoadOptions(tokenizer=str(tmp_path / "words"))
        )
