"""Reading one image: anything a user may hand over -> RGB bytes, upright.

JPEG goes through `simplejpeg` where it is installed (about twice PIL's speed), everything else through PIL.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from qformer.types import BadSample

try:
    import simplejpeg
except ImportError:  # an optional accelerator: the result is the same without it
    simplejpeg = None

if TYPE_CHECKING:
    ImageLike = bytes | str | Path | np.ndarray | Image.Image | Tensor

JPEG = b"\xff\xd8\xff"
EXIF = b"Exif\x00\x00"


def read_image(image: ImageLike) -> Tensor:
    """Encoded bytes, a path, a PIL image, `uint8[h, w, 3]` or `uint8[3, h, w]` -> uint8[3, h, w], channels last.

    EXIF orientation is applied, other colour modes are converted, 16 bits become 8, alpha is dropped onto white.

    Raises:
        BadSample: kinds `missing` (no such file), `unreadable` (no permission, a folder), `undecodable` (not an image,
            truncated, or far too large).
    """
    if isinstance(image, Tensor):
        return image
    if isinstance(image, str | Path):
        image = read_file(Path(image))
    if isinstance(image, np.ndarray):
        pixels = image
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
            raise BadSample("undecodable", f"an array {pixels.dtype}{list(pixels.shape)} is not uint8[h, w, 3]")
    elif isinstance(image, bytes):
        pixels = _decode(image)
    else:
        pixels = _decode_with_pil(image)
    return torch.from_numpy(np.require(pixels, requirements=["C", "W"])).permute(2, 0, 1)  # (3, h, w)


def read_file(path: Path) -> bytes:
    """An image as it is stored.

    Raises:
        BadSample: kinds `missing` and `unreadable`.
    """
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: a zero byte in the name
        raise BadSample("missing", str(path)) from error
    except OSError as error:
        raise BadSample("unreadable", f"{path}: {error.strerror}") from error


def _decode(data: bytes) -> np.ndarray:
    # A rotated photo carries an EXIF block, in front of which other blocks may stand; PIL knows how to apply it.
    if simplejpeg is not None and data[:3] == JPEG and EXIF not in data:
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
            if colours != "CMYK" and height * width <= (Image.MAX_IMAGE_PIXELS or height * width):
                return simplejpeg.decode_jpeg(data, colorspace="RGB")
        except ValueError:
            pass  # damage, which PIL names; CMYK is inverted or not as PIL knows; of a bomb it warns, or refuses it
    return _decode_with_pil(io.BytesIO(data))


def _decode_with_pil(image: Image.Image | io.BytesIO) -> np.ndarray:
    try:
        if isinstance(image, Image.Image):
            return _rgb(image)
        with Image.open(image) as opened:
            return _rgb(opened)
    except UnidentifiedImageError as error:
        raise BadSample("undecodable", "not an image") from error
    except Exception as error:  # a damaged file makes PIL's decoders raise nearly anything
        raise BadSample("undecodable", str(error) or type(error).__name__) from error


def _rgb(image: Image.Image) -> np.ndarray:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of grey, which PIL would clip rather than scale
        grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        image = Image.fromarray(grey)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))
