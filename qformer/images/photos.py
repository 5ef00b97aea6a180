"""Photos to try a model on: some that come with scikit-image, and else those of the user's own gallery."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from qformer.images import read_image
from qformer.types import BadSample

if TYPE_CHECKING:
    from collections.abc import Iterable

COUNT, SIZE = 4, 320  # pixels of the longer side
ANYTHING = "what is in the photo?"

#: Photos in scikit-image's folder `data` that anybody may use for anything, as its own documentation says, each with a
#: question: CC0 by Stefan van der Walt, public domain by NASA, CC0 by Rachel Michetti, public domain by SpaceX.
FREE = {
    "chelsea.png": "what animal is in the photo?",
    "astronaut.png": "who is in the photo?",
    "coffee.png": "what color is the cup?",
    "rocket.jpg": ANYTHING,
}
MISLEADING = "there is a dog in the photo."  # about the first


def draw_photos(folder: Path, own: Iterable[str] = ()) -> list[list[str]]:
    """Write small copies of photos into `folder`: rows (file, question, context), empty if there are no photos.

    Args:
        own: files of the user, taken in this order where scikit-image is not installed; unreadable ones are left out.
    """
    free = _find_free()
    rows: list[list[str]] = []
    for file, question in free.items() if free else ((Path(name), ANYTHING) for name in own):
        if len(rows) == COUNT:
            break
        try:
            picture = Image.fromarray(read_image(file).permute(1, 2, 0).numpy())
        except BadSample:
            continue
        picture.thumbnail((SIZE, SIZE))
        copy = folder / f"photo{len(rows)}.png"
        picture.save(copy)
        rows.append([str(copy), question, ""])
    return [*rows, [*rows[0][:2], MISLEADING]] if free and rows else rows


def _find_free() -> dict[Path, str]:
    """Files of `FREE` that are on this machine, and their questions; scikit-image itself is not imported."""
    found = find_spec("skimage")
    if found is None or found.origin is None:
        return {}
    folder = Path(found.origin).parent / "data"
    return {folder / name: question for name, question in FREE.items() if (folder / name).is_file()}
