"""NaturalBench as its authors publish it: a row has two pictures and two questions, each asked about both."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from qformer.data.huggingface import HuggingFace
from qformer.types import Sample

#: Numbers of question and picture of the four samples of a row, in the order of the authors' script.
PLACES = ((0, 0), (0, 1), (1, 0), (1, 1))


@dataclass(frozen=True)
class NaturalBench:
    """Rows of `BaiqiL/NaturalBench`: `Image_0`, `Question_0`, `Image_0_Question_0` (its answer), and so on.

    A row gives four samples, each with the number of its row as `group`, and `question_number` and `image_number` (0 or
    1), among its facts.

    Attributes:
        path: folder of the data set, or its files (`data/train-*.parquet`; JSON whose pictures are paths).
        split: such as train, the default.
        images: folder that paths of pictures are relative to.
    """

    path: str | list[str]
    split: str | None = None
    images: str = "."
    _parts: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        parts = [
            HuggingFace(
                path=self.path,
                split=self.split,
                images=self.images,
                image=f"Image_{image}",
                question=f"Question_{question}",
                answers=f"Image_{image}_Question_{question}",
            )
            for question, image in PLACES
        ]
        object.__setattr__(self, "_parts", parts)

    def __len__(self) -> int:
        return len(PLACES) * len(self._parts[0])

    def __getitem__(self, index: int) -> Sample:
        row, place = divmod(index, len(PLACES))
        question, image = PLACES[place]
        sample: Sample = self._parts[place][row]
        facts = sample.facts | {"group": row, "question_number": question, "image_number": image}
        return replace(sample, key=f"{sample.key} question {question}, image {image}", facts=facts)
