"""What the page takes, as plain functions: pictures by content and size, texts, numbers, requests."""

from __future__ import annotations

import struct
import subprocess
import sys
import zlib
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from qformer.demo import limits
from qformer.types import UsageError

if TYPE_CHECKING:
    from pathlib import Path

RED, WHITE = (255, 0, 0), (255, 255, 255)


def png(width: int, height: int, rows: bytes = b"") -> bytes:
    """A PNG whose head claims a size, whatever its rows are."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def saved(image: Image.Image, file: Path, kind: str, **options: Any) -> Path:
    image.save(file, kind, **options)
    return file


@pytest.fixture
def undecoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding fails the test: what is refused must be refused by its head."""

    def decode(*_: Any) -> None:
        raise AssertionError("the picture was decoded")

    monkeypatch.setattr(limits, "read_image", decode)


@pytest.mark.parametrize("size", [(8_000, 8_000), (30_000, 30_000), (2**31 - 1, 2**31 - 1)])
def test_a_bomb_is_refused_by_its_head(size: tuple[int, int], tmp_path: Path, undecoded: None) -> None:
    (tmp_path / "bomb.png").write_bytes(png(*size))
    with pytest.raises(UsageError, match=r"pixels; the limit is 50 million"):
        limits.open_picture(tmp_path / "bomb.png")


def test_too_many_bytes_are_refused_unread(tmp_path: Path, undecoded: None) -> None:
    with (tmp_path / "long.png").open("wb") as file:
        file.truncate(limits.MAX_BYTES + 1)
    with pytest.raises(UsageError, match=r"20\.0 MB; the limit is 20"):
        limits.open_picture(tmp_path / "long.png")


def test_a_line_is_no_picture(tmp_path: Path, undecoded: None) -> None:
    (tmp_path / "line.png").write_bytes(png(100_000, 3))
    with pytest.raises(UsageError, match="one side can be 200 times the other"):
        limits.open_picture(tmp_path / "line.png")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("page.png", b"<!doctype html><script>alert(1)</script>"),
        ("drawing.png", b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'),
        ("script.jpg", b"#!/bin/sh\necho hello\n"),
        ("empty.png", b""),
        ("head.png", b"\x89PNG\r\n\x1a\n"),
        ("document.pdf.png", b"%PDF-1.7\n"),
        ("vector.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
        ("cut.png", png(30, 30, b"\0" * 5)),
        ("head.jpg", b"\xff\xd8\xff\xe0\x00\x10JFIF\x00"),
    ],
)
def test_what_is_no_picture_is_said_to_be_none(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    why = {"empty.png": "it is empty", "cut.png": "damaged or incomplete", "head.jpg": "ends before its pixels"}
    said = why.get(name, "its format is not taken here")
    with pytest.raises(UsageError, match=rf"cannot be read as a picture \(.*{said}\); give JPEG, PNG, WebP") as told:
        limits.open_picture(tmp_path / name)
    assert not [word for word in ("BMP", "TIFF", "pillow", "Plugin", "processed") if word in str(told.value)]


@pytest.mark.parametrize("where", ["nowhere.png", "", "\0"])
def test_a_file_that_is_gone(where: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no longer there|cannot be read"):
        limits.open_picture(f"{tmp_path}/{where}")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_the_content_tells_the_format_not_the_name(kind: str, tmp_path: Path) -> None:
    file = saved(Image.new("RGB", (40, 20), RED), tmp_path / "picture.html", kind)
    opened = limits.open_picture(file)
    assert (opened.mode, opened.size) == ("RGB", (40, 20))
    assert np.abs(np.asarray(opened).astype(int) - RED).max() <= 3


def test_a_photo_taken_upright_is_shown_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    opened = limits.open_picture(saved(Image.new("RGB", (40, 20)), tmp_path / "a.jpg", "JPEG", exif=exif))
    assert opened.size == (20, 40)


def test_strange_modes_become_rgb(tmp_path: Path) -> None:
    clear = saved(Image.new("RGBA", (8, 8), (255, 0, 0, 0)), tmp_path / "clear.png", "PNG")
    assert limits.open_picture(clear).getpixel((4, 4)) == WHITE
    grey = saved(Image.fromarray(np.full((8, 8), 65535, np.uint16)), tmp_path / "deep.png", "PNG")
    assert limits.open_picture(grey).getpixel((4, 4)) == WHITE
    ink = limits.open_picture(saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), tmp_path / "ink.jpg", "JPEG"))
    red, green, blue = np.asarray(ink)[4, 4].astype(int)
    assert red > 200 > 60 > max(green, blue)
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, WHITE)]
    for kind in ("GIF", "WEBP"):
        moving = saved(frames[0], tmp_path / "moving", kind, save_all=True, append_images=frames[1:])
        assert np.abs(np.asarray(limits.open_picture(moving)).astype(int) - RED).max() <= 3


def test_a_gif_whose_frame_is_larger_than_its_screen_is_refused(tmp_path: Path, undecoded: None) -> None:
    written = BytesIO()
    Image.new("P", (8, 8)).save(written, "GIF")
    content = bytearray(written.getvalue())
    frame = content.index(b",", 13 + 3 * (2 << (content[10] & 7)))
    content[frame + 5 : frame + 9] = struct.pack("<HH", 60_000, 60_000)
    (tmp_path / "a.gif").write_bytes(content)
    with pytest.raises(UsageError, match=r"pixels; the limit|cannot be read"):
        limits.open_picture(tmp_path / "a.gif")


def test_texts() -> None:
    assert limits.check_text("question", None, 5) == ""
    assert limits.check_text("question", "a\r\nb\tc", 5) == "a\nb\tc"
    assert (
        limits.check_text("question", "\u4f60\u597d \U0001f469\u200d\U0001f52c", 10)
        == "\u4f60\u597d \U0001f469\u200d\U0001f52c"
    )
    with pytest.raises(UsageError, match="the question has 6 characters; the limit is 5"):
        limits.check_text("question", "abcdef", 5)
    for value, said in (
        (["a"], "a list"),
        (3, "a number"),
        ({}, "an object"),
        (True, "true or false"),
        (b"a", "bytes"),
    ):
        with pytest.raises(UsageError, match=f"the context must be text, but got {said}"):
            limits.check_text("context", value, 5)
    for sign in ("\0", "\x1b", "\x7f", "\x85", "\ud800"):
        with pytest.raises(UsageError, match=rf"control character \(U\+{ord(sign):04X}, at position 2\)"):
            limits.check_text("question", f"a{sign}", 5)


def test_numbers() -> None:
    assert limits.check_number("beams", 3, 1, 5, whole=True) == 3
    assert limits.check_number("beams", 3.0, 1, 5, whole=True) == 3
    assert limits.check_number("top_p", 0.25, 0, 1) == 0.25
    for value in (float("nan"), float("inf"), -float("inf"), 0, 6, 10**400, True, "3", None, [3]):
        with pytest.raises(UsageError, match="beams must be a number from 1 to 5, but got"):
            limits.check_number("beams", value, 1, 5)
    with pytest.raises(UsageError, match=r"beams must be a whole number from 1 to 5, but got 2\.5"):
        limits.check_number("beams", 2.5, 1, 5, whole=True)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[1]", "must be a JSON object, but got a list"),
        (b'{"data": [NaN]}', "NaN is not a number that can be used"),
        (b'{"data": [-Infinity]}', "-Infinity is not a number"),
        (b'{"data": [1e999]}', "1e999 is not a number"),
        (b'{"data": [' + b"9" * 5000 + b"]}", "not valid JSON"),
        (b'{"data": ["\\ud800"]}', r"control character \(U\+D800"),
        (b'{"a\\u0000b": 1}', r"control character \(U\+0000"),
        (b'{"data": ' + b"[" * 60 + b"]" * 60 + b"}", "nested too deeply"),
        (b'{"data": ' + b"[" * 200_000, "nested too deeply"),
    ],
)
def test_requests_that_are_refused(body: bytes, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        limits.check_request(body)


def test_a_plain_request_is_read() -> None:
    body = '{"data": [null, "what is it?\\n", 0.5, {"path": "a"}], "session_hash": "abc"}'
    assert limits.check_request(body.encode()) == {
        "data": [None, "what is it?\n", 0.5, {"path": "a"}],
        "session_hash": "abc",
    }


def test_heaps_are_bounded_where_the_c_library_can() -> None:
    """In a process of its own, since the bound stays: glibc takes it, and others are left alone."""
    code = (
        "import ctypes; from qformer.demo import limits; asked = []\n"
        "class Library: mallopt = staticmethod(lambda *given: asked.append(given))\n"
        "limits.bound_heaps(); ctypes.CDLL = lambda _: Library; limits.bound_heaps()\n"
        "assert asked == [(-8, 2)], asked\n"
        "ctypes.CDLL = lambda _: object(); limits.bound_heaps()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
