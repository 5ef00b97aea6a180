"""Folders as people have them: what is an image, what is left out and told, which text belongs to which image."""

from __future__ import annotations

import os
import socket
import unicodedata
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qformer.data import sources
from qformer.data.folders import list_images
from qformer.formats import FORMATS
from qformer.images import read_image
from qformer.types import BadSample, LeftOut, UsageError
from tests.data.making import encoded, number_of, photo
from tests.test_cli import config

if TYPE_CHECKING:
    from collections.abc import Callable

    Run = Callable[..., tuple[int, str, str]]

APPLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        "


def put(folder: Path, *names: str) -> None:
    """Images by the names that end so, each with its own number; texts that say their own name; else nothing much."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.name.startswith("._"):
            path.write_bytes(APPLE)
        elif path.suffix.lower() == ".txt":
            path.write_text(f"text of {name}")
        else:
            path.write_bytes(encoded(photo(number)))


def build(folder: Path, **options: Any) -> Any:
    return sources.build("folder", path=str(folder), **options)


def names(source: Any) -> list[str]:
    return [str(source[number].image.relative_to(source.path)) for number in range(len(source))]


def test_what_macs_and_windows_add_is_passed_over(tmp_path: Path) -> None:
    put(
        tmp_path,
        "a.png",
        "._a.png",
        "a.txt",
        "._a.txt",
        "__MACOSX/b.png",
        "@eaDir/a.png/thumb.jpg",
        "c/._a.png",
        "c/d.png",
    )
    put(tmp_path, ".DS_Store", "Thumbs.db", "c/desktop.ini")
    with pytest.warns(LeftOut, match=r"files and folders of macOS, Windows or a drive \(such as \._\*\): 8$"):
        source = build(tmp_path)
    assert names(source) == ["a.png", "c/d.png"]
    assert source[0].captions == ["text of a.txt"]


def test_every_format_is_taken_and_what_is_left_out_is_told_once(tmp_path: Path) -> None:
    endings = [ending for known in FORMATS.values() for ending in known]
    put(
        tmp_path, *(f"{number}{ending}" for number, ending in enumerate(endings)), "big.JPEG", "a.jp2", "b.CR2", "c.cr2"
    )
    put(tmp_path, "film.mp4", "none", "captions.json", "lonely.txt")
    with pytest.warns(LeftOut) as told:
        source = build(tmp_path)
    assert len(source) == len(endings) + 1
    assert [str(one.message) for one in told] == [
        f"'{tmp_path}': left out: formats that are not supported (convert them): 2 .cr2, 1 .jp2; "
        "not images by their names: 1 .mp4, 1 without an ending; .txt without an image: 1"
    ]


def test_what_is_no_file_is_never_opened(tmp_path: Path) -> None:
    """Pipes, sockets and devices: called like an image they are bad samples, else counted; also in place of a text."""
    put(tmp_path, "a.png", "b.png", "folder.png/c.png", "d.png")
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "b.txt")
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(os.path.relpath(tmp_path / "socket.jpg"))
    os.symlink("/dev/zero", tmp_path / "zero.png")
    with pytest.warns(LeftOut, match="pipes, sockets and devices: 2$"):
        source = build(tmp_path)
    found = [file.name for file in list_images(tmp_path).images]
    assert found == ["a.png", "b.png", "d.png", "folder.png", "c.png", "pipe.png", "socket.jpg", "zero.png"]
    with pytest.raises(BadSample, match=r"no caption: .*b\.txt: not a file"):
        source[1]
    for number in (3, 5, 6, 7):
        with pytest.raises(BadSample, match=r"unreadable: .*: not a file"):
            read_image(source[number].image)


def test_folders_that_cannot_be_opened_are_told(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "locked/c.png")
    (tmp_path / "locked").chmod(0)
    if os.access(tmp_path / "locked", os.R_OK):
        pytest.skip("run by a user who may read anything")
    assert list_images(tmp_path).left_out == f"folders that cannot be opened: 1 ({tmp_path / 'locked'})"
    (tmp_path / "locked").chmod(0o700)


def test_patterns_that_are_excluded(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "a.depth.png", "2019/b.png", "2020/b.png", "2020/thumbs/c.png", "thumbs/d.png")
    assert names(build(tmp_path, exclude="*.depth.png"))[-1] == "thumbs/d.png"
    assert names(build(tmp_path, exclude=["thumbs/", "*.depth.png", "2019/*"])) == ["2020/b.png", "a.png"]
    assert names(build(tmp_path, exclude=["20??"])) == ["a.depth.png", "a.png", "thumbs/d.png"]
    assert names(build(tmp_path, exclude=["**/thumbs/**", "*.depth.png"])) == ["2019/b.png", "2020/b.png", "a.png"]
    assert "thumbs/d.png" not in names(build(tmp_path, exclude="./thumbs"))
    with pytest.warns(LeftOut, match="exclude 'thumb' matches nothing"):
        build(tmp_path, exclude=["thumb"])
    with pytest.raises(UsageError, match=r"no image below .* that is not excluded"):
        build(tmp_path, exclude="*")
    with pytest.raises(UsageError, match=r"data\.exclude"):
        build(tmp_path, exclude=3)


def test_which_text_belongs_to_which_image(tmp_path: Path) -> None:
    """Dots and brackets in names, capital endings, and accents that a Mac spells as two characters."""
    apart, joined = (unicodedata.normalize(form, "é") for form in ("NFD", "NFC"))
    put(tmp_path, "a.b.jpg", "a.b.txt", "a.c.jpg", "a.c.txt", "d [1].png", "d [1].txt", "E.JPG", "E.TXT")
    put(tmp_path, f"{joined}.png", f"{apart}.txt")
    with warnings.catch_warnings(action="error"):
        source = build(tmp_path)
    texts = {source[number].image.name: source[number].captions for number in range(len(source))}
    assert texts == {
        "E.JPG": ["text of E.TXT"],
        "a.b.jpg": ["text of a.b.txt"],
        "a.c.jpg": ["text of a.c.txt"],
        "d [1].png": ["text of d [1].txt"],
        f"{joined}.png": [f"text of {apart}.txt"],
    }


@pytest.mark.parametrize("kind", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_captions_in_the_encodings_of_windows(kind: str, tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    (tmp_path / "a.txt").write_bytes("a café\r\na red\u2028circle\x0c\r\rlast".encode(kind))
    assert build(tmp_path)[0].captions == ["a café", "a red\u2028circle\x0c", "last"]


def test_the_command_line_tells_what_is_left_out(run: Run, tmp_path: Path) -> None:
    put(tmp_path / "photos", "a.png", "a.txt", "b.jp2", "._a.png")
    os.mkfifo(tmp_path / "photos" / "c")
    code, out, err = run("config", config(), "data.train={name: folder, path: photos}", "--data")
    assert (code, err.splitlines()) == (
        0,
        [
            "qformer: 'photos': left out: formats that are not supported (convert them): 1 .jp2; files and folders of "
            "macOS, Windows or a drive (such as ._*): 1; pipes, sockets and devices: 1"
        ],
    )
    assert "# data.train: 1 of the first 1 samples can be used" in out


def test_pixels_of_a_folder(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "b.gif")
    source = build(tmp_path)
    assert [number_of(source[number]) for number in range(2)] == [0, 1]
