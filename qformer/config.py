"""Loading of configurations from YAML files, which hold differences from the schema, and `key.sub=value` overrides.

An unknown key, a value of the wrong type or an impossible combination is a `UsageError` before anything is loaded.
"""

from __future__ import annotations

import difflib
import os
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ValidationError

from qformer import lookup
from qformer.data_schema import DataConfig, FeaturesConfig
from qformer.fields import Choice
from qformer.language_schema import LLMConfig, LoraConfig
from qformer.schema import (
    BackboneConfig,
    Config,
    LossConfig,
    QFormerConfig,
    QuestionConfig,
    TextConfig,
    TrainConfig,
)
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = [
    "BackboneConfig",
    "Choice",
    "Config",
    "DataConfig",
    "FeaturesConfig",
    "LLMConfig",
    "LoraConfig",
    "LossConfig",
    "QFormerConfig",
    "QuestionConfig",
    "TextConfig",
    "TrainConfig",
    "UnknownKey",
    "anchor",
    "by_prefix",
    "dump_config",
    "load_config",
    "parse_config",
    "read_values",
]

LARGEST = 100_000  # values in a configuration


class UnknownKey(UsageError):
    """A configuration has a key that no section knows."""


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply `key.sub=value` overrides, and validate the result.

    Args:
        path: a file, or the name of a shipped configuration, such as `quickstart/stage1.yaml`, from any folder.

    Raises:
        UsageError: no such file, not YAML, an override that is not `key=value`, or an invalid configuration.
    """
    return parse_config(read_values(path, overrides))


def read_values(path: str | Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """Read the plain data of a configuration, which are not checked; see `load_config`.

    Raises:
        UsageError: no such file, not YAML, or an override that is not `key=value`.
    """
    path = _find(Path(path))
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # such as 2024-99-99, and 1,000 brackets
        raise UsageError(f"'{path}' is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UsageError(
            f"'{path}' holds {type(values).__name__}, not the keys of a configuration; see the configs folder"
        )
    if _exceeds(values, LARGEST):
        raise UsageError(f"'{path}' holds more than {LARGEST:,} values once its aliases are written out; take them out")
    for override in overrides or []:
        _apply_override(values, override)
    expanded: dict[str, Any] = _expand_home(values)
    return expanded


def _expand_home(values: Any) -> Any:
    """Expand `~/` at the start of every text in plain data, as a shell does."""
    if isinstance(values, dict):
        return {key: _expand_home(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_expand_home(value) for value in values]
    return os.path.expanduser(values) if isinstance(values, str) and values.startswith("~/") else values


def _exceeds(values: Any, limit: int) -> bool:
    """Check if plain data hold more than `limit` values; a few nested YAML aliases can expand to billions."""
    left, count = [values], 0
    while left and count <= limit:
        value = left.pop()
        count += 1
        left += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return count > limit


def shipped() -> dict[str, Path]:
    """The shipped configurations: name, such as `quickstart/stage1.yaml` -> file."""
    folder = Path(str(resources.files("qformer.configs")))
    return {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*.yaml"))}


def _find(path: Path) -> Path:
    """Find the file at `path`, or the shipped configuration of that name, with or without a leading `configs/`."""
    if path.is_file():
        return path
    if address := lookup.address(path):
        raise UsageError(f"'{address}'{lookup.NOT_FETCHED} and give the file")
    known = shipped()
    name = path.as_posix().removeprefix("configs/")
    if name in known:
        return known[name]
    same = [other for other in known if Path(other).stem == path.stem]
    near = list(dict.fromkeys([*same, *difflib.get_close_matches(name, known, n=3, cutoff=0.7)]))[:3]
    advice = (
        f"did you mean {' or '.join(repr(other) for other in near)}?"
        if near
        else "give a YAML file, or the name of one in the configs folder, such as quickstart/stage1.yaml"
    )
    raise UsageError(f"no configuration at '{path}', and none of that name is shipped; {advice}")


def parse_config(values: dict[str, Any]) -> Config:
    """Check plain data (from YAML or a checkpoint) against the schema.

    Raises:
        UsageError: an invalid key (`UnknownKey`) or value; the message names the first one.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        unknown = [fault["loc"] for fault in error.errors() if fault["type"] == "extra_forbidden"]
        if unknown:  # reported first: a misspelled key is also a missing one
            *parents, key = [str(part) for part in unknown[0]]
            known = lookup.nearest(key, _find_section(parents).model_fields)
            raise UnknownKey(f"unknown configuration key '{'.'.join([*parents, key])}': {known}") from error
        raise UsageError(lookup.explain(error, values)) from error


def _find_section(parents: list[str]) -> type[BaseModel]:
    """Find the schema class that holds the keys below `parents`."""
    section: type[BaseModel] = Config
    for name in parents:
        kinds = getattr(section.model_fields[name].annotation, "__args__", (section.model_fields[name].annotation,))
        section = next(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel))
    return section


def _apply_override(values: dict[str, Any], override: str) -> None:
    """Set one `key.sub=value`; the value is parsed as YAML, so `[0.5, 1]` is a list and `null` is None."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UsageError(f"'{override}' is not an override; write key=value, such as train.steps=1000")
    *parents, last = key.split(".")
    for parent in parents:
        if not isinstance(values.get(parent), dict):
            values[parent] = {}
        values = values[parent]
    if not text.strip():
        raise UsageError(f"'{override}' has no value; write one, or {key}=null for none")
    try:
        values[last] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"the value of '{override}' is not YAML; quote it, as in '{key}=\"{text}\"'") from error


def by_prefix(overrides: list[str], names: tuple[str, ...]) -> dict[str, list[str]]:
    """Group overrides of several configurations by prefix: `vit.train.steps=10` -> `{"vit": ["train.steps=10"], ...}`.

    Raises:
        UsageError: an override that starts with none of the names.
    """
    found: dict[str, list[str]] = {name: [] for name in names}
    for override in overrides:
        name, _, rest = override.partition(".")
        if name not in found or not rest:
            raise UsageError(f"'{override}' names none of the configurations; write {'|'.join(names)}.key=value")
        found[name].append(rest)
    return found


#: Keys that the first configurations of a release did not have.
LATER = (
    ("start",),
    ("limits",),
    ("text", "pooling"),
    ("loss", "itm"),
    ("loss", "itg"),
    ("llm", "template"),
    ("llm", "clip_ids"),
    ("train", "bert_rate"),
)


def dump_config(config: Config) -> str:
    """Write the whole resolved configuration, defaults included, as YAML.

    The connector is written only if it is not the Q-Former's without links, and keys of `LATER` only if they differ
    from their defaults: so a configuration of an older version is written as before, and older versions can read it.
    """
    values = config.model_dump(mode="json", exclude_none=True)
    if config.has_qformer and config.links == "none":
        del values["connector"]
    for *place, key in LATER:
        section = getattr(config, place[0]) if place else config
        if section is not None and getattr(section, key) == type(section).model_fields[key].default:
            del (values[place[0]] if place else values)[key]
    return yaml.safe_dump(values, sort_keys=False)


def anchor(config: Config) -> Config:
    """Make existing tower folders and `init` absolute, so that a checkpoint finds them from any folder."""

    def absolute(path: str | None) -> str | None:
        return str(Path(path).resolve()) if path is not None and Path(path).exists() else path

    changes: dict[str, Any] = {
        "init": absolute(config.init),
        "vision": config.vision.model_copy(update=map_towers(config.vision.options, absolute)),
        "text": config.text.model_copy(update={"bert": absolute(config.text.bert)}),
    }
    if config.llm is not None:
        changes["llm"] = config.llm.model_copy(update={"path": absolute(config.llm.path)})
    if config.question is not None:
        changes["question"] = config.question.model_copy(update={"init": absolute(config.question.init)})
    return config.model_copy(update={key: value for key, value in changes.items() if value != getattr(config, key)})


def map_towers(options: Mapping[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """Copy the options of an image encoder with `change` applied to `path` and `weights`, also inside a mixture."""
    made: dict[str, Any] = {}
    for key, value in options.items():
        if isinstance(value, dict):
            made[key] = map_towers(value, change)
        else:
            made[key] = change(value) if key in ("path", "weights") else value
    return made
