"""Questions that are asked word for word as a benchmark publishes them, and answered in the model's own words.

Case, brackets and line breaks of such a prompt matter (`(A)`, `{3}`), so nothing of it is cleaned. The wording of the
preset stays around it; `--prompt "{}"` leaves that out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from qformer.data.columns import columns_of
from qformer.evaluation.benchmarks import AskOptions, Item, Record, new_item, question_id
from qformer.evaluation.tasks import OpenQuestion
from qformer.metrics.documents import PRINT, print_size
from qformer.metrics.shares import Score, Unit
from qformer.resolution.measures import height_scale
from qformer.types import BadSample, TooLong

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from qformer.model.vision_language import VisionLanguageModel
    from qformer.types import Sample, Tiles

SCALE = "scale"  # of a record: pixels that the image encoder saw for one of the picture
MOST = 1e9  # pixels; beyond it a number is no height
COLUMN = "print"  # fact of an item: size of its print after that


class Published(OpenQuestion):
    """Questions of a benchmark with prompts of its own.

    Attributes:
        new_tokens: most tokens of an answer, as in the published evaluation.
    """

    lemmatizes = False
    new_tokens: ClassVar[int] = 32

    def predict(
        self, model: VisionLanguageModel, tiles: Tiles, items: Sequence[Sequence[Item]], ask: AskOptions
    ) -> list[Record]:
        """An answer as `said` to each question, shorter than published where the positions leave no more room."""
        decoding = {"max_new_tokens": self.new_tokens} | dict(ask.decoding)
        try:
            said = super().predict(model, tiles, items, replace(ask, decoding=decoding))
        except TooLong:
            if sum(map(len, items)) > 1:  # then each is asked alone, so that none depends on its batch
                raise
            said = super().predict(model, tiles, items, ask)
        shown = [(item, place) for place, group in enumerate(items) for item in group]
        return [
            record | ({SCALE: height_scale(tiles.plans[place])} if PRINT in item.facts else {})
            for record, (item, place) in zip(said, shown, strict=True)
        ]


def tell_print(items: Sequence[Item], records: Sequence[Record]) -> tuple[str, ...]:
    """Note the size of its print, as the image encoder saw it, as a fact of each item that knows its height.

    Returns:
        The column by which results are told apart.
    """
    for item, record in zip(items, records, strict=True):
        height, scale = item.facts.get(PRINT), record.get(SCALE)
        if isinstance(height, int | float) and 0 <= height < MOST and scale is not None:
            item.facts[COLUMN] = print_size(height * scale)
    return (COLUMN,)


def asked_as(sample: Sample, place: int, question: Any, name: str | None = None) -> Item:
    """An item that asks this, with the answers of the sample and facts of its own.

    Args:
        name: its id, if the record has none that is unique.

    Raises:
        BadSample: `no question`.
    """
    item = new_item(sample, place, question_id(sample) if name is None else name)
    if not isinstance(question, str) or not question.strip():
        raise BadSample("no question", f"{sample.key}; {columns_of(sample.facts)}")
    item.question, item.facts = question.strip(), dict(sample.facts)
    item.accepted = [answer for answer in sample.answers if answer.strip()]
    return item


def first_fact(sample: Sample, names: Iterable[str]) -> Any:
    """The first of these columns that a record has and that is not empty; None if it has none."""
    return next((sample.facts[name] for name in names if sample.facts.get(name) not in (None, "")), None)


def of_each(items: Sequence[Item], earned: Sequence[float], part: str | None = None) -> Score:
    """The mean of what each item earned, with images as clusters.

    Args:
        part: fact by which the mean is one of several parts.
    """
    return Score(
        [
            Unit((row,), value, item.image, None if part is None else item.facts[part])
            for row, (item, value) in enumerate(zip(items, earned, strict=True))
        ]
    )
