"""Small towers: what their parts compute, where a wrong one would only train worse."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from qformer.config import BackboneConfig
from qformer.stages.towers.build import (
    UNSEEN,
    build_language_model,
    build_vit,
    sine_positions,
    train_tokenizer,
)
from qformer.stages.towers.matching import late_interaction


def test_late_interaction_is_the_mean_of_best_patches() -> None:
    torch.manual_seed(0)
    image = F.normalize(torch.randn(3, 5, 8), dim=-1)  # (I, S, P)
    text = F.normalize(torch.randn(2, 4, 8), dim=-1)  # (B, T, P)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    got = late_interaction(image, text, mask)
    for i in range(3):
        for b in range(2):
            best = [max(float(image[i, s] @ text[b, t]) for s in range(5)) for t in range(4) if mask[b, t]]
            assert float(got[i, b]) == pytest.approx(sum(best) / len(best), abs=1e-6)


def test_sine_positions_tell_every_place_apart() -> None:
    table = sine_positions(6, 32)
    assert table.shape == (36, 32)
    distance = torch.cdist(table, table) + 10 * torch.eye(36)
    assert float(distance.min()) > 0.1
    column_1, row_1 = table[1], table[6]  # place 1 is one column to the right, place 6 one row down
    assert float(column_1[0]) == pytest.approx(math.sin(math.pi), abs=1e-6)
    assert torch.equal(column_1[16:], table[0][16:])  # its row half does not move
    assert torch.equal(row_1[:16], table[0][:16])


def test_a_vit_starts_with_positions_that_count_beside_its_patches() -> None:
    torch.manual_seed(0)
    vit = build_vit(BackboneConfig(kind="vit", width=64, layers=1, heads=4, image_size=48, patch_size=8, text="none"))
    positions = vit.embeddings.position_embeddings[0, 1:]
    patches = vit.embeddings.patch_embeddings(torch.randn(1, 3, 48, 48))[0]
    assert 0.1 < float(positions.detach().std() / patches.detach().std()) < 10
    assert positions.requires_grad


def test_a_t5_starts_with_heads_that_know_order() -> None:
    """What T5 makes of its biases: of four heads the first sees all alike, the others before, behind, and around."""
    tokenizer = train_tokenizer("t5", ["a red square is left of a circle"], 40)
    model = build_language_model(BackboneConfig(kind="t5", width=32, layers=2, heads=8, decoder_layers=1), tokenizer)
    bias = model.encoder.block[0].layer[0].SelfAttention.compute_bias(41, 41)[0].detach()  # (heads, from, to)
    before, after = bias[:, 20, :20].flip(1), bias[:, 20, 21:]  # (heads, distance from 1)
    for heads, steep in ((bias[:4], 0.3), (bias[4:], 0.9)):
        assert torch.equal(heads[0], torch.zeros(41, 41))
        assert heads[1:, 20, 21].tolist() == pytest.approx([UNSEEN, -steep, -steep])
        assert heads[1:, 20, 19].tolist() == pytest.approx([-steep, UNSEEN, -steep])
    for falling in (before[1], before[3], after[2], after[3]):
        assert (falling.diff() <= 0).all()
        assert falling[0] > falling[3] > falling[9]
    assert (after[[1, 5]] == UNSEEN).all()
    assert (before[[2, 6]] == UNSEEN).all()


def test_the_tokenizer_of_a_clip_is_the_same_each_time() -> None:
    """A run that resumes trains it again; transformers takes an end of number 2 for the largest number."""
    text = ["a red square is left of a circle", "the word book on a green moon", "three hollow stars and two crosses"]
    first, *others = (train_tokenizer("clip", text, 300) for _ in range(4))
    assert all(other.get_vocab() == first.get_vocab() for other in others)
    ids = first("a hollow red star")["input_ids"]
    assert (ids[0], ids[-1]) == (first.bos_token_id, first.eos_token_id) == (2, 3)
    assert first.decode(ids, skip_special_tokens=True) == "a hollow red star"
