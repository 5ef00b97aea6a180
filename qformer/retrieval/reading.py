"""Reading and embedding for a gallery: ITC rows and optional stored tokens of images, embeddings of texts.

A process reads samples in rounds: it skips files whose size and time are known, and embeds the contents that no process
has embedded yet.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qformer.data.base import number_of
from qformer.data.texts import cleaned
from qformer.files.packing import pack
from qformer.images import read_file, read_image
from qformer.resolution.base import cut_all, plannable
from qformer.retrieval.embedders import Embedder, as_embedder, fingerprint
from qformer.retrieval.entries import Entry, Place, is_utf8
from qformer.retrieval.places import digest, find_spelling, plain_bytes, status, tar_time, to_nfc
from qformer.types import BadSample, UsageError
from qformer.videos.rows import only_picture

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor

    from qformer.data.base import Source
    from qformer.fields import Packing
    from qformer.model.image_text import ImageTextModel
    from qformer.retrieval.gallery import Gallery
    from qformer.types import Sample, VisualTokens

__all__ = ["ReadSample", "Reader", "Round", "embed_captions", "fingerprint", "probes"]

TEXTS = 256  # embedded at once
THINGS = ("a dog", "a man", "two women", "children", "a red car", "a bird", "food", "a sign", "a building", "flowers")
PLACES = ("on a beach", "in the snow", "on a street", "in a room", "at night", "in the grass", "near water", "close up")


@dataclass
class ReadSample:
    """A sample that was read: a known place, a known content in a new place, or a new content.

    Attributes:
        index: position of the sample in its source. place: its file or record.
        id: hash of its content; None if the place is known and its file has not changed.
        captions: its captions, cleaned. entry: a new entry, if this process does not know the content.
    """

    index: Any
    place: Place
    id: str | None
    captions: list[str]
    entry: Entry | None = None


@dataclass
class Round:
    """Samples that a process has read, faults of those it could not read, and images still to embed."""

    seen: list[ReadSample] = field(default_factory=list)
    faults: list[dict[str, str]] = field(default_factory=list)
    images: list[tuple[Entry, Tensor]] = field(default_factory=list)


class Reader:
    """Reader of samples for one process, which embeds new contents.

    Attributes:
        known: id and place of every name in this source. ids: contents of the gallery.
        features: packing of the image encoder's tokens for re-ranking: fp16, int8, or None to store none.
    """

    def __init__(
        self,
        model: Embedder | ImageTextModel,
        number: int,
        known: dict[str, tuple[str, Place]],
        ids: Iterable[str],
        features: Packing | None,
    ) -> None:
        self.embedder, self.number, self.known, self.ids, self.features = (
            as_embedder(model),
            number,
            known,
            set(ids),
            features,
        )

    def look(self, source: Source, members: Sequence[Any]) -> Round:
        """Read the samples at these indices, skipping unchanged files, and decode new contents."""
        found = Round()
        for index in members:
            name = ""
            try:
                sample = source[index]
                image = only_picture(sample)
                name = find_spelling(os.path.abspath(image)) if isinstance(image, Path) else sample.key
                self._look(sample, image, name, index, number_of(source, index), found)
            except BadSample as bad:
                path = ascii(name) if bad.kind == "not utf-8" else name or bad.detail.partition(": ")[0]
                found.faults.append({"path": path, "kind": bad.kind, "detail": bad.detail})
        return found

    def _look(self, sample: Sample, data: Any, name: str, index: Any, number: int, found: Round) -> None:
        if not is_utf8(name):
            raise BadSample("not utf-8", ascii(name))
        texts = cleaned(sample.captions) if self.embedder.limit else ()
        captions = [to_nfc(" ".join(text.split())) for text in texts]  # one line each
        place = Place(self.number, name, number, -1, tar_time(name))
        if isinstance(data, Path):
            place = Place(self.number, name, -1, *status(name))
            if name in self.known and self.known[name][1][3:] == place[3:]:
                found.seen.append(ReadSample(index, place, None, captions))
                return
            data = read_file(Path(name))
        plain = plain_bytes(data)
        id_ = digest(plain)
        if id_ in self.ids:
            found.seen.append(ReadSample(index, place, id_, captions))
            return
        pixels = read_image(data)
        if self.embedder.matcher is not None:
            plannable(pixels, self.embedder.matcher.frontend.strategy)
        self.ids.add(id_)
        entry = Entry(id_, [place], len(plain), pixels.shape[2], pixels.shape[1], np.zeros((0, 0), np.float16))
        found.seen.append(ReadSample(index, place, id_, captions, entry))
        found.images.append((entry, pixels))

    @torch.no_grad()
    def embed(self, found: Round) -> Round:
        """Fill the new entries of a round."""
        if not found.images:
            return found
        entries, images = zip(*found.images, strict=True)
        found.images = []
        model = self.embedder.matcher
        if self.features is None or model is None:
            embeds, valid = self.embedder.embed_images(images)
        else:
            encoded = model.frontend.encode_tiles(cut_all(images, model.frontend.strategy))
            embeds, valid = model.embed_images(encoded)
            parts = self._pack(encoded, self.features)
            for entry, count in zip(entries, encoded.counts, strict=True):
                entry.features = list(islice(parts, count))
        for entry, rows, own in zip(entries, embeds.float().cpu(), valid.cpu(), strict=True):
            entry.embeds = rows[own].half().numpy()
        return found

    def _pack(self, encoded: VisualTokens, packing: Packing) -> Iterator[np.ndarray]:
        """Pack the tokens of each tile into the stored form.

        Raises:
            UsageError: fp16 cannot hold them.
        """
        for rows in encoded.rows:
            try:
                yield pack(rows, packing).cpu().numpy()
            except OverflowError as error:
                raise UsageError(f"{error}; index into a new folder with --features int8, or none") from error


@torch.no_grad()
def embed_captions(model: Embedder | ImageTextModel, texts: Sequence[str]) -> np.ndarray:
    """Embed any number of texts, float16[n, P]."""
    embedder = as_embedder(model)
    parts = [np.zeros((0, embedder.width), np.float16)]
    for start in range(0, len(texts), TEXTS):
        parts.append(embedder.embed_texts(list(texts[start : start + TEXTS])).float().cpu().half().numpy())
    return np.concatenate(parts)


def probes(gallery: Gallery, model: Embedder | ImageTextModel) -> Tensor:
    """Embeddings of typical queries, float[n, P]: captions of the gallery, and plain phrases."""
    phrases = [f"{thing} {place}" for thing in THINGS for place in PLACES]
    captioned = [known.id for known in gallery.store.known() if known.captions]
    some = gallery.store.get(captioned[:: max(1, len(captioned) // len(phrases))])
    rows = [entry.caption_embeds[:1] for entry in some.values()]
    return torch.from_numpy(np.concatenate([embed_captions(model, phrases), *rows]).astype(np.float32))
