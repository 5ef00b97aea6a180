"""The page of `qformer demo`: its tabs, its API, and its start."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it on import

import gradio as gr

from qformer.demo import backend, server
from qformer.demo.asking import ask_tab
from qformer.demo.endpoints import endpoints
from qformer.demo.hosts import Hosts
from qformer.demo.looking import look_tab
from qformer.demo.markup import CSS
from qformer.demo.searching import search_tab
from qformer.demo.tabs import Page, caption_tab, match_tab
from qformer.scenes.examples import draw_examples

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from qformer.demo.backend import Models

# System fonts: the usual themes fetch theirs from the network.
THEME = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
LOOKS: dict[str, Any] = {"theme": THEME, "css": CSS}


def build(models: Models, gate: server.Gate, examples: list[list[str]]) -> gr.Blocks:
    """Build the page for the given models; build and serve it inside a `server.workplace`.

    Args:
        gate: the gate for all calls of a model.
        examples: rows of (image file, question, context) to try; can be empty.
    """
    page = Page(models, gate)
    for model in filter(None, (models.asking, models.matching)):
        gate.watch(model, models.name)
    with gr.Blocks(title="qformer: ask a picture", analytics_enabled=False) as blocks:
        gr.Markdown(f"# Ask a picture\n{models.name}")
        with gr.Tabs():
            with gr.Tab("Ask", id="ask"):
                ask_tab(page, examples)
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
) -> None:
    """Load a checkpoint and serve its page until it is interrupted.

    Args:
        path, stage1, index, device, quantize, trust: see `backend.load_models`.
        port, queue, share, auth: see `server.launch`. host, root_path, allow_hosts: see `hosts.Hosts`.

    Raises:
        UsageError: something that cannot be loaded, an address that cannot be served, or a port that is taken.
    """
    hosts = Hosts(allow_hosts, root_path, host)
    server.check_bind(hosts, port)
    models = backend.load_models(path, stage1, index, device, quantize, trust)
    gate = server.Gate()
    with server.workplace() as folder:
        examples = draw_examples(folder) if backend.of_scenes(path) else backend.draw_photos(folder, models)
        page = build(models, gate, examples)
        server.launch(
            page, folder=folder, gate=gate, port=port, queue=queue, share=share, auth=auth, hosts=hosts, **LOOKS
        )
