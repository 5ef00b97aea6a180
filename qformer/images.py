"""Reading one image: anything a user may hand over -> RGB bytes, upright.

JPEG goes through `simplejpeg` where it is installed (about twice PIL's speed), everything else through PIL.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps
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
    """Encoded bytes, a path, a PIL image, `uint8[h, w, 3]` or `uint8[3, h, w]` -> uint8[3, h, w] (channels last in memory).

    EXIF orientation is applied, other colour modes are converted, alpha is dropped onto white.

    Raises:
        BadSample: kinds `missing` (no such file), `unreadable` (no permission), `undecodable` (not an image, or truncated).
    """
    if isinstance(image, Tensor):
        return image
    if isinstance(image, str | Path):
        image = _read_file(Path(image))
    if isinstance(image, np.ndarray):
        pixels = image
    elif isinstance(image, bytes):
        pixels = _decode(image)
    else:
        pixels = _rgb(image)
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)  # (3, h, w)


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadSample("missing", str(path)) from error
    except OSError as error:
        raise BadSample("unreadable", f"{path}: {error.strerror}") from error


def _decode(data: bytes) -> np.ndarray:
    # A rotated photo carries an EXIF block near its start; PIL knows how to apply it.
    if simplejpeg is not None and data[:3] == JPEG and EXIF not in data[:64]:
        try:
            return simplejpeg.decode_jpeg(data, colorspace="RGB")
        except ValueError:
            pass  # CMYK or damage: PIL reads the one and names the other
    try:
        with Image.open(io.BytesIO(data)) as opened:
            return _rgb(opened)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadSample("undecodable", str(error)) from error


def _rgb(image: Image.Image) -> np.ndarray:
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))
