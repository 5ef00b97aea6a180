"""The tab Ask: a conversation about a picture, in Gradio. What it does stands in `demo.backend`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import gradio as gr

from demo import backend
from demo.backend import METHODS, PRESETS, Decoding
from demo.tabs import CONFIRM, Page, path_of, picture_box, told
from demo.transcript import Turn, as_html, as_json
from qformer.model.decoding import GenerateConfig
from qformer.model.prompts import wording

if TYPE_CHECKING:
    from qformer.model.vision_language import VisionLanguageModel

REMEMBERED = 3600  # seconds that a conversation is kept after its last turn
DECODING = {
    "Beam search: the likeliest text, as in the paper; it comes at once": "beams",
    "Greedy: the likeliest word each time, word by word": "greedy",
    "Nucleus sampling: drawn, another text each time, word by word": "nucleus",
}
assert set(DECODING.values()) == set(METHODS)
OPTIONS = (
    "method",
    "beams",
    "top_p",
    "temperature",
    "max_new_tokens",
    "min_new_tokens",
    "length_penalty",
    "repetition_penalty",
)
#: Puts a text that the server made into a file of the visitor's: nothing is written on the server.
SAVE = """(made) => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([made.text], {type: made.type}));
  link.download = made.name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}"""


def ask_tab(page: Page, examples: list[list[str]]) -> None:
    """The tab, and its events."""
    model = page.models.asking
    if model is None:
        page.lacking(backend.NO_ASKING)
        return
    turns = gr.State([], time_to_live=REMEMBERED, delete_callback=list.clear)
    with gr.Row():
        with gr.Column(scale=4, min_width=300):
            picture = picture_box("picture")
            if examples:
                gr.Examples(
                    examples,
                    [picture, question := _question(render=False), context := _context(render=False)],
                    label="Scenes that no training has shown",
                    elem_id="examples",
                    api_visibility="private",
                )
            else:
                question, context = _question(render=False), _context(render=False)
        with gr.Column(scale=5, min_width=300):
            chat = gr.Chatbot(
                label="Conversation",
                elem_id="chat",
                height=380,
                render_markdown=False,
                feedback_options=None,
                buttons=["copy", "copy_all"],
                placeholder="Choose a picture, and ask about it. A new picture begins a new conversation.",
            )
            question.render()
            with gr.Row():
                ask = gr.Button("Ask", variant="primary", elem_id="ask", min_width=90)
                stop = gr.Button("Stop", elem_id="stop", min_width=90)
                suggest = gr.Button("Suggest a question", elem_id="suggest", min_width=200)
            context.render()
            preset = gr.Dropdown(list(PRESETS.items()), value="vqa", label="What to write", elem_id="preset")
            decoding = _decoding(model)
            with gr.Accordion("The exact prompt", open=False, elem_id="prompt"):
                prompt = gr.Textbox(
                    label="Behind the image, of the last question", lines=2, interactive=False, buttons=["copy"]
                )
            with gr.Row():
                clear = gr.Button("Clear", elem_id="clear", size="sm", min_width=80)
                save_json = gr.Button("Save as JSON", elem_id="save-json", size="sm", min_width=100)
                save_html = gr.Button("Save as HTML", elem_id="save-html", size="sm", min_width=100)
            made = gr.JSON(visible="hidden")
    inputs = [picture, question, context, preset, *decoding, turns]
    outputs = [chat, question, turns, prompt]
    events = [
        page.on([ask.click, question.submit, context.submit], _asking(page, model), inputs, outputs, chat),
        page.on([suggest.click], _suggesting(page, model), [picture, context, turns], outputs, chat),
    ]
    stop.click(_ended, [turns], [chat, turns], cancels=events, **CONFIRM)
    gr.on([clear.click, chat.clear, picture.change], _forgotten, None, [chat, turns, prompt], cancels=events, **CONFIRM)
    preset.change(lambda task: _usual(model, task), [preset], decoding[1:], **CONFIRM)
    for button, kind in ((save_json, "json"), (save_html, "html")):
        button.click(_saving(page, kind), [picture, turns], [made], preprocess=False, **CONFIRM).success(
            None, [made], None, js=SAVE, **CONFIRM
        )


def _question(render: bool) -> gr.Textbox:
    return gr.Textbox(
        label="Question",
        placeholder="what color is the star?",
        info="Enter asks, Shift+Enter breaks the line; empty: a caption",
        lines=1,
        max_lines=6,
        elem_id="question",
        render=render,
    )


def _context(render: bool) -> gr.Textbox:
    return gr.Textbox(
        label="Context (optional)",
        placeholder="the star is red.",
        info="What the model is told before the question, be it true or not",
        lines=1,
        max_lines=6,
        elem_id="context",
        render=render,
    )


def _decoding(model: VisionLanguageModel) -> list[Any]:
    """Components of `OPTIONS`, folded away; they show what a short answer is written with."""
    beams, top_p, temperature, longest, shortest, length, repetition = _usual(model, "vqa")
    with gr.Accordion("Decoding", open=False, elem_id="decoding"):
        method = gr.Radio(list(DECODING.items()), value="beams", label="How words are chosen", elem_id="method")
        with gr.Row():
            made = [
                gr.Slider(1, 10, beams, step=1, label="Beams", info="of the search", min_width=220),
                gr.Slider(0.05, 1, top_p, step=0.05, label="Top p", info="of the nucleus", min_width=220),
                gr.Slider(0.1, 2, temperature, step=0.1, label="Temperature", info="of the nucleus", min_width=220),
                gr.Slider(1, 256, longest, step=1, label="Longest", info="tokens of an answer", min_width=220),
                gr.Slider(0, 64, shortest, step=1, label="Shortest", info="tokens of an answer", min_width=220),
                gr.Slider(-2, 2, length, step=0.5, label="Length", info="penalty, of beams", min_width=220),
                gr.Slider(1, 3, repetition, step=0.1, label="Repetition", info="penalty", min_width=220),
            ]
    return [method, *made]


def _usual(model: VisionLanguageModel, task: str) -> list[float]:
    """Values of `OPTIONS` but the method, as a task has them."""
    usual = GenerateConfig.of(wording(task, "paper", model.llm.family).generate)
    names = ("num_beams", "top_p", "temperature", "max_new_tokens", "min_new_tokens")
    return [getattr(usual, name) for name in (*names, "length_penalty", "repetition_penalty")]


def _asking(page: Page, model: VisionLanguageModel) -> Callable[..., Iterator[Any]]:
    def ask(request: gr.Request, picture: Any, question: Any, context: Any, task: Any, *rest: Any) -> Iterator[Any]:
        *values, turns = rest
        with told():
            decoding = Decoding.of(dict(zip(OPTIONS, values, strict=True)))
            before = _done(turns)
            history = [(turn.question, turn.answer) for turn in before if turn.question]
            asked = backend.prepare(model, path_of(picture), question, context, history, task, decoding)
            turn = Turn(asked.question, "", asked.context or "", asked.task, asked.prompt, asked.options)
            if asked.cut:
                gr.Info("The beginning of the context, or of the conversation, was left out: it is longer than fits.")
            yield _messages([*before, turn]), "", before, asked.prompt
            with page.gate.running(request), closing(backend.answer(model, asked)) as texts:
                for text in texts:
                    turn = replace(turn, answer=text, stopped=True)
                    yield _messages([*before, turn]), gr.skip(), [*before, turn], gr.skip()
            turn = replace(turn, stopped=False)
            yield _messages([*before, turn]), gr.skip(), [*before, turn], gr.skip()

    return ask


def _suggesting(page: Page, model: VisionLanguageModel) -> Callable[..., Iterator[Any]]:
    def suggest(request: gr.Request, picture: Any, context: Any, turns: list[Turn]) -> Iterator[Any]:
        with told():
            before = _done(turns)
            yield _messages(before), gr.skip(), before, gr.skip()
            question, answer = page.gate.run(backend.suggest, model, path_of(picture), context, request=request)
            words = backend.prepare(model, path_of(picture), question, context)
            turn = Turn(question, answer, words.context or "", "ask", words.prompt, suggested=True)
            yield _messages([*before, turn]), gr.skip(), [*before, turn], words.prompt

    return suggest


def _done(turns: Any) -> list[Turn]:
    return [turn for turn in turns or [] if turn.answer]


def _messages(turns: list[Turn]) -> list[dict[str, str]]:
    """Turns as the chatbot shows them."""
    shown = []
    for turn in turns:
        question = turn.question or "(a caption)"
        told = f"{question}\n(told: {turn.context})" if turn.context else question
        shown.append({"role": "user", "content": told})
        shown.append({"role": "assistant", "content": turn.answer or "…"})
    return shown


def _ended(turns: list[Turn]) -> tuple[list[dict[str, str]], list[Turn]]:
    return _messages(_done(turns)), _done(turns)


def _forgotten() -> tuple[list[Any], list[Turn], str]:
    return [], [], ""


def _saving(page: Page, kind: str) -> Callable[..., dict[str, str]]:
    """The transcript as text, with the name of a file and what it is."""

    def save(picture: Any, turns: list[Turn]) -> dict[str, str]:
        with told():
            if not _done(turns):
                raise gr.Error("There is no conversation to save yet.", duration=None, print_exception=False)
            shown = None if path_of(picture) is None else backend.picture_of(path_of(picture))
            if kind == "json":
                text, mime = as_json(page.models.name, _done(turns), shown), "application/json"
            else:
                text, mime = as_html(page.models.name, _done(turns), shown), "text/html"
            return {"text": text, "type": mime, "name": f"conversation.{kind}"}

    return save
