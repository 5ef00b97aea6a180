"""Losses of choices, many at once, against the loss of the language model for each alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qformer.evaluation import choice
from qformer.evaluation.choice import choice_losses
from qformer.llm.loading import load_language_model
from qformer.model.connectors import Prefix
from tests.tiny import save_tiny_llm


class Speaking:
    """What `choice_losses` reads of a model."""

    def __init__(self, llm: torch.nn.Module) -> None:
        self.llm = llm


@pytest.mark.parametrize("kind", ["opt", "flan-t5"])
def test_each_choice_costs_what_it_costs_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    llm = load_language_model(save_tiny_llm(tmp_path / kind, kind))
    monkeypatch.setattr(choice, "ROWS", 3)
    prefix = torch.randn(2, 4, llm.width)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    prompts = ["Question: a cat? Answer:", "Question: what is it that is there on the mat? Answer:"]
    choices = [["yes", "no"], ["a dog", "a very long answer that goes on", "cat"]]
    found = choice_losses(Speaking(llm), Prefix(prefix, mask), prompts, choices)
    for row, texts in enumerate(choices):
        for number, text in enumerate(texts):
            loss, count = llm.loss(prefix[row : row + 1], mask[row : row + 1], [text], [prompts[row]], choice.ROOM)
            assert found[row][0][number] == pytest.approx(float(loss), rel=2e-5, abs=1e-4)
            assert found[row][1][number] == int(count)
