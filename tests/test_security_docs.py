"""docs/security.md says what is true of pictures: who decodes what, the page's formats, and the sizes."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from demo import limits
from qformer import images

TEXT = (Path(__file__).parent.parent / "docs/security.md").read_text(encoding="utf-8")


def test_formats_and_sizes() -> None:
    row = next(line for line in TEXT.splitlines() if "which is told to open these" in line)
    named = {word.strip().upper() for word in row.split("|")[1].split(",")}
    assert named == images.FORMATS.keys() - {"JPEG", "HEIF"}
    assert "The page takes JPEG, PNG, WebP and GIF alone" in TEXT
    assert limits.FORMATS == ("JPEG", "PNG", "WEBP", "GIF")
    assert f"{2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6} million pixels at most" in TEXT
    assert f"on the page {limits.MAX_PIXELS // 10**6} million" in TEXT
