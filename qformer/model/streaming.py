"""Texts piece by piece while they are generated.

`generate` of transformers runs in a thread and hands over each token. Whoever reads the pieces may stop at any time:
the thread then ends at its next token, and is waited for.
"""

from __future__ import annotations

from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any

from transformers.generation.streamers import BaseStreamer

from qformer.model.decoding import GenerateConfig
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from qformer.model.llm import LanguageModel

UNFINISHED = "\ufffd"  # stands for the first bytes of a character


def stream(llm: LanguageModel, prefix: Tensor, mask: Tensor, prompt: str, options: dict[str, Any]) -> Iterator[str]:
    """Pieces of the text behind [visual][prompt], which together are what `generate` with these options gives.

    Args:
        prefix: float[1, M, L]. mask: bool[1, M].
        options: fields of `GenerateConfig`; one beam is the default.

    Raises:
        UsageError: several beams or texts, an unknown option, or a row longer than the positions of the model.
    """
    options = {"num_beams": 1, **options}
    if options["num_beams"] != 1 or options.get("num_return_sequences", 1) != 1:
        raise UsageError(
            "only one text can be streamed, without beams, whose words change until the end; "
            "leave num_beams and num_return_sequences out, or use generate"
        )
    GenerateConfig.of(options)
    return _pieces(llm, prefix, mask, prompt, options)


def _pieces(llm: LanguageModel, prefix: Tensor, mask: Tensor, prompt: str, options: dict[str, Any]) -> Iterator[str]:
    tokens = _Tokens()

    def work() -> None:
        try:
            llm.generate(prefix, mask, [prompt], streamer=tokens, **options)
            tokens.queue.put(None)
        except _Stopped:
            pass
        except BaseException as error:  # raised again where the pieces are read
            tokens.queue.put(error)

    thread = Thread(target=work, daemon=True)
    thread.start()
    ids: list[int] = []
    told = ""
    try:
        while (new := tokens.queue.get()) is not None:
            if isinstance(new, BaseException):
                raise new
            ids += new
            text = _settled(llm, ids)
            if len(text) > len(told) and text.startswith(told):
                yield text[len(told) :]
                told = text
        if rest := llm.decode([ids])[0][len(told) :]:
            yield rest
    finally:
        tokens.stopped = True
        thread.join()


def _settled(llm: LanguageModel, ids: list[int]) -> str:
    """What no further token will change: whole characters, and spaces only in front of something."""
    text = llm.decode([ids])[0].rstrip(UNFINISHED).rstrip()
    if getattr(llm.tokenizer, "clean_up_tokenization_spaces", False):  # `do n` may yet become `don't`
        return text.rpartition(" ")[0]
    return text


class _Stopped(Exception):
    """Nobody reads any more."""


class _Tokens(BaseStreamer):
    """Takes tokens from `generate` into a queue."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[list[int] | BaseException | None] = SimpleQueue()
        self.stopped = False
        self.started = False

    def put(self, value: Tensor) -> None:
        """Ids of a step, long[1]; those of the first call stand in front of the text."""
        if self.stopped:
            raise _Stopped
        if self.started:
            self.queue.put(value.flatten().tolist())
        self.started = True

    def end(self) -> None:
        pass
