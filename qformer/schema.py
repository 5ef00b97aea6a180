"""What the configuration is made of: strict sections, names with options, kinds of numbers; and some sections."""

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
    model_validator,
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
    """A part of the configuration: unknown keys and infinite numbers are refused, values are fixed once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="wrap")
    @classmethod
    def _no_bool_for_a_number(cls, given: Any, read: ValidatorFunctionWrapHandler) -> Any:
        value = read(given)
        lookup.refuse_bools(given, value)
        return value


class Choice(BaseModel):
    """A name from a table and the options of what it names, typed by the user unless it says where it was read."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str
    _origin: str = PrivateAttr(default="")  # no key of a file can set it, and copies keep it

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    def __eq__(self, other: object) -> bool:
        """Whether it says the same, wherever it was read."""
        return isinstance(other, Choice) and (self.name, self.options) == (other.name, other.options)

    def read_from(self, origin: str) -> Self:
        """The same, known to be somebody else's: of the gallery 'g', say (`qformer.trust`)."""
        found = self.model_copy()
        found._origin = origin
        return found

    def building(self) -> AbstractContextManager[None]:
        """What this names is to be built inside."""
        return trust.reading(self._origin)


def read_from(section: Read, origin: str) -> Read:
    """A section in which every `Choice`, however deep, was read from `origin`."""
    changes: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Choice):
            changes[name] = value.read_from(origin)
        elif isinstance(value, Section) and (inner := read_from(value, origin)) is not value:
            changes[name] = inner
    return section.model_copy(update=changes) if changes else section


class FeaturesConfig(Section):
    """A store of the frozen image encoder's tokens, filled before training, which then reads them instead of images.

    Attributes:
        path: folder of the store.
        crops: random crops (and mirrors) stored of each image, of which each visit draws one.
        dtype: of the stored tokens; int8 has a scale for each token.
    """

    path: Named
    crops: Positive = 1
    dtype: Packing = "fp16"

    @model_validator(mode="before")
    @classmethod
    def _folder_alone(cls, given: Any) -> Any:
        return {"path": given} if isinstance(given, str) else given


class QuestionConfig(Section):
    """The Q-Former of stage two reads the question beside its queries (BLIP-2, section 4.3 and appendix).

    Attributes:
        init: run or checkpoint of stage one that the text path (word and position embeddings, text feed-forward) is
            taken from, where the `init` of the run has none: stage two keeps the query path only. By default BERT's.
        max_tokens: questions are cut here for the Q-Former, `[CLS]` and `[SEP]` counted.
    """

    init: Named | None = None
    max_tokens: Positive = 32


class LoraConfig(Section):
    """Low-rank adapters of a frozen language model (Hu et al., arXiv 2106.09685); they need the package peft.

    Attributes:
        rank: of the two matrices whose product is added to a weight.
        alpha: their product counts alpha / rank times.
        dropout: of what they read, in training.
        targets: ends of the names of the Linear layers that get them; by default those that peft knows to be usual for
            the model, queries and values of the attention.
    """

    rank: Positive = 8
    alpha: Annotated[float, Field(gt=0)] = 16
    dropout: Fraction = 0.0
    targets: list[str] | None = None


POSITIONS = {"bert": 128, "opt": 512}  # of towers from scratch, those of a T5 being relative


class BackboneConfig(Section):
    """A small tower trained from scratch: sizes of the model that `stage: vision` or `stage: language` makes.

    Attributes:
        kind: what is built, saved as an ordinary transformers folder.
        heads: attention heads.
        intermediate: width inside the feed-forward layers; 4 x `width` by default.
        decoder_layers: of a T5, whose encoder has `layers`; as many by default, and no more (transformers has a
            cache of `layers` where it generates).
        image_size, patch_size: of a ViT.
        text: BERT folder or hub id against which a ViT is trained contrastively; it is discarded afterwards.
        freeze_text: keep that BERT as it is and train a projection on it only.
        vocab_size: of the WordPiece (BERT), byte-level BPE (OPT) or word BPE (T5) tokeniser trained on the captions.
    """

    kind: Literal["vit", "bert", "opt", "t5"]
    width: Positive = 192
    layers: Positive = 6
    heads: Positive = 3
    intermediate: Positive | None = None
    decoder_layers: Positive | None = None
    image_size: Positive = 112
    patch_size: Positive = 16
    text: Named | None = None
    freeze_text: bool = False
    vocab_size: Positive = 4096
    max_tokens: Positive = 48

    @model_validator(mode="after")
    def _width_divides(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"backbone.width {self.width} does not divide into {self.heads} heads; change one of them")
        if self.decoder_layers is not None and self.decoder_layers > self.layers:
            raise ValueError(
                f"backbone.decoder_layers {self.decoder_layers} is more than backbone.layers {self.layers}; lower it"
            )
        if self.kind == "vit" and (self.width % 4 or self.image_size % self.patch_size):
            raise ValueError(
                f"a vit of backbone.width {self.width}, image_size {self.image_size} and patch_size {self.patch_size} "
                "cannot be built; give a width that 4 divides and an image_size that patch_size divides"
            )
        return self


class TextConfig(Section):
    """The BERT that the Q-Former starts from and whose tokeniser it uses.

    Attributes:
        bert: folder or hub id. The Q-Former's sizes are read from it unless given.
        fold_token_types: add BERT's token-type row 0 to its word embeddings, so that the text path equals BERT
            exactly; the original drops it.
        max_tokens: captions are cut here, `[CLS]` and `[SEP]` counted.
    """

    bert: Named = "bert-base-uncased"
    fold_token_types: bool = False
    max_tokens: Positive = 32


class LossConfig(Section):
    """Stage one (BLIP-2, section 3.2).

    Attributes:
        embed_width: P, the width of the ITC space.
        temperature: start of the learned ITC temperature.
        smoothing: label smoothing of ITC and ITG.
        gather_grad: `anchor` lets gradient into ITC through the row side only, as the original does; `full` is the
            true gradient of the loss.
    """

    embed_width: Positive = 256
    temperature: Annotated[float, Field(gt=0)] = 0.07
    smoothing: Fraction = 0.1
    gather_grad: Literal["anchor", "full"] = "anchor"
