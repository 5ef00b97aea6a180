"""Find things by name: a known name from a table, `module:Class` for outsiders, or an error that lists the names."""

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
    """The address that a name is, `https://...`, `s3://...` or `data:...`; None for any other name.

    A path made of an address has lost one of its two slashes, which it is given back.
    """
    text = str(name)
    return re.sub(r"^([A-Za-z][\w+.-]+:)/(?!/)", r"\1//", text) if ADDRESS.match(text) else None


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
    target = check(table, name, options, what)
    try:
        return TypeAdapter(target).validate_python(dict(options))
    except ValidationError as error:
        within = error.errors()[0].get("ctx", {}).get("error")  # of a source inside this one
        raise within if isinstance(within, trust.Untrusted) else UsageError(explain(error, options, what)) from error


def check(
    table: Mapping[str, Any], name: str, options: Mapping[str, Any], what: str, complete: bool = True
) -> type[Any]:
    """The dataclass that `name` stands for, whose fields the options are found to be; nothing is made of them.

    So a source is not opened, and what `__post_init__` says of values is left to `build`.

    Args:
        complete: whether an option that has no default must be there.

    Raises:
        UsageError: unknown name, unknown or missing option, or a value of the wrong type, such as true for a number, or
            an infinite one where the field does not allow it (`Field(allow_inf_nan=True)`); or (`Untrusted`) a class
            that somebody else's file names.
    """
    target = find(table, name, what, own=True)
    if not isinstance(target, type) or not dataclasses.is_dataclass(target):
        raise UsageError(f"{what} '{name}' is not a dataclass, whose fields would be its options; make it one")
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
    """A text that says something.

    Raises:
        PydanticCustomError: it is empty.
    """
    if not given.strip():
        raise PydanticCustomError("empty", "it is empty; give a value, or leave the key out")
    return given


def _skip_post_init(self: Any, *_given: Any) -> None:
    """In place of `__post_init__`, which may open files."""


def _as_list(given: Any) -> list[Any]:
    return given if isinstance(given, list) else [given]


def refuse_bools(given: Any, value: Any) -> None:
    """Refuse true and false where pydantic made them numbers.

    Args:
        given: as it stood in the file. value: what pydantic made of it.

    Raises:
        PydanticCustomError: it is one, or holds one.
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
    """The first fault that pydantic found, as one sentence with the path of the key and the value given.

    What is wrong is told before what is missing.

    Args:
        given: what was checked. where: its path.
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
    """Of pydantic's path what is in the data: between keys and numbers stand kinds of a union, such as `list[str]`."""
    for part in path:
        is_key = isinstance(given, Mapping) and part in given
        if is_key or (isinstance(given, list | tuple) and isinstance(part, int) and part < len(given)):
            given = given[part]
            yield str(part)
