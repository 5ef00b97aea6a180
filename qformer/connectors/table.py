"""Connectors by name: `build("my_package:Linear", width, llm_width)`.

That of the Q-Former is made from the sections of a configuration (`qformer.model.assembly`).
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_type_hints

from qformer import lookup
from qformer.connectors.base import Connector
from qformer.schema import QFORMER
from qformer.types import UsageError

if TYPE_CHECKING:
    from qformer.fields import Choice

CONNECTORS: dict[str, Any] = {
    "qformer": "qformer.model.connectors.bridge:QFormerConnector",
    "mlp": "qformer.connectors.mlp:MLP",
    "pixel_shuffle_mlp": "qformer.connectors.shuffle:PixelShuffleMLP",
    "resampler": "qformer.connectors.resampler:Resampler",
    "spatial_resampler": "qformer.connectors.resampler:SpatialResampler",
    "compressor": "qformer.connectors.compressor:Compressor",
    "merger": "qformer.connectors.shuffle:PatchMerger",
    "avg_pool": "qformer.connectors.pooling:AvgPool",
    "c_abstractor": "qformer.connectors.pooling:CAbstractor",
    "token_packer": "qformer.connectors.token_packer:TokenPacker",
}
SIZES = ("width", "llm_width")  # what the towers decide, not the options


def build(name: str, width: int, llm_width: int, **options: Any) -> Connector:
    """A connector of the table, or `module:Class` of a subclass of `Connector` of your own.

    Args:
        width: D, of the image encoder's tokens. llm_width: L, of the language model.
        options: further parameters of its `__init__`, coerced to the types that these declare.

    Raises:
        UsageError: unknown name or option, a value of the wrong type, or the connector of the Q-Former, which is made
            from a configuration.
    """
    kind, known = _class(name)
    given = lookup.build({name: known}, name, options, "connector")
    return kind(width, llm_width, **{field.name: getattr(given, field.name) for field in dataclasses.fields(known)})


def check(name: str, options: Mapping[str, Any], complete: bool = True) -> None:
    """Check that the options are those of the connector; nothing is made.

    Args:
        complete: all options that have no default must be there.

    Raises:
        UsageError: as of `build`.
    """
    lookup.check({name: _class(name)[1]}, name, options, "connector", complete=complete)


def chosen(choice: Choice, width: int, llm_width: int) -> Connector:
    """The connector that a configuration names.

    Raises:
        UsageError: as of `build`; or (`Untrusted`) a class that somebody else's file names.
    """
    with choice.building():
        return build(choice.name, width, llm_width, **choice.options)


def _class(name: str) -> tuple[Any, type[Any]]:
    """The class that `name` stands for, and the options that its `__init__` takes, as a dataclass."""
    kind = lookup.find(CONNECTORS, name, "connector", own=True)
    if not (isinstance(kind, type) and issubclass(kind, Connector)):
        raise UsageError(
            f"connector '{name}' is no connector; make it a subclass of qformer.model.connectors.Connector"
        )
    if name == QFORMER:
        raise UsageError(
            f"connector '{name}' is made from the sections of a configuration; give one to "
            "qformer.model.assembly.build_vision_language"
        )
    taken = [p for p in inspect.signature(kind).parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if tuple(parameter.name for parameter in taken[: len(SIZES)]) != SIZES:
        raise UsageError(f"connector '{name}' does not take {' and '.join(SIZES)} first; give its __init__ these two")
    try:
        types = get_type_hints(kind.__init__)
    except NameError as error:
        raise UsageError(
            f"connector '{name}' has an option whose type cannot be found ({error}); import it where the class is read"
        ) from error
    fields = [(option.name, types.get(option.name, Any), _field(option.default)) for option in taken[len(SIZES) :]]
    namespace = {"__module__": kind.__module__}
    return kind, dataclasses.make_dataclass(kind.__name__, fields, kw_only=True, namespace=namespace)


def _field(default: Any) -> Any:
    if default is inspect.Parameter.empty:
        return dataclasses.field()
    if type(default).__hash__ is None:  # a list, say, which a dataclass does not take as it is
        return dataclasses.field(default_factory=lambda: default)
    return dataclasses.field(default=default)
