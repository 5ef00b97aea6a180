"""The tabs Caption, Match and Search in Gradio, and what all tabs share. The logic is in `qformer.demo.finding`.

Every call of a model goes through the gate, one at a time; the queue in front of it is Gradio's, and visitors see their
position in it.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from qformer.demo import about, backend, finding, markup
from qformer.demo.limits import MAX_CONTEXT, MAX_QUESTION, NO_ROOM, is_full
from qformer.demo.shown import MOST_SHOWN, lacks, shown_by_browsers
from qformer.types import BadSample, TooLong, UsageError

if TYPE_CHECKING:
    from qformer.demo.about import Hints
    from qformer.demo.backend import Models
    from qformer.demo.server import Gate
    from qformer.model.vision_language import VisionLanguageModel

MORE = f"They follow the picture, {MOST_SHOWN} in all. A moving GIF is a clip here; in the box above it is a picture."
#: Options of events that need no model: they do not wait, and are not part of the API.
CONFIRM: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


def picture_box() -> gr.Image:
    """Make the component for a visitor's picture, not rendered yet."""
    looks: dict[str, Any] = {"label": "Picture", "show_label": False, "elem_id": "picture", "height": 340}
    uses: dict[str, Any] = {"sources": ["upload", "clipboard", "webcam"], "buttons": ["fullscreen"], "render": False}
    return gr.Image(type="filepath", image_mode=None, alt_text="Picture: your choice", **looks, **uses)


@dataclass
class Page:
    """Shared state of the tabs.

    Attributes:
        gate: the gate in front of the models. hints: texts of empty boxes. picture, more: what the tabs are about.
        keeps: browsers keep conversations. feedback: file for verdicts on answers, if they are wanted.
    """

    models: Models
    gate: Gate
    hints: Hints = about.PHOTOS
    keeps: bool = True
    feedback: Path | None = None
    picture: gr.Image = field(default_factory=picture_box)
    more: gr.Gallery | None = None
    tabs: gr.Tabs | None = None

    @property
    def files(self) -> list[Any]:
        """Components of the picture, and of further pictures and clips if a model takes them."""
        return [self.picture, *([] if self.more is None else [self.more])]

    def on(self, triggers: list[Any], function: Callable[..., Any], inputs: list[Any], outputs: Any, wait: Any) -> Any:
        """Register an event that calls a model; the component `wait` shows its progress."""
        return gr.on(triggers, function, inputs, outputs, **self.call(function, wait))

    def call(self, function: Callable[..., Any], wait: Any) -> dict[str, Any]:
        """Options of an event that calls a model. Values arrive unprocessed: `qformer.demo.backend` checks them."""
        return {
            "preprocess": False,
            "show_progress": "full",
            "show_progress_on": wait,
            "api_name": f"page_{function.__name__}",  # else it would take the name of an endpoint
            "api_visibility": "private",
        }

    def lacking(self, sentence: str) -> None:
        """Show a message in place of a tab."""
        gr.Markdown(sentence, elem_classes="lacking")


def sentence(error: Exception) -> str:
    """Text of an error for a visitor; unexpected ones are also logged on the server."""
    if isinstance(error, TooLong):
        return (
            "the question is too long for this model together with the picture and the words it may write; "
            "ask in fewer words, or choose a smaller number under Decoding, Longest"
        )
    if isinstance(error, UsageError | BadSample):
        return str(error)[:400]
    if is_full(error):
        return NO_ROOM
    traceback.print_exception(error)
    return f"something went wrong here ({type(error).__name__}, see the server's log); try again"


@contextmanager
def show_errors() -> Iterator[None]:
    """Raise errors as one sentence that Gradio shows."""
    try:
        yield
    except gr.Error:
        raise
    except Exception as error:
        text = escape(sentence(error), quote=False)
        raise gr.Error(text, duration=None, print_exception=False) from error


def in_place(function: Callable[..., str]) -> Callable[..., str]:
    """Let a function that returns HTML return an error as a line in that place."""

    @wraps(function)
    def returned(*args: Any) -> str:
        try:
            return function(*args)
        except Exception as error:
            return markup.fault(sentence(error))

    return returned


def more_box(model: VisionLanguageModel, name: str = "more") -> gr.Gallery:
    """Make the component for further pictures and clips; where the model is shown one picture alone, it says so."""
    why, no_clips = lacks(model), lacks(model, clips=True)
    with gr.Accordion("More pictures, or a clip", open=bool(why), elem_id=f"{name}-open"):
        told = f"{why[0].upper()}{why[1:]}." if why else MORE + (f" But {no_clips}." if no_clips else "")
        gr.Markdown(escape(told, quote=False))
        looks: dict[str, Any] = {
            "columns": 3,
            "height": 220,
            "object_fit": "contain",
            "interactive": True,
            "buttons": [],
        }
        kinds, shown = ["image"] if no_clips else ["image", "video"], not (why and no_clips)
        return gr.Gallery(file_types=kinds, label="More", elem_id=name, elem_classes="more", visible=shown, **looks)


def shared_boxes(page: Page) -> None:
    """Show the boxes of the files that all tabs are about; an unusable one is taken out, and why is told below."""
    page.picture.render()
    told = gr.HTML(elem_id="picture-told")
    page.picture.upload(_look_at_picture, [page.picture], [page.picture, told], preprocess=False, **CONFIRM)
    gr.on([page.picture.clear], lambda: "", None, [told], **CONFIRM)
    if page.models.asking is not None:
        page.more = more_box(page.models.asking)
        page.more.upload(_look_at_more, [page.more], [page.more, told], preprocess=False, **CONFIRM)


def _look_at_picture(picture: Any) -> tuple[Any, str]:
    try:
        path = path_of(picture)
        shown = None if path is None else shown_by_browsers(path)
    except Exception as error:
        return None, markup.fault(sentence(error))
    return (gr.skip() if shown == path else shown), ""


def _look_at_more(more: Any) -> tuple[Any, str]:
    try:
        for path in paths_of(more):
            shown_by_browsers(path)
    except Exception as error:
        return None, markup.fault(sentence(error))
    return gr.skip(), ""


def path_of(picture: Any) -> str | None:
    """Path of the file in an image component; Gradio has checked that it was uploaded here.

    Raises:
        UsageError: anything but a file, such as an address.
    """
    if picture is None:
        return None
    path = picture.get("path") if isinstance(picture, dict) else None
    if not isinstance(path, str) or not path:
        raise UsageError("the picture is not a file that was uploaded to this page; upload one")
    return path


def paths_of(more: Any) -> list[str]:
    """Paths of the files in a gallery component, or in a list of files; raises as `path_of` does."""
    files = [one.get("image") or one.get("video") or one if isinstance(one, dict) else "" for one in more or []]
    return [path for path in map(path_of, files) if path]


def caption_tab(page: Page) -> None:
    model = page.models.asking
    if model is None:
        page.lacking(backend.NO_ASKING)
        return
    with gr.Row():
        count = gr.Slider(1, finding.MOST_CAPTIONS, 5, step=1, label="Captions, at most", elem_id="caption-count")
        hints: dict[str, Any] = {"info": "Start of every caption", "placeholder": model.prompt or "a photo of"}
        prompt = gr.Textbox(label="Beginning (optional)", max_length=MAX_QUESTION, elem_id="caption-prompt", **hints)
    with gr.Accordion("Decoding", open=False):
        top_p = gr.Slider(0.05, 1, 0.9, step=0.05, label="Nucleus: top p")
        temperature = gr.Slider(0.1, 2, 1, step=0.1, label="Nucleus: temperature")
    button = gr.Button("Write captions", variant="primary", elem_id="caption-go")
    said = gr.HTML(elem_id="captions", min_height=60)
    gr.Markdown(
        "One caption by beam search, the others by sampling. Score: the mean log-likelihood of a token; the bar is its "
        "exponential."
    )

    @in_place
    def write(request: gr.Request, picture: Any, *rest: Any) -> str:
        values = (path_of(picture), *rest[:-1], paths_of(rest[-1]))
        return markup.caption_bars(page.gate.run(finding.captions, model, *values, request=request))

    inputs = [page.picture, count, prompt, top_p, temperature, page.more]
    page.on([button.click, prompt.submit], write, inputs, [said], said)


def match_tab(page: Page) -> None:
    model = page.models.matching
    if model is None:
        page.lacking(backend.NO_MATCHING)
        return
    size: dict[str, Any] = {"lines": 4, "max_lines": 12, "max_length": MAX_CONTEXT}
    told: dict[str, Any] = {"placeholder": page.hints.texts, "info": "Shift+Enter compares", "elem_id": "match-texts"}
    texts = gr.Textbox(label="Texts, one per line", **size, **told)
    button = gr.Button("Compare", variant="primary", elem_id="match-go")
    said = gr.HTML(elem_id="matches", min_height=60)
    gr.Markdown("ITM: the probability that text and picture match. ITC: the cosine of both.")

    @in_place
    def compare(request: gr.Request, picture: Any, texts: Any) -> str:
        return markup.match_bars(page.gate.run(finding.match, model, path_of(picture), texts, request=request))

    page.on([button.click, texts.submit], compare, [page.picture, texts], [said], said)
