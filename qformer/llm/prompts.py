"""Prompts for each task about an image, with their decoding options: one table and pure functions on strings.

Captions, visual questions and their decoding follow BLIP-2 (arXiv:2301.12597, sections 4.1 to 4.3); dialogue follows
the original implementation, LAVIS. The paper shows the other tasks as examples only (figure 4): their prompts and
decoding options are ours.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qformer.lookup import find

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@dataclass(frozen=True)
class Wording:
    """The prompt of a task for one family of language models.

    Attributes:
        template: the prompt; `{}` stands for the question or the instruction, if the task takes one.
        generate: options of `LanguageModel.generate`.
        context: the template of free text before the prompt.
    """

    template: str
    generate: dict[str, Any]
    context: str = "{}"

    @property
    def asks(self) -> bool:
        """True if the template has a place for a question."""
        return "{}" in self.template


def _both(*wording: Any) -> dict[str, Wording]:
    return dict.fromkeys(("causal", "seq2seq"), Wording(*wording))


SHORT = {"num_beams": 5, "max_new_tokens": 10, "min_new_tokens": 1, "length_penalty": -1.0}
SENTENCE = {"num_beams": 5, "max_new_tokens": 30, "min_new_tokens": 1}
LONG = {
    "num_beams": 5,
    "max_new_tokens": 100,
    "min_new_tokens": 1,
    "repetition_penalty": 1.5,
    "no_repeat_ngram_size": 3,
}
QUESTION, SHORT_QUESTION = "Question: {} Answer:", "Question: {} Short answer:"
BRIEFLY = "{} Answer with a single word or a short phrase."
STEPS = "Let's think step by step."  # Kojima et al., arXiv:2205.11916
TURN = "Question: {} Answer: {}."

#: By task, then by the family of the language model (`LanguageModel.family`).
TASKS: dict[str, dict[str, Wording]] = {
    "caption": _both("a photo of", SENTENCE),
    "vqa": {"causal": Wording(QUESTION, SHORT), "seq2seq": Wording(SHORT_QUESTION, SHORT)},
    "context": {
        "causal": Wording(QUESTION, SHORT, "Context: {}."),
        "seq2seq": Wording(SHORT_QUESTION, SHORT, "Context: {}."),
    },
    "dialogue": _both(QUESTION, SENTENCE),
    "knowledge": _both(QUESTION, SENTENCE | {"max_new_tokens": 50}),
    "reasoning": {
        "causal": Wording(f"{QUESTION} {STEPS}", LONG),
        "seq2seq": Wording(f"{{}} {STEPS}", LONG),
    },
    "writing": _both("{}", LONG),
    "ask": _both("Ask a question about the picture. Question:", SENTENCE),
}
#: By preset: `paper`, and `lavis` for what LAVIS does differently.
PRESETS: dict[str, dict[str, dict[str, Wording]]] = {
    "paper": TASKS,
    "lavis": TASKS
    | {
        "vqa": {
            "causal": Wording(SHORT_QUESTION, SHORT | {"length_penalty": 0.0}),
            "seq2seq": Wording(SHORT_QUESTION, SHORT),
        }
    },
}
CHAT = "chat"  # the wording of language models that are spoken to in the turns of a template
#: Instruct models behind a young bridge repeat themselves, the more so the more a search rewards long texts.
SAID = SENTENCE | {"length_penalty": 0.0, "no_repeat_ngram_size": 3}
#: By task, what a user says in a turn, whatever the preset; these models have learned instructions, and are told so.
TURNS: dict[str, Wording] = {
    "caption": Wording("Describe the photo in one sentence.", SAID),
    "vqa": Wording(BRIEFLY, SHORT),
    "context": Wording(BRIEFLY, SHORT, "Context: {}."),
    "dialogue": Wording("{}", SAID),
    "knowledge": Wording("{}", SAID | {"max_new_tokens": 50}),
    "reasoning": Wording(f"{{}} {STEPS}", LONG),
    "writing": Wording("{}", LONG),
    "ask": Wording("Ask a question about the picture.", SAID),
}


def wording(task: str, preset: str, family: str) -> Wording:
    """Look up the row of the table for language models of `family` ("causal" or "seq2seq"), or with a template, "chat".

    Raises:
        UsageError: an unknown task, preset or family.
    """
    row = find(find(PRESETS, preset, "preset"), task, "task")
    return find(row | {CHAT: TURNS[task]}, family, "family of language models")


def vqa_preset(preset: str, family: str) -> Wording:
    """Look up the `wording` of visual question answering."""
    return wording("vqa", preset, family)


@dataclass(frozen=True)
class Prompt:
    """A prompt in its parts, joined by spaces.

    Attributes:
        context: free text at the start, possibly empty.
        turns: earlier questions with their answers, the oldest first.
        instruction: the question, or the words that the model continues. It is never cut.
    """

    context: str
    turns: tuple[str, ...]
    instruction: str

    @property
    def text(self) -> str:
        return " ".join(part for part in (self.context, *self.turns, self.instruction) if part)

    def fit(self, count: Callable[[str], int], room: int) -> Prompt:
        """Cut the prompt from its start to at most `room` tokens, but never the instruction.

        The context loses words from its start until none is left; then the oldest turns are dropped. The instruction
        alone can still exceed `room`, which the caller must check.

        Args:
            count: a function that counts the tokens of a text.
        """
        starts = [0, *(word.start() for word in re.finditer(r"\S{1,16}", self.context))][1:]  # long words are split

        def context_from(place: int) -> Prompt:
            return replace(self, context=self.context[starts[place] :])

        def turns_from(place: int) -> Prompt:
            return Prompt("", self.turns[place:], self.instruction)

        if count(self.text) <= room:
            return self
        kept = bisect_left(range(len(starts)), True, key=lambda place: count(context_from(place).text) <= room)
        if kept < len(starts):
            return context_from(kept)
        last = len(self.turns)
        return turns_from(bisect_left(range(last), True, key=lambda place: count(turns_from(place).text) <= room))


def compose(
    question: str,
    task: str = "vqa",
    preset: str = "paper",
    family: str = "causal",
    context: str | None = None,
    history: Sequence[tuple[str, str]] | None = None,
) -> Prompt:
    """Compose the prompt of a task from its parts: [context] [earlier turns] instruction.

    After earlier turns a visual question is worded like them, as in the dialogues of LAVIS.

    Args:
        question: a cleaned question (see `data.texts`) or an instruction; ignored if the task takes none.
        task, preset, family: see `wording`.
        context: free text at the start, such as a fact or an OCR result.
        history: earlier (question, answer) pairs, the oldest first.

    Raises:
        UsageError: an unknown task, preset or family.
    """
    chosen = wording(task, preset, family)
    template = wording("dialogue", preset, family).template if history and task == "vqa" else chosen.template
    front = (context or "").strip()
    if front and chosen.context != "{}":
        front = chosen.context.format(front.removeprefix("Context:").strip().rstrip("."))
    turns = tuple(TURN.format(q, a.strip().rstrip(".")) for q, a in history or ())
    return Prompt(front, turns, template.format(question))


def vqa_prompt(
    question: str,
    preset: str = "paper",
    family: str = "causal",
    context: str | None = None,
    history: Sequence[tuple[str, str]] | None = None,
) -> str:
    """Compose the prompt of a visual question as a string; see `compose`."""
    return compose(question, "vqa", preset, family, context, history).text
