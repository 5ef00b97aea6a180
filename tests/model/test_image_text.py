"""Stage one against a slow reference that shares nothing, its gradients, its corner cases, and the scores it gives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Blip2Config, Blip2ForImageTextRetrieval

from qformer.config import LossConfig
from qformer.evaluation import retrieval
from qformer.model.frontend import join_tiles
from qformer.model.image_text import ImageTextModel
from qformer.model.qformer import QFormer
from qformer.resolution.base import ResolutionStrategy, cut_all
from qformer.schema import QFormerConfig
from qformer.types import Batch, Plan, Tile, Tiles, Tokens
from qformer.vision.base import VisionEncoder
from tests.tiny import CAPTIONS, tiny_tokenizer

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
QUERIES, WIDTH, HIDDEN = 4, 12, 16
LOSSES = {"loss", "itc", "itm", "itg"}


class Patches(VisionEncoder):
    """A Linear over patches of 14, in front of them a token that saw all of them; dropout shows a wrong train mode."""

    def __init__(self):
        super().__init__(width=WIDTH, patch_size=14, image_size=28, extra=1)
        self.project = nn.Linear(3 * 14 * 14, WIDTH)
        self.dropout = nn.Dropout(0.5)

    def encode(self, pixels):
        rows = F.unfold(pixels, 14, stride=14).transpose(1, 2)  # (N, patches, 588)
        tokens = self.dropout(self.project(rows))
        summary = tokens.mean(dim=1, keepdim=True)
        return torch.cat([summary, tokens + summary], dim=1)


class Views(ResolutionStrategy):
    """An overview of 28 x 28; beside it half of a wide image, or both halves of a very wide one, 28 x 42 each."""

    def plan(self, width, height):
        tiles = [Tile((28, 28), (28, 28), (0, 0), (0, 0, 28, 28))]
        if width > height:
            tiles.append(Tile((56, 42), (56, 42), (0, 0), (0, 0, 28, 42)))
        if width > 2 * height:
            tiles.append(Tile((56, 42), (56, 42), (0, 0), (28, 0, 56, 42)))
        return Plan((width, height), tuple(tiles), (len(tiles) - 1 or 1, 1), 0, QUERIES * len(tiles))


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = tiny_tokenizer("bert")
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    return tokenizer


@pytest.fixture
def make(tokenizer):
    def make(dropout=0.0, **loss):
        torch.manual_seed(0)
        qformer = QFormer(
            QFormerConfig(
                hidden_size=HIDDEN,
                layers=2,
                heads=2,
                intermediate_size=24,
                queries=QUERIES,
                encoder_width=WIDTH,
                vocab_size=len(tokenizer),
                max_positions=40,
                dropout=dropout,
            )
        )
        config = LossConfig(**{"embed_width": 8, "temperature": 0.2, **loss})
        model = ImageTextModel(Patches().freeze(), qformer, tokenizer, config)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name != "temp" and not name.startswith("frontend.encoder"):
                    noise = 0.3 * torch.randn(weight.shape, generator=generator)
                    weight.copy_(noise + (name.endswith("norm.weight")))
        return model.train()

    return make


def images(count, seed=3):
    return Tiles.from_pixels(torch.rand(count, 3, 28, 28, generator=torch.Generator().manual_seed(seed)))


def uneven_images():
    """Two, one, three and two tiles."""
    generator = torch.Generator().manual_seed(4)
    sizes = [(40, 30), (30, 40), (90, 30), (50, 40)]
    pixels = [torch.randint(0, 256, (3, h, w), generator=generator, dtype=torch.uint8) for w, h in sizes]
    tiles = cut_all(pixels, Views())
    assert tiles.counts == [2, 1, 3, 2]
    return tiles


def reference(model, batch):
    """The three losses, every pass by itself on one unpadded image and text; nothing is shared."""
    tokens = model.tokenize(batch.text)
    count = len(batch)
    texts = [tokens.ids[b, tokens.mask[b]][None] for b in range(count)]
    per_image = []  # tokens of the tiles of each image, one by one
    for b in range(count):
        per_image.append([model.frontend.encode(tile[None]) for tile in batch.tiles[b : b + 1].pixels])

    def ones(ids):
        return torch.ones_like(ids, dtype=torch.bool)

    queries = [torch.cat([model.qformer.encode_image(tile)[0] for tile in tiles]) for tiles in per_image]
    image_embeds = [F.normalize(model.vision_proj(rows), dim=-1) for rows in queries]
    text_embeds = [F.normalize(model.text_proj(model.qformer.encode_text(t, ones(t))[0, 0]), dim=-1) for t in texts]
    anchor = model.config.gather_grad == "anchor"

    def column(tensor):
        return tensor.detach() if anchor else tensor

    ids = batch.image_id or list(range(count))
    itc = 0.0
    for i in range(count):
        equal = torch.tensor([float(other == ids[i]) for other in ids])
        target = 0.9 * equal / equal.sum() + 0.1 / count
        image_to_text = torch.stack([(image_embeds[i] @ column(text)).max() for text in text_embeds]) / model.temp
        text_to_image = torch.stack([(column(rows) @ text_embeds[i]).max() for rows in image_embeds]) / model.temp
        itc -= (target * (image_to_text.log_softmax(0) + text_to_image.log_softmax(0))).sum() / count / 2

    image_for_text, text_for_image = (drawn.tolist() for drawn in batch.negatives)
    rows = [(b, b, 1) for b in range(count)]
    if len(set(ids)) > 1:
        rows += [(image_for_text[b], b, 0) for b in range(count)] + [(b, text_for_image[b], 0) for b in range(count)]
    itm = 0.0
    for image, text, label in rows:
        joined = torch.cat(per_image[image], dim=1)
        answer = model.itm_head(model.qformer.match(joined, None, texts[text], ones(texts[text]))[0]).mean(dim=0)
        itm -= answer.log_softmax(0)[label] / len(rows)

    terms = []
    for b in range(count):
        start = texts[b].clone()
        start[0, 0] = model.tokenizer.convert_tokens_to_ids("[DEC]")
        logits = model.qformer.decode(torch.cat(per_image[b], dim=1), None, start, ones(start))[0]
        for position in range(start.shape[1] - 1):
            logs = logits[position].log_softmax(0)
            terms.append(-0.9 * logs[texts[b][0, position + 1]] - 0.1 * logs.mean())
    itg = sum(terms) / len(terms)
    return {"itc": itc, "itm": itm, "itg": itg, "loss": itc + itm + itg}


def batches():
    negatives = (torch.tensor([1, 2, 3, 1]), torch.tensor([3, 2, 0, 1]))
    return {
        "one tile": Batch(images(4), CAPTIONS[:4], None, negatives=negatives),
        "equal images": Batch(images(4), CAPTIONS[:4], ["a", "b", "c", "a"], negatives=negatives),
        "uneven tiles": Batch(uneven_images(), CAPTIONS[:4], [7, 8, 9, 10], negatives=negatives),
    }


@pytest.mark.parametrize("case", batches())
@pytest.mark.parametrize("gather_grad", ["anchor", "full"])
def test_losses_and_gradients_equal_the_slow_reference(make, case, gather_grad):
    batch = batches()[case]
    model = make(gather_grad=gather_grad)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    got, expected = model(batch), reference(model, batch)
    assert set(got) == LOSSES
    for name in LOSSES:
        assert got[name].shape == ()
        torch.testing.assert_close(got[name], expected[name], **CLOSE)
    fast = torch.autograd.grad(got["loss"], list(trained.values()), allow_unused=True)
    slow = torch.autograd.grad(expected["loss"], list(trained.values()), allow_unused=True)
    for name, one, other in zip(trained, fast, slow, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


def test_gather_grad_changes_gradients_but_no_loss_and_not_that_of_temp(make):
    batch, found = batches()["one tile"], {}
    for rule in ("anchor", "full"):
        model = make(gather_grad=rule)
        loss = model(batch)["itc"]
        found[rule] = (loss, *torch.autograd.grad(loss, [model.temp, model.text_proj.weight]))
    torch.testing.assert_close(found["anchor"][:2], found["full"][:2])
    assert found["anchor"][1] != 0
    assert not torch.allclose(found["anchor"][2], found["full"][2], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("tiles", ["one tile", "uneven tiles"])
def test_every_trained_weight_gets_a_gradient_and_the_frozen_encoder_none(make, tiles):
    model = make(dropout=0.1)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    model(batches()[tiles])["loss"].backward()
    optimizer.step()
    for name, weight in model.named_parameters():
        if name.startswith("frontend.encoder"):
            assert weight.grad is None
            assert not weight.requires_grad
            assert weight.equal(before[name])
        else:
            assert weight.grad is not None, name
            assert weight.grad.abs().sum() > 0, name
            assert not weight.equal(before[name]), name


def test_frozen_encoder_stays_in_eval(make):
    model = make().eval().train()
    assert model.qformer.training
    assert not any(part.training for part in model.frontend.encoder.modules())
    tiles = images(2)
    assert model.frontend(tiles).padded()[0].equal(model.frontend(tiles).padded()[0])  # its dropout sleeps


def test_itc_shares_its_pass_with_itg(make, monkeypatch):
    """As in the original the queries of ITC and the pass of ITG have the same dropout; it is one pass."""
    model = make(dropout=0.5)
    monkeypatch.setattr(model.qformer, "encode_image", lambda *args: pytest.fail("a pass of its own for ITC"))
    model(batches()["one tile"])


def test_image_tokens_and_their_keys_are_computed_once_a_step(make):
    model, calls = make(), []
    model.frontend.encoder.project.register_forward_hook(lambda *args: calls.append("encoder"))
    model.qformer.layers[0].cross_attention.key.register_forward_hook(lambda *args: calls.append("keys"))
    model(batches()["one tile"])
    assert calls == ["encoder", "keys"]


@pytest.mark.parametrize(
    ("tiles", "ids"),
    [(images(1), None), (images(3), ["a", "a", "a"]), (images(3), [5, 5, 5]), (uneven_images()[:1], None)],
)
def test_without_a_legal_negative_itm_is_that_of_the_positives(make, tiles, ids):
    model = make()
    got = model(Batch(tiles, CAPTIONS[: len(tiles)], ids))
    rows = model.match_scores(tiles, CAPTIONS[: len(tiles)])
    tokens = model.tokenize(CAPTIONS[: len(tiles)])
    queries = model.qformer.match(model.encode_images(tiles), None, tokens.ids, tokens.mask)
    logits = model.itm_head(queries).mean(dim=1)
    torch.testing.assert_close(rows, logits[:, 1])
    torch.testing.assert_close(got["itm"], -logits.log_softmax(1)[:, 1].mean(), **CLOSE)
    assert all(loss.isfinite() for loss in got.values())
    got["loss"].backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters() if weight.grad is not None)


def test_itc_of_one_pair_is_zero(make):
    assert make()(Batch(images(1), CAPTIONS[:1]))["itc"].item() == pytest.approx(0.0, abs=1e-6)


def test_a_row_without_a_legal_negative_is_left_out_of_the_mean(make):
    model, batch = make(), batches()["one tile"]
    tokens, legal = model.tokenize(batch.text), torch.tensor([True, False, True, True])
    image, (images_drawn, texts_drawn) = model.encode_images(batch.tiles), batch.negatives
    got = model.matching_loss(image, tokens, batch.negatives, legal)
    terms = []
    for b in range(4):
        for i, t, label in ((b, b, 1), (images_drawn[b], b, 0), (b, texts_drawn[b], 0)):
            if label or legal[b]:
                i, t = torch.as_tensor(i)[None], torch.as_tensor(t)[None]
                rows = model.qformer.match(image.select(i), None, tokens.ids[t], tokens.mask[t])
                terms.append(-model.itm_head(rows).mean(dim=1).log_softmax(1)[0, label])
    assert len(terms) == 10
    torch.testing.assert_close(got, sum(terms) / 10, **CLOSE)


def test_drawn_negatives_are_hard_and_never_the_same_image(make, monkeypatch):
    model = make(temperature=0.05)
    batch = Batch(images(6), CAPTIONS[:6], ["a", "b", "a", "c", "c", "d"])
    seen = []
    inner = model.matching_loss
    monkeypatch.setattr(model, "matching_loss", lambda *args: seen.append(args[2]) or inner(*args))
    drawn = torch.zeros(2, 6, 6)
    for _ in range(150):
        with torch.no_grad():
            model(batch)
        for way, columns in enumerate(seen.pop()):
            drawn[way, torch.arange(6), columns] += 1 / 150
    with torch.no_grad():
        rows, _ = model.embed_images(batch.tiles)
        cosine = torch.einsum("iqp,tp->tiq", rows, model.embed_texts(batch.text)).amax(2)
    equal = torch.tensor([[one == other for other in batch.image_id] for one in batch.image_id])
    for way, scores in enumerate((cosine, cosine.T)):  # an image for each text, then a text for each image
        expected = (scores / model.temp.detach()).masked_fill(equal, -torch.inf).softmax(1)
        assert drawn[way][equal].eq(0).all()
        torch.testing.assert_close(drawn[way], expected, atol=0.18, rtol=0)


def test_padding_of_the_text_changes_no_loss(make):
    model, batch = make(), batches()["uneven tiles"]
    tokens = model.tokenize(batch.text)
    more = Tokens(F.pad(tokens.ids, (0, 5)), F.pad(tokens.mask, (0, 5)))
    garbage = Tokens(more.ids.masked_fill(~more.mask, 9), more.mask)
    expected = model(batch)
    for text in (tokens, more, garbage):
        got = model(Batch(batch.tiles, text, batch.image_id, negatives=batch.negatives))
        for name in LOSSES:
            torch.testing.assert_close(got[name], expected[name], **CLOSE)


def test_text_is_cut_and_keeps_its_end(make, tokenizer):
    model = make()
    model.max_tokens = 5
    tokens = model.tokenize(["a photo of a cat", "a dog"])
    assert tokens.ids.shape == (2, 5)
    assert tokens.mask.tolist() == [[True] * 5, [True] * 4 + [False]]
    assert tokens.ids[:, 0].eq(tokenizer.cls_token_id).all()
    assert tokens.ids[0, -1] == tokens.ids[1, 3] == tokenizer.sep_token_id
    assert model.tokenize(["a photo of a cat"], max_tokens=4).ids.shape == (1, 4)


def test_images_that_are_alike_by_string_or_number(make):
    model, batch = make(), batches()["equal images"]
    by_number = Batch(batch.tiles, batch.text, [3, 1, 2, 3], negatives=batch.negatives)
    torch.testing.assert_close(model(by_number), model(batch))
    distinct = Batch(batch.tiles, batch.text, None, negatives=batch.negatives)
    assert not torch.allclose(model(distinct)["itc"], model(batch)["itc"])


# scores and features


def plain_score(model, tiles, tokens, image, text):
    """One pair by itself: keys and values of its own, all rows of all layers, the text with the padding of others."""
    encoded = model.frontend.encode_tiles(tiles[image : image + 1])
    rows, mask = model.frontend.adapt(encoded).padded()
    rows, mask = join_tiles(rows, mask, encoded.counts)
    ids, exists = tokens.ids[text : text + 1], tokens.mask[text : text + 1]
    return model.itm_head(model.qformer.joint(rows, mask, ids, exists, "bidirectional")[0]).mean(dim=1)[0, 1]


@pytest.mark.parametrize("tiles", [images(3), uneven_images()[:3]], ids=["one tile", "uneven tiles"])
def test_match_scores_of_many_pairs_equal_one_by_one(make, tiles):
    model = make().eval()
    texts = [CAPTIONS[1], "", CAPTIONS[0], "cat", CAPTIONS[0], "a photo of a cat " * 3000]
    generator = torch.Generator().manual_seed(0)
    pairs = torch.stack([torch.randint(3, (40,), generator=generator), torch.randint(6, (40,), generator=generator)], 1)
    tokens = model.tokenize(texts)
    with torch.no_grad():
        expected = torch.stack([plain_score(model, tiles, tokens, i, t) for i, t in pairs.tolist()])
        once = model.encode_images(tiles)
        for chunk in (None, 256, 40, 39, 7, 1):
            torch.testing.assert_close(model.match_scores(once, texts, pairs, chunk), expected, **CLOSE)
        torch.testing.assert_close(model.match_scores(tiles, tokens, pairs), expected, **CLOSE)
        torch.testing.assert_close(
            model.match_scores(tiles, texts[:3]),
            model.match_scores(tiles, texts, torch.arange(3)[:, None].expand(3, 2)),
        )
        assert expected.std() > 0.01  # far more than what is called close
        assert model.match_scores(once, texts, pairs[:0]).shape == (0,)


def test_tokens_of_uneven_tiles_are_kept_as_they_are(make, tmp_path):
    model, groups = make().eval(), [uneven_images()[:3], uneven_images()[3:]]
    found = []
    for file in (None, (tmp_path / "tokens").open("wb+")):
        gallery = retrieval.Images(model, file)
        for group in groups:
            gallery.add(group)
        found.append(gallery.score(CAPTIONS, k=3).itm)
    assert found[0].count_nonzero() >= 3 * 4
    assert torch.equal(*found)


def test_first_layer_reads_each_text_of_a_chunk_once(make):
    """Before it looks at the image nothing differs between the pairs of a text."""
    model = make().eval()
    seen = []
    model.qformer.layers[0].text_ffn.register_forward_hook(lambda module, given, made: seen.append(given[0].shape[:2]))
    pairs = torch.tensor([[0, 1], [1, 0], [2, 1], [1, 1], [0, 0]])
    model.match_scores(images(3), ["a photo of a cat", "cat", "never asked for"], pairs)
    assert seen == [(2, 7)]
    seen.clear()
    model.match_scores(images(3), ["a photo of a cat", "cat", "never asked for"], pairs, chunk=3)
    assert seen == [(1, 3), (1, 7)]  # by length, so that no text is padded


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_match_scores_in_half_precision(make, dtype):
    model, pairs = make().eval(), torch.cartesian_prod(torch.arange(4), torch.arange(4))
    tiles = uneven_images()
    with torch.no_grad():
        expected = model.match_scores(tiles, CAPTIONS[:4], pairs)
        with torch.autocast("cpu", dtype):
            got = model.match_scores(tiles, CAPTIONS[:4], pairs)
            alone = torch.cat([model.match_scores(tiles, CAPTIONS[:4], pair[None]) for pair in pairs])
    size = expected.abs().max().item()
    assert got.dtype == torch.float32  # else many a score would equal another
    tolerance = size * torch.finfo(dtype).eps
    torch.testing.assert_close(got.float(), expected, atol=8 * tolerance, rtol=0)
    torch.testing.assert_close(got, alone, atol=8 * tolerance, rtol=0)


def test_features_have_three_modes(make):
    model = make().eval()
    tiles, text = uneven_images()[:2], CAPTIONS[:2]
    tokens = model.tokenize(text)
    image = model.features(tiles)
    assert image.embeds.shape == (2, 2 * QUERIES, HIDDEN)
    assert image.mask.sum(1).tolist() == [2 * QUERIES, QUERIES]
    rows, valid = model.embed_images(tiles)
    assert valid.equal(image.mask)
    torch.testing.assert_close(rows[valid], image.projected[image.mask])
    torch.testing.assert_close(image.projected[image.mask].norm(dim=-1), torch.ones(3 * QUERIES))

    words = model.features(text=text, mode="text")
    assert words.mask.equal(tokens.mask)
    torch.testing.assert_close(words.embeds, model.qformer.encode_text(tokens.ids, tokens.mask))
    torch.testing.assert_close(words.projected[:, 0], model.embed_texts(text))
    torch.testing.assert_close(words.projected.norm(dim=-1), torch.ones(tokens.ids.shape))

    both = model.features(tiles, text, "multimodal")
    assert both.embeds.shape == (2, QUERIES, HIDDEN)
    assert both.mask.all()
    assert both.projected is None
    torch.testing.assert_close(model.itm_head(both.embeds).mean(1)[:, 1], model.match_scores(tiles, text))


@pytest.mark.parametrize(
    ("given", "mode", "missing"),
    [
        ({}, "image", "tiles"),
        ({}, "text", "text"),
        ({"text": ["a"]}, "multimodal", "tiles"),
        ({"tiles": images(1)}, "multimodal", "text"),
        ({"tiles": images(1)}, "text", "text"),
    ],
)
def test_features_say_what_is_missing(make, given, mode, missing):
    with pytest.raises(ValueError, match=f"mode '{mode}' needs {missing};"):
        make().features(mode=mode, **given)


def test_embeddings_of_one_tile_are_one_row_per_query(make):
    rows, valid = make().embed_images(images(3))
    assert rows.shape == (3, QUERIES, 8)
    assert valid.shape == (3, QUERIES)
    assert valid.all()


def test_an_image_does_not_change_with_its_neighbours(make):
    model, tiles = make().eval(), uneven_images()
    text = CAPTIONS[:4]
    with torch.no_grad():
        rows, valid = model.embed_images(tiles)
        scores = model.match_scores(tiles, text)
        for b in range(4):
            alone, all_there = model.embed_images(tiles[b : b + 1])
            assert all_there.all()
            assert valid[b].sum() == QUERIES * tiles.counts[b] == alone.shape[1]
            torch.testing.assert_close(rows[b][valid[b]], alone[0], **CLOSE)
            torch.testing.assert_close(scores[b : b + 1], model.match_scores(tiles[b : b + 1], text[b : b + 1]))


def test_matching_reads_all_tiles_at_once(make):
    model, tiles = make().eval(), uneven_images()
    tokens = model.tokenize(CAPTIONS[:4])
    image = model.encode_images(tiles)
    got = model.qformer.match(image, None, tokens.ids, tokens.mask)
    for b in range(4):
        every = torch.cat([model.frontend.encode(tile[None]) for tile in tiles[b : b + 1].pixels], dim=1)
        expected = model.qformer.match(every, None, tokens.ids[b : b + 1], tokens.mask[b : b + 1])
        torch.testing.assert_close(got[b : b + 1], expected, **CLOSE)


# the retrieval model of transformers


class Blip2Tower(VisionEncoder):
    """The vision model of a transformers BLIP-2 without its last norm, which is our `frontend.norm`."""

    def __init__(self, tower):
        super().__init__(width=WIDTH, patch_size=14, image_size=28, extra=1)
        self.tower = tower

    def encode(self, pixels):
        return self.tower.encoder(self.tower.embeddings(pixels)).last_hidden_state


def test_both_scores_equal_transformers_retrieval(make):
    model = make().eval()
    config = Blip2Config(
        vision_config={
            "hidden_size": WIDTH,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
            "layer_norm_eps": 1e-5,
            "initializer_range": 0.2,
        },
        qformer_config={
            "vocab_size": model.qformer.config.vocab_size,
            "hidden_size": HIDDEN,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "max_position_embeddings": 40,
            "encoder_hidden_size": WIDTH,
            "layer_norm_eps": 1e-12,
            "use_qformer_text_input": True,
        },
        num_query_tokens=QUERIES,
        image_text_hidden_size=8,
        image_token_index=None,  # with an index it takes the first ids for image placeholders
    )
    torch.manual_seed(0)
    theirs = Blip2ForImageTextRetrieval(config).eval()
    model.frontend.encoder = Blip2Tower(theirs.vision_model)
    copy_to_blip2(model, theirs)
    tiles, tokens = images(3), model.tokenize(CAPTIONS[:3])
    pixels = (torch.stack(tiles.pixels) - model.frontend.encoder.mean) / model.frontend.encoder.std
    with torch.no_grad():
        arguments = {"pixel_values": pixels, "input_ids": tokens.ids, "attention_mask": tokens.mask.long()}
        itm = theirs(**arguments, use_image_text_matching_head=True).logits_per_image
        itc = theirs(**arguments, use_image_text_matching_head=False)
        rows, _ = model.embed_images(tiles)
        torch.testing.assert_close(model.match_scores(tiles, tokens), itm[:, 1], **CLOSE)
        torch.testing.assert_close(rows, itc.image_embeds, **CLOSE)
        torch.testing.assert_close(model.embed_texts(tokens), itc.text_embeds, **CLOSE)


@torch.no_grad()
def copy_to_blip2(model, theirs):
    """Weight by weight in the order of our modules, each named twice."""
    ours, done = model.qformer, set()

    def copy(mine, other):
        for (name, weight), target in zip(mine.named_parameters(), other.parameters(), strict=True):
            assert weight.shape == target.shape, name
            target.copy_(weight)
            done.add(id(target))

    copy(model.frontend.norm, theirs.vision_model.post_layernorm)
    copy(ours.embeddings.words, theirs.embeddings.word_embeddings)
    copy(ours.embeddings.positions, theirs.embeddings.position_embeddings)
    copy(ours.embeddings.norm, theirs.qformer.layernorm)
    theirs.query_tokens.copy_(ours.queries)
    for mine, other in zip(ours.layers, theirs.qformer.encoder.layer, strict=True):
        pairs = [(mine.attention, other.attention)]
        if mine.cross_attention is not None:
            pairs.append((mine.cross_attention, other.crossattention))
        for attention, target in pairs:
            for part in ("query", "key", "value"):
                copy(getattr(attention, part), getattr(target.attention, part))
            copy(attention.output, target.output.dense)
            copy(attention.norm, target.output.LayerNorm)
        for ffn, suffix in ((mine.text_ffn, ""), (mine.query_ffn, "_query")):
            copy(ffn.inner, getattr(other, f"intermediate{suffix}").dense)
            copy(ffn.output, getattr(other, f"output{suffix}").dense)
            copy(ffn.norm, getattr(other, f"output{suffix}").LayerNorm)
    copy(model.vision_proj, theirs.vision_projection)
    copy(model.text_proj, theirs.text_projection)
    copy(model.itm_head, theirs.itm_head)
    for name, weight in theirs.named_parameters():
        kept = name == "query_tokens" or name.startswith("vision_model.e")
        assert kept or id(weight) in done, name
