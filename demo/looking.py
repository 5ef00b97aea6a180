"""The tab Look in Gradio: attention of the queries, relevance for an answer, and slices (`demo/look.py`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import gradio as gr

from qformer.demo import finding, markup
from qformer.demo.limits import MAX_QUESTION
from qformer.demo.tabs import CONFIRM, Page, path_of, picture_box, show_errors
from qformer.types import UsageError

ALL = "the whole answer"
SHEET = "Where each query looks: cross-attention, averaged over heads and layers"
METHOD = (
    "Integrated gradients (Sundararajan et al., arXiv:1703.01365) at the image tokens: what each patch adds to the "
    "log-probability of the answer, from a blank picture to this one"
)


def look_tab(page: Page) -> None:
    """Build the tab and its events."""
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            picture = picture_box("look-picture")
        with gr.Column(scale=3, min_width=300):
            status = gr.Markdown("Choose a picture, then a view.", elem_id="look-status")
            queries = gr.Button("Show where each query looks", variant="primary", elem_id="look-queries")
            cut = gr.Button("Show how strategies slice it", elem_id="look-slices")
            asking = [] if page.models.asking is None else _asking_boxes()
    queries_shown = gr.HTML(elem_id="look-sheet")
    with gr.Row():
        with gr.Column(min_width=300):
            relevance = gr.HTML(elem_id="look-relevance")
        with gr.Column(min_width=300):
            token = gr.Radio(
                [], label="Token of the answer", info=METHOD, elem_id="look-token", visible=False, min_width=300
            )
    tiles = gr.HTML(elem_id="look-tiles")
    draw = partial(markup.figure, caption=SHEET, wide=True)
    page.on([queries.click], _show(page, finding.queries, draw), [picture], [queries_shown], status)
    page.on([cut.click], _show(page, finding.slices, markup.slice_cards), [picture], [tiles], status)
    if asking:
        _explaining(page, picture, asking, status, relevance, token)
    shown = [queries_shown, relevance, tiles, token]
    picture.change(lambda: ["", "", "", gr.update(visible=False)], None, shown, **CONFIRM)


def _asking_boxes() -> list[Any]:
    return [
        gr.Textbox(
            label="Question", placeholder="what color is the star?", max_length=MAX_QUESTION, elem_id="look-question"
        ),
        gr.Textbox(
            label="Answer to explain (optional)",
            info="Empty: the model's own answer",
            max_length=MAX_QUESTION,
            elem_id="look-answer",
        ),
        gr.Button("Show what the answer is based on", elem_id="look-explain"),
    ]


def _explaining(
    page: Page, picture: gr.Image, asking: list[Any], status: gr.Markdown, relevance: gr.HTML, token: gr.Radio
) -> None:
    """Add the events that explain an answer."""
    model = page.models.asking
    assert model is not None
    question, answer, button = asking

    def explain(request: gr.Request, picture: Any, question: Any, answer: Any) -> tuple[Any, Any, Any]:
        with show_errors():
            found = page.gate.run(finding.relevance, model, path_of(picture), question, answer, request=request)
            choices = [(text.strip() or "(space)", str(number)) for number, text in enumerate(found.tokens)]
            return (
                markup.figure(found.picture, f"What the answer “{found.answer}” is based on"),
                gr.update(choices=[ALL, *choices], value=ALL, visible=True),
                found.answer,
            )

    def of_token(request: gr.Request, picture: Any, question: Any, answer: Any, token: Any) -> Any:
        with show_errors():
            if token != ALL and not (isinstance(token, str) and token.isdecimal() and len(token) < 5):
                raise UsageError("the token is not part of the answer; choose one of those shown")
            chosen = None if token == ALL else int(token)
            found = page.gate.run(finding.relevance, model, path_of(picture), question, answer, chosen, request=request)
            part = "answer" if chosen is None else f"token “{found.tokens[chosen].strip()}” of the answer"
            return markup.figure(found.picture, f"What the {part} “{found.answer}” is based on".replace("  ", " "))

    inputs = [picture, question, answer]
    explained = gr.State("")
    page.on([button.click, question.submit, answer.submit], explain, inputs, [relevance, token, explained], status)
    page.on([token.input], of_token, [picture, question, explained, token], [relevance], relevance)


def _show(page: Page, find: Callable[..., Any], draw: Callable[[Any], str]) -> Callable[..., str]:
    def show(request: gr.Request, picture: Any) -> str:
        with show_errors():
            return draw(page.gate.run(find, page.models.looking, path_of(picture), request=request))

    return show
