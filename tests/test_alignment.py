"""Two linear maps solved in closed form: against numpy, on relations that are known, and where little is there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from qformer.alignment import align, pooled
from qformer.types import UsageError, VisualTokens


def pairs(count=400, hidden=4, image_width=10, text_width=6, noise=0.1, seed=0):
    """Features that both sides make of the same hidden numbers, with noise and a mean of their own."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    common = draw(count, hidden)
    images = common @ draw(hidden, image_width) + noise * draw(count, image_width) + 5 * draw(image_width)
    texts = common @ draw(hidden, text_width) + noise * draw(count, text_width) + 2 * draw(text_width)
    return images, texts


def found(alignment, images, texts):
    """Share of images whose own text is the nearest."""
    best = alignment.similarity(images, texts).argmax(1)
    return (best == torch.arange(len(images))).float().mean().item()


def test_it_is_the_canonical_correlation_analysis_of_the_textbook():
    """Eigenvectors of Cxx^-1 Cxy Cyy^-1 Cyx, in numpy; each direction up to its sign, times its correlation."""
    images, texts = pairs()
    ridge = 0.3
    x, y = images.double().numpy(), texts.double().numpy()
    mean, deviation = x.mean(0), x.std(0)
    x, y = (x - mean) / deviation, y - y.mean(0)
    cxx = x.T @ x / len(x) + ridge * np.eye(10)
    cyy = y.T @ y / len(y)
    cyy += ridge * np.trace(cyy) / 6 * np.eye(6)
    cxy = x.T @ y / len(x)
    squared, vectors = np.linalg.eig(np.linalg.solve(cxx, cxy) @ np.linalg.solve(cyy, cxy.T))
    order = np.argsort(-squared.real)[:3]
    rho, a = np.sqrt(squared.real[order]), vectors.real[:, order]
    a /= np.sqrt(np.einsum("dp,de,ep->p", a, cxx, a))  # unit variance under the regularized covariance
    b = np.linalg.solve(cyy, cxy.T @ a) / rho
    got = align(images, texts, width=3, ridge=ridge)
    np.testing.assert_allclose(got.correlations, rho, rtol=1e-5)
    sign = np.sign(np.einsum("pd,dp->p", got.image.weight * deviation, a))
    np.testing.assert_allclose(got.image.weight * deviation, (sign * rho * a).T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got.text.weight, (sign * rho * b).T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got.image(images).mean(0), np.zeros(3), atol=1e-4)
    np.testing.assert_allclose(got.text(texts).mean(0), np.zeros(3), atol=1e-4)


def test_a_linear_relation_is_recovered_on_pairs_that_it_has_not_seen():
    images, texts = pairs(600, image_width=16, text_width=12, noise=0.03)
    solved = align(images[:400], texts[:400], width=4)
    assert found(solved, images[400:], texts[400:]) > 0.9
    wrong = align(images[:400], texts[:400].roll(1, 0), width=4)
    assert found(wrong, images[400:], texts[400:]) < 0.1


def test_shifting_and_scaling_the_features_changes_no_cosine():
    images, texts = pairs()
    scale, shift = torch.logspace(-1, 2, 10), torch.linspace(-5, 5, 10)
    expected = align(images, texts, width=4).similarity(images, texts)
    moved, said = images * scale + shift, texts * 7 - 3
    torch.testing.assert_close(align(moved, said, width=4).similarity(moved, said), expected, atol=1e-3, rtol=0)


def test_the_maps_go_into_linear_layers():
    images, texts = pairs()
    solved = align(images.half(), texts.half(), width=4)
    for affine, features in ((solved.image, images), (solved.text, texts)):
        head = nn.Linear(features.shape[1], 4)
        head.load_state_dict({"weight": affine.weight, "bias": affine.bias})
        torch.testing.assert_close(head(features), affine(features))
        torch.testing.assert_close(affine(features.half()[None])[0], affine(features.half()))


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_fewer_pairs_than_features_and_a_width_above_the_rank(ridge):
    """Eight pairs have at most seven directions; the rest of the twelve is zeros, and the pairs are told apart."""
    images, texts = pairs(count=8, hidden=7, image_width=30, text_width=20)
    solved = align(images, texts, width=25, ridge=ridge)
    assert [tuple(affine.weight.shape) for affine in (solved.image, solved.text)] == [(25, 30), (25, 20)]
    assert solved.correlations[7:].abs().max() < 1e-6 < solved.correlations[6]
    assert solved.image.weight[20:].abs().max() == solved.text.weight[20:].abs().max() == 0
    assert found(solved, images, texts) == 1


def test_constant_features_get_no_weight():
    images, texts = pairs()
    plain = align(images, texts, width=4)
    constants = torch.cat([images, torch.full((400, 1), 0.1), torch.zeros(400, 1)], 1)
    constants[::2, 10] = torch.nextafter(constants[0, 10], torch.tensor(1.0))  # the last bit of a rounding
    solved = align(constants, torch.cat([texts, torch.ones(400, 1)], 1), width=4)
    assert solved.image.weight[:, 10:].abs().max() == 0
    assert solved.text.weight[:, 6].abs().max() < 1e-6
    torch.testing.assert_close(solved.image.weight[:, :10].abs(), plain.image.weight.abs(), atol=0.1, rtol=0.1)
    assert found(solved, constants, torch.cat([texts, torch.ones(400, 1)], 1)) > 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x[:1], y[:1]), "1 pairs"),
        (lambda x, y: (x[:5], y), r"\[5, 10\] and \[400, 6\]"),
        (lambda x, y: (x[0], y), "one row per pair"),
        (lambda x, y: (x.masked_fill(x > 5, float("nan")), y), "image features hold numbers that are not finite"),
        (lambda x, y: (x, torch.ones_like(y)), "text features are the same in all 400 rows"),
    ],
)
def test_features_from_which_nothing_can_be_solved_are_refused(change, message):
    with pytest.raises(UsageError, match=message):
        align(*change(*pairs()), width=4)


@pytest.mark.parametrize("options", [{"width": 0}, {"width": 4, "ridge": -0.1}, {"width": 4, "ridge": float("nan")}])
def test_a_width_or_ridge_out_of_range_is_refused(options):
    with pytest.raises(UsageError, match="width of at least 1"):
        align(*pairs(), **options)


def test_tokens_are_pooled_by_image():
    """The class token beside the mean of all patches; a second token in front of them is not read."""
    tiles = [torch.arange(float(2 * count)).view(count, 2) for count in (4, 3, 6)]  # extra tokens and patches
    images = VisualTokens(tiles, [], extra=2, plans=[], counts=[2, 1])
    expected = [[0.0, 1.0, 14 / 3, 17 / 3], [0.0, 1.0, 7.0, 8.0]]
    torch.testing.assert_close(pooled(images), torch.tensor(expected))
    plain = VisualTokens(tiles, [], extra=0, plans=[], counts=[1, 2])
    torch.testing.assert_close(pooled(plain), torch.tensor([[3.0, 4.0], [4.0, 5.0]]))
