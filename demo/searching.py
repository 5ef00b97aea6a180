"""The tab Search in Gradio: a gallery's hits, and one of them large. The logic is in `qformer.demo.finding`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from qformer.demo import backend, browser, finding
from qformer.demo.hosts import network
from qformer.demo.limits import MAX_QUESTION
from qformer.demo.tabs import CONFIRM, Page, path_of, show_errors
from qformer.figures.page import ENVIRONMENT, data_uri
from qformer.retrieval.places import in_words
from qformer.types import UsageError

if TYPE_CHECKING:
    from qformer.demo.finding import ShownHit
    from qformer.retrieval.search import Retriever

CARD = 160  # pixels of a thumbnail
HITS = ENVIRONMENT.from_string((browser.FILES / "hits.html").read_text(encoding="utf-8"))
OPENED = ENVIRONMENT.from_string(
    "<p><code>{{ one.path }}</code></p>{% for text in one.captions %}<p>{{ text }}</p>{% endfor %}"
)
SHOW = "() => document.getElementById('opened')?.scrollIntoView({block: 'nearest', behavior: 'smooth'})"
RERANKED = "Re-ranked by ITM: the score is its logit plus the cosine"
BY_COSINE = "Ordered by cosine; re-ranking needs a text"
ALONE = "By ITC alone: the cosine, from the index"
BOTH = "By text and picture: the score is the mean of both, each standardized"
UNKNOWN = "The model knows no letter of this text, so these hits mean nothing"


def hit_cards(hits: Sequence[ShownHit], label: str, reranked: bool = False, moved: bool = False) -> str:
    """Hits as cards: thumbnail, place (and those won or lost), the score that orders them, name and caption."""
    given = {"reranked": reranked, "moved": moved, "side": CARD, "data_uri": data_uri, "in_words": in_words}
    return HITS.render(hits=hits, label=label, **given)


def search_tab(page: Page) -> None:
    """Build the tab and its events."""
    retriever = page.models.retriever
    if retriever is None:
        page.lacking(backend.NO_MATCHING if page.models.matching is None else backend.NO_GALLERY)
        return
    info, hint = "By text, by a picture, or by both; Enter searches", page.hints.search
    box: dict[str, Any] = {"max_length": MAX_QUESTION, "elem_id": "search-text"}
    text = gr.Textbox(label=_among(retriever), placeholder=hint, info=info, **box)
    with gr.Row():
        k = gr.Slider(1, finding.MOST_HITS, 8, step=1, label="Hits", min_width=140, elem_id="search-k")
        shortlist = gr.Slider(
            1, 256, 64, step=1, label="Candidates to re-rank", min_width=140, elem_id="search-shortlist"
        )
    with gr.Row():
        like = gr.Checkbox(False, label="Images like the picture", elem_id="search-like")
        compare = gr.Checkbox(False, label="Compare with the order by ITC alone", elem_id="search-compare")
    button = gr.Button("Search", variant="primary", elem_id="search-go")
    opened = _Opened(page)
    with gr.Row():
        with gr.Column(min_width=300):
            hits = gr.HTML(elem_id="hits", min_height=120, js_on_load=browser.OPEN_HIT)
        with gr.Column(min_width=300, visible=False) as column:
            before = gr.HTML(elem_id="hits-itc", min_height=120, js_on_load=browser.OPEN_HIT)

    def find(request: gr.Request, text: Any, picture: Any, like: Any, compare: Any, *numbers: Any) -> tuple[Any, ...]:
        with show_errors():
            path = path_of(picture) if like else None
            if like and path is None:
                raise UsageError("there is no picture to look for; choose one, or write a text")
            first, second = page.gate.run(finding.search, retriever, text, path, *numbers, request=request)
            told = BOTH if path and second else RERANKED if second else BY_COSINE
            note = f"<p>{UNKNOWN if second and retriever.is_unknown(text) else told}.</p>"
            cards = hit_cards(second, "hits", True, bool(compare)) if second else hit_cards(first, "hits")
            hidden, label = gr.update(visible=False), gr.update(label=_among(retriever))
            return note + cards, f"<p>{ALONE}.</p>" + hit_cards(first, "hits by cosine"), label, hidden

    def count() -> Any:
        with show_errors():
            return gr.update(label=_among(retriever))

    inputs = [text, page.picture, like, compare, k, shortlist]
    page.on([button.click, text.submit], find, inputs, [hits, before, text, opened.panel], [hits])
    compare.change(lambda on: gr.update(visible=bool(on)), [compare], [column], **CONFIRM)
    opened.listen(page, retriever, [hits, before])
    gr.on(None, count, None, [text], **CONFIRM)  # at each opening of the page: the gallery may have grown


class _Opened:
    """A hit, shown large: with its path, a download, and ways to other tabs."""

    def __init__(self, page: Page) -> None:
        with gr.Group(visible=False, elem_id="opened") as self.panel:
            self.picture = gr.Image(
                interactive=False, show_label=False, height=420, buttons=["fullscreen"], elem_id="opened-picture"
            )
            self.told = gr.HTML(elem_id="opened-path", padding=True)
            with gr.Row():
                self.download = gr.DownloadButton("Download", elem_id="opened-download", min_width=120)
                for name, label in (("ask", "Ask about it"), ("look", "Look inside it")):
                    send = gr.Button(label, elem_id=f"opened-{name}", min_width=120)
                    sent = send.click(path_of, [self.picture], [page.picture], preprocess=False, **CONFIRM)
                    if page.tabs is not None:
                        sent.then(lambda name=name: gr.update(selected=name), None, [page.tabs], **CONFIRM)

    def listen(self, page: Page, retriever: Retriever, lists: list[gr.HTML]) -> None:
        def show(request: gr.Request, event: gr.EventData) -> tuple[Any, ...]:
            with show_errors():
                opened = finding.open_hit(retriever, getattr(event, "hit", None))
                if page.gate.visits is not None and request.client is not None:
                    page.gate.visits.keep([Path(opened.file)], network(request.client.host))
                return opened.file, OPENED.render(one=opened), opened.file, gr.update(visible=True)

        outputs = [self.picture, self.told, self.download, self.panel]
        gr.on([one.click for one in lists], show, None, outputs, **CONFIRM).then(None, js=SHOW, **CONFIRM)


def _among(retriever: Retriever) -> str:
    return f"Search among {finding.count(retriever):,} images"
