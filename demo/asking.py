"""The tab Ask in Gradio: a conversation about a picture. Its logic is in `qformer.demo.backend`.

A question is first put into the conversation, at once, and then waits for its answer; both travel as text between
browser and server (`qformer.demo.transcript`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import gradio as gr

from qformer.demo import backend, browser, markup
from qformer.demo.backend import METHODS, PRESETS, Decoding
from qformer.demo.limits import MAX_CONTEXT, MAX_QUESTION, check_text
from qformer.demo.shown import stills_of
from qformer.demo.tabs import CONFIRM, Page, path_of, paths_of, sentence, show_errors
from qformer.demo.transcript import SIDE, Conversation, Turn, as_html, as_json
from qformer.files.records import append_record
from qformer.llm.decoding import GenerateConfig
from qformer.llm.prompts import wording
from qformer.types import UsageError

if TYPE_CHECKING:
    from qformer.model.vision_language import VisionLanguageModel

CONTEXT = "Text before the question, true or not"
NO_PICTURE = "there is no picture yet; choose, drop or paste one"
NO_ANSWER = "no answer came, since the page was busy or the connection broke; press Retry"
DECODING = {
    "Beam search: the likeliest text, as in the paper; it appears all at once": "beams",
    "Greedy: the likeliest word each time, word by word": "greedy",
    "Nucleus sampling: a random text each time, word by word": "nucleus",
}
assert set(DECODING.values()) == set(METHODS)
EMPTY = markup.talk(Conversation())
NOTHING = f"() => [{json.dumps(EMPTY)}, '', '']"  # in the browser, since the next question may come before a reply
#: Options of events without a model, whose values `qformer.demo.transcript` checks.
QUICK: dict[str, Any] = {**CONFIRM, "preprocess": False}
MAX_VERDICT, MAX_FEEDBACK = 200_000, 200_000_000  # bytes of a verdict with its turn, and of the file of all of them
OPTIONS = ("method", *backend.LIMITS)


def ask_boxes(page: Page) -> list[gr.Textbox]:
    """Make the boxes of question and context, which the examples fill; the tab renders them."""
    box: dict[str, Any] = {"lines": 1, "max_lines": 6, "render": False}
    bare: dict[str, Any] = {"show_label": False, "container": False, "scale": 1, "min_width": 120}
    question = gr.Textbox(label="Question", placeholder=page.hints.question, elem_id="question", **bare, **box)
    hint = page.hints.context
    context = gr.Textbox(label="Context (optional)", placeholder=hint, info=CONTEXT, elem_id="context", **box)
    return [question, context]


def ask_tab(page: Page, boxes: list[gr.Textbox]) -> None:
    """Build the tab and its events, inside a `gr.Blocks`."""
    model = page.models.asking
    if model is None:
        page.lacking(backend.NO_ASKING)
        return
    question, context = boxes
    talk = gr.Textbox(visible="hidden", elem_id="talk", label="The conversation, as text")
    with gr.Column(elem_classes="asks"):
        with gr.Column(elem_id="chat"):
            said = gr.HTML(EMPTY, elem_id="said", js_on_load=browser.TALK, apply_default_css=False)
            place = gr.HTML(elem_id="place")
        with gr.Row(elem_id="question-row"):
            question.render()
            ask = gr.Button("Ask", variant="primary", elem_id="ask", min_width=70)
            stop = gr.Button("Stop", variant="stop", elem_id="stop", min_width=70)
        with gr.Row():
            suggest = gr.Button("Suggest a question", elem_id="suggest", size="sm", min_width=150)
            clear = gr.Button("Clear", elem_id="clear", size="sm", min_width=150)
            save_json = gr.Button("Save as JSON", elem_id="save-json", size="sm", min_width=150)
            save_html = gr.Button("Save as HTML", elem_id="save-html", size="sm", min_width=150)
        context.render()
        preset = gr.Dropdown(list(PRESETS.items()), value="vqa", label="What to write", elem_id="preset")
        decoding = _decoding_boxes(model)
        with gr.Accordion("The exact prompt", open=False, elem_id="prompt"):
            prompt = gr.Textbox(label="Sent with the last question", lines=2, interactive=False, buttons=["copy"])
        made = gr.JSON(visible="hidden")
    files = page.files
    outputs, asked = [said, talk, prompt], [*files, question, context, preset, talk]
    put, answer = _make_put(page), _make_answer(page, model)
    puts = [
        gr.on([ask.click, question.submit, context.submit], put, asked, [question, *outputs], **QUICK),
        suggest.click(_make_put(page, suggested=True), asked, [question, *outputs], **QUICK),
        said.retry(_make_again(page), [talk], [question, *outputs], **QUICK),
    ]
    events = []
    for one in puts:
        one.then(None, None, None, js=browser.ASKED, **CONFIRM)
        events.append(one.success(answer, [*files, *decoding, talk], outputs, **page.call(answer, place)))
        events[-1].failure(_make_settle(page, NO_ANSWER), [talk], [said, talk], js=browser.UNLESS_STOPPED, **QUICK)
    _stop(page, stop, said, talk, events)
    gr.on([clear.click, page.picture.clear], None, None, outputs, js=NOTHING, cancels=events, **CONFIRM)
    # Must not cancel: a visitor who asks at once has begun the new conversation before this event arrives.
    begin = browser.NEW_PICTURE.replace("NOTHING", json.dumps(EMPTY))
    changes = [one.change for one in files]
    gr.on(changes, None, [*files, talk, said, prompt], [talk, said, prompt], js=begin, **QUICK)
    said.edit(_make_edit(page), [talk], [question, context, said, talk], **QUICK).then(
        None, None, None, js=browser.FOCUS_TO_EDIT, **CONFIRM
    )
    if page.feedback is not None:
        said.like(_make_like(page), [talk], [said, talk], **QUICK)
    preset.change(lambda task: _default_options(model, task), [preset], decoding[1:], **CONFIRM)
    for button, kind in ((save_json, "json"), (save_html, "html")):
        button.click(_make_save(page, model, kind), [*files, talk], [made], **QUICK).success(
            None, [made], None, js=browser.SAVE, **CONFIRM
        )
    if page.keeps:
        _keep(page, talk, said, clear)


def _stop(page: Page, stop: gr.Button, said: gr.HTML, talk: gr.Textbox, events: list[Any]) -> None:
    """Let Stop end what waits or is written, and the conversation itself where words still come after it."""
    presses = [stop.click, said.stop]
    gr.on(presses, _make_settle(page), [talk], [said, talk], js=browser.STOPPED, cancels=events, **QUICK).then(
        None, None, None, js=browser.FOCUS, **CONFIRM
    )


def _decoding_boxes(model: VisionLanguageModel) -> list[Any]:
    """Folded components for `OPTIONS`, with the defaults of a short answer."""
    beams, top_p, temperature, longest, shortest, length, repetition = _default_options(model, "vqa")
    with gr.Accordion("Decoding", open=False, elem_id="decoding"):
        method = gr.Radio(list(DECODING.items()), value="beams", label="Choice of words", elem_id="method")
        with gr.Row():
            made = [
                gr.Slider(1, 10, beams, step=1, label="Beams", info="of beam search", min_width=220),
                gr.Slider(0.05, 1, top_p, step=0.05, label="Top p", info="of the sampling", min_width=220),
                gr.Slider(0.1, 2, temperature, step=0.1, label="Temperature", info="of the sampling", min_width=220),
                gr.Slider(1, 256, longest, step=1, label="Longest", info="tokens of an answer", min_width=220),
                gr.Slider(0, 64, shortest, step=1, label="Shortest", info="tokens of an answer", min_width=220),
                gr.Slider(-2, 2, length, step=0.5, label="Length", info="penalty with beams", min_width=220),
                gr.Slider(1, 3, repetition, step=0.1, label="Repetition", info="penalty", min_width=220),
            ]
    return [method, *made]


def _default_options(model: VisionLanguageModel, task: str) -> list[float]:
    """Default values of a task for `OPTIONS`, except the method."""
    usual = GenerateConfig.of(wording(task, "paper", model.llm.wording).generate)
    names = ("num_beams", "top_p", "temperature", "max_new_tokens", "min_new_tokens")
    return [getattr(usual, name) for name in (*names, "length_penalty", "repetition_penalty")]


def _keep(page: Page, talk: gr.Textbox, said: gr.HTML, clear: gr.Button) -> None:
    """Let the browser keep the conversation with its pictures, and bring both back."""
    files = page.files
    keeper = gr.HTML(visible="hidden", elem_id="keeper", js_on_load=browser.KEEP)
    keeper.input(None, [keeper, *files, talk], [*files, talk], js=browser.FILL, **QUICK).then(
        _make_settle(page), [talk], [said, talk], **QUICK
    )
    gr.on([one.change for one in files], None, files, None, js=browser.KEEP_FILES, **QUICK)
    talk.change(None, [talk], None, js=browser.KEEP_TALK, **CONFIRM)
    clear.click(None, None, None, js=browser.FORGET, **CONFIRM)


def _draw(page: Page, talk: Conversation) -> tuple[str, str]:
    """A conversation as the page shows it, and as text."""
    return markup.talk(talk, page.feedback is not None), talk.text


def _make_put(page: Page, suggested: bool = False) -> Callable[..., tuple[Any, ...]]:
    """Make the function that puts a question into the conversation, where it waits; one without files fails at once."""

    def put(picture: Any, more: Any, question: Any, context: Any, task: Any, text: Any) -> tuple[Any, ...]:
        with show_errors():
            before = Conversation.of(text).about(path_of(picture), paths_of(more))
            if before.is_busy:
                return (gr.skip(),) * 4
            told = check_text("context", context, MAX_CONTEXT)
            asked = "" if suggested else check_text("question", question, 4 * MAX_CONTEXT)
            turn = Turn(asked, context=told.strip(), task=str(task), suggested=suggested)
            try:
                check_text("question", asked, MAX_QUESTION)
                if before.picture is None and not before.more:
                    raise UsageError(NO_PICTURE)
            except UsageError as error:
                return gr.skip(), *_draw(page, before.and_then(replace(turn, error=sentence(error)))), ""
            typed = gr.skip() if suggested else ""
            return typed, *_draw(page, before.and_then(replace(turn, state="waiting"))), ""

    return put


def _make_again(page: Page) -> Callable[..., tuple[Any, ...]]:
    def again(text: Any) -> tuple[Any, ...]:
        with show_errors():
            talk = Conversation.of(text)
            if talk.is_busy or not talk.turns:
                return (gr.skip(),) * 4
            last = talk.turns[-1]
            asked = "" if last.suggested else last.question
            turn = Turn(asked, context=last.context, task=last.task, suggested=last.suggested, state="waiting")
            return gr.skip(), *_draw(page, replace(talk, editing=True).and_then(turn)), ""

    return again


def _make_answer(page: Page, model: VisionLanguageModel) -> Callable[..., Iterator[Any]]:
    """Make the function that answers the question that waits."""

    def answer(request: gr.Request, picture: Any, more: Any, *rest: Any) -> Iterator[Any]:
        *values, text = rest
        with show_errors():
            talk = Conversation.of(text)
        if not talk.is_busy:
            yield (gr.skip(),) * 3
            return
        try:
            files = path_of(picture), paths_of(more)
            decoding = Decoding.of(dict(zip(OPTIONS, values, strict=True)))
            turn = talk.turns[-1]
            if turn.suggested and not turn.question:
                yield (gr.skip(),) * 3  # a generator, which Stop ends
                asked, said = page.gate.run(backend.suggest, model, files[0], turn.context, files[1], request=request)
                words = backend.prepare(model, files[0], asked, turn.context, more=files[1])
                read = {"question": asked, "read": words.question, "task": words.task, "prompt": words.prompt}
                yield *_draw(page, talk.with_last(answer=said, state="", **read)), words.places + words.prompt
                return
            earlier = replace(talk, turns=talk.turns[:-1]).history()
            words = backend.prepare(
                model, files[0], turn.question, turn.context, earlier, turn.task, decoding, files[1]
            )
            read = {"read": words.question, "task": words.task, "prompt": words.prompt, "options": words.options}
            talk = talk.with_last(context=words.context or "", cut=words.cut, state="writing", **read)
            yield *_draw(page, talk), words.places + words.prompt
            with page.gate.running(request), closing(backend.answer(model, words)) as texts:
                for written in texts:
                    talk = talk.with_last(answer=written)
                    yield *_draw(page, talk), gr.skip()
            yield *_draw(page, talk.with_last(state="")), gr.skip()
        except Exception as error:
            yield *_draw(page, talk.with_last(state="", error=sentence(error))), gr.skip()

    return answer


def _make_settle(page: Page, error: str = "") -> Callable[..., tuple[Any, Any]]:
    """Make the function that ends what waits or is written, after Stop, a reload, or a failure; nothing for no text."""

    def settle(text: Any) -> tuple[Any, Any]:
        if not text:
            return gr.skip(), gr.skip()
        with show_errors():
            return _draw(page, Conversation.of(text).settled(error))

    return settle


def _make_edit(page: Page) -> Callable[..., tuple[Any, ...]]:
    """Make the function that takes the last question back into its box, or, pressed again, leaves it as it is."""

    def edit(text: Any) -> tuple[Any, ...]:
        with show_errors():
            talk = Conversation.of(text)
            if not talk.turns:
                return (gr.skip(),) * 4
            talk = replace(talk, editing=not talk.editing)
            last = talk.turns[-1]
            return *((last.question, last.context) if talk.editing else ("", gr.skip())), *_draw(page, talk)

    return edit


def _make_like(page: Page) -> Callable[..., tuple[str, str]]:
    """Make the function that appends a verdict on an answer to the file of the page."""

    def like(text: Any, event: gr.EventData) -> tuple[str, str]:
        with show_errors():
            talk = Conversation.of(text)
            number, liked = getattr(event, "index", None), getattr(event, "liked", None)
            if type(number) is not int or not 0 <= number < len(talk.turns) or liked not in ("yes", "no"):
                raise UsageError("the verdict names no answer of this conversation; press a thumb below one")
            turn = replace(talk.turns[number], liked=liked)
            told = {"when": round(time.time()), "model": page.models.name, "liked": liked == "yes"}
            kept = ("question", "answer", "context", "task", "prompt", "options")
            assert page.feedback is not None
            told |= {name: getattr(turn, name) for name in kept}
            if len(json.dumps(told)) > MAX_VERDICT:
                raise UsageError("this turn is too long for a verdict; ask with a shorter context")
            if page.feedback.exists() and page.feedback.stat().st_size > MAX_FEEDBACK:
                raise UsageError("the file for verdicts is full; tell who runs the page")
            append_record(page.feedback, told)
            return _draw(page, replace(talk, turns=(*talk.turns[:number], turn, *talk.turns[number + 1 :])))

    return like


def _make_save(page: Page, model: VisionLanguageModel, kind: str) -> Callable[..., dict[str, str]]:
    """Make the function that returns the transcript as text, with its file name and MIME type."""

    def save(picture: Any, more: Any, text: Any) -> dict[str, str]:
        with show_errors():
            turns = Conversation.of(text).turns
            if not turns:
                raise UsageError("there is no conversation to save yet; ask something first")
            files = path_of(picture), paths_of(more)
            shown = stills_of(model, *files, SIDE) if files[0] or files[1] else ()
            if kind == "json":
                text, mime = as_json(page.models.name, turns, *shown), "application/json"
            else:
                text, mime = as_html(page.models.name, turns, *shown), "text/html"
            return {"text": text, "type": mime, "name": f"conversation.{kind}"}

    return save
