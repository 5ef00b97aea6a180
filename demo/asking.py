"""The tab Ask in Gradio: a conversation about a picture. Its logic is in `qformer.demo.backend`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from html import escape
from typing import TYPE_CHECKING, Any

import gradio as gr

from qformer.demo import backend
from qformer.demo.backend import METHODS, PRESETS, Decoding
from qformer.demo.shown import row_of, still
from qformer.demo.tabs import CONFIRM, Page, more_box, path_of, paths_of, picture_box, show_errors
from qformer.demo.transcript import Turn, as_html, as_json
from qformer.llm.decoding import GenerateConfig
from qformer.llm.prompts import wording
from qformer.types import UsageError

if TYPE_CHECKING:
    from qformer.model.vision_language import VisionLanguageModel

ENTER = "Enter asks, Shift+Enter starts a new line; empty: a caption"
CONTEXT = "Text before the question, true or not"
REMEMBERED = 3600  # seconds for which a conversation is kept after its last turn
DECODING = {
    "Beam search: the likeliest text, as in the paper; it appears all at once": "beams",
    "Greedy: the likeliest word each time, word by word": "greedy",
    "Nucleus sampling: a random text each time, word by word": "nucleus",
}
assert set(DECODING.values()) == set(METHODS)
OPTIONS = ("method", *backend.LIMITS)
#: Saves a text from the server as a file of the visitor; nothing is written on the server.
SAVE = """(made) => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([made.text], {type: made.type}));
  link.download = made.name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}"""
#: Gradio draws examples without alternative texts; their questions serve as such.
NAME_EXAMPLES = """() => {
  const name = () => document.querySelectorAll("#examples img[alt='']").forEach((image) => {
    image.alt = "example: " + image.closest("tr").textContent.trim();
  });
  new MutationObserver(name).observe(document.body, {childList: true, subtree: true});
  name();
}"""


@dataclass(frozen=True)
class Conversation:
    """Turns of a conversation about the files of one row: a picture or none, and further pictures and clips."""

    picture: str | None = None
    more: tuple[str, ...] = ()
    turns: tuple[Turn, ...] = ()

    def about(self, picture: Any, more: Any) -> Conversation:
        """Continue the conversation, or begin a new one if the values of the components are other files."""
        shown = path_of(picture), tuple(paths_of(more))
        return self if shown == (self.picture, self.more) else Conversation(*shown)

    def and_then(self, turn: Turn) -> Conversation:
        return replace(self, turns=(*self.turns, turn))

    def messages(self) -> list[dict[str, str]]:
        """Messages for the chatbot, escaped because it reads them as HTML."""
        shown = []
        for turn in self.turns:
            question = turn.question or "(a caption)"
            text = f"{question}\n(context: {turn.context})" if turn.context else question
            shown.append({"role": "user", "content": escape(text, quote=False)})
            shown.append({"role": "assistant", "content": escape(turn.answer or "…", quote=False)})
        return shown


def ask_tab(page: Page, examples: list[list[str]]) -> None:
    """Build the tab and its events, inside a `gr.Blocks`."""
    model = page.models.asking
    if model is None:
        page.lacking(backend.NO_ASKING)
        return
    talk = gr.State(Conversation(), time_to_live=REMEMBERED)
    with gr.Row():
        with gr.Column(scale=4, min_width=300):
            picture = picture_box("picture")
            more = more_box(model, "more")
            _, asked, told = examples[-1] if examples else ["", "what color is the star?", ""]
            question = _line("question", "Question", asked, ENTER)
            context = _line("context", "Context (optional)", told or "the star is red.", CONTEXT)
            if examples:
                _examples(examples, [picture, question, context])
        with gr.Column(scale=5, min_width=300):
            chat = gr.Chatbot(
                label="Conversation",
                elem_id="chat",
                height=380,
                render_markdown=False,
                feedback_options=None,
                buttons=["copy", "copy_all"],
                placeholder="Choose a picture and ask about it. A new picture begins a new conversation.",
            )
            question.render()
            with gr.Row():
                ask = gr.Button("Ask", variant="primary", elem_id="ask", min_width=90)
                stop = gr.Button("Stop", elem_id="stop", min_width=90)
                suggest = gr.Button("Suggest a question", elem_id="suggest", min_width=200)
            context.render()
            preset = gr.Dropdown(list(PRESETS.items()), value="vqa", label="What to write", elem_id="preset")
            decoding = _decoding_boxes(model)
            with gr.Accordion("The exact prompt", open=False, elem_id="prompt"):
                prompt = gr.Textbox(label="Sent with the last question", lines=2, interactive=False, buttons=["copy"])
            with gr.Row():
                clear = gr.Button("Clear", elem_id="clear", size="sm", min_width=80)
                save_json = gr.Button("Save as JSON", elem_id="save-json", size="sm", min_width=100)
                save_html = gr.Button("Save as HTML", elem_id="save-html", size="sm", min_width=100)
            made = gr.JSON(visible="hidden")
    inputs = [picture, question, context, preset, *decoding, more, talk]
    outputs = [chat, question, talk, prompt]
    events = [
        page.on([ask.click, question.submit, context.submit], _make_ask(page, model), inputs, outputs, chat),
        page.on([suggest.click], _make_suggest(page, model), [picture, context, more, talk], outputs, chat),
    ]
    stop.click(lambda talk: (talk.messages(), talk), [talk], [chat, talk], cancels=events, **CONFIRM)
    gr.on([clear.click, chat.clear, picture.clear], _clear, None, [chat, talk, prompt], cancels=events, **CONFIRM)
    # Must not cancel: a visitor who asks at once has begun the new conversation before this event arrives.
    changes = [picture.change, more.change]
    gr.on(changes, _change_picture, [picture, more, talk], [chat, talk, prompt], preprocess=False, **CONFIRM)
    preset.change(lambda task: _default_options(model, task), [preset], decoding[1:], **CONFIRM)
    for button, kind in ((save_json, "json"), (save_html, "html")):
        button.click(_make_save(page, model, kind), [talk], [made], preprocess=False, **CONFIRM).success(
            None, [made], None, js=SAVE, **CONFIRM
        )


def _examples(rows: list[list[str]], boxes: list[Any]) -> None:
    gr.Examples(rows, boxes, label="Pictures to try", elem_id="examples", api_visibility="private")
    gr.on(None, None, None, None, js=NAME_EXAMPLES, **CONFIRM)


def _line(name: str, label: str, placeholder: str, info: str) -> gr.Textbox:
    return gr.Textbox(label=label, placeholder=placeholder, info=info, lines=1, max_lines=6, elem_id=name, render=False)


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


def _make_ask(page: Page, model: VisionLanguageModel) -> Callable[..., Iterator[Any]]:
    def ask(request: gr.Request, picture: Any, question: Any, context: Any, task: Any, *rest: Any) -> Iterator[Any]:
        *values, more, talk = rest
        with show_errors():
            decoding = Decoding.of(dict(zip(OPTIONS, values, strict=True)))
            before = talk.about(picture, more)
            history = [(turn.question, turn.answer) for turn in before.turns if turn.question]
            asked = backend.prepare(model, before.picture, question, context, history, task, decoding, before.more)
            turn = Turn(asked.question, "", asked.context or "", asked.task, asked.prompt, asked.options, stopped=True)
            if asked.cut:
                gr.Info("The beginning of the context or of the conversation was left out, because it is too long.")
            yield before.and_then(turn).messages(), "", before, asked.places + asked.prompt
            with page.gate.running(request), closing(backend.answer(model, asked)) as texts:
                for text in texts:
                    turn = replace(turn, answer=text)
                    now = before.and_then(turn)
                    yield now.messages(), gr.skip(), now, gr.skip()
            now = before.and_then(replace(turn, stopped=False))
            yield now.messages(), gr.skip(), now, gr.skip()

    return ask


def _make_suggest(page: Page, model: VisionLanguageModel) -> Callable[..., Iterator[Any]]:
    def suggest(request: gr.Request, picture: Any, context: Any, more: Any, talk: Conversation) -> Iterator[Any]:
        with show_errors():
            before = talk.about(picture, more)
            yield before.messages(), gr.skip(), before, gr.skip()
            asked, said = page.gate.run(backend.suggest, model, before.picture, context, before.more, request=request)
            words = backend.prepare(model, before.picture, asked, context, more=before.more)
            turn = Turn(asked, said, words.context or "", words.task, words.prompt, suggested=True)
            now = before.and_then(turn)
            yield now.messages(), gr.skip(), now, words.places + words.prompt

    return suggest


def _clear() -> tuple[list[Any], Conversation, str]:
    return [], Conversation(), ""


def _change_picture(picture: Any, more: Any, talk: Conversation) -> tuple[Any, ...]:
    """Begin a new conversation for a new picture."""
    with show_errors():
        known = talk.turns and talk.about(picture, more) is talk
        return (gr.skip(), gr.skip(), gr.skip()) if known else _clear()


def _make_save(page: Page, model: VisionLanguageModel, kind: str) -> Callable[..., dict[str, str]]:
    """Make the function that returns the transcript as text, with its file name and MIME type."""

    def save(talk: Conversation) -> dict[str, str]:
        with show_errors():
            if not talk.turns:
                raise UsageError("there is no conversation to save yet; ask something first")
            shown = map(still, row_of(model, talk.picture, talk.more))
            if kind == "json":
                text, mime = as_json(page.models.name, talk.turns, *shown), "application/json"
            else:
                text, mime = as_html(page.models.name, talk.turns, *shown), "text/html"
            return {"text": text, "type": mime, "name": f"conversation.{kind}"}

    return save
