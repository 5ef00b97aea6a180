"""Data source `mosaics`: 4 to 16 photos of another source on a canvas of 448 to 896 pixels a side.

Mosaics mention left and right, so do not flip or crop them as an augmentation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from qformer.canvases.drawn import Quiz
from qformer.data.sources import build_at, read_named
from qformer.mosaics.album import SPLITS, Album
from qformer.mosaics.layout import LEAST, MOST, Mosaic, lay_out, place_photo
from qformer.mosaics.texts import KINDS, MosaicQuestion, Teller
from qformer.resolution.base import resize
from qformer.types import BadSample, Sample, UsageError

STREAM = 9  # separates the random numbers from those of the drawn sources
NARROWEST = 224  # pixels of a side; four photos a row would be a few dozen pixels wide


@dataclass(frozen=True, kw_only=True)
class Mosaics(Quiz[Mosaic]):
    """Mosaics of photos; sample `i` is a function of the options, the photos and `i` alone.

    Attributes:
        photos: any source of captioned photos: its `name` and options. Records of one photo are one.
        split: `train` has eight tenths of the photos, `val` and `test` one each, by the name of a photo, so that no
            photo is in two of them; `any` has all.
        sides: least and greatest width and height, in pixels.
        per_mosaic: least and greatest number of photos.
        seed, count: seed of the mosaics, and length of the source, which may be any number.
        cache: folder for the cache of `photos`.
    """

    KINDS: ClassVar[tuple[str, ...]] = KINDS

    photos: dict[str, Any]
    split: Literal["train", "val", "test", "any"] = "train"
    sides: tuple[int, int] = (448, 896)
    per_mosaic: tuple[int, int] = (LEAST, MOST)
    seed: int = 0
    count: int = 1_000_000
    cache: str | None = None
    _album: Album = field(init=False, repr=False, compare=False)
    _teller: Teller = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not NARROWEST <= self.sides[0] <= self.sides[1]:
            raise UsageError(f"sides is {self.sides}; give the least and the greatest side in pixels, from {NARROWEST}")
        if not LEAST <= self.per_mosaic[0] <= self.per_mosaic[1] <= MOST:
            raise UsageError(
                f"per_mosaic is {self.per_mosaic}; give the least and the greatest number of photos, from {LEAST} to "
                f"{MOST}"
            )
        if self.seed < 0 or self.count < 0:
            raise UsageError(f"seed is {self.seed} and count is {self.count}; neither may be negative")
        self.check_quiz("mosaics")
        name, options = read_named(self.photos, "data.photos")
        source = build_at(name, options, "data.photos", self.cache)
        album = Album.open(source, self.split, self.per_mosaic[1] + 1)
        object.__setattr__(self, "_album", album)
        captions = [record.captions for record in album.records]
        object.__setattr__(self, "_teller", Teller(captions, self.per_mosaic))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        """Paste a mosaic `uint8[h, w, 3]` with captions and, with `questions`, a question whose kind ends the key.

        Among its facts are `places`, a table of the photos in reading order with place, box in pixels (left, top,
        right, bottom), name and captions, `photos`, their number, and the `choices` of a question.

        Raises:
            BadSample: a photo cannot be read, or is too thin; the message names it.
        """
        rng = self._rng(index)
        mosaic, question = self.pose(index, rng)
        pixels, table = self._paste(mosaic)
        facts: dict[str, Any] = {"photos": len(mosaic.placed), "places": table}
        answers: list[str] = []
        if isinstance(question, MosaicQuestion):
            facts |= {"question_type": question.kind, "choices": list(question.choices)}
            answers = [question.answer, *question.others]
        return Sample(
            image=pixels,
            key=f"mosaics/{self.split}/{self.seed}/{index}{'' if question is None else f':{question.kind}'}",
            captions=self._teller.tell(mosaic, rng)[: self.captions],
            question=None if question is None else question.question,
            answers=answers,
            facts=facts,
        )

    def mosaic(self, index: int) -> Mosaic:
        """Get the mosaic of a sample without opening a photo."""
        return self.pose(index, self._rng(index))[0]

    def draw(self, rng: np.random.Generator) -> Mosaic:
        size, grid, cells = lay_out(rng, self.per_mosaic, self.sides)
        *shown, absent = self._album.draw(rng, len(cells) + 1)
        placed = tuple(place_photo(rng, photo, cell) for photo, cell in zip(shown, cells, strict=True))
        return Mosaic(size, grid, int(rng.integers(256)), placed, absent)

    def ask(self, shown: Mosaic, rng: np.random.Generator) -> list[MosaicQuestion]:
        return self._teller.ask(shown, rng)

    def _rng(self, index: int) -> np.random.Generator:
        if not 0 <= index < self.count:
            raise IndexError(f"mosaics has no {index}, but {self.count}")
        return np.random.default_rng((self.seed, SPLITS.index(self.split), index, STREAM))

    def _paste(self, mosaic: Mosaic) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """Paste the photos, uint8[h, w, 3], and make the table of their places."""
        width, height = mosaic.size
        canvas = np.full((height, width, 3), mosaic.ground, dtype=np.uint8)
        table = []
        for one in mosaic.placed:
            record = self._album.records[one.photo]
            try:
                pixels = self._album.read(one.photo)
                left, top, right, bottom = box = mosaic.box(one, pixels.shape[2], pixels.shape[1])
            except BadSample as bad:
                raise BadSample(bad.kind, f"{bad.detail} (a photo of the mosaic, {record.key})") from bad
            # Pillow's arithmetic is the same on every machine, so that stored tokens fit their pictures anywhere.
            scaled = resize(pixels, right - left, bottom - top, exact=True)
            canvas[top:bottom, left:right] = scaled.permute(1, 2, 0).numpy()
            place = mosaic.names[one.photo]
            table.append({"place": place, "box": list(box), "photo": record.key, "captions": list(record.captions)})
        return canvas, table
