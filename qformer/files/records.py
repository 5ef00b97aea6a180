"""JSON of ours: files of one object, and lines that a run appends to.

Of lines, what a kill cut off is passed over, and a shorter list replaces a longer whole.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import contextmanager
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qformer import lookup
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path


class Form(BaseModel):
    """The keys of an object of ours and their types: `1` is no text and `"1"` no number; further keys may be there."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class Step(Form):
    """A line of a file with a record per step."""

    step: int


class Metrics(Step):
    """A line of `metrics.jsonl`: numbers, beside the kind."""

    __pydantic_extra__: dict[str, float] = Field(init=False)
    kind: str


def read_object(file: Path, form: type[Form]) -> dict[str, Any]:
    """The JSON object in a file, of this form.

    Raises:
        UsageError: it cannot be read, is no JSON, or is of another form; names the file, and the key with what it holds
            and what it should.
    """
    try:
        values = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"'{file}' cannot be read as JSON ({error})") from error
    if fault := _find_fault(values, form):
        raise UsageError(f"'{file}' is not as it was written ({fault})")
    return values


def _find_fault(values: Any, form: type[Form]) -> str:
    """What is wrong with an object, nothing if it is of the form."""
    try:
        form.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "missing":
            return f"{'.'.join(map(str, first['loc']))} is missing"
        if not first["loc"]:
            return "it is no object with keys"
        return shorten(lookup.explain(error, values), 300)
    return ""


def read_lines(file: Path, form: type[Form]) -> list[dict[str, Any]]:
    """The lines of a file, each an object of this form; one that a kill cut off is passed over.

    Raises:
        UsageError: any other that is not of the form; names the file, the line and the key.
    """
    lines = file.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            fault = _find_fault(record, form)
        except (ValueError, RecursionError):
            if not line.strip() or number == len(lines):  # a whole one has its end
                continue
            fault = "it is no JSON"
        if fault:
            raise UsageError(
                f"line {number} of '{file}' is not as it was written ({fault}); take it out, or move the file away"
            )
        records.append(record)
    return records


def append_record(file: Path, record: Mapping[str, Any]) -> None:
    """Add a line to a file, or nothing at all.

    Raises:
        OSError: it could not be written, as on a full disk; what was there is as it was.
    """
    with file.open("ab") as opened:
        before = opened.tell()
        try:
            opened.write((json.dumps(record) + "\n").encode())
            opened.flush()
        except OSError:
            os.truncate(file, before)
            raise


def read_records(file: Path) -> list[dict[str, Any]]:
    """The lines of a file; one that was cut off while it was written is passed over."""
    records = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def replace_records(file: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write the file anew; a kill in the middle leaves it as it was."""
    partial = file.with_suffix(".partial")
    partial.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    os.replace(partial, file)


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON for standard output, in letters that it takes: a name that is no UTF-8 is escaped, and so survives."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent)
    return text


ORIGINAL = "_original"  # behind the name of a count that takes each text for true of one image alone


@contextmanager
def writing(output: Path) -> Iterator[None]:
    """Inside, what cannot be written is one sentence.

    Raises:
        UsageError: a full disk, no permission.
    """
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"'{output}' cannot be written ({error.strerror}); what is done is kept: make room, and give the same "
            "command"
        ) from error
