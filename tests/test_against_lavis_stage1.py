"""Stage one held against the original: LAVIS 1.0.2's own tensors, from tests/golden (see make_golden.py there)."""

from __future__ import annotations

import pytest
import torch

from qformer import losses
from qformer.evaluation import retrieval
from qformer.model.image_text import ImageTextModel
from qformer.types import Batch, Tokens
from tests.golden.golden import GRADIENTS, Golden, close, gradients, image_text, read, same_ids, tiles

Pair = tuple[Golden, ImageTextModel]


@pytest.fixture(scope="module", params=["a", "b"])
def pair(request: pytest.FixtureRequest) -> Pair:
    golden = read(f"stage1_{request.param}")
    return golden, image_text(golden)


def batch_of(golden: Golden) -> Batch:
    negatives = golden.given["negative_images"], golden.given["negative_texts"]
    return Batch(tiles(golden), golden.about["texts"], negatives=negatives)


def test_the_two_models_differ_in_every_size() -> None:
    first, second = read("stage1_a").about, read("stage1_b").about
    same = [key for part in ("vision", "qformer") for key in first[part] if first[part][key] == second[part][key]]
    same += [
        key for key in ("queries", "cross_attention_every", "embed_width", "max_tokens") if first[key] == second[key]
    ]
    assert same == []
    lengths = [len(read(f"stage1_{variant}").weight["Qformer.cls.predictions.decoder.bias"]) for variant in "ab"]
    assert lengths[0] != lengths[1]


def test_texts_become_the_same_ids(pair: Pair) -> None:
    golden, model = pair
    tokens = model.tokenize(golden.about["texts"])
    width = tokens.ids.shape[1]
    assert tokens.ids.tolist() == golden.given["ids"][:, :width].tolist()
    assert tokens.mask.tolist() == golden.given["mask"][:, :width].bool().tolist()
    assert not golden.given["mask"][:, width:].any()


@torch.no_grad()
def test_image_encoder(pair: Pair) -> None:
    golden, model = pair
    close(model.frontend.encoder(golden.given["pixels"]), golden.out["vit"])
    close(model.frontend(tiles(golden)).padded()[0], golden.out["image_embeds"])


@torch.no_grad()
def test_embeddings_and_their_similarity(pair: Pair) -> None:
    golden, model = pair
    image, valid = model.embed_images(tiles(golden))
    text = model.embed_texts(golden.about["texts"])
    assert valid.all()
    close(image, golden.out["image_feats"])
    close(text, golden.out["text_feats"])
    # What the original draws negatives by: softmax of the similarity, a little added, own pairs at zero.
    similarity = losses.similarity(image, text) / model.temp  # (texts, images)
    for ours, theirs in ((similarity, golden.out["draws_t2i"]), (similarity.T, golden.out["draws_i2t"])):
        close((ours.softmax(dim=1) + 1e-4).fill_diagonal_(0), theirs)


@pytest.mark.parametrize("padded", [False, True])
def test_losses_and_gradients(pair: Pair, padded: bool) -> None:
    golden, model = pair
    batch = batch_of(golden)
    if padded:  # as the original, which pads every text to the longest that may be
        batch.text = Tokens(golden.given["ids"], golden.given["mask"].bool())
    model.zero_grad()
    out = model(batch)
    close(torch.stack([out[name] for name in ("loss", "itc", "itm", "itg")]), golden.out["losses"])
    out["loss"].backward()
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    theirs = gradients(golden)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        close(ours[name], gradient, GRADIENTS)


@torch.no_grad()
def test_matching_logits_of_the_step(pair: Pair) -> None:
    golden, model = pair
    batch = batch_of(golden)
    own, (image, text) = torch.arange(len(batch)), batch.negatives or ()
    pairs = torch.stack([torch.cat([own, image, own]), torch.cat([own, own, text])], dim=1)
    scores = model.match_scores(batch.tiles, batch.text, pairs)
    close(scores, golden.out["itm_logits"][:, 1])


@torch.no_grad()
def test_scores_of_every_image_with_every_text(pair: Pair) -> None:
    golden, model = pair
    texts, count = golden.about["texts"], len(golden.given["pixels"])
    pairs = torch.cartesian_prod(torch.arange(count), torch.arange(len(texts)))
    scores = model.match_scores(tiles(golden), texts, pairs, chunk=5).view(count, len(texts))
    close(scores, golden.out["itm_scores"][..., 1])
    image, text = model.embed_images(tiles(golden))[0], model.embed_texts(texts)
    close(losses.similarity(image, text).T, golden.out["itc_scores"])  # without temperature


@torch.no_grad()
def test_features(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    golden, model = pair
    texts = golden.about["texts"]
    monkeypatch.setattr(model, "max_tokens", 40)  # here the original cuts no text
    image = model.features(tiles(golden), mode="image")
    close(image.embeds, golden.out["features_image"])
    close(image.projected, golden.out["features_image_projected"])
    text = model.features(text=texts, mode="text")
    close(text.embeds[text.mask], golden.out["features_text"][text.mask])
    close(text.projected[text.mask], golden.out["features_text_projected"][text.mask])
    both = model.features(tiles(golden), texts, mode="multimodal")
    close(both.embeds, golden.out["features_multimodal"])


@pytest.mark.parametrize("name", ["greedy", "beam", "short", "free", "exact", "over"])
def test_captions(pair: Pair, name: str) -> None:
    golden, model = pair
    least = int(golden.given["least"])  # of the shortest text that ends where it likes
    options = {
        "greedy": {"beams": 1},
        "beam": {},
        "short": {"max_length": 9, "min_length": 3},
        "free": {"beams": 1, "min_length": 1},
        "exact": {"beams": 1, "min_length": least},
        "over": {"beams": 1, "min_length": least + 1},
    }
    ids = model.caption(tiles(golden), return_ids=True, **options[name])
    theirs = golden.out[f"caption_{name}"]
    assert (theirs[:, 0] == model.tokenizer.bos_token_id).all()
    same_ids(ids, theirs[:, 1:], model.tokenizer.sep_token_id)


def test_the_least_length_of_captions_tells(pair: Pair) -> None:
    free, exact, over = (pair[0].out[f"caption_{name}"].tolist() for name in ("free", "exact", "over"))
    assert free == exact != over


def test_retrieval(pair: Pair) -> None:
    golden, model = pair
    gallery = tiles(golden, "gallery")
    scores = retrieval.score(model, [gallery[:2], gallery[2:]], golden.about["gallery"], golden.about["k"])
    close(scores.image_to_text, golden.out["scores_i2t"])
    close(scores.text_to_image, golden.out["scores_t2i"].T)
