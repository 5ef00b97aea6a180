"""Galleries of models of others: a CLIP-like folder of transformers indexes and searches, by cosines alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from qformer.data.texts import clean_caption
from qformer.images import read_image
from qformer.retrieval.embedders import load_embedder
from qformer.retrieval.gallery import Gallery
from qformer.retrieval.search import Retriever
from tests.retrieval.photos import folder
from tests.tiny_clip import save_tiny_clip, save_tiny_siglip

if TYPE_CHECKING:
    from collections.abc import Callable

    Run = Callable[..., tuple[int, str, str]]

COUNT, TEXT = 6, "A dog on the beach"


@pytest.mark.parametrize("save", [save_tiny_clip, save_tiny_siglip])
def test_a_gallery_of_a_clip(run: Run, tmp_path: Path, save: Any) -> None:
    """Hits are ordered by the cosines of the model itself; what re-ranks is missing, and said to be."""
    path = str(save(tmp_path / "clip"))
    photos = folder(tmp_path / "photos", COUNT, captions=True)
    code, out, err = run("index", path, "photos", "-o", "gallery", "--device", "cpu")
    assert (code, "gallery: 6 images" in out + err) == (0, True)
    code, out, err = run("search", path, "gallery", TEXT, "--json", "--device", "cpu")
    assert (code, "has no ITM to re-rank with, so cosines alone order the images" in err) == (0, True)
    embedder = load_embedder(path, "cpu")
    images = [read_image(photos / f"{n}.png") for n in range(COUNT)]
    (rows, valid), text = embedder.embed_images(images), embedder.embed_texts([clean_caption(TEXT)])
    assert rows.shape == (COUNT, 1, embedder.width)
    assert valid.all()
    cosines = (rows[:, 0] @ text[0]).tolist()
    hits = json.loads(out)
    assert [hit["itm"] for hit in hits] == [None] * COUNT
    found = {Path(hit["path"]).stem: hit["itc"] for hit in hits}
    assert [found[str(n)] for n in range(COUNT)] == pytest.approx(cosines, abs=2e-3)  # rows are kept as fp16
    assert [hit["score"] for hit in hits] == sorted(found.values(), reverse=True)
    retriever = Retriever("gallery", embedder)
    assert Path(retriever.image_to_image(photos / "3.png", k=1)[0].path).stem == "3"
    assert {hit.itm for hit in retriever.image_to_text(photos / "0.png", k=4)} == {None}
    assert retriever.words_read("cat " * 60) < 60
    assert run("index", path, "photos", "-o", "gallery", "--device", "cpu")[0] == 0


def test_what_only_our_models_have(run: Run, tmp_path: Path) -> None:
    path = str(save_tiny_clip(tmp_path / "clip"))
    folder(tmp_path / "photos", 2)
    code, _, err = run("index", path, "photos", "-o", "gallery", "--features", "fp16", "--device", "cpu")
    assert (code, "has no ITM, which alone reads --features; leave it out" in err) == (2, True)
    assert not Path("gallery").exists()


def test_the_fingerprint_is_of_weights_and_of_how_images_are_read(run: Run, tmp_path: Path) -> None:
    path = save_tiny_clip(tmp_path / "clip")
    embedder, again = load_embedder(str(path), "cpu"), load_embedder(str(path), "cpu")
    made = embedder.fingerprint()
    assert made == again.fingerprint()
    again.processor.image_mean = [0.0, 0.0, 0.0]  # type: ignore[attr-defined]
    assert made != again.fingerprint()
    with torch.no_grad():
        embedder.model.visual_projection.weight.mul_(0.5)  # type: ignore[attr-defined]
    assert made != embedder.fingerprint()
    folder(tmp_path / "photos", 2)
    assert run("index", str(path), "photos", "-o", "gallery", "--device", "cpu")[0] == 0
    assert Gallery.open("gallery").about["fingerprint"] == made
    with pytest.raises(Exception, match="was embedded by another model"):
        Retriever("gallery", embedder)
