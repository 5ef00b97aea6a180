"""The page of `qformer demo`: a picture, a question, an optional context, the answer."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr

from demo import backend, limits, server
from qformer import checkpoint
from qformer.model.loading import load_vision_language
from qformer.types import UsageError

if TYPE_CHECKING:
    from qformer.model.vision_language import VisionLanguageModel

# Fonts of the system: the usual themes fetch theirs from the network.
THEME = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def build(model: VisionLanguageModel, name: str, examples: list[list[str]], gate: server.Gate) -> gr.Blocks:
    """The page for one model.

    Args:
        name: of the checkpoint, shown above.
        examples: rows of (image file, question, context) to try; may be empty.
        gate: through which the model is reached.
    """

    def ask(picture: str | None, question: str, context: str) -> str:
        try:
            asked = limits.checked_text("question", question, limits.MAX_QUESTION)
            told = limits.checked_text("context", context, limits.MAX_CONTEXT)
            return gate.run(backend.answer, model, picture, asked, told)
        except UsageError as error:
            raise gr.Error(str(error), duration=None) from error

    with gr.Blocks(title="qformer", analytics_enabled=False) as page:
        gr.Markdown(f"# Ask a picture\n{name}")
        with gr.Row():
            image = gr.Image(type="filepath", image_mode=None, label="Picture", elem_id="picture", height=360)
            with gr.Column():
                question = gr.Textbox(
                    label="Question", placeholder="what color is the star?", info="Empty: a caption", elem_id="question"
                )
                context = gr.Textbox(
                    label="Context (optional)",
                    placeholder="Context: the star is red.",
                    info="Text put in front of the question",
                    elem_id="context",
                )
                button = gr.Button("Ask", variant="primary", elem_id="ask")
                said = gr.Textbox(label="Answer", interactive=False, elem_id="answer")
        if examples:
            gr.Examples(examples, [image, question, context], label="Scenes that no training has shown")
        inputs = [image, question, context]
        button.click(ask, inputs, said, api_name="ask")
        for box in (question, context):
            box.submit(ask, inputs, said, api_visibility="private")
    return page


def serve(path: str, device: str | None, port: int | None) -> None:
    """Load a stage-two checkpoint and serve its page on this machine until interrupted.

    Args:
        port: None: the first free one from 7860 on.

    Raises:
        UsageError: nothing to load is there, a checkpoint of stage one, or a port that is taken.
    """
    model = load_vision_language(path, device)
    gate = server.Gate()
    gate.watch(model, path)
    with server.workplace() as folder:
        of_scenes = checkpoint.read(path).config.data.train.name == "scenes"
        page = build(model, path, backend.draw_examples(folder) if of_scenes else [], gate)
        try:
            server.launch(page, folder=folder, gate=gate, port=port, theme=THEME)
        except OSError as error:
            raise UsageError(f"the page cannot be served ({error}); give another --port") from error
