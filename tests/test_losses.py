"""ITC, hard negatives, ITM and ITG as plain functions, each against arithmetic written out here."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from qformer import losses
from qformer.losses import same_image

TEMP = 0.2


def embeddings(count=4, queries=3, width=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = F.normalize(torch.randn(count, queries, width, generator=generator), dim=-1)
    text = F.normalize(torch.randn(count, width, generator=generator), dim=-1)
    return image, text


def cosine(image, text):
    """Every (image, text) pair by itself: the best of the image's rows."""
    return torch.stack([torch.stack([max(row @ words for row in rows) for words in text]) for rows in image])


def test_similarity_is_the_best_row_with_texts_in_rows():
    image, text = embeddings(4)
    text = text[:3]
    torch.testing.assert_close(losses.similarity(image, text), cosine(image, text).T)


def test_similarity_ignores_rows_that_do_not_exist():
    image, text = embeddings(2)
    valid = torch.tensor([[True, False, True], [True, True, True]])
    expected = torch.cat([cosine(image[:1, [0, 2]], text), cosine(image[1:], text)]).T
    torch.testing.assert_close(losses.similarity(image, text, valid), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_contrastive_of_distinct_images_is_label_smoothed_cross_entropy(smoothing):
    image, text = embeddings()
    logits = cosine(image, text) / TEMP
    own = torch.arange(4)
    expected = (
        F.cross_entropy(logits, own, label_smoothing=smoothing)
        + F.cross_entropy(logits.T, own, label_smoothing=smoothing)
    ) / 2
    got = losses.contrastive(image, text, image, text, same_image(None, 4), TEMP, smoothing)
    torch.testing.assert_close(got, expected)


IDS = [["x", "y", "x", "x"], [7, 8, 7, 7], [1, "1", 1, 1], torch.tensor([7, 8, 7, 7])]  # strings, numbers, both


@pytest.mark.parametrize("ids", IDS, ids=str)
def test_contrastive_shares_the_target_between_equal_images(ids):
    image, text = embeddings()
    total = 0.0
    for logits in (cosine(image, text) / TEMP, cosine(image, text).T / TEMP):
        for row in range(4):
            equal = [bool(other == ids[row]) for other in ids]
            logs = logits[row] - logits[row].exp().sum().log()
            for column in range(4):
                target = 0.9 * equal[column] / sum(equal) + 0.1 / 4
                total -= target * logs[column].item() / 4 / 2
    got = losses.contrastive(image, text, image, text, same_image(ids, 4), TEMP)
    assert got.item() == pytest.approx(total, abs=1e-5)


def test_contrastive_of_two_processes_averages_to_the_whole_batch():
    image, text = embeddings(6)
    same = same_image([0, 1, 2, 0, 4, 5], 6)
    whole = losses.contrastive(image, text, image, text, same, TEMP)
    ranks = (slice(0, 3), slice(3, 6))
    parts = [losses.contrastive(image[rank], text[rank], image, text, same[rank], TEMP) for rank in ranks]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


def test_contrastive_does_not_see_rows_that_are_padding():
    image, text = embeddings(3)
    valid = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    scores = torch.cat([cosine(image[i : i + 1, : 3 - i], text) for i in range(3)]) / TEMP
    own = torch.arange(3)
    expected = (
        F.cross_entropy(scores, own, label_smoothing=0.1) + F.cross_entropy(scores.T, own, label_smoothing=0.1)
    ) / 2
    got = losses.contrastive(image, text, image, text, same_image(None, 3), TEMP, 0.1, valid, valid)
    torch.testing.assert_close(got, expected)


def test_contrastive_of_one_pair_is_zero():
    image, text = embeddings(1)
    assert losses.contrastive(image, text, image, text, same_image(None, 1), TEMP).item() == 0.0


def test_contrastive_at_chance_is_log_n():
    image, text = torch.ones(8, 2, 1), torch.ones(8, 1)
    got = losses.contrastive(image, text, image, text, same_image(None, 8), TEMP)
    assert got.item() == pytest.approx(math.log(8), abs=1e-5)


def test_detached_columns_let_gradient_in_through_rows_only():
    image, text = (tensor.requires_grad_() for tensor in embeddings())
    temp = torch.tensor(TEMP, requires_grad=True)
    same = same_image(None, 4)
    loss = losses.contrastive(image, text, image.detach(), text.detach(), same, temp)
    got = torch.autograd.grad(loss, [image, text, temp])

    own = torch.arange(4)
    image_to_text = F.cross_entropy(cosine(image, text) / temp, own, label_smoothing=0.1) / 2
    text_to_image = F.cross_entropy(cosine(image, text).T / temp, own, label_smoothing=0.1) / 2
    torch.testing.assert_close(got[0], torch.autograd.grad(image_to_text, image, retain_graph=True)[0])
    torch.testing.assert_close(got[1], torch.autograd.grad(text_to_image, text, retain_graph=True)[0])
    torch.testing.assert_close(got[2], torch.autograd.grad(image_to_text + text_to_image, temp)[0])


def test_contrastive_survives_similarities_in_half_precision():
    image, text = (tensor.bfloat16() for tensor in embeddings())
    exact = losses.contrastive(*[tensor.float() for tensor in (image, text, image, text)], same_image(None, 4), TEMP)
    got = losses.contrastive(image, text, image, text, same_image(None, 4), TEMP)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, exact, atol=0.05, rtol=0)


def test_hard_negatives_follow_the_softmax_and_are_never_the_same_image():
    logits = torch.tensor([2.0, 0.5, 1.0, -1.0, 9.0])
    same = torch.tensor([False, False, False, False, True])
    draws = 20_000
    columns, legal = losses.hard_negatives(
        logits.expand(draws, 5), same.expand(draws, 5), torch.Generator().manual_seed(0)
    )
    expected = torch.cat([logits[:4].softmax(0), torch.zeros(1)])
    share = torch.bincount(columns, minlength=5) / draws
    assert legal.all()
    assert share[4] == 0
    torch.testing.assert_close(share, expected, atol=0.015, rtol=0)


def test_hard_negatives_of_each_row_use_that_row():
    logits = torch.full((4, 4), -60.0)
    wanted = torch.tensor([2, 3, 0, 1])
    logits[torch.arange(4), wanted] = 60.0
    logits.fill_diagonal_(1000.0)
    columns, legal = losses.hard_negatives(logits, torch.eye(4, dtype=torch.bool))
    assert columns.tolist() == wanted.tolist()
    assert legal.all()


def test_hard_negatives_repeat_with_the_generator():
    logits, same = torch.zeros(50, 50), torch.eye(50, dtype=torch.bool)
    first, second, other = (losses.hard_negatives(logits, same, torch.Generator().manual_seed(s))[0] for s in (1, 1, 2))
    assert first.equal(second)
    assert not first.equal(other)


@pytest.mark.parametrize("ids", [["a"], ["a", "a", "a"]])
def test_no_legal_negative_where_everything_is_the_same_image(ids):
    count = len(ids)
    columns, legal = losses.hard_negatives(torch.randn(count, count), same_image(ids, count))
    assert columns.shape == legal.shape == (count,)
    assert not legal.any()
    assert ((columns >= 0) & (columns < count)).all()  # meaningless, but still an index


@pytest.mark.parametrize(
    "ids", [["a", "b", "a", "c"], [5, 6, 5, 7], [5, "5", 5, "a"], torch.tensor([5, 6, 5, 7])], ids=str
)
def test_hard_negatives_of_a_part_of_the_batch(ids):
    same = same_image(ids, 4)[:2]
    columns, legal = losses.hard_negatives(torch.zeros(2, 4).repeat(100, 1), same.repeat(100, 1))
    assert legal.all()
    assert set(columns[0::2].tolist()) == {1, 3}
    assert set(columns[1::2].tolist()) == {0, 2, 3}


def test_hard_negatives_have_no_loop_over_rows():
    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls += 1
            return function(*args, **(kwargs or {}))

    counts = []
    for size in (2, 60):
        logits, same = torch.zeros(size, size), torch.eye(size, dtype=torch.bool)
        with Count() as mode:
            losses.hard_negatives(logits, same)
        counts.append(mode.calls)
    assert counts[0] == counts[1]


def test_hard_negatives_carry_no_gradient():
    logits = torch.zeros(3, 3, requires_grad=True)
    columns, _ = losses.hard_negatives(logits, torch.eye(3, dtype=torch.bool))
    assert not columns.requires_grad


def test_matching_averages_what_is_not_left_out():
    logits = torch.tensor([[1.0, 3.0], [2.0, 0.0], [5.0, -4.0], [0.5, 0.25]])
    labels = torch.tensor([1, 0, losses.IGNORE, 0])
    expected = sum(
        math.log(1 + math.exp(logits[row, 1 - label] - logits[row, label])) for row, label in ((0, 1), (1, 0), (3, 0))
    )
    assert losses.matching(logits, labels).item() == pytest.approx(expected / 3, abs=1e-6)


def test_captioning_smooths_over_valid_targets_only():
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, 2, losses.IGNORE], [6, losses.IGNORE, losses.IGNORE]])
    logs = logits.log_softmax(-1)
    terms = [0.9 * logs[b, t, labels[b, t]] + 0.1 * logs[b, t].mean() for b, t in ((0, 0), (0, 1), (1, 0))]
    expected = -sum(terms) / 3
    torch.testing.assert_close(losses.captioning(logits, labels, 0.1), expected)
    torch.testing.assert_close(losses.captioning(logits[labels >= 0], labels[labels >= 0], 0.1), expected)


def test_captioning_at_chance_is_log_of_the_vocabulary():
    got = losses.captioning(torch.zeros(2, 4, 1000), torch.randint(1000, (2, 4)))
    assert got.item() == pytest.approx(math.log(1000), abs=1e-5)
