"""How questions are worded for BLIP-2: the presets, as data and pure functions.

Templates and generation settings of visual question answering follow BLIP-2 (arXiv:2301.12597, sections 4.1 and 4.3)
and the original implementation, LAVIS; strings in, strings out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qformer.lookup import find

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class VqaPreset:
    """How a family of language models is asked: the prompt, and the options of `LanguageModel.generate`."""

    template: str
    generate: dict[str, Any]


BEAMS = {"num_beams": 5, "max_new_tokens": 10, "min_new_tokens": 1}

# By preset, then by the family of the language model (`LanguageModel.family`).
VQA_PRESETS: dict[str, dict[str, VqaPreset]] = {
    "paper": {
        "causal": VqaPreset("Question: {} Answer:", {**BEAMS, "length_penalty": -1.0}),
        "seq2seq": VqaPreset("Question: {} Short answer:", {**BEAMS, "length_penalty": -1.0}),
    },
    "lavis": {
        "causal": VqaPreset("Question: {} Short answer:", {**BEAMS, "length_penalty": 0.0}),
        "seq2seq": VqaPreset("Question: {} Short answer:", {**BEAMS, "length_penalty": -1.0}),
    },
}


def vqa_preset(preset: str, family: str) -> VqaPreset:
    """The preset called `preset` for language models of `family` ("causal" or "seq2seq").

    Raises:
        UsageError: an unknown preset or family.
    """
    return find(find(VQA_PRESETS, preset, "VQA preset"), family, "family of language models")


def vqa_prompt(
    question: str,
    preset: str = "paper",
    family: str = "causal",
    context: str | None = None,
    history: Sequence[tuple[str, str]] | None = None,
) -> str:
    """The prompt of a question: [context] [earlier turns] template, joined by spaces.

    Args:
        question: as it is to be read; see `qformer.cleaning`.
        preset, family: see `vqa_preset`.
        context: free text in front, such as a fact or an OCR result.
        history: earlier (question, answer) pairs, the oldest first.
    """
    turns = [f"Question: {q} Answer: {a}." for q, a in history or ()]
    parts = [context or "", *turns, vqa_preset(preset, family).template.format(question)]
    return " ".join(part for part in parts if part)
