"""Preview of a source before training: the first texts as a model will read them, and a count of bad samples."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from qformer.data.base import indices
from qformer.data.texts import draw_texts
from qformer.types import BadSample
from qformer.videos import is_video
from qformer.videos.rows import glance, parts_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qformer.data.base import Source

LOOK = 100
SHOW = 3


def preview(source: Source) -> Iterator[str]:
    """Yield a summary of the first hundred samples, then the first texts; no further shards are opened."""
    rng = np.random.default_rng(0)
    texts: list[str] = []
    bad: Counter[str] = Counter()
    for index in islice(indices(source), LOOK):
        try:
            sample = source[index]
            text, _ = draw_texts(sample, rng)
            shown = " + ".join(map(_size, parts_of(sample.image)))
        except BadSample as fault:
            bad[fault.kind] += 1
            continue
        texts.append(f"{shown}: {' '.join(text.split())}")
    kinds = ", ".join(f"{count} {kind}" for kind, count in bad.most_common())
    yield f"{len(texts)} of the first {len(texts) + bad.total()} samples can be used" + (
        f"; not: {kinds}" if bad else ""
    )
    yield from texts[:SHOW]


def _size(shown: Any) -> str:
    """Size of one picture or video that a sample shows, such as `640 x 480` or `video of 640 x 480`."""
    height, width = glance(shown).shape[1:]
    return f"{'video of ' * is_video(shown)}{width} x {height}"
