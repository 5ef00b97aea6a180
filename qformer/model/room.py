"""Room for what is shown: how many visual tokens a language model can read in front of a text, and what exceeds it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from qformer.llm.plain_text import PlainText
from qformer.llm.rows import positions
from qformer.resolution.base import Refused
from qformer.resolution.limits import named

if TYPE_CHECKING:
    from qformer.connectors.base import Connector
    from qformer.llm.base import LanguageModel
    from qformer.types import Plan


@dataclass(frozen=True)
class Room:
    """Positions that a language model has in front of a text; calling it refuses a plan that needs more of them.

    It holds no weights, so that the processes that read data can have it.

    Attributes:
        connector: counts the tokens of plans; on the meta device.
        words: tokenizes the texts around tiles.
        most: visual tokens that there is room for, markers and texts around tiles included; None: any number.
        text: length of the text, for messages. model: type of the language model, for messages.
        reduced_by: options of the resolution that lower the number of tokens, for messages.
    """

    connector: Connector
    words: PlainText
    most: int | None
    text: int
    model: str
    reduced_by: str

    @classmethod
    def of(cls, connector: Connector, llm: LanguageModel, reduced_by: str, taken: int, text: int | None = None) -> Room:
        """Room of a language model before `taken` tokens and those of a template; messages call it a text of `text`."""
        limit = positions(llm.model)
        return cls(
            connector=_without_weights(connector),
            words=PlainText(llm.tokenizer),
            most=None if limit is None else max(limit - llm.chat.length - taken, 0),
            text=taken if text is None else text,
            model=llm.model.config.model_type,
            reduced_by=reduced_by,
        )

    def count(self, plan: Plan) -> int:
        """Count what the language model reads of a plan, as `VisionLanguageModel.count_tokens` does."""
        leads = sum(len(self.words.meant(tile.lead)) for tile in plan.tiles if tile.lead)
        return self.connector.count_tokens(plan) + plan.markers + leads

    def __call__(self, plan: Plan) -> None:
        """Check that a picture, clip or row of this plan fits.

        Raises:
            UsageError: it does not; a bad sample of a data set (`Refused`).
        """
        if self.most is not None and (visual := self.count(plan)) > self.most:
            raise Refused(
                f"{named(plan)} makes {visual:,} visual tokens, but before a text of {self.text} this {self.model} "
                f"model has {self.most:,} positions for them; lower {self.reduced_by or 'max_frames'} of resolution, "
                "or use a connector with fewer tokens"
            )


def _without_weights(connector: Connector) -> Connector:
    """Copy a connector onto the meta device; no weight is copied on the way."""
    weights = {id(one): nn.Parameter(one.detach().to("meta"), one.requires_grad) for one in connector.parameters()}
    return copy.deepcopy(connector, weights | {id(one): one.to("meta") for one in connector.buffers()})
