"""Reading of one image from bytes, a path, an array or a tensor to upright RGB pixels.

JPEG, also inside TIFF, is decoded by `simplejpeg` and never by Pillow (docs/security.md); Pillow decodes the other
`FORMATS`.
"""

from __future__ import annotations

import io
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from qformer import lookup
from qformer.formats import FORMATS
from qformer.images import brightness, jpeg, tiff
from qformer.images.orientation import of_info, upright
from qformer.types import BadSample

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    ImageLike = bytes | str | Path | np.ndarray | Image.Image | Tensor

HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
LONGEST_NAME = 100  # characters of a name that are shown in a message


def read_image(image: ImageLike) -> Tensor:
    """Read encoded bytes, a path, a PIL image, `uint8[h, w, 3]` or a tensor to uint8[3, h, w] in channels-last memory.

    The orientation from EXIF is applied, other color modes are converted to RGB, 16 bits become 8, and alpha is
    composited onto white. A tensor, `uint8[3, h, w]` or float[3, h, w] from 0 to 1, is returned unchanged.

    Raises:
        BadSample: kinds `missing` (no such file), `unreadable` (no permission, a folder), `undecodable` (not an image,
            truncated, far too large, values without a known white level, or an array or tensor of another kind).
    """
    if isinstance(image, Tensor):
        return _check_tensor(image)
    if isinstance(image, str | Path):
        image = read_file(Path(image))
    if isinstance(image, np.ndarray):
        pixels = image
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
            raise BadSample("undecodable", f"an array {pixels.dtype}{list(pixels.shape)} is not uint8[h, w, 3]")
    elif isinstance(image, bytes | bytearray | memoryview):
        pixels = _decode(bytes(image))
    elif not isinstance(image, Image.Image):
        raise BadSample("undecodable", f"{type(image).__name__} is not encoded bytes, a path, an array, or an image")
    else:
        pixels = _decode_with_pil(image)
    return torch.from_numpy(np.require(pixels, requirements=["C", "W"])).permute(2, 0, 1)  # (3, h, w)


def _check_tensor(image: Tensor) -> Tensor:
    shape = f"a tensor {str(image.dtype).removeprefix('torch.')}{list(image.shape)}"
    known = image.dtype == torch.uint8 or image.is_floating_point()
    if not known or image.ndim != 3 or image.shape[0] != 3 or not image.numel():
        raise BadSample("undecodable", f"{shape} is not uint8[3, h, w] or float[3, h, w] from 0 to 1")
    if image.is_floating_point() and not bool(((image >= 0) & (image <= 1)).all()):  # NaN is neither
        raise BadSample("undecodable", f"{shape} has numbers outside 0 to 1; give pixels from 0 to 1, or uint8")
    return image


def shown(path: str | Path) -> str:
    """Shorten a name for a message, since an address may hold megabytes."""
    return str(path) if len(str(path)) <= LONGEST_NAME else f"{str(path)[:LONGEST_NAME]}..."


def _describe_missing(path: Path) -> str:
    """Describe a missing file, and say that addresses are not fetched if it is one."""
    address = lookup.address(path)
    return shown(path) if address is None else f"{shown(address)}{lookup.NOT_FETCHED}"


def read_file(path: Path) -> bytes:
    """Read the bytes of a regular file; pipes and devices are never opened.

    Raises:
        BadSample: kinds `missing` and `unreadable`.
    """
    with regular(path):
        return path.read_bytes()


@contextmanager
def regular(path: Path) -> Iterator[None]:
    """Context in which a regular file may be opened; what is no file is refused before.

    Raises:
        BadSample: kinds `missing` and `unreadable`.
    """
    try:
        if lookup.address(path) and not path.exists():
            raise FileNotFoundError
        if path.exists() and not path.is_file():  # reading from a device or a pipe may never end
            raise BadSample("unreadable", f"{path}: not a file")
        yield
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: a null byte in the name
        raise BadSample("missing", _describe_missing(path)) from error
    except OSError as error:
        if lookup.address(path):  # a data address is too long for a file name
            raise BadSample("missing", _describe_missing(path)) from error
        raise BadSample("unreadable", f"{shown(path)}: {error.strerror}") from error


def read_head(data: bytes, formats: Iterable[str] = FORMATS) -> tuple[str, int, int]:
    """Read format, width and height in pixels from the header of an encoded image, without decoding it.

    Raises:
        BadSample: kind `undecodable`: not an image of these formats, a damaged header, or too many pixels for Pillow.
    """
    try:
        if data.startswith(jpeg.START):
            if "JPEG" not in formats:
                raise UnidentifiedImageError
            head = jpeg.parse(data)
            return "JPEG", head.width, head.height
        with _open_image(data, formats) as opened:
            return str(opened.format), *opened.size
    except Exception as error:
        raise _undecodable_error(error, data) from error


def is_animated(path: Path) -> bool:
    """Check if a file is a GIF of several frames; one that cannot be read is none, which is told when it is shown."""
    try:
        with _open_image(read_file(path), ["GIF"]) as image:
            return bool(getattr(image, "is_animated", False))
    except (BadSample, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


def _decode(data: bytes) -> np.ndarray:
    try:
        if data.startswith(jpeg.START):
            head = jpeg.parse(data)
            if Image.MAX_IMAGE_PIXELS and head.width * head.height > 2 * Image.MAX_IMAGE_PIXELS:  # as for other formats
                raise Image.DecompressionBombError(f"{head.width} x {head.height} pixels are too many")
            return jpeg.read_rgb(head)
        with _open_image(data, FORMATS) as opened:
            if tiff.holds_jpeg(opened):
                return tiff.read_rgb(opened, data)
            opened.load()
            brightness.check_colors(opened, data)
            return upright(
                _to_rgb(opened), 1 if opened.format == "TIFF" else of_info(opened.info)
            )  # Pillow turns TIFF itself
    except Exception as error:  # a damaged file makes PIL's decoders raise nearly anything
        raise _undecodable_error(error, data) from error


def _open_image(data: bytes, formats: Iterable[str]) -> Image.Image:
    """Open an image with Pillow, in these formats only (anybody may send others) and never as JPEG."""
    if "HEIF" in formats and "HEIF" not in Image.OPEN:
        import pillow_heif

        pillow_heif.register_heif_opener()
    return Image.open(io.BytesIO(data), formats=[name for name in formats if name != "JPEG"])


def _undecodable_error(error: Exception, data: bytes = b"") -> BadSample:
    if isinstance(error, UnidentifiedImageError):  # its own message shows the memory address of an object
        if "HEIF" not in FORMATS and data[4:8] == b"ftyp" and data[8:12] in HEIF_BRANDS:
            return BadSample("undecodable", "an image in HEIC; install pillow-heif to read it, or convert it")
        return BadSample("undecodable", f"not an image in a supported format: {', '.join(FORMATS)}")
    return BadSample("undecodable", str(error) or type(error).__name__)


def _decode_with_pil(image: Image.Image) -> np.ndarray:
    """Convert an image that the caller has opened with Pillow, decoding it if necessary."""
    try:
        return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:
        raise _undecodable_error(error) from error


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(brightness.to_gray(image))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))
