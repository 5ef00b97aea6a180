"""Data sources on the command line: a folder, a file, tars, a configuration, or `key=value` options."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from qformer.config import Choice, load_config
from qformer.data import sources
from qformer.formats import SUFFIXES, UNREAD
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qformer.data.base import Source


def pairs(words: list[str], of: str = "the data source", such: str = "path=captions.jsonl") -> dict[str, Any]:
    """Parse options of a data source (or of something else), written as `key=value` with YAML values.

    Raises:
        UsageError: a word of another form.
    """
    return dict(_parse_pair(word, of, such) for word in words)


def _parse_pair(text: str, of: str, such: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    try:
        read = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError):  # such as 2024-99-99, and 1,000 brackets
        equals = ""
    if not equals:
        raise UsageError(f"'{text}' is not an option of {of}; write key=value, such as {such}")
    return key, os.path.expanduser(read) if isinstance(read, str) and read.startswith("~/") else read


def open_data(words: Sequence[str], output: Path) -> Source:
    """Open the source that `choose_data` finds. Raises UsageError: it cannot be used."""
    return sources.for_run(choose_data(words), str(output))


def choose_data(words: Sequence[str]) -> Choice:
    """Find the source for words of the command line.

    Args:
        words: a folder, a file of JSON lines, tars, a configuration with `data.train`, or options as `key=value`.

    Raises:
        UsageError: none of these, or options that the source does not have.
    """
    first = words[0]
    key, equals, _ = first.partition("=")
    if len(words) > 1 or (equals and key.isidentifier() and not Path(first).exists()):
        named = {"name": "jsonl"} | pairs(list(words))
    elif first.startswith("pipe:") or "://" in first or ".tar" in first:
        named = {"name": "webdataset", "path": first}
    elif first.endswith((".yaml", ".yml")):
        named = load_config(first).data.train.model_dump()
    elif Path(first).is_dir():
        tars = any(Path(first).glob("*.tar"))
        named = {"name": "webdataset", "path": f"{first}/*.tar"} if tars else {"name": "folder", "path": first}
    elif first.lower().endswith(tuple(SUFFIXES | UNREAD)):
        raise UsageError(
            f"'{first}' is a single image; give the folder that holds it, or a list of images in JSON lines"
        )
    else:
        named = {"name": "jsonl", "path": first}
    choice = Choice(**named)
    sources.check(choice.name, choice.options)
    return choice
