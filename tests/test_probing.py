"""The attack with padding beside its baselines, against oracles: who sees, who takes gray for nothing, who guesses."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from qformer.metrics.proportions import share_interval
from qformer.probing.padding import FILL, KINDS, OTHER_GRAY, RATES, PaddingEffect, padding_attack, padding_effect
from qformer.scenes.scenes import RGB
from tests.evaluation.test_probes import edge

ZERO = dict.fromkeys(RATES, 0.0)


def effect(answer: Callable[[Image.Image, str], str], repeats: int = 1) -> PaddingEffect:
    """The effect on somebody who answers one question about one picture."""
    return padding_effect(lambda *both: [answer(*one) for one in zip(*both, strict=True)], side=60, repeats=repeats)


def shares(found: PaddingEffect, kind: str = "all") -> dict[str, float]:
    return {rate: count / asked for rate in RATES for count, asked in [found.pooled(kind, rate)]}


def middle(picture: Image.Image) -> str:
    """The color of the rectangle."""
    rgb = picture.getpixel((picture.width // 2, picture.height // 2))
    return next(name for name, color in RGB.items() if color == rgb)


def without(*grounds: tuple[int, int, int]) -> Callable[[Image.Image, str], str]:
    """Somebody who takes these grounds for nothing."""

    def answer(picture: Image.Image, question: str) -> str:
        ground = picture.getpixel((0, 0))
        return middle(picture) if ground in grounds else edge(picture, question)

    return answer


def test_whoever_sees_is_right_on_every_ground() -> None:
    assert shares(effect(edge)) == ZERO | {"alone": 1.0}


def test_whoever_takes_padding_for_nothing_is_fooled_by_its_gray_alone() -> None:
    fooled = ZERO | {"named": 1.0, "alone": 1.0, "fooled": 1.0, "only_padding": 1.0}
    assert shares(effect(without(FILL))) == fooled


def test_whoever_takes_all_grays_for_nothing_is_not_fooled_by_padding_alone() -> None:
    found = shares(effect(without(FILL, OTHER_GRAY)))
    assert found == ZERO | {"named": 1.0, "alone": 1.0, "on_other_gray": 1.0, "fooled": 1.0}


def test_whoever_always_names_the_thing_in_the_middle_is_not_fooled() -> None:
    """The published rate is 100 %, though no ground makes a difference."""
    found = shares(effect(lambda picture, _: middle(picture)))
    assert found == ZERO | dict.fromkeys(("named", "alone", "on_yellow", "on_other_gray"), 1.0)


def test_whoever_knows_no_word_for_gray_and_guesses_is_hardly_fooled() -> None:
    """One of three colors, whatever is shown, unless the edge has a name."""

    def answer(picture: Image.Image, question: str) -> str:
        seen = edge(picture, question)
        return ("red", "green", "blue", "black")[sum(map(ord, question)) % 4] if seen == "gray" else seen

    found = shares(effect(answer))
    assert found["alone"] == 1
    assert 0 < found["named"] < 0.5
    assert (found["on_yellow"], found["fooled"], found["only_padding"]) == (0, found["named"], 0)


def test_rates_are_told_by_kind_and_side_with_their_intervals() -> None:
    """Fooled at the left of what is narrower than high."""

    def answer(picture: Image.Image, question: str) -> str:
        rows, columns = np.where((np.asarray(picture) != FILL).any(axis=2))
        narrow = np.ptp(columns) < np.ptp(rows)
        return middle(picture) if narrow and "left" in question else edge(picture, question)

    found = effect(answer, repeats=2)
    assert found.shares("named")["<1:1"] == {"left": 1.0, "right": 0.0, "top": 0.0, "bottom": 0.0}
    assert set(found.shares("named")[">1:1"].values()) == {0.0}
    record = found.record()
    assert [record[kind]["named"]["count"] for kind in (*KINDS, "all")] == [18, 0, 18]
    assert record["<1:1"]["named"]["asked"] == 72
    low, high = share_interval(18, 72)
    assert record["<1:1"]["named"]["interval"] == [pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4)]


def test_the_attack_asks_the_first_of_the_four() -> None:
    asked: list[list[bytes]] = []

    def ask(pictures: list[Image.Image], questions: list[str]) -> list[str]:
        asked.append([picture.tobytes() for picture in pictures])
        return ["red"] * len(questions)

    whole = padding_effect(ask, side=60, repeats=1)
    of_effect, asked[:] = asked[::4], []
    assert padding_attack(ask, side=60, repeats=1) == whole.shares("named")
    assert asked == of_effect
