"""Texts of files in any encoding, and those of which characters were lost on the way."""

from __future__ import annotations

import pytest

from qformer.data.encodings import decode_text, encoding_of, lines_of
from qformer.data.texts import is_mangled, without_mangled


@pytest.mark.parametrize(
    "text", ["a red circle\n", "a", "ein rötlicher Kreis, 3 €", "красный круг", "红色的圆圈 🔴", ""]
)
@pytest.mark.parametrize("kind", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings_that_are_marked(text: str, kind: str) -> None:
    assert decode_text(text.encode(kind)) == text
    assert decode_text(b"\xfe\xff" + text.encode("utf-16-be")) == text
    assert not is_mangled(text)


@pytest.mark.parametrize("kind", ["utf-16-le", "utf-16-be"])
def test_encodings_that_are_not(kind: str) -> None:
    """Of Latin letters it can be told; of others not, which is told in turn."""
    assert decode_text("ein rötlicher Kreis\r\n".encode(kind)) == "ein rötlicher Kreis\r\n"
    assert encoding_of("a dog".encode(kind)) == kind
    assert is_mangled(decode_text("красный круг".encode(kind)))
    assert is_mangled(decode_text("红色的圆圈".encode(kind)))


@pytest.mark.parametrize("data", [b"caf\xe9", b"a\0dog", b"abc\0", b"\0\0\0", "lost \ufffd".encode(), b"a\x1bdog"])
def test_what_is_mangled(data: bytes) -> None:
    assert is_mangled(decode_text(data))
    assert not is_mangled(without_mangled(decode_text(data)))


def test_lines() -> None:
    assert lines_of("a\r\nb\rc\nd\u2028e\x0bf\x85g") == ["a", "b", "c", "d\u2028e\x0bf\x85g"]
