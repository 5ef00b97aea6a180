"""Prompts of a vision-language model: contexts, earlier turns and examples, and how much of them fits the positions.

Functions over a language model and a visual prefix; the methods of `VisionLanguageModel` call them.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from qformer.connectors.interleave import interleave, put_in_front
from qformer.llm.decoding import GenerateConfig
from qformer.llm.prompts import CHAT, Prompt, compose
from qformer.types import Tiles, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from qformer.connectors.base import Prefix
    from qformer.llm.base import LanguageModel

    Turn = tuple[str, str]  # a question and its answer
    Example = tuple[Tiles, str]  # one image, and the text that belongs to it
    AnsweredExample = tuple[Tiles, str, str]  # one image, a question and its answer
    WordedExample = tuple[Tiles, str, str | tuple[str, str]]  # and what is read, with a template as prompt and answer
    See = Callable[[Tiles, list[list[str]] | None], Prefix]  # `VisionLanguageModel.prefix`

ROWS = 64  # questions that are answered at once


def nest(questions: Sequence[str] | Sequence[Sequence[str]]) -> list[list[str]]:
    """One string per image, or a list of strings per image, as lists."""
    return [[asked] if isinstance(asked, str) else list(asked) for asked in questions]


def prompts_of_images(
    questions: list[list[str]],
    images: int,
    context: Sequence[str | None] | str | None,
    history: Sequence[Sequence[Turn]] | None,
    key: tuple[str, str, str],
) -> list[list[Prompt]]:
    """The prompts of each image.

    Args:
        key: task, preset and family, see `qformer.llm.prompts.wording`.

    Raises:
        UsageError: numbers of images, questions, contexts or histories that differ.
    """
    contexts = [context] * images if context is None or isinstance(context, str) else list(context)
    histories = [()] * images if history is None else list(history)
    for name, given in (("questions", questions), ("contexts", contexts), ("histories", histories)):
        if len(given) != images:
            raise UsageError(f"got {len(given)} {name} for {images} images; give one for each image")
    return [
        [compose(one, *key, told, turns) for one in asked]
        for asked, told, turns in zip(questions, contexts, histories, strict=True)
    ]


def fit(llm: LanguageModel, prompts: list[Prompt], visual: list[int], new: int) -> list[str]:
    """The prompts as texts that fit after `visual` tokens each and before `new` tokens; what is left out is warned of.

    Raises:
        UsageError: a question does not fit by itself.
    """
    fitting, signs, turns = [], 0, 0
    for prompt, tokens in zip(prompts, visual, strict=True):
        room = llm.room(tokens, new)
        kept = prompt if room is None else prompt.fit(llm.count_tokens, room)
        signs += len(prompt.context) - len(kept.context)
        turns += len(prompt.turns) - len(kept.turns)
        fitting.append(kept.text)
    if signs or turns:
        warnings.warn(
            f"{signs} characters from the start of the context and {turns} of the oldest turns were left out: "
            f"image, prompt and answer must fit the positions of this {llm.model.config.model_type} model",
            stacklevel=5,
        )
    return fitting


def reply(llm: LanguageModel, visual: Prefix, prompts: list[list[Prompt]], settings: dict[str, Any]) -> list[list[str]]:
    """A text for each of the prompts of each image.

    Args:
        visual: the prefix, a row for each prompt.
        settings: fields of `GenerateConfig`.

    Raises:
        UsageError: an unknown field, several texts for a prompt, or a question that does not fit.
    """
    config = GenerateConfig.of(settings)
    if config.num_return_sequences != 1:
        raise UsageError("num_return_sequences is for captions (`generate`); ask a question several times instead")
    flat = [prompt for asked in prompts for prompt in asked]
    config.check_draws(len(flat))
    fitting = fit(llm, flat, visual.mask.sum(dim=1).tolist(), config.max_new_tokens)
    texts: list[str] = []
    for start in range(0, len(fitting), ROWS):
        rows = slice(start, start + ROWS)
        own = settings if config.draws is None else settings | {"draws": config.of_rows(rows).draws}
        part = visual.select(rows)
        texts += llm.decode(llm.generate(*part, fitting[rows], **part.placing | own))
    answers = iter(texts)
    return [[next(answers) for _ in asked] for asked in prompts]


def see(
    llm: LanguageModel,
    prefix: See,
    tiles: Tiles,
    questions: list[list[str]] | None,
    examples: Sequence[Sequence[WordedExample]] | None,
) -> Prefix:
    """`prefix` of B images, or of each question of each, after the image's examples: image, question, text.

    Raises:
        UsageError: not one list of examples for each image, or an example of several images.
    """
    if examples is None or not any(examples):
        return prefix(tiles, questions)
    images, asked, rows = put_in_front(tiles, questions or [[""]] * len(tiles), examples)
    seen = prefix(images, asked)
    return interleave(llm, *seen, rows, seen.places)


def without_questions(
    llm: LanguageModel, examples: Sequence[Sequence[Example]] | None, prompts: Sequence[str]
) -> list[list[WordedExample]] | None:
    """Examples without a question for the Q-Former; with a template, the user says their row's prompt in them."""
    if examples is None:
        return None
    if not llm.chat:
        return [[(image, "", text) for image, text in shown] for shown in examples]
    if len(examples) != len(prompts):
        raise UsageError(f"got {len(examples)} lists of examples for {len(prompts)} images; give one for each image")
    return [
        [(image, "", (prompt, text)) for image, text in shown] for shown, prompt in zip(examples, prompts, strict=True)
    ]


def worded(
    examples: Sequence[Sequence[AnsweredExample]] | None, key: tuple[str, str, str]
) -> list[list[WordedExample]] | None:
    """Examples as image, question, and the text that is read: worded like what is asked, then the answer.

    Args:
        key: task, preset and family, see `qformer.llm.prompts.wording`.
    """
    if examples is None:
        return None

    def text(question: str, answer: str) -> str | tuple[str, str]:
        asked = compose(question, *key).text
        return (asked, answer) if key[2] == CHAT else f"{asked} {answer}"

    return [[(image, one, text(one, answer)) for image, one, answer in shown] for shown in examples]


def first_question(text: str) -> str:
    """Cut a generated text after its first question mark."""
    return text[: text.find("?") + 1] or text
