"""Formats of pictures: which are read, and how names of their files end. Neither torch nor Pillow is needed to know."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

#: What is read, told by the content: the names that Pillow has for it, and how names of such files end.
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jfif", ".jpe", ".jif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
}
if find_spec("pillow_heif"):
    FORMATS["HEIF"] = (".heic", ".heif", ".hif")
#: Endings of files in a folder that are taken for images: those that are read, and those that are told to be unread.
SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)
UNREAD = (
    frozenset({".heic", ".heif", ".hif", ".jp2", ".j2k", ".jpx", ".jpf", ".j2c", ".jxl", ".jxr", ".svg", ".svgz"})
    | {".ico", ".icns", ".psd", ".psb", ".xcf", ".tga", ".exr", ".hdr", ".eps", ".dcm", ".pcx", ".qoi", ".dds", ".wmf"}
    | {".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".sr2", ".orf", ".rw2", ".raf", ".pef", ".srw", ".raw"}
) - SUFFIXES
#: What Macs, Windows and network drives put beside files of people, in small letters.
SYSTEM = frozenset(
    {"__macosx", ".ds_store", ".appledouble", ".spotlight-v100", ".trashes", ".fseventsd", ".temporaryitems"}
    | {"thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information", "@eadir", "#recycle"}
)
APPLE_DOUBLE = "._"  # in front of a name: what a Mac keeps of a file where it cannot be kept in the file


def of_a_system(parts: Iterable[str]) -> bool:
    """Whether a file or folder, by the parts of its path, is none of its owner but of a Mac, Windows or a drive."""
    return any(part.startswith(APPLE_DOUBLE) or part.lower() in SYSTEM for part in parts)
