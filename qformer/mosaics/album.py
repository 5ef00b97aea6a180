"""Photos of a source with their captions, and which of them resemble each other by what is said of them."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qformer.data.held_out import list_images
from qformer.images import read_image
from qformer.types import LeftOut, UsageError
from qformer.videos.rows import only_picture

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from torch import Tensor

    from qformer.data.base import Source
    from qformer.data.held_out import ImageRecord

SPLITS = ("train", "val", "test", "any")
TENTHS = {"test": range(1), "val": range(1, 2), "train": range(2, 10), "any": range(10)}  # of all photos
LONGEST = 38  # words of a caption; a question has fifty (`qformer.data.texts`)
ALIKE = 0.5  # share of the words of the shorter caption; of two with more in common one could be true of both
TRIES = 100  # photos tried for a place
AGAIN = 20  # times that a mosaic is begun again
#: Words of captions that do not tell what is seen.
PLAIN = """
    a an the of in on at to and or with by for from as is are was were be being there this that it its his her their he
    she they who which while into onto up down over under through near next some one very
"""
EMPTY = frozenset(PLAIN.split())


@dataclass(frozen=True)
class Album:
    """Photos of one split.

    Attributes:
        source: the photos and their captions.
        records: those that are used, with captions short enough to be asked about.
        words: for each photo the telling words of each of its captions.
    """

    source: Source
    records: Sequence[ImageRecord]
    words: Sequence[Sequence[frozenset[str]]]

    @classmethod
    def open(cls, source: Source, split: str, least: int) -> Album:
        """List the photos of a split; each belongs to one by its name, wherever its folder lies.

        Raises:
            UsageError: they are fewer than `least`.
        """
        listed, skipped = list_images(source)
        mine = [record for record in listed if tenth(record.image_id) in TENTHS[split]]
        for record in mine:
            record.captions = [text for text in record.captions if len(text.split()) <= LONGEST and telling(text)]
        used = [record for record in mine if record.captions]
        if left := len(mine) - len(used) + len(skipped):
            warnings.warn(
                f"{left} records of data.photos are left out: without captions of at most {LONGEST} words",
                LeftOut,
                stacklevel=2,
            )
        if len(used) < least:
            raise UsageError(
                f"{len(used)} of the {len(listed)} photos of data.photos are in the split '{split}', and a mosaic "
                f"needs {least}; give more photos, a smaller data.per_mosaic, or split: any where they are held out "
                "already"
            )
        return cls(source, used, [[telling(text) for text in record.captions] for record in used])

    def read(self, photo: int) -> Tensor:
        """Read a photo, uint8[3, h, w]. Raises BadSample: it cannot be read."""
        return read_image(only_picture(self.source[self.records[photo].index]))

    def alike(self, first: int, second: int) -> bool:
        """Return True if a caption of one photo could be true of the other: they have most of their words in common."""
        return any(
            len(one & other) > ALIKE * min(len(one), len(other))
            for one in self.words[first]
            for other in self.words[second]
        )

    def draw(self, rng: np.random.Generator, number: int) -> list[int]:
        """Draw photos in random order, no two of them alike.

        Raises:
            UsageError: there are not so many.
        """
        for _ in range(AGAIN):
            chosen: list[int] = []
            for photo in rng.integers(len(self.records), size=TRIES * number).tolist():
                if photo not in chosen and not any(self.alike(photo, other) for other in chosen):
                    chosen.append(photo)
                if len(chosen) == number:
                    return [chosen[place] for place in rng.permutation(number)]
        raise UsageError(
            f"no {number} of the {len(self.records)} photos differ in what their captions say; give others in "
            "data.photos, or a smaller data.per_mosaic"
        )


def tenth(image_id: str | int) -> int:
    """Tenth of all photos that one belongs to, 0..9, by the last two parts of its path, so that folders can move."""
    name = "/".join(str(image_id).split("/")[-2:])
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) % 10


def telling(caption: str) -> frozenset[str]:
    """Words of a cleaned caption that say what is seen, without the s of a plural."""
    words = caption.replace(",", " ").split()
    return frozenset(word.removesuffix("s") or word for word in words if word not in EMPTY)
