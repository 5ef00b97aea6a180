"""Records of JSON files that are one list or object, not an object per line, or the name of the source to use."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from qformer.data.encodings import decode_text
from qformer.types import UsageError

if TYPE_CHECKING:
    from pathlib import Path

NOT_JSON = (ValueError, RecursionError)  # the latter for 1,000 brackets in a row
BLANK = b" \t\r\n\xef\xbb\xbf"  # including the byte order mark of UTF-8
PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd", b"PK\x03\x04")  # gzip, bzip2, xz, zstd, zip
TABLES = {".parquet", ".arrow", ".csv", ".tsv"}


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UsageError: the file is not JSON.
    """
    refuse_table(path, "JSON")
    try:
        return json.loads(decode_text(path.read_bytes()))
    except NOT_JSON as error:
        raise UsageError(f"'{path}' is not JSON ({error}); for one JSON object per line use name: jsonl") from error


def refuse_table(path: Path, expected: str) -> None:
    """Refuse tables and compressed files, and name the source that reads tables.

    Raises:
        UsageError: the file is one.
    """
    if path.suffix.lower() in TABLES:
        raise UsageError(f"'{path}' is a table, not {expected}; read it by name: datasets")
    with path.open("rb") as file:
        if file.read(6).startswith(PACKED):
            raise UsageError(f"'{path}' is compressed; unpack it, such as with gzip -d or unzip, and give the content")


def read_document(path: Path, named: bool = False) -> list[Any] | None:
    """Read the records of a file that is a single JSON value; None if it has one object per line.

    Supported are a list of records, an object with a list `data` (TextVQA, DocVQA), `questions` (SEED-Bench) or
    `annotations` (MiniGPT-4's captions), and an object of records by id (ScienceQA's problems.json), whose ids become
    `question_id`.

    Args:
        named: the user has named the column of the images, so lists without its usual name can be read too.

    Raises:
        UsageError: a file for another source, which the message names, or a list that is cut off.
    """
    refuse_table(path, "a file with one JSON object per line")
    with path.open("rb") as file:
        first = next((line for line in file if line.strip(BLANK)), b"").strip(BLANK)
        more = any(line.strip(BLANK) for line in file)
    if not first.startswith((b"[", b"{")) or (more and first.startswith(b"{") and first != b"{" and _parse_json(first)):
        return None
    values = _parse_json(path.read_bytes())
    if isinstance(values, dict) and "image" not in values:
        held = next(
            (key for key in ("data", "questions", "images", "annotations") if _holds_records(values, key)), None
        )
        if held == "images" or (held == "annotations" and "caption" not in values[held][0]):
            raise _wrong_source_error(path, values)
        if held is not None:
            values = values[held]
        elif values and all(isinstance(record, dict) for record in values.values()):
            values = [{"question_id": number} | record for number, record in values.items()]
    if values is None and first.startswith(b"[") and _parse_json(first) is None:
        raise UsageError(f"'{path}' begins as a JSON list but is not one; it may be cut off: get it again")
    if not isinstance(values, list):
        return None
    if values and isinstance(values[0], dict) and not named:
        _refuse_others(path, values[0])
    return values


def _parse_json(data: bytes) -> Any:
    try:
        return json.loads(decode_text(data))
    except NOT_JSON:
        return None


def _holds_records(values: dict[str, Any], key: str) -> bool:
    found = values.get(key)
    return isinstance(found, list) and bool(found) and all(isinstance(record, dict) for record in found)


def _wrong_source_error(path: Path, values: dict[str, Any]) -> UsageError:
    if not _holds_records(values, "images"):
        return UsageError(f"'{path}' has only answers; read the questions by name: vqa, with this as data.annotations")
    name = "karpathy" if "sentences" in values["images"][0] else "coco"
    return UsageError(f"'{path}' is an annotation file in the form of {name}; read it by name: {name}")


def _refuse_others(path: Path, record: dict[str, Any]) -> None:
    """Refuse lists of questions whose images only another source can find."""
    name = None
    if "regions" in record:
        name = "visual_genome"
    elif "imageId" in record:
        name = "gqa"
    elif "question" in record and isinstance(record.get("image_id"), int):
        name = "aokvqa" if "choices" in record else "vqa"
    elif "answers" in record and "image_id" in record and not record.keys() & {"question", "text", "image"}:
        raise _wrong_source_error(path, {})
    if name is not None and "image" not in record:
        raise UsageError(f"'{path}' has the form of {name}; read it by name: {name}")
