"""What the tab Search tells of pictures that are gone or others by now, and of how many there are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import gradio as gr

from qformer.demo import finding, markup, server, tabs
from qformer.demo.backend import Models
from qformer.retrieval.search import Retriever
from tests.retrieval.photos import folder, gallery, index, model_of_tiles, picture

if TYPE_CHECKING:
    from pathlib import Path


def test_pictures_that_are_others_by_now(tmp_path: Path) -> None:
    photos, model = folder(tmp_path / "photos", 4), model_of_tiles()
    opened = gallery(tmp_path / "g", model)
    index(opened, model, path=photos)
    (photos / "0.png").write_bytes(picture(9))
    (photos / "1.png").unlink()
    before, after = finding.search(Retriever(opened, model), "a cat")
    for hits in (before, after):
        assert {one.name: one.fault for one in hits if one.fault} == {"0.png": "changed", "1.png": "missing"}
        assert all((one.picture is None) == bool(one.fault) for one in hits)
    page = markup.hit_cards(after, "hits")
    assert (page.count("changed since it was indexed"), page.count("not where it was indexed")) == (1, 1)


def test_the_number_of_pictures_is_told_anew(tmp_path: Path) -> None:
    """Whenever the page is opened, and by each search."""
    photos, model = folder(tmp_path / "photos", 3), model_of_tiles()
    opened = gallery(tmp_path / "g", model)
    index(opened, model, path=photos)
    models = Models("x", matching=model, retriever=Retriever(tmp_path / "g", model))
    with gr.Blocks() as blocks:
        tabs.search_tab(tabs.Page(models, server.Gate()))
    (count,) = (one for one in blocks.fns.values() if one.name == "count")
    assert [event for _, event in count.targets] == ["load"]
    assert "among 3 images" in count.fn()["label"]
    (photos / "new.png").write_bytes(picture(9))
    index(opened, model, path=photos)
    assert "among 4 images" in count.fn()["label"]
