"""Files of the processors of transformers: how a system resizes its pictures, and which classes make its inputs."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from qformer.files import pretrained
from qformer.types import UsageError

if TYPE_CHECKING:
    from pathlib import Path

NO_PROCESSOR = "{{where}} does not say how {title} cuts pictures ({{reason}}); put its preprocessor_config.json there"
FILES = ("preprocessor_config.json", "processor_config.json")
BICUBIC = 3  # Pillow's number
#: What an image processor must do, as the strategies here do it.
PROCESSED = (
    ("do_resize", True),
    ("do_rescale", True),
    ("do_normalize", True),
    ("do_center_crop", None),
    ("resample", BICUBIC),
)


def read(kind: Any, folder: Path, title: str) -> Any:
    """The image processor of a folder, of this class of transformers; version 5 keeps it in the second of `FILES`.

    Raises:
        UsageError: there is none, it is damaged, or it changes pixels in another way than published.
    """
    own, whole = (folder / name for name in FILES)
    if not own.is_file() and not (whole.is_file() and b'"image_processor"' in whole.read_bytes()):
        raise UsageError(f"'{folder}' has no {FILES[0]}, which says how {title} cuts its pictures; put its own there")
    images = pretrained.read(kind, folder, NO_PROCESSOR.format(title=title))
    for key, expected in PROCESSED:
        found = getattr(images, key, None)
        if (found or None) != (expected or None):
            raise UsageError(
                f"the image processor in '{folder}' has {key} {found}, and {title} {expected}; set it to that"
            )
    if not math.isclose(images.rescale_factor, 1 / 255):
        raise UsageError(
            f"the image processor in '{folder}' has rescale_factor {images.rescale_factor}; set it to 1/255"
        )
    return images


def square(images: Any, folder: Path) -> int:
    """Side of the squares that an image processor makes.

    Raises:
        UsageError: they are no squares.
    """
    width, height = images.size.width, images.size.height
    if not width or width != height:
        raise UsageError(
            f"the image processor in '{folder}' makes tiles of {width} x {height} pixels; set both to the same number"
        )
    return int(width)


def require_place(odd: dict[str, bool], title: str) -> None:
    """Refuse a checkpoint with something for which the class of a system has no place.

    Args:
        odd: by its name, True where the class has no place for what the checkpoint has.

    Raises:
        UsageError: naming the first.
    """
    if named := [key for key, is_odd in odd.items() if is_odd]:
        raise UsageError(f"{title} in transformers has no place for the {named[0]} of this checkpoint; use it as it is")


def write(folder: Path, own: dict[str, Any], clips: dict[str, Any] | None = None) -> None:
    """Write what a processor is beside its image processor and its tokenizer, as transformers 4 and 5 read it.

    Args:
        own: its class and options. clips: the class and options of its processor of clips.
    """
    files = {FILES[1]: own} | ({} if clips is None else {"video_preprocessor_config.json": clips})
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
