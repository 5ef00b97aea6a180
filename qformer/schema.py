"""What the configuration is made of: strict sections, names with options, kinds of numbers; and the store of tokens."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from qformer.packing import Packing

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """A part of the configuration: unknown keys are refused, values are fixed once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Choice(BaseModel):
    """A name from a table and the options of what it names."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class FeaturesConfig(Section):
    """A store of the frozen image encoder's tokens, filled before training, which then reads them instead of images.

    Attributes:
        path: folder of the store.
        crops: random crops (and mirrors) stored of each image, of which each visit draws one.
        dtype: of the stored tokens; int8 has a scale for each token.
    """

    path: str
    crops: Positive = 1
    dtype: Packing = "fp16"

    @model_validator(mode="before")
    @classmethod
    def _folder_alone(cls, given: Any) -> Any:
        return {"path": given} if isinstance(given, str) else given
