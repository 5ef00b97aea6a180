"""Names in tars as people give them: dots, brackets, several pictures, files of a Mac; each sample is right or told."""

from __future__ import annotations

import io
import os
import tarfile
import warnings
from pathlib import Path
from typing import Any

import pytest

from qformer.data import sources
from qformer.data.members import MINGLED
from qformer.types import BadSample, LeftOut
from tests.data.making import encoded, number_of, photo, tar

APPLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        "


def build(path: Path, *names: str, **options: Any) -> Any:
    """A tar of images that are the numbers of their names and texts that say their own."""
    members = []
    for number, name in enumerate(names):
        made = f"text of {name}".encode() if name.endswith("txt") else encoded(photo(number))
        members.append((name, APPLE if name.rpartition("/")[2].startswith("._") else made))
    return sources.build("webdataset", path=tar(path, members), **options)


def found(source: Any, *names: str) -> list[Any]:
    """Of each sample its key, the name of its image and its captions, or the kind of bad."""
    samples: list[Any] = []
    for place in source.indices():
        try:
            sample = source[place]
            samples.append((sample.key.rpartition(".tar/")[2], names[number_of(sample)], *sample.captions))
        except BadSample as bad:
            samples.append(bad.kind)
    return samples


PLAIN = ("0.png", "0.txt", "1.png", "1.txt")
RIGHT: dict[str, tuple[tuple[str, ...], list[Any]]] = {
    "packed on a Mac": (
        ("./._0.png", "./0.png", "./._0.txt", "./0.txt", "./._1.png", "./1.png", "./._1.txt", "./1.txt"),
        [("./0", "./0.png", "text of ./0.txt"), ("./1", "./1.png", "text of ./1.txt")],
    ),
    "zipped on a Mac": (
        ("a/0.png", "__MACOSX/a/._0.png", "__MACOSX/a/0.png", "a/.DS_Store", "a/0.txt", "a/Thumbs.db"),
        [("a/0", "a/0.png", "text of a/0.txt")],
    ),
    "dots in names": (
        ("v1.2.png", "v1.2.txt", "v1.3.png", "v1.3.txt"),
        [("v1.2", "v1.2.png", "text of v1.2.txt"), ("v1.3", "v1.3.png", "text of v1.3.txt")],
    ),
    "one name with a dot": (("a.b.png", "a.b.txt"), [("a.b", "a.b.png", "text of a.b.txt")]),
    "dots, images first": (
        ("v1.2.png", "v1.3.png", "v1.2.txt", "v1.3.txt"),
        [("v1.2", "v1.2.png", "text of v1.2.txt"), ("v1.3", "v1.3.png", "text of v1.3.txt")],
    ),
    "dots, images alone": (
        ("2024.01.05.png", "2024.01.06.png", "2024.02.01.png"),
        [("2024.01.05", "2024.01.05.png"), ("2024.01.06", "2024.01.06.png"), ("2024.02.01", "2024.02.01.png")],
    ),
    "a copy between": (
        ("a.new.png", "a.png", "a.new.txt", "a.txt"),
        [("a.new", "a.new.png", "text of a.new.txt"), ("a", "a.png", "text of a.txt")],
    ),
    "one without a text": (
        ("v1.2.png", "v1.3.png", "v1.3.txt"),
        [("v1.2", "v1.2.png"), ("v1.3", "v1.3.png", "text of v1.3.txt")],
    ),
    "names between": (
        ("0.png", "README", "0.txt", ".hidden.png"),
        [("0", "0.png", "text of 0.txt")],
    ),
    "texts alone": (("v1.2.png", "v1.2.txt", "v1.3.txt"), [("v1.2", "v1.2.png", "text of v1.2.txt"), "no image"]),
}


@pytest.mark.parametrize("name", RIGHT)
def test_which_files_are_a_sample(name: str, tmp_path: Path) -> None:
    names, expected = RIGHT[name]
    with warnings.catch_warnings(action="error"):
        source = build(tmp_path / "a.tar", *names)
        assert found(source, *names) == expected
    ids = [source[place].image_id for place, one in zip(source.indices(), expected, strict=True) if one != "no image"]
    assert len(set(ids)) == len(ids)


def test_many_names_with_dots(tmp_path: Path) -> None:
    """Sorted, each is a sample; where all images come first, none reads what is between it and its text."""
    stems = [f"x.{number:03d}" for number in range(MINGLED)]
    pairs = [name for stem in stems for name in (f"{stem}.png", f"{stem}.txt")]
    source = build(tmp_path / "a.tar", *pairs)
    assert found(source, *pairs) == [(stem, f"{stem}.png", f"text of {stem}.txt") for stem in stems]
    apart = sorted(pairs, key=lambda name: name[-3:])
    assert found(build(tmp_path / "b.tar", *apart), *apart) == [
        *((stem, f"{stem}.png") for stem in stems),
        *["no image"] * MINGLED,
    ]


def test_which_of_several_images_is_meant(tmp_path: Path) -> None:
    names = ("0.depth.png", "0.png", "0.txt", "1.png", "1.seg.png", "1.txt")
    source = build(tmp_path / "a.tar", *names)
    with warnings.catch_warnings(record=True, action="always") as told:
        assert found(source, *names) == [("0", "0.png", "text of 0.txt"), ("1", "1.png", "text of 1.txt")]
    assert [one.category for one in told] == [LeftOut, LeftOut]
    assert "several images in a sample (depth.png, png) png is taken; name another with" in str(told[0].message)
    chosen = build(tmp_path / "a.tar", *names, image="depth.png")
    assert found(chosen, *names) == [("0", "0.depth.png", "text of 0.txt"), "no image"]


def test_of_several_formats_the_first_that_is_known(tmp_path: Path) -> None:
    names = ("0.png", "0.jpg", "0.txt")
    with pytest.warns(LeftOut, match="jpg is taken"):
        assert found(build(tmp_path / "a.tar", *names), *names) == [("0", "0.jpg", "text of 0.txt")]


def test_images_of_which_none_is_meant_more(tmp_path: Path) -> None:
    names = ("0.rgb.png", "0.depth.png", "0.txt")
    source = build(tmp_path / "a.tar", *names)
    with pytest.raises(
        BadSample, match=r"several images: .*/0 has rgb.png, depth.png; name one of them with data.image"
    ):
        source[0]
    assert found(build(tmp_path / "a.tar", *names, image="rgb.png"), *names) == [("0", "0.rgb.png", "text of 0.txt")]


def test_a_caption_of_another_ending(tmp_path: Path) -> None:
    names = ("0.image.png", "0.caption.txt")
    source = build(tmp_path / "a.tar", *names, caption="caption.txt")
    assert found(source, *names) == [("0", "0.image.png", "text of 0.caption.txt")]


@pytest.mark.parametrize("name", ["s[1].tar", "d [2024]/s[a-c].tar", "{1,2}.tar", "d*/a?.tar"])
def test_signs_of_a_pattern_in_names_of_files(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    assert found(build(path, *PLAIN), *PLAIN) == [("0", "0.png", "text of 0.txt"), ("1", "1.png", "text of 1.txt")]
    with tarfile.open(path.parent / "other.tar", "w"):
        pass
    assert len(sources.build("webdataset", path=str(path.parent / "*.tar")).shards) == 2


def test_signs_of_a_pattern_in_names_of_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    path = tmp_path / "d [2024]" / "a[1].parquet"
    path.parent.mkdir()
    datasets.Dataset.from_dict({"image": [encoded(photo(1))], "text": ["a"]}).to_parquet(path)
    assert len(sources.build("datasets", path=str(path))) == 1
    assert len(sources.build("datasets", path=f"{path.parent}/*.parquet")) == 1


def test_texts_of_windows_and_links(tmp_path: Path) -> None:
    """Captions and JSON in UTF-16; a link in a tar has no data, so its sample is bad and not gone."""
    image = encoded(photo(1))
    members = [("0.png", image), ("0.txt", "ein Hündchen".encode("utf-16")), ("1.png", image)]
    path = Path(tar(tmp_path / "a.tar", [*members, ("1.json", '{"caption": "é"}'.encode("utf-16"))]))
    with tarfile.open(path, "a") as file:
        link = tarfile.TarInfo("2.png")
        link.type, link.linkname = tarfile.LNKTYPE, "1.png"
        file.addfile(link)
        text = tarfile.TarInfo("2.txt")
        text.size = 1
        file.addfile(text, io.BytesIO(b"t"))
    source = sources.build("webdataset", path=str(path))
    assert [source[place].captions for place in (0, 1)] == [["ein Hündchen"], ["é"]]
    with pytest.raises(BadSample, match=r"no image: .*/2 has txt"):
        source[2]


def test_a_pipe_is_no_tar(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar.gz"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(BadSample, match=r"broken shard|missing shard"):
            sources.build("webdataset", path=str(tmp_path / name))[0]
