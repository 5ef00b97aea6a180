"""Lookup of classes by name, from a table or as `module:Class`, and construction with checked options."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from qformer import trust
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

FINITE = ConfigDict(allow_inf_nan=False)
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:/|data:", re.IGNORECASE)
NOT_FETCHED = " is an address, and addresses are not fetched: save it first"


def address(name: str | Path) -> str | None:
    """Return a name if it is an address (`https://...`, `s3://...` or `data:...`), else None.

    `Path` drops one of the two slashes of an address; it is restored.
    """
    text = str(name)
    return re.sub(r"^([A-Za-z][\w+.-]+:)/(?!/)", r"\1//", text) if ADDRESS.match(text) else None


def nearest(name: str, known: Iterable[str]) -> str:
    """Suggest the known name closest to `name`, as `did you mean 'x'?`, or else list all known names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"known are {', '.join(names)}"


def find(table: Mapping[str, Any], name: str, what: str = "name", own: bool = False) -> Any:
    """Find the entry `name` of a table; a text `module:Class` as an entry is imported.

    Args:
        own: allow `name` itself to be the `module:Class` of a user. Must be False if a visitor may choose `name`.

    Raises:
        UsageError: the name is not in the table, or its module or class does not exist; or (`Untrusted`) it is a
            `module:Class` from somebody else's file.
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
    """Build the dataclass called `name`; `options` are checked and converted to the types of its fields.

    Conversion is needed since YAML reads `1e-4` as a string and has lists for tuples.

    Raises:
        UsageError: unknown name, unknown option (the message suggests the nearest one), wrong type or invalid value;
            or (`Untrusted`) a class, a command or an address from somebody else's file.
    """
    target = check(table, name, options, what)
    try:
        return TypeAdapter(target).validate_python(dict(options))
    except ValidationError as error:
        within = error.errors()[0].get("ctx", {}).get("error")  # of a source inside this one
        raise within if isinstance(within, trust.Untrusted) else UsageError(explain(error, options, what)) from error


def check(
    table: Mapping[str, Any], name: str, options: Mapping[str, Any], what: str, complete: bool = True
) -> type[Any]:
    """Check options against the fields of the dataclass called `name`, and return the class without building it.

    No source is opened; checks in `__post_init__` are left to `build`.

    Args:
        complete: require the options that have no default.

    Raises:
        UsageError: unknown name, unknown or missing option, a value of the wrong type, such as true for a number, or an
            infinite number unless the field allows it (`Field(allow_inf_nan=True)`); or (`Untrusted`) a class from
            somebody else's file.
    """
    target = find(table, name, what, own=True)
    if not isinstance(target, type) or not dataclasses.is_dataclass(target):
        raise UsageError(f"{what} '{name}' is not a dataclass; make it one, with a field for each option")
    fields = {f.name: f for f in dataclasses.fields(target) if f.init}
    for key, given in options.items():
        if key not in fields:
            raise UsageError(f"{what}.{key} is not an option of '{name}': {nearest(key, fields)}")
        if fields[key].default != "" and any(isinstance(text, str) and not text.strip() for text in _as_list(given)):
            raise UsageError(f"{what}.{key} is empty; give a value, or leave the key out")
    settings = {"__module__": target.__module__, "__post_init__": _skip_post_init, "__pydantic_config__": FINITE}
    unopened = type(target.__name__, (target,), settings)
    try:
        values: Any = TypeAdapter(unopened).validate_python(dict(options))
    except ValidationError as error:
        if complete or any(fault["type"] != "missing" for fault in error.errors()):
            raise UsageError(explain(error, options, what)) from error
        return target
    for key, given in options.items():
        try:
            refuse_bools(given, getattr(values, key))
        except PydanticCustomError as error:
            raise UsageError(f"{what}.{key}: {error.message()}, but got {given!r}") from error
    return target


def refuse_empty(given: str) -> str:
    """Return a text unless it is empty or blank.

    Raises:
        PydanticCustomError: the text is empty.
    """
    if not given.strip():
        raise PydanticCustomError("empty", "it is empty; give a value, or leave the key out")
    return given


def _skip_post_init(self: Any, *_given: Any) -> None:
    """Stand-in for a `__post_init__`, which may open files."""


def _as_list(given: Any) -> list[Any]:
    return given if isinstance(given, list) else [given]


def refuse_bools(given: Any, value: Any) -> None:
    """Refuse booleans that pydantic has converted to numbers.

    Args:
        given: the value in the file.
        value: the value after conversion by pydantic.

    Raises:
        PydanticCustomError: the value is, or contains, such a boolean.
    """
    if isinstance(given, bool) and not isinstance(value, bool) and isinstance(value, int | float):
        raise PydanticCustomError("bool_for_a_number", "input should be a number, not true or false")
    if isinstance(given, list | tuple) and isinstance(value, list | tuple):
        for one, made in zip(given, value, strict=False):
            refuse_bools(one, made)
    elif isinstance(given, dict) and isinstance(value, dict):
        for key in given.keys() & value.keys():
            refuse_bools(given[key], value[key])


def explain(error: ValidationError, given: Any, where: str = "") -> str:
    """Describe the first fault that pydantic found in one sentence, with the path of the key and the given value.

    Wrong values are reported before missing ones.

    Args:
        given: the data that were validated.
        where: path of these data.
    """
    faults = error.errors()
    first = next((fault for fault in faults if fault["type"] != "missing"), faults[0])
    path = ".".join([where, *_data_keys(first["loc"], given)]).strip(".")
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if first["type"] == "missing":
        return f"{path}.{first['loc'][-1]} is required; add it to the configuration".lstrip(".")
    if first["type"] == "value_error":
        return message if message.startswith(path) else f"{path}: {message}"
    return f"{path}: {message}, but got {first['input']!r}"


def _data_keys(path: tuple[int | str, ...], given: Any) -> Iterator[str]:
    """Drop the members of unions, such as `list[str]`, from pydantic's path, so that keys and indices remain."""
    for part in path:
        is_key = isinstance(given, Mapping) and part in given
        if is_key or (isinstance(given, list | tuple) and isinstance(part, int) and part < len(given)):
            given = given[part]
            yield str(part)
