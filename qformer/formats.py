"""Formats of pictures: which are read, and how names of their files end. Neither torch nor Pillow is needed to know."""

from __future__ import annotations

from importlib.util import find_spec

#: What is read, told by the content: the names that Pillow has for it, and how names of such files end.
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif",),
    "PPM": (".ppm", ".pgm"),
}
if find_spec("pillow_heif"):
    FORMATS["HEIF"] = (".heic", ".heif")
#: Endings of files in a folder that are taken for images: those that are read, and those that are told to be unread.
SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)
UNREAD = frozenset({".heic", ".heif", ".jp2", ".j2k", ".jxl", ".svg", ".ico", ".psd", ".tga"}) - SUFFIXES
