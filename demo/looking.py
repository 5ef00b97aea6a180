"""The tab Look in Gradio: attention of the queries, relevance for an answer, and slices (`demo/look.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import gradio as gr

from qformer.demo import browser, finding, look, markup
from qformer.demo.backend import prepare
from qformer.demo.limits import MAX_QUESTION, open_picture
from qformer.demo.tabs import Page, in_place, path_of, sentence

SHEET = "Where each query looks: cross-attention, averaged over heads and layers"
METHOD = (
    "Integrated gradients (Sundararajan et al., arXiv:1703.01365) at the image tokens: what each patch adds to the "
    "log-probability of the answer, or of one of its words, from a blank picture to this one. Point at a word, or "
    "choose it, to see its map."
)


def look_tab(page: Page) -> None:
    """Build the tab and its events."""
    if page.models.asking is not None:
        asking = _asking_boxes(page)
        explain = gr.Button("Show what the answer is based on", variant="primary", elem_id="look-explain")
        relevance = gr.HTML(elem_id="look-relevance", js_on_load=browser.SAVE_PICTURE, min_height=40)
        gr.Markdown(METHOD, elem_classes="method")
        triggers = [explain.click, *(box.submit for box in asking)]
        page.on(triggers, _make_explain(page), [page.picture, *asking], [relevance], relevance)
    draw = partial(markup.figure, caption=SHEET, wide=True)
    for name, label, find, shown in (
        ("queries", "Show where each query looks", finding.queries, draw),
        ("slices", "Show how strategies slice it", finding.slices, markup.slice_cards),
    ):
        button = gr.Button(label, elem_id=f"look-{name}")
        box = gr.HTML(elem_id=f"look-{name}-shown", js_on_load=browser.SAVE_PICTURE, min_height=40)
        page.on([button.click], _show(page, find, shown), [page.picture], [box], box)


def _asking_boxes(page: Page) -> list[gr.Textbox]:
    boxes = (
        ("question", "Question", page.hints.question, None),
        ("second", "Second question, to compare (optional)", "", None),
        ("answer", "Answer to explain (optional)", "", "Empty: the model's own answer"),
    )
    sizes: dict[str, Any] = {"max_length": MAX_QUESTION, "max_lines": 4, "min_width": 200}
    with gr.Row():
        return [
            gr.Textbox(label=label, placeholder=hint, info=info, elem_id=f"look-{name}", **sizes)
            for name, label, hint, info in boxes
        ]


def _make_explain(page: Page) -> Callable[..., Iterator[str]]:
    """Make the function that explains one answer, or two: each whole at first, and then its words."""
    model = page.models.asking
    assert model is not None

    def explain(request: gr.Request, picture: Any, question: Any, second: Any, answer: Any) -> Iterator[str]:
        shown: list[tuple[str, str, list[tuple[str, Any]]]] = []
        try:
            path = path_of(picture)
            with page.gate.running(request):
                for asked in [question, second] if second else [question]:
                    found = finding.relevance(model, path, asked, answer)
                    shown.append((asked, found.answer, [(found.answer, found.picture)]))
                    yield markup.explained(shown)
                    words = look.words(found.answer, found.tokens)[: markup.MOST_WORDS]
                    opened, read = open_picture(path), prepare(model, path, asked).question
                    for word, numbers in words if len(words) > 1 else []:
                        heat = look.answer_relevance(model, opened, read, found.answer, numbers)[1]
                        shown[-1][2].append((word, look.overlay(opened, heat)))
                    yield markup.explained(shown)
        except Exception as error:
            yield (markup.explained(shown) if shown else "") + markup.fault(sentence(error))

    return explain


def _show(page: Page, find: Callable[..., Any], draw: Callable[[Any], str]) -> Callable[..., str]:
    @in_place
    def show(request: gr.Request, picture: Any) -> str:
        return draw(page.gate.run(find, page.models.looking, path_of(picture), request=request))

    return show
