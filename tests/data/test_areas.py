"""Plain areas: what is asked of an edge is what its pixels show."""

from __future__ import annotations

from collections import Counter

import numpy as np

from qformer.canvases.areas import NO_COLOR, Areas
from qformer.canvases.layout import GROUND
from qformer.data import sources
from qformer.metrics.counts import parse_color
from qformer.scenes.scenes import RGB
from qformer.scenes.text import COLOURS
from qformer.types import Sample


def edge_of(sample: Sample) -> np.ndarray:
    """Pixels of the edge that is asked about: uint8[n, 3]."""
    assert isinstance(sample.image, np.ndarray)
    edge = str(sample.question).split()[4]
    image = sample.image
    return {"left": image[:, 0], "right": image[:, -1], "top": image[0], "bottom": image[-1]}[edge]


def tones(sample: Sample) -> set[int]:
    """All colors of a picture, as numbers: faster than to compare them by channel."""
    return set(np.unique(np.asarray(sample.image).astype(int) @ [1 << 16, 1 << 8, 1]).tolist())


def test_the_answer_is_the_color_of_the_pixels_along_that_edge() -> None:
    for split in ("train", "val", "test", "any"):
        for sample in (Areas(split, (120, 200), seed=1)[number] for number in range(150)):
            (pixel,) = np.unique(edge_of(sample), axis=0).astype(int)
            nearest = min(COLOURS, key=lambda color: np.abs(pixel - RGB[color]).sum())
            gray = GROUND[0] <= pixel[0] <= GROUND[1] and len(set(pixel)) == 1
            assert sample.answers == [NO_COLOR if gray else nearest]
    assert parse_color(NO_COLOR) is None


def test_answers_edges_and_numbers_of_areas_are_balanced() -> None:
    samples = [Areas(sides=(120, 160))[number] for number in range(1500)]
    answers = Counter(sample.answers[0] for sample in samples)
    assert answers.keys() == {*COLOURS, NO_COLOR}
    assert 0.3 < answers.pop(NO_COLOR) / len(samples) < 0.37
    assert max(answers.values()) < 1.4 * min(answers.values())
    edges = Counter(str(sample.question) for sample in samples)
    assert len(edges) == 4
    assert max(edges.values()) < 1.2 * min(edges.values())
    areas = Counter(len(tones(sample)) for sample in samples[:300])
    assert areas.keys() == {1, 2, 3}
    assert min(areas.values()) > 50


def test_no_split_shows_a_tone_of_another_one() -> None:
    train, val, test = (
        set[int]().union(*(tones(source[number]) for number in range(200)))
        for source in (Areas(split, (120, 130)) for split in ("train", "val", "test"))
    )
    assert not train & val | train & test | val & test


def test_it_is_built_from_a_configuration_and_drawn_again_alike() -> None:
    source = sources.build("areas", split="val", sides=[120, 130], seed=3, count=10**9)
    one, again = source[10**9 - 1], source[10**9 - 1]
    assert isinstance(one.image, np.ndarray)
    assert (one.image == np.asarray(again.image)).all()
    assert all(120 <= side <= 130 for side in one.image.shape[:2])
    assert one.key == one.image_id == "areas/val/3,sides=(120,130)/999999999:edge"
