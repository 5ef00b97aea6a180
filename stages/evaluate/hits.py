"""The sheet of `qformer eval`: queries that are found, missed, mended and spoilt by re-ranking, with what was found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from qformer.evaluation import retrieval
from qformer.figures import page as sheet
from qformer.figures.page import Card
from qformer.types import BadSample

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from qformer.data.base import Source
    from qformer.data.held_out import ImageRecord

BEST, EACH = 6, 3  # hits of a query, queries of a kind
#: Queries by the place of the right one before and after re-ranking.
FATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Mended by re-ranking": lambda before, after: (before > 1) & (after == 1),
    "Spoilt by re-ranking": lambda before, after: (before == 1) & (after > 1),
    "Missed": lambda before, after: (before > 1) & (after > 1),
    "Found": lambda before, after: (before == 1) & (after == 1),
}
LEGEND = (
    f"Recalls in %. Each query below is shown with its {BEST} best results, the right ones outlined: ITC is the "
    "cosine, ITM the probability that they match, score the logit of ITM + ITC."
)
DIRECTIONS = {"t2i": "A text looks for its image", "i2t": "An image looks for its texts"}


def page(
    title: str,
    note: str,
    table: tuple[Sequence[str], Sequence[Sequence[str]]],
    source: Source,
    images: list[ImageRecord],
    scores: retrieval.Scores,
    places: dict[str, dict[str, Tensor]],
) -> str:
    """One HTML file.

    Args:
        title, note: name of the checkpoint, and what was measured. table: head and rows of the numbers.
        images: of the rows of `scores`; their captions, in order, are its columns. places: their `rank_table`.
    """
    found = HitSheet(source, images, scores)
    parts = [sheet.heading(title, note), sheet.table(*table), sheet.paragraph(LEGEND)]
    for way, direction in DIRECTIONS.items():
        before, after = places["itc"][way], places["reranked"][way]
        if not scores.of_text.any():  # nothing was re-ranked
            after = before
        for fate, of in FATES.items():
            queries = of(before, after).nonzero().flatten().tolist()
            if queries:
                parts.append(sheet.section(f"{direction}: {fate.lower()}, {len(queries)} of {len(before)}"))
                parts += [found.search(way, query, int(before[query]), int(after[query])) for query in _spread(queries)]
    return sheet.page(f"Retrieval: {title}", parts)


def _spread(queries: list[int]) -> list[int]:
    """A few of them, from all over."""
    count = min(EACH, len(queries))
    return [queries[place * len(queries) // count] for place in range(count)]


@dataclass
class HitSheet:
    """Cards of the hits of a query."""

    source: Source
    images: list[ImageRecord]
    scores: retrieval.Scores

    def __post_init__(self) -> None:
        self.texts = [(number, text) for number, image in enumerate(self.images) for text in image.captions]
        self.true = retrieval.true_pairs([image.captions for image in self.images])
        self.pixels = lru_cache(maxsize=256)(self._pixels)

    def search(self, way: str, query: int, before: int, after: int) -> Markup:
        """The best by ITC, and re-ranked, of a text (`t2i`) or an image (`i2t`); places of the right one in both."""
        scores = self.scores
        if way == "t2i":
            rows = {"By ITC": scores.itc[:, query]}
            candidates, total = scores.of_text[:, query], scores.itm[:, query] + scores.itc[:, query]
        else:
            rows = {"By ITC": scores.itc[query]}
            candidates, total = scores.of_image[query], scores.itm[query] + scores.itc[query]
        if candidates.any():
            rows["Re-ranked, by ITM + ITC"] = total.masked_fill(~candidates, retrieval.NO_CANDIDATE)
        cards = {}
        for name, row in rows.items():
            best = row.topk(min(BEST, len(row))).indices.tolist()
            cards[name] = [self._card(way, query, number, bool(candidates[number])) for number in best]
        places = {"right one in place": f"{before}, re-ranked {after}" if len(rows) > 1 else f"{before}"}
        asked = Card(lines=[self.texts[query][1]], scores=places) if way == "t2i" else self._shown(query, [], places)
        if not any(card.right for found in cards.values() for card in found):
            best_right = int(rows["By ITC"].masked_fill(~self._right(way, query), -torch.inf).argmax())
            card = self._card(way, query, best_right, bool(candidates[best_right]))
            cards["The right one"] = [replace(card, place=str(before))]
        return sheet.search(asked, cards)

    def _right(self, way: str, query: int) -> Tensor:
        """bool: what is right among the images for a text, among the texts for an image."""
        return self.true[:, query] if way == "t2i" else self.true[query]

    def _card(self, way: str, query: int, number: int, candidate: bool) -> Card:
        image, text = (number, query) if way == "t2i" else (query, number)
        values = {"ITC": float(self.scores.itc[image, text])}
        if candidate:
            values["ITM"] = float(self.scores.match[image, text])
            values["score"] = float(self.scores.itm[image, text] + self.scores.itc[image, text])
        right = bool(self.true[image, text])
        if way == "i2t":
            return Card(lines=[self.texts[text][1]], scores=values, right=right)
        return self._shown(image, self.images[image].captions[:1], values, right)

    def _shown(
        self, image: int, lines: list[str], scores: Mapping[str, float | str], right: bool | None = None
    ) -> Card:
        pixels = self.pixels(image)
        gone = "" if pixels is not None else "cannot be read any more"
        return Card(pixels, [*lines, self.images[image].key.rpartition("/")[2]], scores, right, gone)

    def _pixels(self, image: int) -> Image.Image | None:
        try:
            pixels = self.images[image].read(self.source)
        except BadSample:
            return None
        drawn = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        drawn.thumbnail((sheet.SIDE, sheet.SIDE))
        return drawn
