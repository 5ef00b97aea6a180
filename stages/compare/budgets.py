"""Equal budgets: options at which systems have as many visual tokens, and steps at which they take as many FLOPs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qformer.data.base import Source
    from qformer.schema import Config
    from qformer.stages.compare.costs import Cost
    from qformer.stages.compare.systems import Refused


def equal_tokens(configs: Mapping[str, Config], source: Source, tokens: float) -> dict[str, Config | Refused]:
    """The systems with as nearly `tokens` visual tokens a row as they can have, on the mean over a source."""
    raise NotImplementedError


def equal_flops(
    configs: Mapping[str, Config], costs: Mapping[str, Cost], reference: str
) -> dict[str, Config | Refused]:
    """The systems with as many steps as take the training FLOPs of the reference."""
    raise NotImplementedError
