"""Whatever bytes arrive: the right pixels, or a `BadSample` that says which kind of bad; never another exception."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from qformer import images
from qformer.images import orientation, read_image
from qformer.types import BadSample

ORIENTATION = 0x112


def photo(width: int = 50, height: int = 40) -> Image.Image:
    """Smooth colours, different in every corner: red grows to the right, green downwards, blue to the upper right."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, (x + 255 - y) / 2], axis=2).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def bad(image: Any) -> BadSample:
    with pytest.raises(BadSample) as caught:
        read_image(image)
    return caught.value


@pytest.mark.parametrize("options", [{"subsampling": 0, "quality": 95}, {"progressive": True}, {"quality": 50}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_is_what_pil_says(mode: str, options: dict[str, Any]) -> None:
    data = encoded(photo(51, 37).convert(mode), "JPEG", **options)
    read = read_image(data)
    assert read.dtype == torch.uint8
    assert read.shape == (3, 37, 51)
    assert torch.equal(read, pixels(Image.open(io.BytesIO(data))))


def test_the_marks_of_colors_are_kept() -> None:
    """Without a mark of JFIF, Adobe's says whether three channels are YCbCr or RGB, and four YCCK or CMYK."""
    for mode, transforms in (("RGB", (0, 1)), ("CMYK", (0, 2))):
        data = encoded(photo(51, 37).convert(mode), "JPEG", subsampling=0)
        place = data.index(b"\xff\xdb")  # the first table: behind the marks
        read = []
        for transform in transforms:
            mark = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([transform])
            marked = b"\xff\xd8" + mark + data[place:]
            read.append(read_image(marked))
            assert torch.equal(read[-1], pixels(Image.open(io.BytesIO(marked))))
        assert not torch.equal(*read)


def test_of_several_pictures_in_a_jpeg_the_first() -> None:
    data = encoded(photo(), "MPO", save_all=True, append_images=[photo(30, 30)])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert torch.equal(read_image(data), pixels(Image.open(io.BytesIO(data))))
    assert images.read_head(data) == ("JPEG", 50, 40)


@pytest.mark.parametrize(
    ("mode", "tags"),
    [("RGB", {}), ("RGB", {262: 2}), ("L", {}), ("L", {262: 0}), ("CMYK", {}), ("CMYK", {274: 6}), ("RGB", {274: 7})],
)
def test_jpegs_inside_tiff(mode: str, tags: dict[int, int]) -> None:
    """In strips, the last one lower; TIFF tells their colors (YCbCr, RGB, 0 is white, CMYK) and orientation."""
    data = encoded(photo(700, 533).convert(mode), "TIFF", compression="jpeg", tiffinfo=tags)
    opened = Image.open(io.BytesIO(data))
    assert len(opened.tag_v2[273]) > 3
    assert torch.equal(read_image(data), pixels(opened))


def test_damaged_tiffs_of_jpegs() -> None:
    data = encoded(photo(700, 533), "TIFF", compression="jpeg")
    tags = Image.open(io.BytesIO(data)).tag_v2
    end = tags[273][3] + tags[279][3]
    assert bad(data[:8] + bytes(len(data) - 8)).kind == "undecodable"
    spoiled = data[: end - 2] + b"\x00\x00" + data[end:]  # a strip without an end
    assert "ends too early" in bad(spoiled).detail
    other = data.replace((533).to_bytes(4, "little"), (999_999).to_bytes(4, "little"), 1)
    assert "pieces" in bad(other).detail or "size" in bad(other).detail


def sampled(*factors: int) -> bytes:
    """A JPEG whose channels say that they are sampled so: 0x21 is twice in width."""
    data = bytearray(encoded(photo(64, 40), "JPEG", subsampling=0))
    place = data.index(b"\xff\xc0") + 11
    for number, factor in enumerate(factors):
        data[place + 3 * number] = factor
    return bytes(data)


@pytest.mark.parametrize("kind", ["444", "422", "420", "440", "411"])
def test_channels_that_are_sampled_unlike(kind: str) -> None:
    data = simplejpeg.encode_jpeg(np.array(photo(64, 40)), colorsubsampling=kind)
    read = read_image(data)
    assert read.shape == (3, 40, 64)
    assert (read.float() - pixels(photo(64, 40)).float()).abs().mean() < 3


@pytest.mark.parametrize("factors", [(0x42, 0x11, 0x11), (0x22, 0x22, 0x22), (0x11, 0x21, 0x12), (0x33, 0x11, 0x11)])
def test_channels_that_are_sampled_as_nobody_reads(factors: tuple[int, ...]) -> None:
    told = ", ".join(f"{factor >> 4}x{factor & 15}" for factor in factors)
    assert bad(sampled(*factors)).detail == (
        f"a JPEG whose channels are sampled {told}, which is not supported; save it again, such as with 4:4:4 or 4:2:0"
    )


def test_what_stands_in_a_head_besides_is_not_looked_at() -> None:
    """Blocks of any content, bytes between blocks and a thumbnail; too many blocks are no head."""
    data = encoded(photo(), "JPEG")
    block = b"\xff\xe2\x00\x10ICC_PROFILE\x00??"
    thumbnail = encoded(photo(8, 8), "JPEG")
    within = b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    for more in (block, within, b"\xff\xff\xff\xfe\x00\x02", b"\xff\xe9\x00\x02between"):
        assert torch.equal(read_image(data[:2] + more + data[2:]), read_image(data))
    assert "does not end" in bad(data[:2] + b"\xff\xe2\x00\x02" * 20_000 + data[2:]).detail


def test_damage_in_the_middle_of_a_jpeg_is_no_error() -> None:
    """As with PIL: the decoder goes on at the next mark."""
    data = bytearray(encoded(photo(200, 200), "JPEG", restart_marker_rows=2))
    data[len(data) // 2 : len(data) // 2 + 6] = b"\xff\x00\xff\x00\x12\x34"
    read = read_image(bytes(data))
    assert torch.equal(read, pixels(Image.open(io.BytesIO(bytes(data)))))
    assert not torch.equal(read, pixels(photo(200, 200)))


@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize("in_front", [b"", b"\xff\xe2" + (9000).to_bytes(2, "big") + bytes(8998)], ids=["", "profile"])
def test_rotated_photos_stand_upright(number: int, in_front: bytes) -> None:
    """Also where another block, such as a colour profile, stands in front of the EXIF block."""
    turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL's transposition that undoes each orientation's own
    upright = photo(50, 40)
    stored = upright if number == 1 else upright.transpose(Image.Transpose(turn[number]))
    data = encoded(stored, "JPEG", exif=exif(number), quality=95, subsampling=0)
    read = read_image(data[:2] + in_front + data[2:])
    assert read.shape == (3, 40, 50)
    assert (read.int() - pixels(upright).int()).abs().max() < 12


def test_orientation_of_png_and_of_pil_images() -> None:
    stored = photo(50, 40).transpose(Image.Transpose.ROTATE_90)
    data = encoded(stored, "PNG", exif=exif(6))
    for kind in ("PNG", "WEBP", "TIFF"):
        lossless = {"lossless": True} if kind == "WEBP" else {}
        assert torch.equal(read_image(encoded(stored, kind, exif=exif(6), **lossless)), pixels(photo(50, 40)))
    assert torch.equal(read_image(Image.open(io.BytesIO(data))), pixels(photo(50, 40)))


@pytest.mark.parametrize(
    ("exif", "xmp", "told"),
    [
        (b"", b"", 1),
        (b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0", b"", 6),
        (b"Exif\0\0" * 300_000 + b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x08\0\0", b"", 8),  # PIL: hours
        (b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x09\0\0\0", b'tiff:Orientation="3"', 1),
        (b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"<tiff:Orientation>3</tiff:Orientation>", 3),
        (b"Exif\0\0II*\0\xff\xff\xff\xff", b"", 1),
        (b"Exif\0\0no", b"", 1),
    ],
)
def test_orientation_of_any_bytes(exif: bytes, xmp: bytes, told: int) -> None:
    assert orientation.of_blocks(exif, xmp) == told


def test_alpha_goes_onto_white() -> None:
    red = Image.new("RGBA", (3, 1), (255, 0, 0, 255))
    red.putpixel((1, 0), (255, 0, 0, 0))
    red.putpixel((2, 0), (255, 0, 0, 51))
    expected = [[255, 0, 0], [255, 255, 255], [255, 204, 204]]
    assert read_image(encoded(red, "PNG"))[:, 0].T.tolist() == expected
    assert read_image(encoded(red, "WEBP", lossless=True, exact=True))[:, 0].T.tolist() == expected
    assert read_image(red)[:, 0].T.tolist() == expected
    grey = Image.new("LA", (2, 1), (100, 255))
    grey.putpixel((1, 0), (100, 0))
    assert read_image(encoded(grey, "PNG"))[0, 0].tolist() == [100, 255]


def test_palettes() -> None:
    image = photo().quantize(16)
    assert torch.equal(read_image(encoded(image, "PNG")), pixels(image))
    two = Image.new("P", (2, 1))
    two.putpalette([10, 20, 30, 0, 0, 0])
    two.putpixel((1, 0), 1)
    assert read_image(encoded(two, "PNG", transparency=1))[:, 0].T.tolist() == [[10, 20, 30], [255, 255, 255]]
    clear = Image.new("RGB", (2, 1), (9, 9, 9))
    clear.putpixel((1, 0), (8, 8, 8))
    assert read_image(encoded(clear, "PNG", transparency=(8, 8, 8)))[0, 0].tolist() == [9, 255]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(kind: str) -> None:
    grey = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    read = read_image(encoded(Image.fromarray(grey), kind))
    assert torch.equal(read, torch.from_numpy((grey >> 8).astype(np.uint8)).expand(3, -1, -1))


def test_grey_and_bilevel() -> None:
    grey = photo().convert("L")
    assert torch.equal(read_image(encoded(grey, "PNG")), pixels(grey))
    line = Image.new("1", (2, 1), 1)
    line.putpixel((1, 0), 0)
    assert read_image(encoded(line, "PNG"))[:, 0].T.tolist() == [[255] * 3, [0] * 3]


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue", "lime")]
    read = read_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert torch.equal(read, pixels(frames[0]))


def test_other_ways_to_hand_over_an_image(tmp_path: Path) -> None:
    expected = pixels(photo())
    path = tmp_path / "photo.with.no.known.suffix"
    path.write_bytes(encoded(photo(), "PNG"))
    for given in (path, str(path), path.read_bytes(), photo(), np.array(photo()), expected):
        read = read_image(given)
        assert torch.equal(read, expected)
    window = np.array(photo())[5:30, 40:10:-1]  # a view with negative strides
    assert torch.equal(read_image(window), torch.from_numpy(window.copy()).permute(2, 0, 1))


def test_pixels_are_writable_and_nobody_warns() -> None:
    frozen = np.array(photo())
    frozen.flags.writeable = False
    for given in (encoded(photo(), "PNG"), encoded(photo(), "JPEG"), photo(), frozen):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            read_image(given).zero_()
    assert frozen.any()


def test_one_pixel() -> None:
    for kind in ("PNG", "JPEG"):
        assert read_image(encoded(Image.new("RGB", (1, 1), "white"), kind)).tolist() == [[[255]]] * 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.97])
def test_truncated_files(kind: str, share: float) -> None:
    data = encoded(photo(200, 200), kind)
    assert bad(data[: int(len(data) * share)]).kind == "undecodable"
    late = Image.open(io.BytesIO(data[: int(len(data) * 0.7)]))  # PIL reads the pixels only when it is asked for them
    assert bad(late).kind == "undecodable"


@pytest.mark.parametrize("data", [b"", b"a text\n", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", bytes(5000), b"GIF89a"])
def test_what_is_no_image(data: bytes, tmp_path: Path) -> None:
    assert bad(data).kind == "undecodable"
    assert "0x" not in bad(data).detail  # no address of an object: the list of skipped samples can be repeated
    (tmp_path / "file.jpg").write_bytes(data)
    assert bad(tmp_path / "file.jpg").kind == "undecodable"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert bad(tmp_path / "none.jpg").kind == "missing"
    assert "none.jpg" in bad(tmp_path / "none.jpg").detail
    assert bad(tmp_path / "file" / "below.jpg").kind == "missing"
    assert bad("zero\0byte.jpg").kind == "missing"
    assert bad(tmp_path).kind == "unreadable"
    assert bad("x" * 5000).kind == "unreadable"
    locked = tmp_path / "locked.jpg"
    locked.write_bytes(encoded(photo(), "JPEG"))
    locked.chmod(0)
    if os.access(locked, os.R_OK):
        pytest.skip("run by a user who may read anything")
    assert bad(locked).kind == "unreadable"


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_decompression_bombs(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(photo(50, 50), kind)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1240)  # PIL refuses twice as many and warns of fewer
    assert bad(data).kind == "undecodable"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2500)
    assert read_image(data).shape == (3, 50, 50)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert read_image(data).shape == (3, 50, 50)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((4, 5), "uint8"), ((4, 5, 4), "uint8"), ((0, 5, 3), "uint8"), ((4, 5, 3), "float32")]
)
def test_arrays_of_another_shape_or_type(shape: tuple[int, ...], dtype: str) -> None:
    assert bad(np.zeros(shape, dtype)).kind == "undecodable"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
@pytest.mark.filterwarnings("ignore")
def test_damage_anywhere_gives_pixels_or_bad_sample(kind: str) -> None:
    rng = np.random.default_rng(0)
    options = {"exif": exif(6)} if kind in ("PNG", "JPEG", "TIFF", "WEBP") else {}
    data = np.frombuffer(encoded(photo(24, 20), kind, **options), np.uint8)
    for _ in range(150):
        damaged = data.copy()
        places = rng.integers(0, min(len(data), int(rng.choice([60, 300, len(data)]))), 4)
        damaged[places] = rng.integers(0, 256, 4)
        try:
            assert read_image(damaged.tobytes()).shape[0] == 3
        except BadSample:
            continue


def test_what_is_no_picture_is_named_by_its_kind() -> None:
    data = io.BytesIO()
    Image.new("RGB", (4, 3), "white").save(data, "PNG")
    assert torch.equal(read_image(bytearray(data.getvalue())), read_image(data.getvalue()))  # type: ignore[arg-type]
    for given, kind in ((data, "BytesIO"), (None, "NoneType"), ([1, 2], "list")):
        with pytest.raises(BadSample, match=f"{kind} is not encoded bytes, a path"):
            read_image(given)  # type: ignore[arg-type]
