"""Sections `data` and `limits` of the configuration: what a run reads, and how much a picture may take."""

from __future__ import annotations

from typing import Any, Self

from pydantic import model_validator

from qformer.fields import Choice, Count, Fraction, Named, Packing, Positive, Section


class FeaturesConfig(Section):
    """A store of the frozen image encoder's tokens, which training reads instead of images.

    Attributes:
        path: folder of the store.
        crops: number of random crops (and flips) stored for each image; training draws one at each visit.
        dtype: dtype of the stored tokens; int8 has a scale for each token.
    """

    path: Named
    crops: Positive = 1
    dtype: Packing = "fp16"

    @model_validator(mode="before")
    @classmethod
    def _folder_alone(cls, given: Any) -> Any:
        return {"path": given} if isinstance(given, str) else given


class DataConfig(Section):
    """Sources of samples, and their augmentation and batching.

    Attributes:
        train, validation: sources (`jsonl`, `webdataset`, `datasets`, `coco`, `mix`, ...: docs/data.md); validation is
            optional.
        features: folder of a store of image tokens, or its `path`, `crops` and `dtype`; by default training reads the
            images.
        batch: B, samples per step and process (before accumulation).
        workers: processes that decode images; 0 decodes in the training process.
        crop: area range of the random resized crop; `[1, 1]` with `flip: 0` leaves images unchanged.
        flip: probability of a horizontal flip; use 0 if captions mention left or right.
        max_bad: largest share of bad samples among the last 1,000; a run with more stops.
        validation_size: maximum number of validation samples used during training.
    """

    train: Choice
    validation: Choice | None = None
    features: FeaturesConfig | None = None
    batch: Positive = 64
    workers: Count = 0
    crop: tuple[Fraction, Fraction] = (0.5, 1.0)
    flip: Fraction = 0.5
    max_bad: Fraction = 0.2
    validation_size: Positive = 500

    @model_validator(mode="after")
    def _crop_range(self) -> Self:
        if not 0 < self.crop[0] <= self.crop[1]:
            raise ValueError(
                f"data.crop is {list(self.crop)}; give [smallest, largest] share of the area, such as [0.5, 1]"
            )
        if self.features is not None and self.features.crops > 1 and self.crop == (1, 1) and not self.flip:
            raise ValueError(
                f"data.features.crops is {self.features.crops}, but data.crop and data.flip leave images as they are: "
                "all crops would be the same; leave crops out"
            )
        return self


class LimitsConfig(Section):
    """Most that a picture may take, and several of one row together; more is refused, in training data skipped.

    Attributes:
        tiles: tiles that the image encoder sees; None is any number.
        tokens: tokens of the published system's connector; None is any number.
    """

    tiles: Positive | None = None
    tokens: Positive | None = None
