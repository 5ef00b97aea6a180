"""The shipped fine-tuning for retrieval, through the real trainer: tiny towers, everything else as in its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from qformer import stages, vision
from qformer.checkpoints import folder as checkpoint
from qformer.checkpoints.weights import start_from
from qformer.config import Choice, load_config
from qformer.model.assembly import build_image_text
from qformer.schema import Config
from tests.workspace import config, make_workspace

EVA = {"width": 16, "depth": 3, "heads": 2, "mlp_hidden": 24}
DECAY = 0.95

pytestmark = pytest.mark.slow  # CI runs them too


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with stage one behind a frozen EVA of 224 pixels, and the photos as COCO's two kinds of files."""
    root = make_workspace(tmp_path_factory.mktemp("space"))
    with torch.random.fork_rng():
        torch.manual_seed(4)
        state = vision.build("eva", precision="fp32", **EVA).state_dict()
    torch.save({name: torch.randn_like(tensor) * 0.2 for name, tensor in state.items()}, root / "eva.pth")
    pretrained = config(root, "stage1", resolution={"name": "fixed", "size": 224}, train={"steps": 2, "save_every": 0})
    eva = Choice(name="eva", weights=str(root / "eva.pth"), **EVA)
    stages.train(pretrained.model_copy(update={"vision": eva}))
    records = [json.loads(line) for line in (root / "captions.jsonl").read_text().splitlines()]
    shared: dict[str, list[dict[str, Any]]] = {"train": [], "val": []}
    lists: dict[str, list[dict[str, Any]]] = {"train": [], "val": []}
    for number, record in enumerate(records):
        split = "val" if record["split"] == "dev" else "train"
        folder, name = record["image"].split("/")
        sentences = [{"raw": caption} for caption in record["captions"]]
        wanted = "restval" if number == 1 else split
        shared[split].append(
            {"filepath": folder, "filename": name, "cocoid": number, "split": wanted, "sentences": sentences}
        )
        same = f"coco_{number}" if number % 2 else number
        captions = [record["captions"]] if split == "val" else record["captions"]
        lists[split] += [{"image": record["image"], "caption": caption, "image_id": same} for caption in captions]
    (root / "dataset_coco.json").write_text(json.dumps({"images": shared["train"] + shared["val"]}))
    for split, rows in lists.items():
        (root / f"coco_karpathy_{split}.json").write_text(json.dumps(rows))
    return root


def finetuning(space: Path, run: str, train: str = "dataset_coco.json", val: str = "dataset_coco.json") -> Config:
    """The configuration as it is shipped, behind small towers; one step, at the peak of the learning rate."""
    overrides = {
        **{f"vision.{name}": size for name, size in EVA.items()},
        "vision.weights": space / "eva.pth",
        "text.bert": space / "bert",
        "qformer.queries": 3,
        "loss.embed_width": 8,
        "init": space / "runs" / "stage1",
        "run": space / run,
        **{f"data.train.{key}": space / name for key, name in (("path", train), ("images", "."))},
        **{f"data.validation.{key}": space / name for key, name in (("path", val), ("images", "."))},
        **{"data.batch": 4, "data.workers": 0, "train.chunk": 2},
        **{"train.steps": 1, "train.warmup": 0, "train.weight_decay": 0},
    }
    return load_config("configs/finetune_retrieval_coco.yaml", [f"{key}={value}" for key, value in overrides.items()])


def test_numbers_of_the_paper() -> None:
    shipped = load_config("configs/finetune_retrieval_coco.yaml")
    train = shipped.train
    assert (shipped.data.batch, train.accumulate, train.lr, train.betas) == (224, 1, 1e-5, (0.9, 0.999))
    assert (train.layer_decay, train.weight_decay, shipped.freeze_vision) == (DECAY, 0.05, False)
    assert shipped.vision.options["image_size"] == shipped.resolution.options["size"] == 364
    assert abs(train.steps * shipped.data.batch - 5 * 566_747) < shipped.data.batch  # five epochs of captions
    assert shipped.data.batch % train.chunk == 0


@pytest.mark.parametrize("names", [("dataset_coco.json",) * 2, ("coco_karpathy_train.json", "coco_karpathy_val.json")])
def test_everything_learns_and_blocks_of_the_vit_slower_towards_the_front(space: Path, names: tuple[str, str]) -> None:
    settings = finetuning(space, f"run-{names[0]}", *names)
    start, _ = build_image_text(settings)
    start_from(start, checkpoint.read(str(settings.init)))
    before = {name: tensor.detach().clone() for name, tensor in start.named_parameters()}
    saved = checkpoint.read(stages.train(settings)).tensors

    assert saved.keys() == before.keys()  # nothing is frozen
    moved = {name: (saved[name].double() - before[name].double()).abs().max().item() for name in before}
    assert sorted(name for name, most in moved.items() if most == 0) == []
    blocks = [max(m for n, m in moved.items() if n.startswith(f"frontend.encoder.blocks.{i}.")) for i in range(3)]
    front = max(m for n, m in moved.items() if n.startswith("frontend.encoder.") and ".blocks." not in n)
    others = max(m for n, m in moved.items() if not n.startswith("frontend.encoder."))
    # Adam's first step is as long as the learning rate, wherever there is a gradient.
    expected = [settings.train.lr * DECAY**power for power in (4, 3, 2, 1, 0)]
    assert [front, *blocks, others] == pytest.approx(expected, rel=0.01)

    last = [json.loads(line) for line in (Path(settings.run) / "metrics.jsonl").read_text().splitlines()][-1]
    assert last["kind"] == "validation"
    assert {"itc_i2t_r1", "reranked_i2t_r1", "reranked_t2i_r10"} <= last.keys()


def test_positions_of_224_pixels_are_resized_to_364_at_the_start(space: Path) -> None:
    model, _ = build_image_text(finetuning(space, "positions"))
    table = torch.load(space / "eva.pth")["pos_embed"]
    grid = table[:, 1:].reshape(1, 16, 16, EVA["width"]).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(26, 26), mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
    expected = torch.cat([table[:, :1], grid.reshape(1, 676, EVA["width"])], dim=1)
    torch.testing.assert_close(dict(model.frontend.encoder.named_parameters())["pos_embed"], expected)


def test_the_small_one_goes_on_from_a_run_at_a_larger_size(space: Path) -> None:
    sizes = {"queries": 3, "cross_attention_every": 1}
    brief = {"steps": 2, "save_every": 0}
    stages.train(config(space, "stage1", run=str(space / "runs" / "small"), qformer=sizes, train=brief))
    shared = {"vision.path": "vit", "text.bert": "bert", "init": "runs/small", "run": "small"}
    overrides = [f"{key}={space / name}" for key, name in (shared | {"data.train.path": "captions.jsonl"}).items()]
    overrides += ["resolution.size=42", "qformer.queries=3", "loss.embed_width=8", "data.batch=4"]
    overrides += ["train.steps=1", "train.warmup=0", "train.weight_decay=0", "train.precision=fp32"]
    settings = load_config("configs/finetune_retrieval_small.yaml", overrides)
    start, _ = build_image_text(settings)
    start_from(start, checkpoint.read(str(settings.init)))
    saved = checkpoint.read(stages.train(settings)).tensors
    before = {name: tensor.detach().double() for name, tensor in start.named_parameters()}
    assert before.keys() == saved.keys()
    moved = {name: (saved[name].double() - before[name]).abs().max().item() for name in before}
    assert min(moved.values()) > 0
    blocks = [max(most for name, most in moved.items() if f"tower.layers.{i}." in name) for i in range(2)]
    assert blocks == pytest.approx([4e-4 * 0.9**2, 4e-4 * 0.9], rel=0.01)
