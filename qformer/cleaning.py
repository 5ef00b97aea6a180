"""Captions and questions: how files of them are decoded, and how they are cleaned, as the original does."""

from __future__ import annotations

import codecs
import re

from qformer.types import UsageError

MAX_WORDS = 50
PUNCTUATION = re.compile(r'[.!"()*#:;~]')
MANGLED = re.compile("[\x00-\x08\x0e-\x1b\x7f\ufffd]")  # control characters, and what stands for a lost character
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


def is_mangled(text: str) -> bool:
    """Whether characters were lost before this text came here, or it was read in another encoding than it has."""
    return MANGLED.search(text) is not None


def without_mangled(text: str) -> str:
    """What a model has written, less halves of characters, such as the last one where it was stopped."""
    return MANGLED.sub("", text)


def clean_question(text: str) -> str:
    """Lower case, punctuation removed except `?`, trailing spaces stripped, at most 50 words."""
    return _first_words(PUNCTUATION.sub("", text.lower()).rstrip(" "))


def clean_caption(text: str) -> str:
    """Lower case, punctuation to spaces, runs of spaces to one, outer spaces stripped, at most 50 words."""
    spaced = re.sub(r"\s{2,}", " ", PUNCTUATION.sub(" ", text.lower()))
    return _first_words(spaced.rstrip("\n").strip(" "))


def _first_words(text: str) -> str:
    return " ".join(text.split(" ")[:MAX_WORDS])
