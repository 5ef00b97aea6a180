"""Limits of the page: pictures, clips, texts and numbers are checked before the model reads them; without Gradio."""

from __future__ import annotations

import ctypes
import errno
import json
import math
import unicodedata
import warnings
from collections import deque
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from PIL import Image, UnidentifiedImageError

from qformer import formats
from qformer.images import read_file, read_head, read_image, shown
from qformer.types import BadSample, UsageError
from qformer.videos import STRANGERS, Video, begins_as_video

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qformer.resolution.base import ResolutionStrategy
    from qformer.videos import Clip

MAX_BYTES = 20_000_000
MAX_PIXELS = 50_000_000
MAX_RATIO = 200  # longer side to shorter side: beyond it a picture is a line
MAX_QUESTION = 2_000  # characters
MAX_CONTEXT = 20_000
NO_ROOM = "the disk of this machine is full; tell who runs the page, or try again later"
MAX_DEPTH = 50  # nesting of a request's JSON
M_ARENA_MAX, HEAPS = -8, 2  # a parameter of glibc's mallopt(3), and its value here
#: Common formats, and HEIC where it can be read; Pillow before 13 has holes in others (docs/security.md).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", *({"HEIF"} & formats.FORMATS.keys()))

LINES = "\n\t"  # control characters that a text can contain
ONE_CLIP = Lock()  # is looked into at a time, which bounds what FFmpeg takes; the queue bounds what is decoded


def check_picture(path: str | Path) -> bytes:
    """Read a file and check by its header that it is a picture within the limits; nothing is decoded.

    The content decides the format, whatever the name.

    Raises:
        UsageError: no such file, too many bytes or pixels, or not a picture.
    """
    try:
        size = Path(path).stat().st_size if Path(path).is_file() else 0
        if size > MAX_BYTES:
            raise UsageError(
                f"the picture has {size / 1e6:.1f} MB; the limit is {MAX_BYTES / 1e6:.0f}, so make it smaller"
            )
        data = read_file(Path(path))
    except BadSample as bad:
        raise UsageError("the picture is no longer there; choose it again") from bad
    width, height = _size(data)
    if width * height > MAX_PIXELS:
        raise UsageError(
            f"the picture has {width} x {height} pixels; the limit is {MAX_PIXELS / 1e6:.0f} million, "
            "so make it smaller"
        )
    if max(width, height) > MAX_RATIO * min(width, height):
        raise UsageError(
            f"the picture has {width} x {height} pixels; one side can be {MAX_RATIO} times the other, so crop it"
        )
    return data


def check_file(path: str | Path) -> None:
    """Check an upload: a picture (`check_picture`), or a clip, of which no frame is made.

    Raises:
        UsageError: neither, or beyond the limits.
    """
    if not begins_as_video(path):
        check_picture(path)
        return
    with _of_stranger(path):
        pass


def open_clip(path: str | Path, strategy: ResolutionStrategy) -> Clip:
    """Read those frames of a clip that a strategy chooses, decoding as few as possible.

    Raises:
        UsageError: a file that cannot be read, or beyond a limit of the page or of the strategy.
    """
    with _of_stranger(path) as video:
        chosen = strategy.sample(video.total, video.fps)
        strategy.plan_video(*video.size, len(chosen))  # refuses before anything is decoded
        return video.read(lambda *_: chosen)


@contextmanager
def _of_stranger(path: str | Path) -> Iterator[Video]:
    """A clip, whose faults are said without where it lies."""
    try:
        with ONE_CLIP:
            video = Video(path, STRANGERS)
        yield video
    except (UsageError, BadSample) as error:
        said = error.detail if isinstance(error, BadSample) else str(error)
        raise UsageError(said.replace(shown(path), shown(Path(path).name))) from error
    except Exception as error:  # whatever PyAV makes of a stranger's file
        raise UsageError(f"this file cannot be read as a video ({type(error).__name__}); give MP4 or WebM") from error


def open_picture(path: Any) -> Image.Image:
    """Open a picture as RGB, upright, alpha on white, 16 bits as 8, the first frame of several (`qformer.images`).

    Raises:
        UsageError: no file, one that `check_picture` refuses, before anything is decoded, or a damaged one.
    """
    if path is None:
        raise UsageError("there is no picture yet; choose, drop or paste one")
    if not isinstance(path, str | Path):
        raise UsageError(f"the picture is a {type(path).__name__}; give a file")
    data = check_picture(path)
    try:
        pixels = read_image(data)
    except BadSample as bad:
        raise _no_picture(bad, data) from bad
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def _size(data: bytes) -> tuple[int, int]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the caller refuses one that is too large
            _, *size = read_head(data, FORMATS)
    except BadSample as bad:
        if isinstance(bad.__cause__, Image.DecompressionBombError):
            most = f"the limit is {MAX_PIXELS / 1e6:.0f} million, so make it smaller"
            raise UsageError(f"the picture has far too many pixels; {most}") from bad
        raise _no_picture(bad, data) from bad
    return size[0], size[1]


def _no_picture(bad: BadSample, data: bytes) -> UsageError:
    """Tell what is wrong with a file, without the words of decoders."""
    why = bad.detail if bad.detail.startswith("a JPEG") else "it is damaged or incomplete"
    if isinstance(bad.__cause__, UnidentifiedImageError):
        why = f"{'HEIC' if 'HEIC' in bad.detail else 'its format'} is not taken here" if data else "it is empty"
    also = ", GIF or HEIC" if "HEIF" in FORMATS else " or GIF"
    return UsageError(f"this file cannot be read as a picture ({why}); give JPEG, PNG, WebP{also}")


def check_text(name: str, value: Any, limit: int) -> str:
    """Check a text of at most `limit` characters; None becomes empty, and line ends become those of Unix.

    Raises:
        UsageError: not a text, too long, or with control characters or halves of characters.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UsageError(f"the {name} must be text, but got {kind(value)}; write it as words")
    text = value.replace("\r\n", "\n").replace("\r", "\n")
    if len(text) > limit:
        raise UsageError(f"the {name} has {len(text):,} characters; the limit is {limit:,}, so shorten it")
    for place, sign in enumerate(text):
        if unicodedata.category(sign) in ("Cc", "Cs") and sign not in LINES:
            raise UsageError(
                f"the {name} contains a control character (U+{ord(sign):04X}, at position {place + 1}); remove it"
            )
    return text


def check_number(name: str, value: Any, low: float, high: float, whole: bool = False) -> float:
    """Check a finite number from `low` to `high`, both included.

    Args:
        whole: require a whole number.

    Raises:
        UsageError: anything else, including booleans and digits in a text.
    """
    wanted = f"{'a whole number' if whole else 'a number'} from {low:g} to {high:g}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(f"{name} must be {wanted}, but got {kind(value)}")
    if not low <= value <= high or (whole and value != math.floor(value)):  # NaN fails the first
        raise UsageError(f"{name} must be {wanted}, but got {str(value)[:20]}")
    return float(value)


def check_request(body: bytes) -> dict[str, Any]:
    """Parse the JSON object of a request: finite numbers, no control or half characters, at most `MAX_DEPTH` deep.

    Raises:
        UsageError: anything else.
    """
    try:
        value = json.loads(body.decode(), parse_constant=_not_finite, parse_float=_finite)
    except RecursionError as error:
        raise UsageError("the request is nested too deeply; send a plain list of values") from error
    except ValueError as error:
        raise UsageError(f"the request is not valid JSON ({str(error)[:200]})") from error
    if not isinstance(value, dict):
        raise UsageError(f"the request must be a JSON object, but got {kind(value)}")
    for part in parts(value):
        if isinstance(part, str):
            check_text("request", part, len(body))
    return value


def parts(value: Any) -> Iterator[Any]:
    """Yield a JSON value and all values in it, including the keys of objects.

    Raises:
        UsageError: nested deeper than `MAX_DEPTH`.
    """
    waiting = deque([(value, MAX_DEPTH)])
    while waiting:
        part, left = waiting.popleft()
        if not left:
            raise UsageError("the request is nested too deeply; send a plain list of values")
        yield part
        inner = [*part.keys(), *part.values()] if isinstance(part, dict) else part if isinstance(part, list) else ()
        waiting.extend((each, left - 1) for each in inner)


def _not_finite(name: str) -> float:
    raise ValueError(f"{name} is not a number that can be used")


def _finite(text: str) -> float:
    return value if math.isfinite(value := float(text)) else _not_finite(text[:20])


def kind(value: Any) -> str:
    """Describe the type of a value in words."""
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return "nothing" if value is None else names.get(type(value), type(value).__name__)


def is_full(error: BaseException) -> bool:
    """Check whether the disk, or what this user may have of it, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def bound_heaps() -> None:
    """Let glibc keep the memory of all threads in two heaps, in place of up to eight for each core.

    Gradio calls the model in whichever of its threads is free, and each heap keeps what its largest call has taken.
    Other C libraries have nothing of the kind, and nothing is changed. Heaps that are there already stay.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_ARENA_MAX, HEAPS)
