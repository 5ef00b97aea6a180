"""The fingerprint of a model: equal for the same weights, another one for others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from qformer.retrieval.reading import embed_captions, fingerprint
from tests.retrieval.photos import Views, model_of_tiles


def test_the_same_weights_have_the_same_fingerprint() -> None:
    made = fingerprint(model_of_tiles())
    half = model_of_tiles().half()
    assert made == fingerprint(model_of_tiles()) == fingerprint(half) == fingerprint(half.float())


@pytest.mark.parametrize(
    "name", ["frontend.encoder.project.weight", "frontend.norm.bias", "vision_proj.weight", "qformer.queries", "temp"]
)
def test_other_weights_have_another_one(name: str) -> None:
    other = model_of_tiles()
    with torch.no_grad():
        weight = dict(other.named_parameters()).get(name)
        if weight is None:
            pytest.fail(f"{name} of {[n for n, _ in other.named_parameters()]}")
        weight += 1e-2 * torch.rand(weight.shape)
    assert fingerprint(other) != fingerprint(model_of_tiles())


def test_a_little_training_changes_it() -> None:
    """One step of AdamW at a learning rate of 1e-5 moves every number that is looked at by about as much."""
    other = model_of_tiles()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 1e-5
    assert fingerprint(other) != fingerprint(model_of_tiles())


def test_the_words_of_a_whole_bert() -> None:
    """More numbers than a float32 can count."""
    words = torch.zeros(1).expand(30523 * 768)
    model = SimpleNamespace(frontend=SimpleNamespace(strategy=Views()), state_dict=lambda: {"words": words})
    assert fingerprint(cast("Any", model)) != fingerprint(model_of_tiles())


def test_another_cutting_of_images_has_another_one() -> None:
    other = model_of_tiles()
    other.frontend.strategy = type("Other", (Views,), {})()
    assert fingerprint(other) != fingerprint(model_of_tiles())


def test_captions_are_embedded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, texts = model_of_tiles(), ["cat", "a dog on the beach", "bus " * 100, "", "rain"]
    whole = embed_captions(model, texts)
    monkeypatch.setattr("qformer.retrieval.reading.TEXTS", 2)
    assert np.abs(embed_captions(model, texts).astype(np.float32) - whole).max() < 1e-3
    assert whole.dtype == np.float16
    assert embed_captions(model, []).shape == (0, 8)
