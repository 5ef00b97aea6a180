"""The tabs Caption, Match and Search in Gradio, and parts that all tabs share. The logic is in `qformer.demo.finding`.

Every call of a model goes through the gate, one at a time; the queue in front of it is Gradio's, and visitors see their
position in it.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import gradio as gr

from qformer.demo import backend, finding, markup
from qformer.demo.limits import MAX_CONTEXT, MAX_QUESTION
from qformer.demo.shown import MOST_SHOWN, lacks
from qformer.types import BadSample, UsageError

if TYPE_CHECKING:
    from qformer.demo.backend import Models
    from qformer.demo.server import Gate
    from qformer.model.vision_language import VisionLanguageModel

MORE = f"They follow the picture, {MOST_SHOWN} in all. A moving GIF is a clip here; in the box above it is a picture."
#: Options of events that need no model: they do not wait, and are not part of the API.
CONFIRM: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


@dataclass
class Page:
    """Shared state of the tabs: the models, and the gate in front of them."""

    models: Models
    gate: Gate

    def on(self, triggers: list[Any], function: Callable[..., Any], inputs: list[Any], outputs: Any, wait: Any) -> Any:
        """Register an event that calls a model; the component `wait` shows its progress.

        Values arrive unprocessed: `qformer.demo.backend` checks them.
        """
        return gr.on(
            triggers,
            function,
            inputs,
            outputs,
            preprocess=False,
            show_progress="full",
            show_progress_on=wait,
            api_name=f"page_{function.__name__}",  # else it would take the name of an endpoint
            api_visibility="private",
        )

    def lacking(self, sentence: str) -> None:
        """Show a message in place of a tab."""
        gr.Markdown(sentence, elem_classes="lacking")


@contextmanager
def show_errors() -> Iterator[None]:
    """Show errors in the page as one sentence; unexpected ones are also logged on the server."""
    try:
        yield
    except (UsageError, BadSample) as error:
        raise gr.Error(escape(str(error)[:400], quote=False), duration=None, print_exception=False) from error
    except gr.Error:
        raise
    except Exception as error:
        traceback.print_exc()
        message = f"something went wrong here ({type(error).__name__}, see the server's log); try again"
        raise gr.Error(message, duration=None, print_exception=False) from error


def picture_box(name: str, label: str = "Picture") -> gr.Image:
    """Make the component for a visitor's picture."""
    return gr.Image(
        type="filepath",
        image_mode=None,
        label=label,
        elem_id=name,
        height=340,
        sources=["upload", "clipboard", "webcam"],
        buttons=["fullscreen"],
        alt_text=f"{label}: your choice",
    )


def more_box(model: VisionLanguageModel, name: str) -> gr.Gallery:
    """Make the component for further pictures and clips; where the model is shown one picture alone, it says so."""
    why, no_clips = lacks(model), lacks(model, clips=True)
    with gr.Accordion("More pictures, or a clip", open=bool(why), elem_id=f"{name}-open"):
        told = f"{why[0].upper()}{why[1:]}." if why else MORE + (f" But {no_clips}." if no_clips else "")
        gr.Markdown(escape(told, quote=False))
        return gr.Gallery(
            file_types=["image"] if no_clips else ["image", "video"],
            label="More",
            elem_id=name,
            elem_classes="more",
            columns=3,
            height=220,
            object_fit="contain",
            interactive=True,
            buttons=[],
            visible=not (why and no_clips),
        )


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
        with gr.Column(min_width=300):
            picture = picture_box("caption-picture")
            more = more_box(model, "caption-more")
        with gr.Column(min_width=300):
            count = gr.Slider(1, finding.MOST_CAPTIONS, 5, step=1, label="Captions, at most", elem_id="caption-count")
            prompt = gr.Textbox(
                label="Beginning (optional)",
                info="Start of every caption",
                placeholder=model.prompt or "a photo of",
                max_length=MAX_QUESTION,
                elem_id="caption-prompt",
            )
            with gr.Accordion("Decoding", open=False):
                top_p = gr.Slider(0.05, 1, 0.9, step=0.05, label="Nucleus: top p")
                temperature = gr.Slider(0.1, 2, 1, step=0.1, label="Nucleus: temperature")
            button = gr.Button("Write captions", variant="primary", elem_id="caption-go")
            gr.Markdown(
                "One caption by beam search, the others by sampling. Score: the mean log-likelihood of a token; the "
                "bar is its exponential."
            )
            said = gr.HTML(elem_id="captions", min_height=120)

    def write(request: gr.Request, picture: Any, *rest: Any) -> str:
        with show_errors():
            values = (path_of(picture), *rest[:-1], paths_of(rest[-1]))
            return markup.caption_bars(page.gate.run(finding.captions, model, *values, request=request))

    inputs = [picture, count, prompt, top_p, temperature, more]
    page.on([button.click, prompt.submit], write, inputs, [said], said)


def match_tab(page: Page) -> None:
    model = page.models.matching
    if model is None:
        page.lacking(backend.NO_MATCHING)
        return
    with gr.Row():
        with gr.Column(min_width=300):
            picture = picture_box("match-picture")
        with gr.Column(min_width=300):
            texts = gr.Textbox(
                label="Texts, one per line",
                placeholder="a red square left of a blue circle\na green star\ntwo yellow triangles",
                lines=5,
                max_lines=12,
                max_length=MAX_CONTEXT,
                info="Shift+Enter compares",
                elem_id="match-texts",
            )
            button = gr.Button("Compare", variant="primary", elem_id="match-go")
            gr.Markdown("ITM: the probability that text and picture match. ITC: the cosine of both.")
            said = gr.HTML(elem_id="matches", min_height=120)

    def compare(request: gr.Request, picture: Any, texts: Any) -> str:
        with show_errors():
            return markup.match_bars(page.gate.run(finding.match, model, path_of(picture), texts, request=request))

    page.on([button.click, texts.submit], compare, [picture, texts], [said], said)
