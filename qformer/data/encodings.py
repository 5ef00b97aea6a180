"""Detection of the encodings of text files: captions, tables and lists."""

from __future__ import annotations

import codecs
import re

from qformer.types import UsageError

MARKS = (  # UTF-32 first: its little-endian mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def decode_text(data: bytes) -> str:
    """Decode UTF-8, UTF-16 or UTF-32 with a byte order mark, and UTF-16 of mostly Latin letters without one.

    Any other encoding is read as UTF-8 with U+FFFD for invalid bytes, which `is_mangled` detects.
    """
    return data.decode(encoding_of(data), "replace").removeprefix("\ufeff")


def encoding_of(data: bytes) -> str:
    """Detect the encoding of a text as in `decode_text`, and return Python's name for it; UTF-8 by default."""
    for mark, kind in MARKS:
        if data.startswith(mark):
            return kind
    # in UTF-16, one of the two bytes of a Latin letter is zero, always the same one
    if len(data) % 2 == 0:
        for kind, zeros, others in (("utf-16-le", data[1::2], data[::2]), ("utf-16-be", data[::2], data[1::2])):
            if zeros.count(0) * 2 > len(zeros) and not others.count(0):
                return kind
    return "utf-8"


def refuse_utf16(file: str, start: bytes) -> None:
    """Refuse a file of lines in UTF-16 or UTF-32, whose line ends are two or four bytes, by its first bytes.

    Raises:
        UsageError: the file is in such an encoding.
    """
    kind = encoding_of(start).upper()
    if kind != "UTF-8":
        raise UsageError(f"'{file}' is {kind} text; save it as UTF-8, such as with iconv -f {kind} -t UTF-8")


def lines_of(text: str) -> list[str]:
    """Split a text into lines at the line ends of any system, but not at other Unicode line breaks."""
    return re.split("\r\n|\r|\n", text)
