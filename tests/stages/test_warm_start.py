"""The warm start: at step 0 ITC is the linear map of the towers, and texts pass BERT as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForMaskedLM

from qformer.alignment import pooled
from qformer.config import LossConfig
from qformer.model.image_text import ImageTextModel
from qformer.model.qformer import QFormer
from qformer.schema import QFormerConfig
from qformer.stages.warm_start import warm_start
from qformer.types import Tiles, UsageError, VisualTokens
from tests.tiny import CAPTIONS, tiny_tokenizer
from tests.tiny_stage1 import WIDTH, Patches

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
