"""What a run starts from and how long its texts may be is settled, or said, before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qformer import stages
from qformer.checkpoints.convert import convert_checkpoint
from qformer.checkpoints.parts import LoadOptions
from qformer.config import load_config
from qformer.stages.sizes import with_sizes
from qformer.types import UsageError
from tests.tiny import save_tiny_llm
from tests.workspace import config, make_workspace

BRIEF = {"steps": 1, "warmup": 0, "save_every": 0}


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with stage one, and stage two with adapters in its OPT."""
    root = make_workspace(tmp_path_factory.mktemp("space"))
    save_tiny_llm(root / "other", "opt", seed=3)
    stages.train(config(root, "stage1", train=BRIEF))
    stages.train(config(root, "stage2", train=BRIEF))
    lora = {"path": str(root / "opt"), "lora": {"rank": 2}}
    stages.train(config(root, "stage2", run=str(root / "lora"), llm=lora, train=BRIEF))
    return root


def start(root: Path, run: str, init: Path, llm: Path, **options: Any) -> None:
    settings = {"init": str(init), "llm": {"path": str(llm), **options}}
    stages.train(config(root, "stage2", run=str(root / run), train=BRIEF, **settings))


def test_the_language_model_of_init_is_another(space: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun = space / "runs" / "stage2"
    start(space, "same", begun, space / "images" / ".." / "opt")
    assert "was trained with" not in capsys.readouterr().out
    start(space, "another", begun, space / "other")
    told = (
        f"init '{begun}' was trained with the language model '{space / 'opt'}', but this run uses '{space / 'other'}'"
    )
    assert told in capsys.readouterr().out
    save_tiny_llm(space / "wide", "opt-projected")
    with pytest.raises(UsageError, match=r"projection.weight .* instead of .*; init '.*' was trained with the"):
        start(space, "wider", begun, space / "wide")


def test_adapters_of_init_are_not_lost_unsaid(space: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match=r"was trained with adapters in its language model \(llm.lora of rank 2\)"):
        start(space, "none", space / "lora", space / "opt")
    merged = convert_checkpoint(str(space / "lora"), space / "merged", "qformer", LoadOptions())
    start(space, "on", merged, merged / "llm")
    assert "was trained with" not in capsys.readouterr().out
    start(space, "back", merged, space / "opt")
    assert f"which is '{space / 'opt'}' with its adapters merged, but" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stage", "changes", "expected"),
    [
        (
            "stage2",
            {"llm": {"max_tokens": 126}},
            "llm.max_tokens is 126, but after 3 visual tokens this opt model",
        ),
        ("stage2", {"llm": {"max_tokens": 2}}, "llm.max_tokens 2 leaves no room for a word of this language model"),
        ("stage2", {"llm": {"max_tokens": 1}}, "llm.max_tokens 1 leaves no room for a word before"),
        ("stage1", {"text": {"max_tokens": 41}}, "text.max_tokens is 41, but the Q-Former has only 40 positions"),
    ],
)
def test_texts_without_room_are_refused(space: Path, stage: str, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        stages.train(config(space, stage, run=str(space / "long"), train=BRIEF, **changes))
    assert not list((space / "long").glob("checkpoints/*"))


def test_the_longest_text_that_fits_is_trained(space: Path) -> None:
    """OPT's positions less the queries; and a `where` of the file that is taken back."""
    values = config(space, "stage2").model_dump(exclude_unset=True)
    values["data"]["train"]["where"] = None
    longest = {"path": str(space / "opt"), "max_tokens": 128 - 3}
    stages.train(config(space, "stage2", run=str(space / "all"), train=BRIEF, data=values["data"], llm=longest))


def test_sizes_are_those_that_are_trained(space: Path) -> None:
    shown, told = with_sizes(config(space, "stage1"))
    trained = load_config(space / "runs" / "stage1" / "checkpoints" / "step-0000001" / "config.yaml")
    assert (shown.qformer, told) == (trained.qformer, [])
    shown, told = with_sizes(config(space, "stage2"))
    trained = load_config(space / "runs" / "stage2" / "checkpoints" / "step-0000001" / "config.yaml")
    assert shown.qformer == trained.qformer
    assert told == [f"llm.path '{space / 'opt'}': opt with embeddings of width 16"]
    for path, expected in (("stage1_vitg", (768, 12, 32, 1408, 30523)), ("quickstart/stage1", (128, 2, 8, 160, 209))):
        sizes = with_sizes(load_config(f"configs/{path}.yaml"))[0].qformer
        found = (sizes.hidden_size, sizes.layers, sizes.queries, sizes.encoder_width, sizes.vocab_size)
        assert found == expected
    several = load_config("configs/stage1_vitg.yaml", ["vision.layers=[13,26,39]"])
    assert with_sizes(several)[0].qformer.encoder_width == 3 * 1408
    _, told = with_sizes(load_config("configs/quickstart/stage2.yaml", ["init=none", "llm.path=no/model"]))
    assert told == [
        "the sizes come from init, which cannot be read: no checkpoint at 'none'; give a run folder or one of its "
        "checkpoints, a folder with model.safetensors"
    ]
