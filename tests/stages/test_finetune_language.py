"""Fine-tuning for language through the real trainer: captions, questions that the Q-Former reads, adapters of the LLM.

Tiny towers; the shipped files are run as they are but for sizes and paths.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import qformer
from qformer import stages, vision
from qformer.checkpoints import folder as checkpoint
from qformer.checkpoints.convert import convert_checkpoint
from qformer.checkpoints.parts import LoadOptions
from qformer.config import Choice, load_config, parse_config
from qformer.evaluation.vqa import mean_accuracy
from qformer.model.assembly import build_vision_language
from qformer.model.connectors import QFormerConnector
from qformer.model.vision_language import VisionLanguageModel
from qformer.schema import Config
from qformer.types import Batch, UsageError
from tests.processes import together
from tests.workspace import config, make_workspace

EVA = {"width": 16, "depth": 3, "heads": 2, "mlp_hidden": 24}
TEXT = (".words.", ".positions.", ".text_ffn.")
BRIEF = {"steps": 2, "save_every": 0}


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with both stages trained, and the photos with questions (`vqa.jsonl`)."""
    root = make_workspace(tmp_path_factory.mktemp("space"))
    records = [json.loads(line) for line in (root / "captions.jsonl").read_text().splitlines()]
    asked = [
        {"image": record["image"], "question": f"What is it, number {i % 3}?", "answers": ["a cat"] * 6 + ["a dog"] * 4}
        for i, record in enumerate(records)
    ]
    (root / "vqa.jsonl").write_text("".join(json.dumps(record) + "\n" for record in asked))
    stages.train(config(root, "stage1", train=BRIEF))
    stages.train(config(root, "stage2", train=BRIEF))
    return root


def test_held_out_questions_are_answered_and_scored(space: Path) -> None:
    """The loss is that of the answer behind the question, not of a caption; the accuracy that of VQAv2."""
    settings = asking(space, "held", train={"steps": 1, "warmup": 0})
    source = settings.data.train.model_dump()
    data = settings.data.model_dump(exclude_unset=True) | {"validation": source, "validation_size": 5}
    settings = settings.model_copy(update={"data": type(settings.data).model_validate(data)})
    run = stages.train(settings)
    last = json.loads((space / "held" / "metrics.jsonl").read_text().splitlines()[-1])
    model = qformer.load(run, device="cpu")
    assert isinstance(model, VisionLanguageModel)
    records = [json.loads(line) for line in (space / "vqa.jsonl").read_text().splitlines()][:5]
    tiles = model.frontend.tiles([space / record["image"] for record in records])
    questions = [record["question"].lower() for record in records]
    said = model.answer(tiles, questions)
    assert last["accuracy"] == pytest.approx(mean_accuracy(said, [record["answers"] for record in records]))
    with torch.no_grad():
        parts = [
            model(Batch(tiles[i:j], [""] * (j - i), question=questions[i:j], answers=[["a cat"]] * (j - i)))["lm"]
            for i, j in ((0, 4), (4, 5))
        ]
    assert last["lm"] == pytest.approx((4 * parts[0].item() + parts[1].item()) / 5, rel=1e-4)
    shown = [json.loads(line) for line in (space / "held" / "captions.jsonl").read_text().splitlines()]
    pairs = zip(questions, said, strict=True)
    assert [line["caption"] for line in shown] == [f"{q} {a}" for q, a in pairs][:4]  # of the first batch
    assert {line["truth"] for line in shown} == {"a cat"}


def asking(space: Path, run: str, **changes: Any) -> Config:
    """Fine-tuning on questions; from stage two unless `init` says otherwise."""
    data = {"train": {"name": "jsonl", "path": str(space / "vqa.jsonl")}, "validation": None}
    values = {"init": str(space / "runs" / "stage2"), "question": {"init": str(space / "runs" / "stage1")}} | changes
    return config(space, "stage2", run=str(space / run), data=data, **values)


def text_path(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("connector."): t for name, t in tensors.items() if any(part in name for part in TEXT)}


def start_of(config: Config) -> dict[str, torch.Tensor]:
    """The tensors after a step that moves nothing: what the run starts from."""
    still = config.train.model_dump() | {"steps": 1, "warmup": 0, "lr": 1e-30, "min_lr": 0, "weight_decay": 0}
    return checkpoint.read(stages.train(parse_config(config.model_dump(exclude_unset=True) | {"train": still}))).tensors


def test_stage_two_starts_with_the_text_path_of_stage_one(space: Path) -> None:
    found = start_of(asking(space, "from-both"))
    one, two = (checkpoint.read(space / "runs" / name).tensors for name in ("stage1", "stage2"))
    text = text_path(found)
    assert set(text) == {n for n in text_path(one) if "layers.1" not in n}  # nobody reads the last layer's text rows
    for name, tensor in text.items():
        torch.testing.assert_close(tensor, one[name])
    rest = {name: tensor for name, tensor in found.items() if name.removeprefix("connector.") not in text}
    assert rest.keys() == two.keys()
    for name, tensor in rest.items():
        torch.testing.assert_close(tensor, two[name])


def test_stage_one_alone_is_a_start(space: Path) -> None:
    found = start_of(asking(space, "from-one", init=str(space / "runs" / "stage1"), question={}))
    one = checkpoint.read(space / "runs" / "stage1").tensors
    for name, tensor in found.items():
        if not name.startswith("connector.projection."):
            torch.testing.assert_close(tensor, one[name.removeprefix("connector.")])


def test_without_stage_one_the_text_path_is_bert_s(space: Path) -> None:
    found = start_of(asking(space, "from-bert", question={}))
    from transformers import BertModel

    bert = BertModel.from_pretrained(space / "bert").state_dict()
    words = bert["embeddings.word_embeddings.weight"]
    torch.testing.assert_close(found["connector.qformer.embeddings.words.weight"][: len(words)], words)
    inner = bert["encoder.layer.0.intermediate.dense.weight"]
    torch.testing.assert_close(found["connector.qformer.layers.0.text_ffn.inner.weight"], inner)


def test_questions_train_resume_and_load_without_anything_else(space: Path, tmp_path: Path) -> None:
    """Stopped after two steps of four and gone on with, the run ends as if it had not been stopped."""
    whole = stages.train(asking(space, "whole", train={"steps": 4, "save_every": 2, "keep_last": 4}))
    (cut := tmp_path / "cut").mkdir()
    for file in ("config.yaml", "metrics.jsonl"):
        (cut / file).write_bytes((space / "whole" / file).read_bytes())
    (cut / "checkpoints").mkdir()
    (whole.parent / "step-0000002").rename(cut / "checkpoints" / "step-0000002")
    again = stages.train(
        asking(space, "cut", train={"steps": 4, "save_every": 2, "keep_last": 4}).model_copy(update={"run": str(cut)})
    )
    tensors, resumed = (checkpoint.read(path).tensors for path in (whole, again))
    assert tensors.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in tensors.items())
    start = checkpoint.read(space / "runs" / "stage1").tensors
    moved = [name for name, tensor in text_path(tensors).items() if not torch.equal(tensor, start[name])]
    assert set(moved) == set(text_path(tensors))  # the text path learns, all of it

    model = qformer.load(whole, device="cpu")
    assert isinstance(model, VisionLanguageModel)
    assert isinstance(model.connector, QFormerConnector)
    assert model.connector.tokenizer is not None
    tiles = model.frontend.tiles([space / "images" / "0.png"])
    first, second = (model.prefix(tiles, [question])[0] for question in ("what is it?", "a dog on the beach"))
    assert not torch.allclose(first, second, atol=1e-4)
    assert len(model.answer(tiles, [["what is it?", "is it a dog?"]], max_new_tokens=2)[0]) == 2
    assert len(model.generate(tiles, max_new_tokens=2)) == 1

    # Another fine-tuning goes on from it, and need not say again that its Q-Former reads questions.
    further = asking(space, "further", init=str(whole), question=None)
    torch.testing.assert_close(start_of(further), tensors)


def test_text_paths_that_do_not_fit_are_refused(space: Path) -> None:
    for changes, told in (
        ({"question": {"init": str(space / "runs" / "stage2")}}, "a run of stage 'stage2', which has no text path"),
        ({"init": str(space / "runs" / "stage1")}, "leave question.init out"),
    ):
        with pytest.raises(UsageError, match=told):
            stages.train(asking(space, "refused", **changes))


LORA = {"rank": 2, "alpha": 8, "dropout": 0.1}


def adapters(tensors: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in tensors if name.startswith("llm.")}


@pytest.mark.canary
@pytest.mark.parametrize("llm", ["opt", "flan-t5"])
def test_adapters_alone_of_the_language_model_learn_and_are_saved(space: Path, llm: str) -> None:
    settings = {"path": str(space / llm), "lora": LORA}
    saved = checkpoint.read(stages.train(asking(space, f"lora-{llm}", question=None, llm=settings)))
    found = adapters(saved.tensors)
    layers = {"opt": 2 * 2, "flan-t5": 2 * 2 * 3}[llm]  # queries and values; a T5 has three attentions to two layers
    assert len(found) == 2 * layers
    assert all("lora_A" in name or "lora_B" in name for name in found)
    assert all(saved.tensors[name].any() for name in found)  # B starts as zeros

    model = qformer.load(saved.path, device="cpu")
    assert isinstance(model, VisionLanguageModel)
    plain, _ = build_vision_language(
        saved.config.model_copy(update={"llm": config(space, "stage2", llm={"path": str(space / llm)}).llm})
    )
    mine = {n.replace(".base_layer", ""): p for n, p in model.llm.model.named_parameters() if "lora_" not in n}
    base = dict(plain.llm.model.named_parameters())
    assert mine.keys() == base.keys()
    assert all(torch.equal(tensor, base[name]) for name, tensor in mine.items())
    tiles = model.frontend.tiles([space / "images" / "0.png"])
    one, mask = model.prefix(tiles)
    with torch.no_grad():
        before, _ = plain.llm.loss(one, mask, ["a cat"], ["what is it?"])
        after, _ = model.llm.loss(one, mask, ["a cat"], ["what is it?"])
    assert before != after
    assert len(model.answer(tiles, ["what is it?"], max_new_tokens=2)) == 1

    half = qformer.load(saved.path, device="cpu", dtype="bf16")
    assert isinstance(half, VisionLanguageModel)
    kept = {"lora" if "lora_" in name else "weights": p.dtype for name, p in half.llm.named_parameters()}
    assert kept == {"lora": torch.float32, "weights": torch.bfloat16}
    assert half(Batch(tiles, ["a cat"]))["loss"].item() == pytest.approx(
        model(Batch(tiles, ["a cat"]))["loss"].item(), rel=0.05
    )


def test_adapters_resume_and_go_on_with_dropout(space: Path, tmp_path: Path) -> None:
    brief = {"steps": 4, "save_every": 2, "keep_last": 4}
    lora = {"path": str(space / "opt"), "lora": LORA}
    whole = stages.train(asking(space, "lora-whole", question=None, llm=lora, train=brief))
    (cut := tmp_path / "cut" / "checkpoints").mkdir(parents=True)
    (whole.parent / "step-0000002").rename(cut / "step-0000002")
    settings = asking(space, "x", question=None, llm=lora, train=brief).model_copy(update={"run": str(cut.parent)})
    again = checkpoint.read(stages.train(settings)).tensors
    for name, tensor in checkpoint.read(whole).tensors.items():
        assert torch.equal(tensor, again[name])
    model = qformer.load(whole, device="cpu")
    assert isinstance(model, VisionLanguageModel)
    dropouts = [part for name, part in model.llm.named_modules() if name.endswith("lora_dropout.default")]
    for mode in (True, False):
        assert {part.training for part in [*dropouts, *(model.train(mode).llm.adapters)]} == {mode}
    assert not model.train().llm.model.model.decoder.layers[0].training  # the rest stays in eval mode


def test_missing_peft_and_wrong_targets_are_told(space: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {"path": str(space / "opt"), "lora": {"targets": ["query"]}}
    with pytest.raises(UsageError, match=r"llm.lora.targets \['query'\] are not layers of this opt model.*q_proj"):
        build_vision_language(asking(space, "wrong", question=None, llm=wrong))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match="peft, which is not installed; run: pip install"):
        build_vision_language(asking(space, "missing", question=None, llm={"path": str(space / "opt"), "lora": LORA}))


CAPTIONS, QUESTIONS, ADAPTERS = (
    f"configs/finetune_{name}.yaml" for name in ("caption_opt2.7b", "vqa_flant5xl", "vqa_lora_small")
)


def test_numbers_of_the_paper() -> None:
    """Section 5 of its appendix: five epochs, lr 1e-5, resolutions, layer decays; the language model is frozen."""
    caption, vqa = load_config(CAPTIONS), load_config(QUESTIONS)
    for shipped, batch, size, decay, samples in ((caption, 256, 364, 1, 566_747), (vqa, 128, 490, 0.95, 658_111)):
        train = shipped.train
        assert shipped.data.batch * train.accumulate == batch
        assert shipped.vision.options["image_size"] == shipped.resolution.options["size"] == size
        assert (train.lr, train.layer_decay, train.weight_decay, shipped.freeze_vision) == (1e-5, decay, 0.05, False)
        assert abs(train.steps * batch - 5 * samples) < batch
        assert shipped.llm is not None
        assert shipped.llm.lora is None
    assert caption.llm is not None
    assert caption.llm.prompt == "a photo of"
    assert caption.question is None
    assert vqa.question is not None


@pytest.fixture(scope="module")
def eva_space(tmp_path_factory: pytest.TempPathFactory, space: Path) -> Path:
    """Both stages behind a frozen EVA of 28 pixels, for the two language models."""
    root = tmp_path_factory.mktemp("eva")
    with torch.random.fork_rng():
        torch.manual_seed(4)
        state = vision.build("eva", precision="fp32", image_size=28, **EVA).state_dict()
    torch.save({name: torch.randn_like(tensor) * 0.2 for name, tensor in state.items()}, root / "eva.pth")
    eva = Choice(name="eva", weights=str(root / "eva.pth"), image_size=28, **EVA)
    stages.train(config(space, "stage1", run=str(root / "stage1"), train=BRIEF).model_copy(update={"vision": eva}))
    for llm in ("opt", "flan-t5"):
        init = str(root / "stage1")
        stages.train(
            config(space, "stage2", run=str(root / llm), init=init, llm={"path": str(space / llm)}, train=BRIEF)
        )
    return root


@pytest.mark.slow
@pytest.mark.parametrize(("path", "llm"), [(CAPTIONS, "opt"), (QUESTIONS, "flan-t5")])
def test_a_shipped_file_trains_all_but_the_language_model(space: Path, eva_space: Path, path: str, llm: str) -> None:
    """One step at the peak of the learning rate: blocks of the ViT move less towards the front where they should."""
    overrides = {
        "init": eva_space / llm,
        "run": eva_space / f"run-{llm}",
        "llm.path": space / llm,
        "vision": json.dumps({"name": "eva", "image_size": 42}),
        "resolution.size": 42,
        "data.train.path": space / ("captions.jsonl" if llm == "opt" else "vqa.jsonl"),
        **{"data.batch": 4, "data.workers": 0, "train.accumulate": 2, "train.precision": "fp32"},
        **{"train.steps": 1, "train.warmup": 0, "train.weight_decay": 0},
    }
    if llm == "flan-t5":
        overrides |= {"question.init": eva_space / "stage1", "question.max_tokens": 12}
    settings = load_config(path, [f"{key}={value}" for key, value in overrides.items()])
    start = start_of(settings.model_copy(update={"run": str(eva_space / f"start-{llm}")}))
    saved = checkpoint.read(stages.train(settings)).tensors
    assert saved.keys() == start.keys()
    assert not any(name.startswith("llm.") for name in saved)
    assert bool(text_path(saved)) == (llm == "flan-t5")
    moved = {name: (saved[name].double() - start[name].double()).abs().max().item() for name in start}
    assert sorted(name for name, most in moved.items() if most == 0) == []
    decay = settings.train.layer_decay
    blocks = [max(m for n, m in moved.items() if n.startswith(f"frontend.encoder.blocks.{i}.")) for i in range(3)]
    others = max(m for n, m in moved.items() if not n.startswith("frontend.encoder."))
    assert [*blocks, others] == pytest.approx([1e-5 * decay**power for power in (3, 2, 1, 0)], rel=0.01)
    model = qformer.load(settings.run, device="cpu")
    assert isinstance(model, VisionLanguageModel)
    tiles = model.frontend.tiles([space / "images" / "0.png"])
    said = model.generate(tiles, max_new_tokens=2) + model.answer(tiles, ["what is it?"], max_new_tokens=2)
    assert len(said) == 2


@pytest.mark.slow
def test_the_file_for_own_questions_trains_bridge_and_adapters(space: Path) -> None:
    overrides = {
        "init": space / "runs" / "stage2",
        "question.init": space / "runs" / "stage1",
        "question.max_tokens": 12,
        "run": space / "lora-small",
        "llm.path": space / "opt",
        "data.train.path": space / "vqa.jsonl",
        **{"data.batch": 4, "data.workers": 0, "train.steps": 3, "train.warmup": 1, "train.precision": "fp32"},
    }
    settings = load_config(ADAPTERS, [f"{key}={value}" for key, value in overrides.items()])
    saved = checkpoint.read(stages.train(settings)).tensors
    assert adapters(saved)
    assert text_path(saved)
    assert not any(name.startswith("frontend.encoder.") for name in saved)


def test_converting_merges_adapters_and_refuses_a_q_former_that_reads_questions(space: Path, tmp_path: Path) -> None:
    settings = {"path": str(space / "opt"), "lora": LORA | {"targets": ["fc1", "out_proj"]}}
    run = stages.train(asking(space, "merged", question=None, llm=settings))
    folder = convert_checkpoint(str(run), tmp_path / "merged", "qformer", LoadOptions())
    before, after = (qformer.load(path, device="cpu") for path in (run, folder))
    assert isinstance(before, VisionLanguageModel)
    assert isinstance(after, VisionLanguageModel)
    assert not [name for name, _ in after.llm.named_parameters() if "lora" in name]
    tiles = before.frontend.tiles([space / "images" / "0.png"])
    with torch.no_grad():
        losses = [model(Batch(tiles, ["a cat"]))["loss"] for model in (before, after)]
    torch.testing.assert_close(*losses)
    plain, _ = build_vision_language(config(space, "stage2", vision=checkpoint.read(run).config.vision.model_dump()))
    assert not torch.equal(
        plain.llm.model.model.decoder.layers[0].fc1.weight, after.llm.model.model.decoder.layers[0].fc1.weight
    )

    tied = {"path": str(space / "opt"), "lora": LORA | {"targets": ["lm_head"]}}
    run = stages.train(asking(space, "tied", question=None, llm=tied, train=BRIEF))
    with pytest.raises(UsageError, match=r"adapters of model.decoder.embed_tokens and lm_head cannot be merged"):
        convert_checkpoint(str(run), tmp_path / "tied", "qformer", LoadOptions())

    reads = stages.train(asking(space, "reads", train=BRIEF))
    for form in ("lavis", "transformers"):
        with pytest.raises(UsageError, match="reads questions, for which stage two of BLIP-2 has no place"):
            convert_checkpoint(str(reads), tmp_path / form, form, LoadOptions())


@pytest.mark.slow
def test_two_processes_learn_the_same_answers_as_one(space: Path) -> None:
    """Questions in the Q-Former and adapters: the losses of every step are those of one process."""
    stages.train(config(space, "stage1", run=str(space / "still"), qformer={"dropout": 0.0, "queries": 3}, train=BRIEF))

    def settings(world: int) -> Config:
        own = {"llm": {"path": str(space / "opt"), "lora": LORA | {"dropout": 0}}, "question": {}}
        train = {"steps": 3, "save_every": 0}
        made = asking(space, f"world-{world}", init=str(space / "still"), train=train, **own)
        return made.model_copy(update={"data": made.data.model_copy(update={"batch": 6 // world})})

    stages.train(settings(1))
    together(space / "meeting", 2, stages.train, settings(2))
    records = [
        [json.loads(line) for line in (space / f"world-{world}" / "metrics.jsonl").read_text().splitlines()]
        for world in (1, 2)
    ]
    for alone, shared in zip(*records, strict=True):
        assert shared["lm"] == pytest.approx(alone["lm"], rel=1e-4)
    one, two = (checkpoint.read(space / f"world-{world}").tensors for world in (1, 2))
    for name, tensor in one.items():
        if not name.endswith("key.bias"):  # whose gradient is rounding alone, which Adam blows up
            torch.testing.assert_close(two[name], tensor, atol=2e-4, rtol=1e-3)
