"""The API of the page: the functions of its tabs under stable names, for `gradio_client` (docs/demo.md).

/ask /suggest /caption /match /search /look /slices. They keep no state: a client sends the conversation with each call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import gradio as gr

from qformer.demo import backend, finding, guard
from qformer.demo.backend import Decoding
from qformer.demo.tabs import Page, path_of, paths_of, show_errors
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

HIT = ("name", "where", "caption", "score", "itc", "itm", "fault")  # of a hit
EXAMPLE = "picture.png"  # in the snippets of the page


def endpoints(page: Page) -> None:
    """Register the functions; those without a model reply with the message of their tab."""
    _endpoint(
        "ask",
        _ask(page),
        [_image(), _text("question"), _text("context"), _text("task", "vqa"), *_json("history", "decoding"), _files()],
        _text("answer"),
    )
    _endpoint(
        "suggest",
        _suggest(page),
        [_image(), _text("context"), _files()],
        gr.JSON(label="question and answer", visible=False),
    )
    _endpoint(
        "caption",
        _caption(page),
        [_image(), _number("count", 5), _text("prompt"), _number("top_p", 0.9), _number("temperature", 1), _files()],
        gr.JSON(label="captions", visible=False),
    )
    _endpoint("match", _match(page), [_image(), *_json("texts")], gr.JSON(label="matches", visible=False))
    _endpoint(
        "search",
        _search(page),
        [_text("text"), _image(), _number("k", 8), _number("shortlist", 64)],
        gr.JSON(label="hits", visible=False),
    )
    look = [
        gr.Image(label="queries", visible=False),
        gr.Image(label="relevance", visible=False),
        gr.JSON(label="answer and tokens", visible=False),
    ]
    _endpoint("look", _look(page), [_image(), _text("question"), _text("answer"), *_json("token")], look)
    _endpoint(
        "slices",
        _slices(page),
        [_image()],
        [gr.Gallery(label="pictures", visible=False), gr.JSON(label="numbers", visible=False)],
    )

    # The guard replaces refused calls by this one, so that the page and its clients show the reason.
    refuse = gr.Button(visible=False)
    refuse.click(_refuse, [_text("reason")], None, api_name=guard.REFUSAL, api_visibility="private")


def _refuse(reason: str) -> None:
    with show_errors():
        raise UsageError(reason)


def _endpoint(name: str, function: Callable[..., Any], inputs: list[Any], outputs: Any) -> None:
    """Register one function under its parameter names; values reach it unprocessed."""
    gr.Button(visible=False).click(
        function, inputs, outputs, preprocess=False, api_name=name, api_description=function.__doc__
    )


def _image() -> gr.Image:
    box = gr.Image(type="filepath", image_mode=None, label="Picture", visible=False)
    example = {"path": EXAMPLE, "url": EXAMPLE, "meta": {"_type": "gradio.FileData"}}
    setattr(box, "example_payload", lambda: example)  # noqa: B010 - Gradio's is an address, which is not fetched
    return box


def _files() -> gr.File:
    box = gr.File(file_count="multiple", label="more", elem_classes=guard.ADDED, visible=False)
    setattr(box, "example_payload", list)  # noqa: B010
    return box


def _text(label: str, value: str = "") -> gr.Textbox:
    return gr.Textbox(value, label=label.capitalize(), visible=False)


def _number(label: str, value: float) -> gr.Number:
    return gr.Number(value, label=label, visible=False)


def _json(*labels: str) -> list[gr.JSON]:
    return [gr.JSON(None, label=label, visible=False) for label in labels]


def _needed(model: Any, sentence: str) -> Any:
    if model is None:
        raise UsageError(sentence)
    return model


def _ask(page: Page) -> Callable[..., Any]:
    def ask(
        request: gr.Request,
        image: Any,
        question: Any,
        context: Any = "",
        task: Any = "vqa",
        history: Any = None,
        decoding: Any = None,
        more: Any = None,
    ) -> Iterator[str]:
        """Yield the growing answer; history: [question, answer] pairs; decoding, and more files: see docs/demo.md."""
        with show_errors():
            model = _needed(page.models.asking, backend.NO_ASKING)
            values = (question, context, history, task, Decoding.of(decoding), paths_of(more))
            asked = backend.prepare(model, path_of(image), *values)
            with page.gate.running(request), closing(backend.answer(model, asked)) as texts:
                yield from texts

    return ask


def _suggest(page: Page) -> Callable[..., Any]:
    def suggest(request: gr.Request, image: Any, context: Any = "", more: Any = None) -> dict[str, str]:
        """Draw a question of the model's own, and its answer."""
        with show_errors():
            model = _needed(page.models.asking, backend.NO_ASKING)
            values = (path_of(image), context, paths_of(more))
            question, answer = page.gate.run(backend.suggest, model, *values, request=request)
            return {"question": question, "answer": answer}

    return suggest


def _caption(page: Page) -> Callable[..., Any]:
    def caption(
        request: gr.Request,
        image: Any,
        count: Any = 5,
        prompt: Any = "",
        top_p: Any = 0.9,
        temperature: Any = 1,
        more: Any = None,
    ) -> list[dict[str, Any]]:
        """Write captions, the likeliest first, each with the mean log-likelihood of its tokens."""
        with show_errors():
            model = _needed(page.models.asking, backend.NO_ASKING)
            values = (path_of(image), count, prompt, top_p, temperature, paths_of(more))
            return [asdict(one) for one in page.gate.run(finding.captions, model, *values, request=request)]

    return caption


def _match(page: Page) -> Callable[..., Any]:
    def match(request: gr.Request, image: Any, texts: Any) -> list[dict[str, Any]]:
        """Rank texts (a list), the best first, each with the cosine of ITC and the probability of ITM."""
        with show_errors():
            model = _needed(page.models.matching, backend.NO_MATCHING)
            return [asdict(one) for one in page.gate.run(finding.match, model, path_of(image), texts, request=request)]

    return match


def _search(page: Page) -> Callable[..., Any]:
    def search(
        request: gr.Request, text: Any = "", image: Any = None, k: Any = 8, shortlist: Any = 64
    ) -> dict[str, list[dict[str, Any]]]:
        """Find hits by ITC, and re-ranked by ITM."""
        with show_errors():
            retriever = _needed(page.models.retriever, backend.NO_GALLERY)
            values = (text, path_of(image), k, shortlist)
            lists = page.gate.run(finding.search, retriever, *values, request=request)
            first, second = ([{key: getattr(one, key) for key in HIT} for one in hits] for hits in lists)
            return {"itc": first, "reranked": second}

    return search


def _look(page: Page) -> Callable[..., Any]:
    def look(
        request: gr.Request, image: Any, question: Any = "", answer: Any = "", token: Any = None
    ) -> tuple[Any, Any, dict[str, Any]]:
        """Draw the attention of each query and, with a question, the relevance for the answer (or one token of it)."""
        with show_errors():
            path = path_of(image)
            sheet = page.gate.run(finding.queries, page.models.looking, path, request=request)
            if not question:
                return sheet, None, {}
            model = _needed(page.models.asking, backend.NO_ASKING)
            found = page.gate.run(finding.relevance, model, path, question, answer, token, request=request)
            return sheet, found.picture, {"answer": found.answer, "tokens": found.tokens}

    return look


def _slices(page: Page) -> Callable[..., Any]:
    def slices(request: gr.Request, image: Any) -> tuple[list[Any], list[dict[str, Any]]]:
        """Draw the tiles of each strategy on the picture, with its numbers."""
        with show_errors():
            found = page.gate.run(finding.slices, page.models.looking, path_of(image), request=request)
            pictures = [(drawn, name) for drawn, name, _ in found]
            return pictures, [{"strategy": name, **numbers} for _, name, numbers in found]

    return slices
