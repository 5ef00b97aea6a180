"""Reading and writing of our JSON files: one object per file, or lines that a run appends.

A last line that was cut off when a process was killed is ignored. `replacing` writes any file or folder atomically.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from qformer import lookup
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path


LONGEST = 300  # characters of what is wrong with an object, which may be one word


class Form(BaseModel):
    """Schema of a JSON object: strict types (`1` is not a text, `"1"` not a number), and further keys are allowed."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class Step(Form):
    """Line of a file with one record per step."""

    step: int


class Point(Step):
    """Numbers by name."""

    __pydantic_extra__: dict[str, float] = Field(init=False)


class Metrics(Point):
    """Line of `metrics.jsonl`: a kind, and numbers by name."""

    kind: str


LINEAR_MAP = "linear.json"  # in the folder of a run of stage one


class LinearMapNumbers(Form):
    """Contents of `LINEAR_MAP`: what made a linear map of the frozen towers, and what it reaches on held-out data."""

    made: dict[str, Any]
    photos: int
    texts: int
    linear: dict[str, float]


def form_of(kind: Any, names: str) -> type[Form]:
    """Form of an object that has each of these names, separated by spaces, and of this type."""
    fields: Any = dict.fromkeys(names.split(), (kind, ...))
    return create_model("Entry", __base__=Form, **fields)


def read_object(file: Path, form: type[Form]) -> dict[str, Any]:
    """Read a JSON object of this form from a file.

    Raises:
        UsageError: the file cannot be read, is not JSON, or has another form; the message names the file, the key, and
            the found and expected values.
    """
    try:
        values = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"'{file}' cannot be read as JSON ({error})") from error
    if fault := _find_fault(values, form):
        raise UsageError(f"'{file}' is not as it was written ({fault})")
    return values


def _find_fault(values: Any, form: type[Form]) -> str:
    """Describe what is wrong with an object; empty if it has the form."""
    try:
        form.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "missing":
            return f"{'.'.join(map(str, first['loc']))} is missing"
        if not first["loc"]:
            return "it is not an object with keys"
        told = " ".join(lookup.explain(error, values).split())
        return told if len(told) <= LONGEST else f"{told[:LONGEST]} [...]"
    return ""


def read_lines(file: Path, form: type[Form]) -> list[dict[str, Any]]:
    """Read a file of lines, each an object of this form; an incomplete last line is ignored.

    Raises:
        UsageError: a line of another form; the message names the file, the line and the key.
    """
    lines = file.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            fault = _find_fault(record, form)
        except (ValueError, RecursionError):
            if not line.strip() or number == len(lines):  # a complete last line ends in a newline
                continue
            fault = "it is not JSON"
        if fault:
            raise UsageError(
                f"line {number} of '{file}' is not as it was written ({fault}); take it out, or move the file away"
            )
        records.append(record)
    return records


def append_record(file: Path, record: Mapping[str, Any]) -> None:
    """Append a line to a file, atomically.

    Raises:
        OSError: the line could not be written, as on a full disk; the file is unchanged.
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
    """Read a file of JSON lines; damaged lines are ignored."""
    records = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return records


def replace_records(file: Path, records: Iterable[dict[str, Any]]) -> None:
    """Replace a file atomically: if the process is killed, the file is unchanged."""
    replace_text(file, "".join(json.dumps(record) + "\n" for record in records))


def replace_text(file: Path, text: str, shared: bool = False) -> None:
    """Replace a file atomically by a text in UTF-8."""
    with replacing(file, shared) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def replacing(target: Path, shared: bool = False) -> Iterator[Path]:
    """Give a path to write to, and move it to `target` once it is whole and on the disk; a file or a folder.

    After a kill or an error the old target is unchanged. A link of that name is replaced, not followed.

    Args:
        shared: several processes may write the same file, each the whole of it.
    """
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial" if shared else f"{target.name}.partial")
    replaces_folder = target.is_dir()  # one that is made meanwhile is somebody else's, and stays
    _remove(partial)
    try:
        yield partial
        for file in [partial, *partial.rglob("*")]:
            if file.is_file():
                flush(file)
        if replaces_folder:
            shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Push a file, or the names in a folder, to the disk, so that a crash cannot leave an empty one after a rename."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def to_json(value: Any, indent: int | None = None) -> str:
    """Format JSON for standard output; characters that its encoding cannot represent are escaped."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent)
    return text


ORIGINAL = "_original"  # suffix of metrics that count each text as true of a single image, as the original does


@contextmanager
def writing(output: Path) -> Iterator[None]:
    """Context in which a failed write is reported as one sentence.

    Raises:
        UsageError: the disk is full, or permission is denied.
    """
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"'{output}' cannot be written ({error.strerror}); what is done is kept: free some space and run the same "
            "command again"
        ) from error
