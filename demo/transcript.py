"""A conversation about a picture: how it travels between browser and server, and how it is kept as a file.

The server keeps no conversation. The browser holds it as a text (`Conversation.text`) and sends it with each question.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from qformer.data.texts import MAX_WORDS
from qformer.demo.browser import FILES
from qformer.demo.limits import check_text, parts
from qformer.figures.page import ENVIRONMENT, data_uri
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

SIDE = 640  # pixels of the picture in a transcript, at most
MOST_TURNS, MOST_BYTES = 50, 400_000  # turns, and bytes in a request, of a conversation; the oldest turns go first
BUSY = ("waiting", "writing")
UNREADABLE = "the conversation that the browser sent cannot be read; clear it and begin anew"
PAGE = ENVIRONMENT.from_string((FILES / "transcript.html").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Turn:
    """A question with its answer.

    Attributes:
        question: as it was typed. read: as the model reads it; empty for a caption.
        prompt: exact text after the image. options: of the decoding. suggested: the model asked the question itself.
        stopped: the visitor stopped the answer. cut: the start of the context or the oldest turns did not fit.
        error: sentence in place of an answer. state: `waiting`, `writing`, or empty when it is over.
        liked: the visitor's verdict: `yes`, `no` or empty.
    """

    question: str
    answer: str = ""
    context: str = ""
    task: str = "vqa"
    prompt: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    suggested: bool = False
    stopped: bool = False
    read: str = ""
    cut: bool = False
    error: str = ""
    state: str = ""
    liked: str = ""

    @property
    def notes(self) -> list[str]:
        """Remarks below the question."""
        context = [f"context: {self.context}"] if self.context else []
        cut = ["the beginning of the context or of the conversation was left out, because it is too long"] * self.cut
        if len(self.read.split(" ")) == MAX_WORDS < len(self.question.split()):
            cut.append(f"only the first {MAX_WORDS} words of the question were read, as in training")
        return context + cut + ["asked by the model itself"] * self.suggested + ["stopped"] * self.stopped


@dataclass(frozen=True)
class Conversation:
    """Turns of a conversation about the files of one row: a picture or none, and further pictures and clips.

    Attributes:
        editing: the next question takes the place of the last one.
    """

    picture: str | None = None
    more: tuple[str, ...] = ()
    turns: tuple[Turn, ...] = ()
    editing: bool = False

    @classmethod
    def of(cls, sent: Any) -> Conversation:
        """Read what a browser sent; nothing is an empty conversation.

        Raises:
            UsageError: something that no page of ours has sent.
        """
        text = check_text("conversation", sent, 4 * MOST_BYTES)
        try:
            found = json.loads(text or "{}")
            list(parts(found))  # checks the depth, since a text in a request may be nested deeper than the request
            turns = tuple(_turn(**turn) for turn in found.get("turns", [])[-MOST_TURNS:])
            picture, more = found.get("picture"), tuple(found.get("more", []))
        except (ValueError, TypeError, AttributeError, RecursionError, UsageError) as error:
            raise UsageError(UNREADABLE) from error
        if not all(isinstance(path, str) for path in (picture or "", *more)):
            raise UsageError(UNREADABLE)
        return cls(picture, more, turns, found.get("editing") is True)

    @property
    def text(self) -> str:
        """Form in which it travels; without `<`, so that nobody takes it for HTML."""
        return json.dumps(asdict(self), ensure_ascii=False).replace("<", "\\u003c") if self.turns else ""

    @property
    def is_busy(self) -> bool:
        return bool(self.turns) and self.turns[-1].state in BUSY

    def about(self, picture: str | None, more: Sequence[str]) -> Conversation:
        """Continue the conversation, or begin a new one if these are other files."""
        shown = picture, tuple(more)
        return self if shown == (self.picture, self.more) else Conversation(*shown)

    def and_then(self, turn: Turn) -> Conversation:
        """Add a turn, in place of the last one if that is edited."""
        turns = (*(self.turns[:-1] if self.editing else self.turns), turn)[-MOST_TURNS:]
        whole = replace(self, turns=turns, editing=False)
        while len(whole.turns) > 1 and len(json.dumps(whole.text, ensure_ascii=False).encode()) > MOST_BYTES:
            whole = replace(whole, turns=whole.turns[1:])
        return whole

    def with_last(self, **changes: Any) -> Conversation:
        """Change the last turn."""
        return replace(self, turns=(*self.turns[:-1], replace(self.turns[-1], **changes)))

    def settled(self, error: str = "") -> Conversation:
        """End a turn that waits or is written: stopped, or with an error where there is no answer yet."""
        if not self.is_busy:
            return self
        failed = error if not self.turns[-1].answer else ""
        return self.with_last(state="", stopped=not failed, error=failed)

    def history(self) -> list[tuple[str, str]]:
        """Questions as the model reads them, and its answers."""
        return [(turn.read, turn.answer) for turn in self.turns if turn.read and turn.answer and not turn.error]


def _turn(**sent: Any) -> Turn:
    """Check a turn of an untrusted browser; raises `TypeError` at values of other types."""
    turn = Turn(**sent)
    for one in fields(Turn):
        if type(getattr(turn, one.name)) is not {"str": str, "bool": bool}.get(str(one.type), dict):
            raise TypeError(one.name)
    return turn


def as_json(model: str, turns: Sequence[Turn], *pictures: Image.Image) -> str:
    """The conversation, the model's name, and the pictures as data URIs: `picture`, and further ones as `more`."""
    shown = [data_uri(one, SIDE) for one in pictures]
    told = [{key: value for key, value in asdict(turn).items() if key != "state"} for turn in turns]
    record = {"model": model, "picture": shown[0] if shown else None, "turns": told}
    return json.dumps(record | ({"more": shown[1:]} if shown[1:] else {}), ensure_ascii=False, indent=1)


def as_html(model: str, turns: Sequence[Turn], *pictures: Image.Image) -> str:
    """The conversation as one HTML file with the pictures inside."""
    return PAGE.render(model=model, turns=turns, pictures=[data_uri(one, SIDE) for one in pictures])
