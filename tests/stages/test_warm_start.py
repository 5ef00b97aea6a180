"""The warm start: at step 0 ITC is the linear map of the towers, and texts pass BERT as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForMaskedLM

from qformer import load, stages
from qformer.alignment import pooled
from qformer.checkpoints.convert import convert_checkpoint
from qformer.checkpoints.parts import LoadOptions
from qformer.config import LossConfig
from qformer.model.image_text import ImageTextModel
from qformer.model.qformer import QFormer
from qformer.schema import QFormerConfig
from qformer.stages.warm_start import warm_start
from qformer.types import Tiles, UsageError, VisualTokens
from tests.tiny import CAPTIONS, tiny_tokenizer
from tests.tiny_stage1 import WIDTH, Patches
from tests.workspace import config, make_workspace

PHOTOS, QUERIES = 60, 4
SIZES = {"hidden_size": 32, "layers": 3, "heads": 4, "intermediate_size": 48, "queries": QUERIES}


def built(pooling: Any = "mean", **sizes: Any) -> tuple[ImageTextModel, BertForMaskedLM]:
    """A model of stage one over a BERT of three layers, in eval mode, and that BERT."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer("bert")
    theirs = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=40, initializer_range=0.2,
    )  # fmt: skip
    bert = BertForMaskedLM(theirs).eval()
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    config = QFormerConfig(**SIZES | {"encoder_width": WIDTH, "vocab_size": len(tokenizer), "max_positions": 40,
                                      "cross_attention_every": 2, "dropout": 0} | sizes)  # fmt: skip
    qformer = QFormer.from_bert(bert.state_dict(), config, fold_token_types=True)
    model = ImageTextModel(Patches().freeze(), qformer, tokenizer, LossConfig(embed_width=16), 32, pooling)
    return model.eval(), bert


def photos() -> Tiles:
    """Images of 8 patches, whose patches and pictures differ from one another."""
    generator = torch.Generator().manual_seed(1)
    colors = torch.rand(PHOTOS, 3, 1, 1, generator=generator)
    return Tiles.from_pixels((0.6 * colors + 0.4 * torch.rand(PHOTOS, 3, 28, 56, generator=generator)).clamp(0, 1))


@torch.no_grad()
def started(model: ImageTextModel) -> tuple[Any, VisualTokens, torch.Tensor]:
    """The maps of a warm start from photos with features of texts that a linear map could make of them."""
    tokens = model.frontend(photos())
    pools = pooled(tokens)
    texts = pools @ torch.randn(pools.shape[1], 32, generator=torch.Generator().manual_seed(2))
    return warm_start(model, pools, texts, tokens.select(range(20))), tokens, texts


@torch.no_grad()
def test_first_query_and_heads_are_the_linear_map() -> None:
    model, _ = built()
    solved, tokens, texts = started(model)
    rows, valid = model.embed_images(model.frontend.encode_tiles(photos()))
    assert rows.shape == (PHOTOS, QUERIES, 16)
    assert bool(valid.all())
    wanted = solved.similarity(pooled(tokens), texts)  # (N, N)
    ours = rows[:, 0] @ F.normalize(model.text_proj(texts), dim=-1).T
    assert torch.corrcoef(torch.stack([ours.flatten(), wanted.flatten()]))[0, 1] > 0.98
    assert (ours.argmax(dim=1) == torch.arange(PHOTOS)).float().mean() > 0.5, "of chance 0.02; the map's own is 0.88"


@torch.no_grad()
def test_queries_are_different_views_of_one_map() -> None:
    model, _ = built()
    started(model)
    rows, _ = model.embed_images(model.frontend.encode_tiles(photos()))
    between = torch.einsum("nqp,nrp->nqr", rows, rows)  # cosines of the queries of each photo
    assert between.amin() > 0.3, "every query reads the map"
    assert not torch.allclose(rows[:, 0], rows[:, 1], atol=1e-3), "but not of the same patches"


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["mean", "class"])
def test_texts_pass_bert_unchanged(pooling: str) -> None:
    model, bert = built(pooling)
    started(model)
    tokens = model.tokenize(CAPTIONS)
    states = bert.bert(input_ids=tokens.ids, attention_mask=tokens.mask.long()).last_hidden_state
    assert torch.allclose(
        model.qformer.encode_text(tokens.ids, tokens.mask)[tokens.mask], states[tokens.mask], atol=1e-5
    )
    mask = tokens.mask[..., None]
    wanted = states[:, 0] if pooling == "class" else (states * mask).sum(1) / mask.sum(1)
    assert torch.allclose(model.read_texts(tokens), wanted, atol=1e-5)
    alone = torch.cat([model.read_texts(model.tokenize([text])) for text in CAPTIONS])
    assert torch.allclose(alone, wanted, atol=1e-5), "padding is no part of the mean"


@pytest.mark.parametrize(
    ("sizes", "said"), [({"cross_attention_every": 3}, "cross_attention_every 3"), ({"heads": 1}, "1 heads")]
)
def test_sizes_without_room_for_the_map_are_refused(sizes: dict[str, int], said: str) -> None:
    model, _ = built(**sizes)
    with pytest.raises(UsageError, match=said):
        started(model)


def test_text_path_that_stays_gets_no_gradient() -> None:
    model, _ = built()
    model.reader_learns = False
    model.embed_texts(CAPTIONS).sum().backward()
    assert model.text_proj.weight.grad is not None
    assert all(parameter.grad is None for parameter in model.qformer.parameters())


WARM = {
    "start": "warm",
    "text": {"fold_token_types": True, "pooling": "mean"},
    "qformer": {"cross_attention_every": 1, "dropout": 0},
    "loss": {"itm": 0, "itg": 0},
}


def run(root: Path, name: str, **changes: Any) -> dict[str, Any]:
    """Train on a store at a rate of next to nothing, measured on the photos of training; returns the measurement."""
    store = {"features": str(root / "store"), "crop": [1, 1], "flip": 0}
    store["validation"] = {"name": "jsonl", "path": str(root / "captions.jsonl"), "where": {"split": "train"}}
    train = {"steps": 1, "warmup": 0, "lr": 1e-9, "min_lr": 0, "bert_rate": 0}
    given = config(root, "stage1", run=str(root / name), data=store, train=train, **changes)
    stages.train(given)
    lines = (root / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if '"validation"' in line][-1]


def test_runs_begin_at_the_map_and_say_what_they_cannot(tmp_path: Path) -> None:
    root = make_workspace(tmp_path)
    warm, cold = run(root, "warm", **WARM), run(root, "cold", **WARM | {"start": "paper"})
    for way in ("i2t", "t2i"):
        assert warm[f"itc_{way}_r5"] >= cold[f"itc_{way}_r5"] + 0.2, "of eight photos of noise"
    assert not {"itm", "itg"} & warm.keys()
    assert not any(key.startswith("reranked") for key in warm)

    model = load(root / "warm", "cpu")
    assert isinstance(model, ImageTextModel)
    assert (model.pooling, model.can_match, model.qformer.lm_head) == ("mean", False, None)
    with pytest.raises(UsageError, match=r"no captioning head: it was trained with loss\.itg 0"):
        model.caption(model.frontend.tiles([str(root / "images" / "0.png")]))
    with pytest.raises(UsageError, match=r"mean of a text's rows \(text.pooling\)"):
        convert_checkpoint(str(root / "warm"), root / "there.pth", "lavis", LoadOptions())

    everything = config(root, "stage1", run=str(root / "all"), init=str(root / "warm"), text=WARM["text"],
                        qformer=WARM["qformer"])  # fmt: skip
    assert isinstance(load(stages.train(everything), "cpu"), ImageTextModel), "its captioning head starts untrained"


@pytest.mark.parametrize(
    ("stage", "changes", "said"),
    [
        ("stage1", {}, "stores no tokens: give data.features a folder"),
        ("stage1", {"init": "other", "data": {"features": "store"}}, "has an init to start from"),
        ("stage2", {"data": {"features": "store"}, "init": None}, "has no Q-Former yet: give init a run of stage1"),
        ("stage2", {"data": {"features": "store"}, "connector": {"name": "mlp"}}, "has the connector .mlp."),
    ],
)
def test_runs_without_what_a_warm_start_needs_are_refused(
    tmp_path: Path, stage: str, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        config(tmp_path, stage, start="warm", **changes)
