"""The Q-Former against transformers with the same weights, against a slow reference, and what may not leak where."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForMaskedLM, BertModel, Blip2QFormerConfig, Blip2QFormerModel
from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings

from qformer.model.bert import attend, attention_mask, bert_weights
from qformer.model.qformer import QFormer
from qformer.schema import QFormerConfig
from qformer.types import UsageError
from tests.tiny import tiny_tokenizer

SIZES = {
    "hidden_size": 16,
    "layers": 3,
    "heads": 2,
    "intermediate_size": 24,
    "queries": 4,
    "encoder_width": 12,
    "vocab_size": 31,
    "max_positions": 20,
}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
MODES = ("unimodal", "bidirectional", "causal")
QUERIES, TEXT, TOKENS = 4, 5, 6


@torch.no_grad()
def noisy(module, seed=0):
    """Random weights everywhere: no bias is zero and no norm is one, so that leaving one of them out shows."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in module.named_parameters():
        is_scale = "norm" in name.lower() and name.endswith("weight")
        weight.copy_(0.3 * torch.randn(weight.shape, generator=generator) + is_scale)
    return module.eval()


def tiny(**sizes):
    return noisy(QFormer(QFormerConfig(**{**SIZES, **sizes})))


def inputs(batch=3, seed=1):
    """Images, their padding mask, ids, and a text mask; every row has another length."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(batch, TOKENS, SIZES["encoder_width"], generator=generator)
    ids = torch.randint(1, SIZES["vocab_size"], (batch, TEXT), generator=generator)
    image_mask = torch.arange(TOKENS) < torch.tensor([TOKENS, TOKENS - 2, TOKENS - 3])[:batch, None]
    text_mask = torch.arange(TEXT) < torch.tensor([TEXT, TEXT - 2, TEXT - 1])[:batch, None]
    return image, image_mask, ids.masked_fill(~text_mask, 0), text_mask


def assert_rows(got, expected, mask):
    torch.testing.assert_close(got[mask], expected[mask], **CLOSE)


# who sees whom


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("unimodal", ["11000", "11000", "00110", "00110", "00110"]),
        ("bidirectional", ["11110", "11110", "11110", "11110", "11110"]),
        ("causal", ["11000", "11000", "11100", "11110", "11110"]),
    ],
)
def test_attention_mask_cell_by_cell(mode, expected):
    """Two queries, then three text tokens of which the last is padding."""
    text = torch.tensor([[True, True, False], [True, True, True]])
    mask = attention_mask(2, text, mode)
    assert mask.shape == (2, 1, 5, 5)
    assert mask.dtype == torch.bool
    assert ["".join(str(int(cell)) for cell in row) for row in mask[0, 0]] == expected


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("unimodal", ["11000", "11000", "00111", "00111", "00111"]),
        ("bidirectional", ["11111"] * 5),
        ("causal", ["11000", "11000", "11100", "11110", "11111"]),
    ],
)
def test_attention_mask_without_padding(mode, expected):
    mask = attention_mask(2, torch.ones(1, 3, dtype=torch.bool), mode)
    assert ["".join(str(int(cell)) for cell in row) for row in mask[0, 0]] == expected


# BERT


def tiny_bert(**changes):
    sizes = {
        "vocab_size": SIZES["vocab_size"] - 1,  # the Q-Former has one word more, [DEC]
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 20,
        "hidden_act": "gelu",
    }
    return noisy(BertForMaskedLM(BertConfig(**{**sizes, **changes})))


def test_text_path_and_lm_head_equal_bert_with_token_types_folded_in():
    bert = tiny_bert()
    model = QFormer.from_bert(bert.state_dict(), QFormerConfig(**SIZES), fold_token_types=True).eval()
    _, _, ids, mask = inputs()
    ids = ids.clamp(max=SIZES["vocab_size"] - 2)
    got = model.encode_text(ids, mask)
    assert_rows(got, bert.bert(ids, attention_mask=mask).last_hidden_state, mask)

    # the decoder is tied to the word embeddings, which now hold the token type too: undo that for the head alone
    words = bert.bert.embeddings.word_embeddings.weight
    logits = model.lm_head(got, torch.cat([words, torch.zeros(1, 16)]))[..., :-1]
    assert_rows(logits, bert(ids, attention_mask=mask).logits, mask)


def test_from_bert_without_folding_leaves_the_token_types_out():
    bert = tiny_bert()
    model = QFormer.from_bert(bert.state_dict(), QFormerConfig(**SIZES)).eval()
    with torch.no_grad():
        bert.bert.embeddings.token_type_embeddings.weight.zero_()
    _, _, ids, mask = inputs()
    ids = ids.clamp(max=SIZES["vocab_size"] - 2)
    got = model.encode_text(ids, mask)
    assert_rows(got, bert.bert(ids, attention_mask=mask).last_hidden_state, mask)
    assert_rows(model.logits(got)[..., :-1], bert(ids, attention_mask=mask).logits, mask)


def test_from_bert_copies_the_text_ffn_for_queries_and_keeps_new_weights():
    bert = tiny_bert()
    torch.manual_seed(0)
    model = QFormer.from_bert(bert.state_dict(), QFormerConfig(**SIZES))
    for number, layer in enumerate(model.layers):
        theirs = bert.bert.encoder.layer[number]
        for ours, weight in [
            (layer.query_ffn.inner.weight, theirs.intermediate.dense.weight),
            (layer.query_ffn.output.bias, theirs.output.dense.bias),
            (layer.query_ffn.norm.weight, theirs.output.LayerNorm.weight),
        ]:
            assert ours.equal(weight)
        for name, weight in layer.text_ffn.named_parameters():
            copy = layer.query_ffn.get_parameter(name)
            assert copy.equal(weight)
            assert copy.data_ptr() != weight.data_ptr()  # two weights, which part in training
    assert model.embeddings.words.weight[:-1].equal(bert.bert.embeddings.word_embeddings.weight)
    dec = model.embeddings.words.weight[-1]
    scale = 0.02 * math.sqrt(768 / SIZES["hidden_size"])
    assert 0 < dec.abs().max() < 5 * scale  # their own start, not BERT's
    assert model.lm_head.bias[:-1].equal(bert.cls.predictions.bias)
    assert model.lm_head.bias[-1] == 0
    cross = model.layers[0].cross_attention
    assert 0.7 * scale < cross.key.weight.std() < 1.4 * scale
    assert cross.key.bias.eq(0).all()
    assert 0.7 * scale < model.queries.std() < 1.4 * scale


def test_from_bert_takes_a_plain_bert_model_and_only_the_layers_it_needs():
    bert = tiny_bert()
    plain = BertModel(bert.config, add_pooling_layer=False)
    plain.load_state_dict({name: tensor for name, tensor in bert.bert.state_dict().items() if "pooler" not in name})
    model = QFormer.from_bert(plain.state_dict(), QFormerConfig(**{**SIZES, "layers": 2}))
    assert len(model.layers) == 2
    assert model.layers[1].attention.query.weight.equal(bert.bert.encoder.layer[1].attention.self.query.weight)
    assert model.lm_head.norm.weight.eq(1).all()  # no head there: its own start


@pytest.mark.parametrize(
    ("bert", "sizes", "message"),
    [
        ({}, {"layers": 4}, "encoder.layer.3"),
        ({}, {"hidden_size": 32}, "match the qformer sizes"),
        ({}, {"intermediate_size": 20}, "match the qformer sizes"),
        ({"intermediate_size": 20}, {}, "match the qformer sizes"),
    ],
)
def test_from_bert_refuses_a_bert_that_does_not_fit(bert, sizes, message):
    with pytest.raises(UsageError, match=message):
        QFormer.from_bert(tiny_bert(**bert).state_dict(), QFormerConfig(**{**SIZES, **sizes}))


def test_from_bert_refuses_what_is_no_bert():
    with pytest.raises(UsageError, match="word_embeddings"):
        bert_weights({"weight": torch.zeros(2)}, QFormerConfig(**SIZES))
    with pytest.raises(UsageError, match="config"):
        QFormer.from_bert(tiny_bert().state_dict())


@pytest.mark.parametrize("with_head", [True, False])
def test_from_bert_reads_a_folder_and_adds_one_word(tmp_path, with_head):
    tokenizer = tiny_tokenizer("bert")
    bert = tiny_bert(vocab_size=len(tokenizer))
    (bert if with_head else bert.bert).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = QFormer.from_bert(str(tmp_path), QFormerConfig(queries=QUERIES, encoder_width=12, dropout=0.0), True).eval()
    assert model.config.vocab_size == len(tokenizer) + 1
    assert model.config.queries == QUERIES
    assert (model.config.layers, model.config.hidden_size, model.config.heads) == (3, 16, 2)
    _, _, ids, mask = inputs()
    assert_rows(model.encode_text(ids, mask), bert.bert(ids, attention_mask=mask).last_hidden_state, mask)
    if with_head:
        assert model.lm_head.bias[:-1].equal(bert.cls.predictions.bias)
        assert model.lm_head.dense.weight.equal(bert.cls.predictions.transform.dense.weight)
    else:
        assert model.lm_head.bias.eq(0).all()
        assert model.lm_head.norm.weight.eq(1).all()


# the Q-Former of transformers


def as_blip2(model):
    """Blip2QFormerModel and its text embeddings with the weights of `model`."""
    config = Blip2QFormerConfig(
        vocab_size=SIZES["vocab_size"],
        hidden_size=SIZES["hidden_size"],
        num_hidden_layers=SIZES["layers"],
        num_attention_heads=SIZES["heads"],
        intermediate_size=SIZES["intermediate_size"],
        max_position_embeddings=SIZES["max_positions"],
        encoder_hidden_size=SIZES["encoder_width"],
        cross_attention_frequency=2,
        hidden_act="gelu",
        layer_norm_eps=1e-12,
        use_qformer_text_input=True,
    )
    names = [("layers.", "encoder.layer."), ("cross_attention.", "crossattention.")]
    for kind in ("attention", "crossattention"):
        names += [(f".{kind}.{part}.", f".{kind}.attention.{part}.") for part in ("query", "key", "value")]
        names += [(f".{kind}.output.", f".{kind}.output.dense."), (f".{kind}.norm.", f".{kind}.output.LayerNorm.")]
    for ours, suffix in (("text_ffn", ""), ("query_ffn", "_query")):
        names += [
            (f".{ours}.inner.", f".intermediate{suffix}.dense."),
            (f".{ours}.output.", f".output{suffix}.dense."),
            (f".{ours}.norm.", f".output{suffix}.LayerNorm."),
        ]
    state = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("layers."):
            for ours, theirs in names:
                name = name.replace(ours, theirs)
            state[name] = tensor
    state |= {f"layernorm.{kind}": getattr(model.embeddings.norm, kind) for kind in ("weight", "bias")}
    theirs, text = Blip2QFormerModel(config).eval(), Blip2TextEmbeddings(config)
    theirs.load_state_dict(state)
    text.load_state_dict(
        {
            "word_embeddings.weight": model.embeddings.words.weight,
            "position_embeddings.weight": model.embeddings.positions.weight,
        }
    )
    return theirs, text


def test_query_path_equals_transformers():
    model = tiny()
    theirs, _ = as_blip2(model)
    image, image_mask, _, _ = inputs()
    expected = theirs(
        query_embeds=model.queries.expand(3, -1, -1),
        encoder_hidden_states=image,
        encoder_attention_mask=image_mask.long(),
    )
    torch.testing.assert_close(model.encode_image(image, image_mask), expected.last_hidden_state, **CLOSE)


def test_match_equals_transformers():
    model = tiny()
    theirs, text = as_blip2(model)
    image, _, ids, mask = inputs()
    expected = theirs(
        query_embeds=text(ids, query_embeds=model.queries.expand(3, -1, -1)),
        query_length=QUERIES,
        attention_mask=torch.cat([torch.ones(3, QUERIES), mask], dim=1).long(),
        encoder_hidden_states=image,
        encoder_attention_mask=torch.ones(3, TOKENS, dtype=torch.long),
    ).last_hidden_state
    queries, rows = model.joint(image, None, ids, mask, "bidirectional")
    torch.testing.assert_close(queries, expected[:, :QUERIES], **CLOSE)
    assert_rows(rows, expected[:, QUERIES:], mask)
    torch.testing.assert_close(model.match(image, None, ids, mask), queries)


# a slow reference


def naive(model, image, ids, mode):
    """One image float[S, D] and one text, nothing padded: every head and row by itself, in double precision."""
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    heads, total = model.config.heads, QUERIES + len(ids)

    def linear(rows, name):
        return rows @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(rows, name):
        centred = rows - rows.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + model.config.layer_norm_eps).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def gelu(rows):
        return rows * 0.5 * (1 + torch.erf(rows / math.sqrt(2)))

    def sees(row, column):
        if mode == "bidirectional":
            return True
        if mode == "unimodal":
            return (row < QUERIES) == (column < QUERIES)
        return column < QUERIES or (row >= QUERIES and column <= row)

    def attend(rows, context, name, visible):
        query, key, value = (
            linear(rows, f"{name}.query"),
            linear(context, f"{name}.key"),
            linear(context, f"{name}.value"),
        )
        width = query.shape[1] // heads
        out = torch.zeros_like(rows)
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            for row in range(len(rows)):
                columns = [column for column in range(len(context)) if visible(row, column)]
                scores = (key[columns, part] @ query[row, part]) / math.sqrt(width)
                shares = scores.exp() / scores.exp().sum()
                out[row, part] = shares @ value[columns, part]
        return norm(rows + linear(out, f"{name}.output"), f"{name}.norm")

    def feed(rows, name):
        return norm(rows + linear(gelu(linear(rows, f"{name}.inner")), f"{name}.output"), f"{name}.norm")

    words = weights["embeddings.words.weight"][ids] + weights["embeddings.positions.weight"][: len(ids)]
    hidden = norm(torch.cat([weights["queries"][0], words]), "embeddings.norm")
    assert len(hidden) == total
    for number in range(model.config.layers):
        layer = f"layers.{number}"
        hidden = attend(hidden, hidden, f"{layer}.attention", sees)
        queries, text = hidden[:QUERIES], hidden[QUERIES:]
        if number % 2 == 0:
            queries = attend(queries, image.double(), f"{layer}.cross_attention", lambda row, column: True)
        hidden = torch.cat([feed(queries, f"{layer}.query_ffn"), feed(text, f"{layer}.text_ffn")])
    text = hidden[QUERIES:]
    head = norm(gelu(linear(text, "lm_head.dense")), "lm_head.norm")
    logits = head @ weights["embeddings.words.weight"].T + weights["lm_head.bias"]
    return hidden[:QUERIES].float(), text.float(), logits.float()


@pytest.mark.parametrize("mode", MODES)
def test_joint_pass_equals_the_slow_reference(mode):
    model = tiny()
    image, image_mask, ids, mask = inputs()
    with torch.no_grad():
        queries, rows = model.joint(image, image_mask, ids, mask, mode)
        logits = model.decode(image, image_mask, ids, mask)
        for b in range(3):
            expected = naive(model, image[b][image_mask[b]], ids[b][mask[b]], mode)
            torch.testing.assert_close(queries[b], expected[0], **CLOSE)
            torch.testing.assert_close(rows[b][mask[b]], expected[1], **CLOSE)
            if mode == "causal":
                torch.testing.assert_close(logits[b][mask[b]], expected[2], **CLOSE)


def test_unimodal_joint_pass_is_the_two_separate_passes():
    model = tiny()
    image, image_mask, ids, mask = inputs()
    queries, rows = model.joint(image, image_mask, ids, mask, "unimodal")
    torch.testing.assert_close(queries, model.encode_image(image, image_mask), **CLOSE)
    assert_rows(rows, model.encode_text(ids, mask), mask)


# what may not leak


def test_causal_queries_do_not_see_the_text():
    model = tiny()
    image, image_mask, ids, mask = inputs()
    alone = model.encode_image(image, image_mask)
    for words in (ids, (ids + 7) % SIZES["vocab_size"], ids[:, :2]):
        queries, _ = model.joint(image, image_mask, words, mask[:, : words.shape[1]], "causal")
        torch.testing.assert_close(queries, alone, **CLOSE)


def test_causal_text_does_not_see_its_future_but_does_see_its_past_and_the_image():
    model = tiny()
    image, _, ids, _ = inputs()
    mask = torch.ones_like(ids, dtype=torch.bool)
    before = model.decode(image, None, ids, mask)
    for position in range(TEXT):
        changed = ids.clone()
        changed[:, position] = (changed[:, position] + 3) % SIZES["vocab_size"]
        after = model.decode(image, None, changed, mask)
        torch.testing.assert_close(after[:, :position], before[:, :position], **CLOSE)
        for later in range(position, TEXT):
            assert not torch.allclose(after[:, later], before[:, later], atol=1e-3)
    other = model.decode(image.flip(0), None, ids, mask)
    assert not torch.allclose(other[0, 0], before[0, 0], atol=1e-3)


def test_matching_sees_the_text_and_the_image():
    model = tiny()
    image, image_mask, ids, mask = inputs()
    before = model.match(image, image_mask, ids, mask)
    changed = ids.clone()
    changed[:, 2] = (changed[:, 2] + 3) % SIZES["vocab_size"]  # the last real token of the shortest text
    assert not torch.allclose(model.match(image, image_mask, changed, mask), before, atol=1e-3)
    assert not torch.allclose(model.match(image.roll(1, 0), None, ids, mask), before, atol=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_padding_changes_nothing(mode):
    model = tiny()
    image, image_mask, ids, mask = inputs()
    queries, rows = model.joint(image, image_mask, ids, mask, mode)
    more_ids = torch.cat([ids.masked_fill(~mask, 9), torch.full((3, 4), 11)], dim=1)  # other words in the padding
    more_mask = torch.cat([mask, torch.zeros(3, 4, dtype=torch.bool)], dim=1)
    more_image = torch.cat([image.masked_fill(~image_mask[..., None], 50.0), torch.full((3, 3, 12), 1e3)], dim=1)
    more_image_mask = torch.cat([image_mask, torch.zeros(3, 3, dtype=torch.bool)], dim=1)
    padded_queries, padded_rows = model.joint(more_image, more_image_mask, more_ids, more_mask, mode)
    torch.testing.assert_close(padded_queries, queries, **CLOSE)
    assert_rows(padded_rows[:, :TEXT], rows, mask)
    torch.testing.assert_close(model.encode_image(more_image, more_image_mask), model.encode_image(image, image_mask))
    assert_rows(model.encode_text(more_ids, more_mask)[:, :TEXT], model.encode_text(ids, mask), mask)
    assert not torch.allclose(model.encode_image(more_image), model.encode_image(more_image, more_image_mask))


def test_text_that_is_too_long_is_refused():
    ids = torch.ones(1, SIZES["max_positions"] + 1, dtype=torch.long)
    with pytest.raises(UsageError, match="21 tokens"):
        tiny().encode_text(ids, ids.bool())


# shared keys and values


def test_shared_keys_and_values_equal_recomputed_ones_in_every_pass():
    model = tiny()
    image, image_mask, ids, mask = inputs()
    shared = model.keys_values(image, image_mask)
    assert len(shared) == 3
    assert len(shared.layers) == 2  # layers 0 and 2
    assert model.keys_values(shared) is shared
    for by_tokens, by_shared in [
        (model.encode_image(image, image_mask), model.encode_image(shared)),
        (model.match(image, image_mask, ids, mask), model.match(shared, None, ids, mask)),
        (model.decode(image, image_mask, ids, mask), model.decode(shared, None, ids, mask)),
    ]:
        torch.testing.assert_close(by_shared, by_tokens)


def test_selected_keys_and_values_equal_recomputed_ones_with_gradients():
    model = tiny()
    image, image_mask, ids, mask = inputs()
    chosen = torch.tensor([2, 0, 2, 1, 2])  # an image may be drawn more than once
    texts = torch.tensor([0, 1, 2, 0, 1])
    results = []
    for shared in (True, False):
        leaf = image.clone().requires_grad_()
        if shared:
            rows = model.match(model.keys_values(leaf, image_mask).select(chosen), None, ids[texts], mask[texts])
        else:
            rows = model.match(leaf[chosen], image_mask[chosen], ids[texts], mask[texts])
        loss = (rows * torch.linspace(-1, 1, rows.numel()).view_as(rows)).sum()
        weights = [leaf, model.layers[0].cross_attention.key.weight, model.layers[2].cross_attention.value.bias]
        results.append([rows, *torch.autograd.grad(loss, weights)])
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, atol=1e-4, rtol=1e-4)
    assert all(results[0][1][b][image_mask[b]].abs().sum() > 0 for b in range(3))


def test_dropout_is_active_in_training_only():
    model = tiny(dropout=0.5)
    image, _, ids, mask = inputs()
    assert model.match(image, None, ids, mask).equal(model.match(image, None, ids, mask))
    model.train()
    assert not torch.allclose(model.match(image, None, ids, mask), model.match(image, None, ids, mask))


def test_every_second_layer_reads_the_image():
    for every, expected in ((1, [0, 1, 2, 3]), (2, [0, 2]), (3, [0, 3])):
        model = QFormer(QFormerConfig(**{**SIZES, "layers": 4, "cross_attention_every": every}))
        assert [n for n, layer in enumerate(model.layers) if layer.cross_attention is not None] == expected


def test_full_size_has_the_parameters_of_bert_base_and_its_additions():
    """BERT-base with 30,523 words, no token types, no pooler; six cross-attentions, a second FFN, 32 queries."""
    with torch.device("meta"):
        model = QFormer(QFormerConfig())
    hidden, inner, encoder = 768, 3072, 1408
    attention = 4 * (hidden * hidden + hidden) + 2 * hidden
    cross = 2 * (hidden * hidden + hidden) + 2 * (encoder * hidden + hidden) + 2 * hidden
    ffn = hidden * inner + inner + inner * hidden + hidden + 2 * hidden
    head = hidden * hidden + hidden + 2 * hidden + 30523
    expected = 12 * (attention + 2 * ffn) + 6 * cross + (30523 + 512 + 32) * hidden + 2 * hidden + head
    # stage one of LAVIS trains 186,705,470 in all: these, ln_vision, two projections, the ITM head and the temperature
    outside = 2 * encoder + 2 * (hidden * 256 + 256) + 2 * hidden + 2 + 1
    assert sum(weight.numel() for weight in model.parameters()) == expected == 186_705_470 - outside


@pytest.mark.parametrize(("width", "std"), [(768, 0.02), (192, 0.04)])
def test_weights_start_at_the_scale_of_their_width(width: int, std: float) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "layers": 1, "heads": 4, "intermediate_size": 64, "vocab_size": 50}
    qformer = QFormer(QFormerConfig(**sizes, encoder_width=width))
    cross = qformer.layers[0].cross_attention
    for weight in (qformer.queries, cross.query.weight, cross.key.weight, cross.value.weight, cross.output.weight):
        assert float(weight.detach().std()) == pytest.approx(std, rel=0.05)


def test_joining_no_images_leaves_no_mask() -> None:
    """A process that needs nobody else's image computes as if it were alone."""
    torch.manual_seed(0)
    qformer = tiny()
    own = qformer.keys_values(torch.randn(2, 5, qformer.config.encoder_width))
    joined = own.join(qformer.keys_values(torch.randn(0, 0, qformer.config.encoder_width)))
    assert joined.mask is None
    torch.testing.assert_close(joined.layers[0][0], own.layers[0][0], atol=0, rtol=0)
    longer = own.join(qformer.keys_values(torch.randn(1, 7, qformer.config.encoder_width)))
    assert longer.mask is not None
    assert longer.mask[:, 0, 0].sum(dim=1).tolist() == [5, 5, 7]


@pytest.mark.parametrize("masked", [False, True])
def test_attention_on_a_cpu_is_in_single_under_autocast(masked: bool) -> None:
    """Its backward pass in bf16 is several times slower; rounded afterwards, so what follows sees bf16."""
    torch.manual_seed(0)
    query, keys, values = (torch.randn(2, 3, 5, 8).bfloat16() for _ in range(3))
    mask = torch.rand(2, 1, 5, 5) < 0.7 if masked else None
    if mask is not None:
        mask[..., 0] = True
    expected = F.scaled_dot_product_attention(query.float(), keys.float(), values.float(), attn_mask=mask)
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(query, keys, values, mask, 0.0)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected.bfloat16())
