"""Find things by name: a known name from a table, `module:Class` for outsiders, or an error that lists the names."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from qformer import trust
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known name closest to `name`, or the list of all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"known are {', '.join(names)}"


def find(table: Mapping[str, Any], name: str, what: str = "name", own: bool = False) -> Any:
    """The entry of `table` called `name`; the value of an entry may be written `module:Class`.

    Args:
        own: `name` itself may be the `module:Class` of somebody's own. Never where it may come from a visitor.

    Raises:
        UsageError: the name is not in the table, or the module or class it points to does not exist; or (`Untrusted`)
            a class of one's own that somebody else's file names.
    """
    entry = table.get(name)
    if entry is None and own and ":" in name:
        trust.judge(name, trust.IMPORTED)
        entry = name
    if entry is None:
        raise UsageError(f"unknown {what} '{name}': {nearest(name, table)}")
    if not isinstance(entry, str):
        return entry
    module, _, attribute = entry.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:  # the last two: ':Class', '.module:Class'
        raise UsageError(f"{what} '{name}' cannot be imported ({error}); write it as package.module:Class") from error


def build(table: Mapping[str, Any], name: str, options: Mapping[str, Any], what: str) -> Any:
    """An instance of the dataclass that `name` stands for, its fields checked and coerced from `options`.

    YAML gives `1e-4` as a string and a list for a tuple; the declared types of the fields decide.

    Raises:
        UsageError: unknown name, unknown option (the nearest one is named), wrong type or refused value; or
            (`Untrusted`) a class, a command or an address that somebody else's file names.
    """
    target = find(table, name, what, own=True)
    if not dataclasses.is_dataclass(target):
        raise UsageError(f"{what} '{name}' is not a dataclass, whose fields would be its options; make it one")
    fields = {f.name for f in dataclasses.fields(target) if f.init}
    for key in options:
        if key not in fields:
            raise UsageError(f"{what}.{key} is not an option of '{name}': {nearest(key, fields)}")
    try:
        return TypeAdapter(target).validate_python(dict(options))
    except ValidationError as error:
        within = error.errors()[0].get("ctx", {}).get("error")  # of a source inside this one
        raise within if isinstance(within, trust.Untrusted) else UsageError(explain(error, what)) from error


def explain(error: ValidationError, where: str = "") -> str:
    """The first fault that pydantic found, as one sentence with the path of the key and the value given."""
    first = error.errors()[0]
    path = ".".join([where, *(str(part) for part in first["loc"])]).strip(".")
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if first["type"] == "missing":
        return f"{path} is required; add it to the configuration"
    if first["type"] == "value_error":
        return message if message.startswith(path) else f"{path}: {message}"
    return f"{path}: {message}, but got {first['input']!r}"


TOWERS = Path(__file__).parent / "towers"


def tower(path: str) -> str:
    """`mini:NAME` is the folder of a shipped tower (`mini:vit`, `mini:opt`, ...); any other path stays as it is.

    Raises:
        UsageError: no tower of that name is shipped.
    """
    scheme, colon, name = path.partition(":")
    if scheme != "mini" or not colon:
        return path
    shipped = {folder.name: folder for folder in TOWERS.glob("*/") if (folder / "config.json").is_file()}
    return str(find(shipped, name, "shipped tower"))
