"""Formats of images and videos, and the suffixes of their files; importing this needs neither torch nor Pillow."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

#: Formats that are read, recognized by content: Pillow's name -> suffixes of files.
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
#: Suffixes of image files in a folder: those of `FORMATS`, and those that are reported as not supported.
SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)
UNREAD = (
    frozenset({".heic", ".heif", ".hif", ".jp2", ".j2k", ".jpx", ".jpf", ".j2c", ".jxl", ".jxr", ".svg", ".svgz"})
    | {".ico", ".icns", ".psd", ".psb", ".xcf", ".tga", ".exr", ".hdr", ".eps", ".dcm", ".pcx", ".qoi", ".dds", ".wmf"}
    | {".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".sr2", ".orf", ".rw2", ".raf", ".pef", ".srw", ".raw"}
) - SUFFIXES
#: Suffixes of videos, which are read by PyAV. A GIF is a picture, its first, where pictures and videos are told apart.
VIDEOS = frozenset(
    {".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".ogv", ".flv", ".wmv"}
    | {".3gp", ".3g2"}
)
#: Names of system files and folders of macOS, Windows and network drives, in lower case.
SYSTEM = frozenset(
    {"__macosx", ".ds_store", ".appledouble", ".spotlight-v100", ".trashes", ".fseventsd", ".temporaryitems"}
    | {"thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information", "@eadir", "#recycle"}
)
APPLE_DOUBLE = "._"  # prefix of a file with the metadata that macOS cannot keep in the file itself


class VideoFile(type(Path())):  # type: ignore[misc]
    """File that is read as a video whatever its name says, such as a GIF that stands among videos."""


def is_system_file(parts: Iterable[str]) -> bool:
    """Check the parts of a path for a system file or folder of macOS, Windows or a network drive."""
    return any(part.startswith(APPLE_DOUBLE) or part.lower() in SYSTEM for part in parts)
