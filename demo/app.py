"""The page of `qformer demo`: a picture, a question, an optional context, the answer."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr

from demo import backend
from qformer import checkpoint
from qformer.model.loading import load_vision_language
from qformer.types import UsageError

if TYPE_CHECKING:
    from qformer.model.vision_language import VisionLanguageModel

# Fonts of the system: the usual themes fetch theirs from the network.
THEME = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def build(model: VisionLanguageModel, name: str, examples: list[list[str]]) -> gr.Blocks:
    """The page for one model.

    Args:
        name: of the checkpoint, shown above.
        examples: rows of (image file, question, context) to try; may be empty.
    """

    def ask(image: str | None, question: str, context: str) -> str:
        try:
            return backend.answer(model, image, question, context)
        except UsageError as error:
            raise gr.Error(str(error), duration=None) from error

    with gr.Blocks(title="qformer", analytics_enabled=False) as page:
        gr.Markdown(f"# Ask a picture\n{name}")
        with gr.Row():
            image = gr.Image(type="filepath", label="Picture", elem_id="picture", height=360)
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
    with tempfile.TemporaryDirectory() as folder:
        of_scenes = checkpoint.read(path).config.data.train.name == "scenes"
        examples = backend.draw_examples(Path(folder)) if of_scenes else []
        try:
            launch(build(model, path, examples), Path(folder), port)
        except OSError as error:
            raise UsageError(f"the page cannot be served ({error}); give another --port") from error


def launch(page: gr.Blocks, examples: Path, port: int | None, block: bool = True) -> Any:
    """Serve a page on this machine alone; of its files only those in `examples` and its own uploads are served."""
    return page.launch(
        server_name="127.0.0.1",
        server_port=port,
        theme=THEME,
        allowed_paths=[str(examples)],
        prevent_thread_lock=not block,
        quiet=not block,
    )
