"""Building blocks of the configuration schema: strict sections, names with options, and number types."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidatorFunctionWrapHandler,
    field_validator,
)

from qformer import lookup, trust

Fraction = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1)]  # not all
Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Epsilon = Annotated[float, Field(gt=0)]
Named = Annotated[str, AfterValidator(lookup.refuse_empty)]  # a path, a hub id, a folder
Packing = Literal["fp16", "int8"]
Read = TypeVar("Read", bound="Section")


class Section(BaseModel):
    """A section of the configuration, which refuses unknown keys and infinite numbers and is immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="wrap")
    @classmethod
    def _no_bool_for_a_number(cls, given: Any, read: ValidatorFunctionWrapHandler) -> Any:
        value = read(given)
        lookup.refuse_bools(given, value)
        return value


class Choice(BaseModel):
    """A name from a table and the options of the named class, typed by the user unless `read_from` says otherwise."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str
    _origin: str = PrivateAttr(default="")  # no key of a file can set it, and copies keep it

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    def __eq__(self, other: object) -> bool:
        """Compare name and options, ignoring the origin."""
        return isinstance(other, Choice) and (self.name, self.options) == (other.name, other.options)

    def read_from(self, origin: str) -> Self:
        """Copy the choice and mark it as read from `origin`, such as "the gallery 'g'" (`qformer.trust`)."""
        found = self.model_copy()
        found._origin = origin
        return found

    def building(self) -> AbstractContextManager[None]:
        """Context in which to build the named class."""
        return trust.reading(self._origin)


def read_from(section: Read, origin: str) -> Read:
    """Copy a section and mark every `Choice` in it, at any depth, as read from `origin`."""
    changes: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Choice):
            changes[name] = value.read_from(origin)
        elif isinstance(value, Section) and (inner := read_from(value, origin)) is not value:
            changes[name] = inner
    return section.model_copy(update=changes) if changes else section
