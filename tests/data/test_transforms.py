"""Random crops and mirrors: inside the image, of the right area and shape, and nothing where nothing is asked."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qformer.data.transforms import RATIOS, augment, random_crop_box


@given(st.integers(1, 3000), st.integers(1, 3000), st.floats(0.01, 1), st.floats(0.01, 1), st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
def test_every_box_is_inside(width: int, height: int, a: float, b: float, seed: int) -> None:
    scale = min(a, b), max(a, b)
    left, top, right, bottom = random_crop_box(width, height, scale, np.random.default_rng(seed))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


@given(st.integers(200, 2000), st.floats(0.75, 1.33), st.floats(0.05, 0.6), st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
def test_area_and_ratio_are_in_range(width: int, aspect: float, smallest: float, seed: int) -> None:
    """Crops of at most 0.65 of a picture that is not far from square always fit within ten tries, to rounding."""
    height = round(width / aspect)
    scale = smallest, 0.65
    left, top, right, bottom = random_crop_box(width, height, scale, np.random.default_rng(seed))
    w, h = right - left, bottom - top
    slack = 1 + 1.2 / min(w, h)  # either side is rounded by at most half a pixel
    assert scale[0] / slack <= w * h / (width * height) <= scale[1] * slack
    assert RATIOS[0] / slack <= w / h <= RATIOS[1] * slack


def test_boxes_fill_their_ranges() -> None:
    """Area is uniform, the ratio uniform in its logarithm, and every place is reached, the edges too."""
    rng = np.random.default_rng(0)
    boxes = np.array([random_crop_box(400, 300, (0.2, 0.6), rng) for _ in range(3000)])
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area = w * h / (400 * 300)
    assert area.min() < 0.21
    assert area.max() > 0.58
    assert area.mean() == pytest.approx(0.4, abs=0.015)
    ratio = np.log(w / h)
    assert abs(ratio.mean()) < 0.012  # a ratio that is itself uniform gives 0.027
    assert ratio.min() == pytest.approx(math.log(3 / 4), abs=0.02)
    assert ratio.max() == pytest.approx(math.log(4 / 3), abs=0.02)
    assert boxes[:, 0].min() == 0
    assert boxes[:, 2].max() == 400
    assert boxes[:, 1].min() == 0
    assert boxes[:, 3].max() == 300
    assert np.mean(boxes[:, 0] / (400 - w)) == pytest.approx(0.5, abs=0.03)


def test_no_ratio_fits_gives_the_largest_centred_box() -> None:
    assert random_crop_box(1000, 30, (0.9, 1.0), np.random.default_rng(0)) == (480, 0, 520, 30)
    assert random_crop_box(30, 1000, (0.9, 1.0), np.random.default_rng(0)) == (0, 480, 30, 520)


def test_the_whole_image_draws_nothing() -> None:
    rng = np.random.default_rng(3)
    before = rng.bit_generator.state
    image = torch.arange(3 * 4 * 5, dtype=torch.uint8).reshape(3, 4, 5)
    assert torch.equal(augment([image], (1.0, 1.0), 0.0, rng)[0], image)
    assert rng.bit_generator.state == before


def test_mirror() -> None:
    image = torch.arange(3 * 4 * 5, dtype=torch.uint8).reshape(3, 4, 5)
    assert torch.equal(augment([image], (1.0, 1.0), 1.0, np.random.default_rng(0))[0], image.flip(2))
    rng = np.random.default_rng(0)
    mirrored = sum(not torch.equal(augment([image], (1.0, 1.0), 0.25, rng)[0], image) for _ in range(400))
    assert 70 <= mirrored <= 130


def test_a_crop_is_a_window_of_the_image() -> None:
    """Rows and columns are not confused: each pixel says where it was."""
    rows, columns = torch.meshgrid(torch.arange(40), torch.arange(90), indexing="ij")
    image = torch.stack([rows, columns, rows]).to(torch.uint8)
    rng, twin = np.random.default_rng(5), np.random.default_rng(5)
    for _ in range(20):
        left, top, right, bottom = random_crop_box(90, 40, (0.1, 0.5), twin)
        crop = augment([image], (0.1, 0.5), 0.0, rng)[0]
        assert crop.shape == (3, bottom - top, right - left)
        assert torch.equal(crop, image[:, top:bottom, left:right])
