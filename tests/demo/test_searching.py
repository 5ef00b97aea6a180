"""Words of the tab Search about pictures that are gone, others or damaged by now, of how many there are, and of one."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

from qformer.demo import finding, limits, searching, server, shown, tabs
from qformer.demo.backend import Models
from qformer.images import read_image
from qformer.retrieval.search import Retriever
from qformer.types import UsageError
from tests.demo.visitor import API, Visitor
from tests.retrieval.photos import folder, gallery, index, model_of_tiles, picture


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return folder(tmp_path / "photos", 4)


@pytest.fixture
def retriever(photos: Path, tmp_path: Path) -> Retriever:
    model = model_of_tiles()
    opened = gallery(tmp_path / "g", model)
    index(opened, model, path=photos)
    return Retriever(tmp_path / "g", model)


def test_pictures_that_are_gone_others_or_damaged_by_now(photos: Path, retriever: Retriever) -> None:
    (photos / "0.png").write_bytes(picture(9))
    (photos / "1.png").unlink()
    (photos / "2.png").write_bytes((photos / "2.png").read_bytes()[:60])
    before, after = finding.search(retriever, "a cat")
    for hits in (before, after):
        faults = {one.name: one.fault for one in hits if one.fault}
        assert faults == {"0.png": "changed", "1.png": "missing", "2.png": "damaged"}
        assert all((one.picture is None) == bool(one.fault) for one in hits)
    page = searching.hit_cards(after, "hits", True)
    for words in ("changed since it was indexed", "not where it was indexed", "damaged, and cannot be read"):
        assert page.count(words) == 1
    assert page.count("not re-ranked") == 3
    for one in after:
        if one.fault:
            with pytest.raises(UsageError, match=r"this picture is (changed|not|damaged)"):
                finding.open_hit(retriever, one.id)


def test_hits_stand_in_the_order_of_the_number_that_is_shown(retriever: Retriever) -> None:
    before, after = finding.search(retriever, "a cat")
    assert {one.id for one in before} == {one.id for one in after}
    for hits, reranked in ((before, False), (after, True)):
        page = searching.hit_cards(hits, "hits", reranked, moved=True)
        numbers = [float(text) for text in re.findall(r">\s*(-?\d+\.\d+)</span>", page)]
        assert numbers == sorted(numbers, reverse=True)
        assert len(numbers) == 4
    assert "▲" not in searching.hit_cards(after, "hits", True)  # without the other order there is nothing to compare


def test_a_hit_is_opened_as_a_file_of_the_page(
    photos: Path, retriever: Retriever, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened_alone: list[bool] = []
    whole = retriever.open_image

    def note(id_: Any) -> Any:
        opened_alone.append(shown.ONE_PICTURE.locked())
        return whole(id_)

    with server.workplace() as place:
        hits, _ = finding.search(retriever, "a cat")
        monkeypatch.setattr(retriever, "open_image", note)
        for hit in hits:
            opened = finding.open_hit(retriever, hit.id)
            assert opened.path == hit.where == str(photos / hit.name)
            assert Path(opened.file).is_relative_to(place / server.UPLOADS)
            assert Path(opened.file).read_bytes() == (photos / hit.name).read_bytes()
            assert finding.open_hit(retriever, hit.id) == opened
            assert len(list(Path(opened.file).parent.iterdir())) == 1
        for unknown in ("f" * 32, "' or 1=1", "", None, 5, "../../etc/passwd"):
            with pytest.raises(UsageError, match="not in the gallery; search again"):
                finding.open_hit(retriever, unknown)
    assert opened_alone == [True] * 8  # outside the queue, where memory must hold one picture at a time


def test_a_hit_that_visitors_could_not_upload_is_opened_as_one_they_could(
    photos: Path, retriever: Retriever, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "FORMATS", ("WEBP",))
    hits, _ = finding.search(retriever, "a cat", k=1)
    with server.workplace():
        opened = finding.open_hit(retriever, hits[0].id)
        assert opened.file.endswith(".png")
        assert read_image(Path(opened.file)).equal(read_image(Path(hits[0].where)))


def tab(retriever: Retriever, gate: server.Gate | None = None) -> gr.Blocks:
    models = Models("x", matching=retriever.model, retriever=retriever)
    with gr.Blocks() as blocks:
        searching.search_tab(tabs.Page(models, gate or server.Gate()))
    return blocks


def function(blocks: gr.Blocks, name: str) -> Any:
    (found,) = (one for one in blocks.fns.values() if one.name == name)
    return found


def test_the_number_of_pictures_is_told_anew(photos: Path, retriever: Retriever) -> None:
    """Whenever the page is opened, and by each search."""
    count = function(tab(retriever), "count")
    assert [event for _, event in count.targets] == ["load"]
    assert "among 4 images" in count.fn()["label"]
    (photos / "new.png").write_bytes(picture(9))
    index(retriever.gallery, model_of_tiles(), path=photos)
    assert "among 5 images" in count.fn()["label"]


def test_a_gallery_whose_folder_is_gone_is_told_in_a_sentence(retriever: Retriever) -> None:
    blocks = tab(retriever)
    shutil.rmtree(retriever.gallery.folder)
    with pytest.raises(gr.Error, match="the gallery is no longer where it was"):
        function(blocks, "count").fn()
    for ask in (lambda: finding.search(retriever, "a cat"), lambda: finding.open_hit(retriever, "f" * 32)):
        with pytest.raises(UsageError, match="the gallery is no longer where it was"):
            ask()


@pytest.mark.parametrize("told", [5, True, "hit", ["hit"], None, {}, {"hit": 5}])
def test_what_is_told_of_a_click_names_a_hit_or_nothing(
    retriever: Retriever, told: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    gate = server.Gate()
    with server.workplace() as place:
        blocks = tab(retriever)
        server.launch(blocks, folder=place, gate=gate, block=False)
        try:
            (number,) = (number for number, one in blocks.fns.items() if one.name == "show")
            body = {"data": [], "fn_index": number, "session_hash": "a", "event_data": told}
            response = Visitor(blocks.local_url).http.post(f"{API}/run/predict", json=body)
        finally:
            server.close(blocks, gate)
    assert "not in the gallery; search again" in response.text
    assert "Traceback" not in "".join(capfd.readouterr())


def test_an_opened_hit_is_one_copy_of_the_visitors_share(retriever: Retriever) -> None:
    gate = server.Gate()
    with server.workplace() as place:
        blocks = tab(retriever, gate)
        server.launch(blocks, folder=place, gate=gate, block=False)
        try:
            (number,) = (number for number, one in blocks.fns.items() if one.name == "show")
            (hit, *_), _ = finding.search(retriever, "a cat")
            visitor = Visitor(blocks.local_url)
            for _ in range(3):
                body = {"data": [], "fn_index": number, "session_hash": "a", "event_data": {"hit": hit.id}}
                assert visitor.http.post(f"{API}/run/predict", json=body).status_code == 200
            files = [file for _, _, file in blocks.visits._files()]
            assert len(files) == 1
            assert blocks.visits._visitors == {files[0]: "127.0.0.1"}
        finally:
            server.close(blocks, gate)
