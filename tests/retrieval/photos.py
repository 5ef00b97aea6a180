"""Galleries of noise for tests: photos that all differ, a tiny model that counts what it embeds, and what is stored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from qformer.data import sources
from qformer.images import read_image
from qformer.resolution.base import cut_all
from qformer.retrieval.entries import Entry, Place
from qformer.retrieval.gallery import Gallery
from qformer.retrieval.index import update
from qformer.retrieval.reading import fingerprint
from tests.data.making import encoded
from tests.tiny_stage1 import QUERIES, Views, tiny_model

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from qformer.model.image_text import ImageTextModel
    from qformer.retrieval.index import Tally
    from qformer.types import Tiles

SIZES = [(40, 30), (30, 40), (90, 30), (50, 40), (30, 30)]  # one, two or three tiles of `Views`
WIDTH = 8


def picture(number: int) -> bytes:
    """A PNG of noise, of one of several sizes."""
    width, height = SIZES[number % len(SIZES)]
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels))


def folder(path: Path, count: int, captions: bool = False) -> Path:
    """`0.png` and so on, every second one with a .txt of two captions if asked for."""
    path.mkdir(parents=True)
    for number in range(count):
        (path / f"{number}.png").write_bytes(picture(number))
        if captions and number % 2 == 0:
            (path / f"{number}.txt").write_text(f"a photo of a cat {number}\nA dog on the beach, {number}.\n")
    return path


def model_of_tiles() -> ImageTextModel:
    """In eval mode; its images have one, two or three tiles."""
    model = tiny_model().eval()
    model.frontend.strategy = Views()
    return model


class Counting:
    """A model that counts the images that it embeds."""

    def __init__(self, model: ImageTextModel) -> None:
        self.model, self.images = model, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def embed_images(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        self.images += len(tiles)
        return self.model.embed_images(tiles)


def gallery(path: Path, model: Any, features: str | None = None) -> Gallery:
    path.mkdir(parents=True, exist_ok=True)
    made = fingerprint(getattr(model, "model", model))
    about = {"checkpoint": "tiny", "features": features, "queries": QUERIES, "width": WIDTH}
    return Gallery.create(path, "lance", fingerprint=made, **about)


def index(opened: Gallery, model: Any, batch: int = 4, remove: bool = False, **choice: Any) -> Tally:
    """Bring a gallery in step with a source; `choice` is a folder's `path` or what `sources.build` takes."""
    choice = {"name": "folder"} | {key: str(value) if key == "path" else value for key, value in choice.items()}
    if choice not in opened.about["sources"]:
        opened.about["sources"].append(choice)
        opened.save()
    number = opened.about["sources"].index(choice)
    return update(opened, model, sources.build(**choice), number, batch, remove=remove)


def stored(opened: Gallery) -> dict[str, tuple[list[str], list[str]]]:
    """Names (without folders) and captions of each id, and that no id and no place stands twice."""
    known = list(opened.store.known())
    places = [(place.source, place.name) for one in known for place in one.places]
    assert len({one.id for one in known}) == len(known) == len(opened.store)
    assert len(set(places)) == len(places)
    assert len({one.seq for one in known}) == len(known)
    entries = opened.store.get([one.id for one in known])
    for entry in entries.values():
        assert len(entry.caption_embeds) == len(entry.captions)
        assert len(entry.embeds) % QUERIES == 0
    return {one.id: (sorted(p.name.rpartition("/")[2] for p in one.places), sorted(one.captions)) for one in known}


def names(opened: Gallery) -> list[str]:
    """Of all places, without their folders."""
    return sorted(name for own, _ in stored(opened).values() for name in own)


def captions(opened: Gallery) -> dict[str, list[str]]:
    """By the first name of an entry."""
    return {own[0]: texts for own, texts in stored(opened).values() if texts}


def rows_of(model: ImageTextModel, image: Any) -> Tensor:
    """The ITC rows of one image by itself, float[V, P]."""
    with torch.no_grad():
        embeds, valid = model.embed_images(tiles_of(model, image))
    return embeds[0][valid[0]]


def tiles_of(model: ImageTextModel, image: Any) -> Tiles:
    return cut_all([read_image(image)], model.frontend.strategy)


def entry(number: int, embeds: Tensor, **fields: Any) -> Entry:
    """An entry of the number `number` with rows float[V, P]."""
    place = Place(0, f"/photos/{number}.jpg", -1, 1, number * 10**9)
    made = Entry(f"{number:032x}", [place], 100 + number, 640 + number % 2, 480, embeds.half().numpy(), **fields)
    made.seq = number
    return made
