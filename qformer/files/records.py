"""JSON of ours: files of one object, and lines that a run appends to.

Of lines, what a kill cut off is passed over, and a shorter list replaces a longer whole. `replacing` writes any file or
folder so that it is there whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
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
    if fault := _fault(values, form):
        raise UsageError(f"'{file}' is not as it was written ({fault})")
    return values


def _fault(values: Any, form: type[Form]) -> str:
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
            fault = _fault(record, form)
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
    replace_text(file, "".join(json.dumps(record) + "\n" for record in records))


def replace_text(file: Path, text: str, shared: bool = False) -> None:
    """Write a text in UTF-8 in the place of a file; see `replacing`."""
    with replacing(file, shared) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def replacing(target: Path, shared: bool = False) -> Iterator[Path]:
    """A path to write a file or folder to, which takes the place of `target` once it is whole and on the disk.

    A kill or an error leaves what was there before; a link of that name is replaced, not followed.

    Args:
        shared: other processes may write the same file, each the whole of it.
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
