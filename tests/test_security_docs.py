"""docs/security.md says what is true: who decodes which pictures, their sizes, and the versions that are asked for."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.version import Version
from PIL import Image

from qformer.demo import limits
from qformer.formats import FORMATS

TEXT = (Path(__file__).parent.parent / "docs/security.md").read_text(encoding="utf-8")


def test_formats_and_sizes() -> None:
    row = next(line for line in TEXT.splitlines() if "which is told to open these" in line)
    named = {word.strip().upper() for word in row.split("|")[1].split(",")}
    assert named == FORMATS.keys() - {"JPEG", "HEIF"}
    assert "the page takes JPEG, PNG, WebP and GIF alone" in TEXT
    assert limits.FORMATS == ("JPEG", "PNG", "WEBP", "GIF")
    assert f"{2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6} million pixels at most" in TEXT
    assert f"on the page {limits.MAX_PIXELS // 10**6} million" in TEXT


def test_no_version_with_a_known_hole_is_asked_for() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    floors = dict(line.split(">=") for line in lines if ">=" in line)
    mended = dict(re.findall(r"^\| ([a-z-]+) \| (\d[\d.]*) \|", TEXT, flags=re.MULTILINE))
    assert mended.keys() == {"torch", "gradio", "pillow", "transformers", "peft", "pillow-heif"}
    assert not {name for name, least in mended.items() if Version(floors.get(name, "99")) < Version(least)}
