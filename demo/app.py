"""The page of `qformer demo`: its tabs, its API, and its start."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it on import

import gradio as gr

from qformer.demo import about, backend, browser, limits, markup, server
from qformer.demo.asking import ask_boxes, ask_tab
from qformer.demo.endpoints import endpoints
from qformer.demo.hosts import Hosts
from qformer.demo.looking import look_tab
from qformer.demo.markup import CSS
from qformer.demo.searching import search_tab
from qformer.demo.tabs import CONFIRM, Page, caption_tab, match_tab, shared_boxes
from qformer.scenes.examples import draw_examples

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from qformer.demo.backend import Models

# System fonts: the usual themes fetch theirs from the network.
# Some of their texts are too pale to read (WCAG asks for a contrast of 4.5), hence other shades.
# Boxes have no borders there, so that white ones could not be seen on white, and labels look like buttons.
SOFT = ("body_text_color_subdued", "block_info_text_color", "input_placeholder_color")
BORDERS = ("input_border_color", "checkbox_border_color")
THEME = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]).set(
    **dict.fromkeys(SOFT, "*neutral_600"),
    **dict.fromkeys((f"{name}_dark" for name in SOFT), "*neutral_300"),
    **dict.fromkeys(("color_accent", "button_primary_background_fill"), "*primary_600"),
    **dict.fromkeys(("input_border_width", "block_border_width", "checkbox_border_width_dark"), "1px"),
    **dict.fromkeys(BORDERS, "*neutral_500"),
    **dict.fromkeys((f"{name}_dark" for name in BORDERS), "*neutral_400"),
    **dict.fromkeys(("block_title_background_fill", "block_title_background_fill_dark"), "none"),
    **dict.fromkeys(("block_label_text_color", "block_title_text_color"), "*body_text_color"),
    block_title_padding="0",
)
LOOKS: dict[str, Any] = {"theme": THEME, "css": CSS}


def build(
    models: Models,
    gate: server.Gate,
    examples: list[list[str]],
    *,
    keeps: bool = True,
    feedback: Path | None = None,
) -> gr.Blocks:
    """Build the page for the given models; build and serve it inside a `server.workplace`.

    Args:
        gate: the gate for all calls of a model.
        examples: rows of (image file, question, context) to try; can be empty.
        keeps: let browsers keep the conversation, so that it outlives a reload.
        feedback: file to which verdicts on answers are appended; None asks for none.
    """
    page = Page(models, gate, about.hints(models, examples), keeps, feedback)
    for model in filter(None, (models.asking, models.matching)):
        gate.watch(model, models.name)
    with gr.Blocks(title="qformer: ask a picture", analytics_enabled=False) as blocks:
        head = gr.HTML(markup.head(about.facts(models)), elem_id="about")
        gr.on(None, lambda: markup.head(about.facts(models)), None, [head], **CONFIRM)  # the gallery may have grown
        boxes = ask_boxes(page)
        with gr.Row(elem_id="body"):
            with gr.Column(scale=4, min_width=300, elem_id="shared"):
                shared_boxes(page)
                if examples:
                    _examples(examples, [page.picture, *(boxes if models.asking is not None else [])])
            with gr.Column(scale=5, min_width=300, elem_id="tabs"), gr.Tabs() as page.tabs:
                with gr.Tab("Ask", id="ask"):
                    ask_tab(page, boxes)
                with gr.Tab("Caption", id="caption"):
                    caption_tab(page)
                with gr.Tab("Match", id="match"):
                    match_tab(page)
                with gr.Tab("Search", id="search"):
                    search_tab(page)
                with gr.Tab("Look", id="look"):
                    look_tab(page)
        endpoints(page)
    return blocks


def _examples(rows: list[list[str]], boxes: list[Any]) -> None:
    shown = [row[: len(boxes)] for row in rows]
    gr.Examples(shown, boxes, label="Pictures to try", elem_id="examples", api_visibility="private")
    gr.on(None, None, None, None, js=browser.NAME_EXAMPLES, **CONFIRM)


def serve(
    path: str,
    *,
    stage1: str | None = None,
    index: Path | None = None,
    device: str | None = None,
    quantize: str | None = None,
    port: int | None = None,
    queue: int = 64,
    share: bool = False,
    auth: tuple[str, str] | None = None,
    host: str = "127.0.0.1",
    root_path: str = "",
    allow_hosts: Sequence[str] = (),
    trust: bool = False,
    feedback: Path | None = None,
) -> None:
    """Load a checkpoint and serve its page until it is interrupted.

    Args:
        path, stage1, index, device, quantize, trust: see `backend.load_models`.
        feedback: see `build`. Behind a password browsers keep nothing, since their users may share a machine.
        port, queue, share, auth: see `server.launch`. host, root_path, allow_hosts: see `hosts.Hosts`.

    Raises:
        UsageError: something that cannot be loaded, an address that cannot be served, or a port that is taken.
    """
    limits.bound_heaps()
    hosts = Hosts(allow_hosts, root_path, host)
    server.check_bind(hosts, port)
    models = backend.load_models(path, stage1, index, device, quantize, trust)
    gate = server.Gate()
    with server.workplace() as folder:
        examples = draw_examples(folder) if models.of_scenes else backend.draw_photos(folder, models)
        page = build(models, gate, examples, keeps=auth is None, feedback=feedback)
        server.launch(
            page, folder=folder, gate=gate, port=port, queue=queue, share=share, auth=auth, hosts=hosts, **LOOKS
        )
