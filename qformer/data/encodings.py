"""Encodings of text files: how bytes of captions, tables and lists become text."""

from __future__ import annotations

import codecs
import re

from qformer.types import UsageError

MARKS = (  # UTF-32 first: its little-endian mark begins as that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def decode_text(data: bytes) -> str:
    """The text of a file: UTF-8, UTF-16 or UTF-32 with its mark, and without one UTF-16 of mostly Latin letters.

    What is none of these is read as UTF-8 with U+FFFD for what is wrong, which `is_mangled` tells.
    """
    return data.decode(encoding_of(data), "replace").removeprefix("\ufeff")


def encoding_of(data: bytes) -> str:
    """The encoding of a text, as Python names it, told as by `decode_text`; UTF-8 where nothing tells another."""
    for mark, kind in MARKS:
        if data.startswith(mark):
            return kind
    # of Latin letters in UTF-16 one byte of two is zero, always the same one
    if len(data) % 2 == 0:
        for kind, zeros, others in (("utf-16-le", data[1::2], data[::2]), ("utf-16-be", data[::2], data[1::2])):
            if zeros.count(0) * 2 > len(zeros) and not others.count(0):
                return kind
    return "utf-8"


def refuse_utf16(file: str, start: bytes) -> None:
    """Refuse a file of lines by how it starts, where a line's end is two bytes or four.

    Raises:
        UsageError: it is UTF-16 or UTF-32.
    """
    kind = encoding_of(start).upper()
    if kind != "UTF-8":
        raise UsageError(f"'{file}' is {kind} text; save it as UTF-8, such as by iconv -f {kind} -t UTF-8")


def lines_of(text: str) -> list[str]:
    """The lines of a text, which end as on any system; other characters that break lines are part of a caption."""
    return re.split("\r\n|\r|\n", text)
