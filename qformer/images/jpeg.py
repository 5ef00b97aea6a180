"""JPEG without Pillow, whose decoder has overflowed (docs/security.md): headers are parsed here, `simplejpeg` decodes.

libjpeg-turbo gets a new header with only what decoding needs: the size in it is the one that was checked, and profiles,
thumbnails and comments are never parsed. Pixels equal those of Pillow, which wraps the same library.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np
import simplejpeg
from PIL import Image

from qformer.images.orientation import HEADER, of_blocks, upright

START = b"\xff\xd8\xff"  # every JPEG starts so, also one with several images (MPO), whose first is read
BEGIN, END = b"\xff\xd8", b"\xff\xd9"
MARKER = re.compile(rb"\xff([^\x00\xff])", re.DOTALL)
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
TABLES = {0xC4, 0xCC, 0xDB, 0xDD}  # Huffman, arithmetic, quantization, restart interval
ALONE = {0x01, *range(0xD0, 0xD9)}  # markers that are not followed by a length
SCAN, LAST, APP0, APP1, APP14 = 0xDA, 0xD9, 0xE0, 0xE1, 0xEE
ADOBE = b"Adobe"
PACKET = b"http://ns.adobe.com/xap/1.0/\x00"
JFIF = b"\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"
MOST_PARTS = 10_000  # segments of a header: more than any program writes


@dataclass(frozen=True)
class Jpeg:
    """Header of a JPEG, and the data that decoding needs.

    Attributes:
        width, height: size in pixels, as stored.
        channels: 1, 3 or 4.
        orientation: from EXIF or XMP, 1 to 8 (`qformer.images.orientation`).
        jfif, adobe: markers of the color space: True if there is a JFIF segment, and the transform of Adobe's segment.
        parts: tables and frame, as stored.
        scans: everything from the first scan on.
        sampling: sampling factors of each channel, such as 2x2, 1x1, 1x1.
    """

    width: int
    height: int
    channels: int
    orientation: int
    jfif: bool
    adobe: int | None
    parts: bytes
    scans: bytes
    sampling: tuple[str, ...]

    @property
    def written(self) -> bytes:
        """File with a minimal header."""
        marks = [JFIF] if self.jfif else []
        if self.adobe is not None:
            known = bool(self.adobe) * (2 if self.channels == 4 else 1)  # libjpeg treats an unknown transform this way
            marks.append(b"\xff\xee\x00\x0e" + ADOBE + b"\x00\x64\x00\x00\x00\x00" + bytes([known]))
        return b"".join([BEGIN, *marks, self.parts, self.scans])


def parse(data: bytes) -> Jpeg:
    """Parse the header of a JPEG without decoding pixels.

    Raises:
        ValueError: the header is damaged, or of a kind that is not supported (12 bits, 2 channels).
    """
    place, jfif, adobe, xmp = 2, False, None, b""
    parts: list[bytes] = []
    exif: list[bytes] = []  # a long EXIF block is split into several segments
    frame = b""
    for _ in range(MOST_PARTS):
        marker, start, body = _next_segment(data, place)
        place = start + 4 + len(body)
        if marker in ALONE:
            place = start + 2
        elif marker == SCAN:
            width, height, channels = _read_size(frame)
            turned = of_blocks(b"".join(exif), xmp)
            sampling = tuple(f"{frame[place] >> 4}x{frame[place] & 15}" for place in range(7, 6 + 3 * channels, 3))
            return Jpeg(width, height, channels, turned, jfif, adobe, b"".join(parts), data[start:], sampling)
        elif marker in FRAMES:
            if frame:
                raise ValueError("a JPEG with two frames")
            frame = body
            parts.append(data[start:place])
        elif marker in TABLES:
            parts.append(data[start:place])
        elif marker == APP0 and body.startswith(b"JFIF\x00") and len(body) >= 14:
            jfif = True
        elif marker == APP14 and body.startswith(ADOBE) and len(body) >= 12:
            adobe = body[11]
        elif marker == APP1 and body.startswith(HEADER):
            exif.append(body[len(HEADER) :] if exif else body)
        elif marker == APP1 and body.startswith(PACKET):
            xmp = body
    raise ValueError("a JPEG whose header does not end")


def _next_segment(data: bytes, place: int) -> tuple[int, int, bytes]:
    """Find the next marker, its offset, and the body of its segment; bytes between segments are skipped."""
    found = MARKER.search(data, place)
    if found is None or found[1][0] == LAST:
        raise ValueError("a JPEG that ends before its pixels")
    marker, start = found[1][0], found.start()
    length = 2 if marker in ALONE else int.from_bytes(data[start + 2 : start + 4], "big")
    body = data[start + 4 : start + 2 + length]
    if length < 2 or len(body) != length - 2:
        raise ValueError("a JPEG that ends before its pixels")
    return marker, start, body


def _read_size(frame: bytes) -> tuple[int, int, int]:
    """Read width, height and number of channels from a frame."""
    if len(frame) < 6 or len(frame) < 6 + 3 * frame[5]:
        raise ValueError("a JPEG without a frame")
    height, width = int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big")
    if frame[0] != 8 or frame[5] not in (1, 3, 4):
        raise ValueError(f"a JPEG of {frame[5]} channels with {frame[0]} bits, which is not supported")
    if not width or not height:
        raise ValueError(f"a JPEG of {width} x {height} pixels")
    return width, height, frame[5]


def decode(jpeg: Jpeg) -> np.ndarray:
    """Decode the pixels as stored, uint8[h, w, 1, 3 or 4]: gray, RGB, or the four channels of the file.

    As with Pillow, damage in the middle of a file spoils some pixels and is no error; a missing end is an error.

    Raises:
        ValueError: the file ends too early, cannot be decoded, or its channel sampling is not one of 4:4:4, 4:2:2,
            4:2:0, 4:4:0, 4:1:1 and 4:4:1.
    """
    if END not in jpeg.scans:
        raise ValueError("a JPEG that ends too early")
    colors = {1: "GRAY", 3: "RGB", 4: "CMYK"}[jpeg.channels]
    try:
        pixels = simplejpeg.decode_jpeg(jpeg.written, colors, strict=False)
    except ValueError as error:
        if "subsampling" not in str(error):
            raise
        raise ValueError(
            f"a JPEG whose channels are sampled {', '.join(jpeg.sampling)}, which is not supported; save it again, "
            "such as with 4:4:4 or 4:2:0"
        ) from error
    if pixels.shape != (jpeg.height, jpeg.width, jpeg.channels):
        raise ValueError(f"a JPEG of {jpeg.width} x {jpeg.height} pixels that holds {list(pixels.shape)}")
    return pixels


def read_rgb(jpeg: Jpeg) -> np.ndarray:
    """Decode an image to upright RGB, uint8[h, w, 3].

    Raises:
        ValueError: as in `decode`.
    """
    pixels = decode(jpeg)
    if jpeg.channels == 1:
        pixels = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
    elif jpeg.channels == 4:  # CMYK is stored inverted, following Adobe
        pixels = np.asarray(Image.frombytes("CMYK", (jpeg.width, jpeg.height), (255 - pixels).tobytes()).convert("RGB"))
    return upright(pixels, jpeg.orientation)


def parse_piece(tables: bytes, piece: bytes, adobe: int | None) -> Jpeg:
    """Parse a strip or tile of a TIFF file, whose tables and color space are stored elsewhere in the file.

    Args:
        tables: tables shared by all strips or tiles.
        piece: data of the strip or tile.
        adobe: color transform of the TIFF file: 0 none, 1 YCbCr.
    """
    joined = BEGIN + tables.removeprefix(BEGIN).removesuffix(END) + piece.removeprefix(BEGIN)
    return replace(parse(joined), jfif=False, adobe=adobe)
