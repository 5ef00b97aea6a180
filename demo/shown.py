"""Pictures and clips of a visitor that a model is shown in one row, and their places in a prompt."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from PIL import Image

from qformer.connectors.markers import write_out
from qformer.demo.limits import open_clip, open_picture
from qformer.types import UsageError
from qformer.videos import INSTALL, Clip, begins_as_video

if TYPE_CHECKING:
    from qformer.model.vision_language import VisionLanguageModel
    from qformer.types import Plan

MOST_SHOWN = 8  # pictures and clips in a row
ONE_PICTURE = Lock()  # is decoded at a time outside the queue, which bounds the memory
SIDE = 224  # pixels of a picture that is planned to find out whether a second one fits


def row_of(model: VisionLanguageModel, image: Any, more: Any = None) -> list[Image.Image | Clip]:
    """Open everything that one question is about, in the order in which the model is shown it.

    Args:
        image: path of a picture or clip, of a moving GIF the first frame; None where there is only `more`.
        more: list of further paths, where a moving GIF is a clip.

    Raises:
        UsageError: nothing, too much, an unusable file, or more than this model can be shown.
    """
    return [_open(model, *one) for one in _files(model, image, more)]


def stills_of(model: VisionLanguageModel, image: Any, more: Any, side: int) -> list[Image.Image]:
    """Pictures of a row, and a frame of each clip, at most `side` pixels wide and high; raises as `row_of` does.

    One is opened at a time, and shrunk before the next: this is for what does not wait in the queue.
    """
    made = []
    for one in _files(model, image, more):
        with ONE_PICTURE:
            made.append(still(_open(model, *one)))
            made[-1].thumbnail((side, side))
    return made


def _files(model: VisionLanguageModel, image: Any, more: Any) -> list[tuple[Any, bool]]:
    """Files of a row, each with whether a moving GIF is a clip there; see `row_of`."""
    further = more or []
    files = [*([] if image is None and further else [image]), *further]
    if len(files) > MOST_SHOWN:
        raise UsageError(f"got {len(files)} pictures and clips; give at most {MOST_SHOWN}")
    if len(files) > 1 and (why := lacks(model)):
        raise UsageError(why)
    return [(file, place >= len(files) - len(further)) for place, file in enumerate(files)]


def _open(model: VisionLanguageModel, file: Any, moves: bool) -> Image.Image | Clip:
    if not isinstance(file, str):
        return open_picture(file)
    if begins_as_video(file):
        if why := lacks(model, clips=True):
            raise UsageError(why)
        return open_clip(file, model.frontend.strategy)
    picture = open_picture(file)
    if moves and Path(file).read_bytes()[:4] == b"GIF8" and not lacks(model, clips=True):
        clip = open_clip(file, model.frontend.strategy)
        return clip if len(clip.frames) > 1 else picture
    return picture


def lacks(model: VisionLanguageModel, clips: bool = False) -> str:
    """Reason why a model is shown one picture alone, or no clips; empty if it is shown several."""
    strategy = model.frontend.strategy
    try:
        if clips:
            if find_spec("av") is None:
                raise UsageError(INSTALL)
            plan = strategy.plan_video(SIDE, SIDE, len(strategy.sample(48, 24.0)))  # two seconds
        else:
            plan = strategy.plan_many([(SIDE, SIDE)] * 2)
        model.prompt_for(plan, "what?")
    except UsageError as error:
        return f"this model is shown {'no clips' if clips else 'one picture alone'}: {error}"
    return ""


def places(model: VisionLanguageModel, row: list[Image.Image | Clip], plan: Plan) -> str:
    """Text for what stands in front of a prompt, such as `[picture 1: 64 tokens]`, with the markers around tiles."""
    texts = []
    for number, (one, part) in enumerate(zip(row, plan.parts or (plan,), strict=True), start=1):
        name = f"{'clip' if isinstance(one, Clip) else 'picture'}{f' {number}' * (len(row) > 1)}"
        frames = f"{len(one.frames)} frames, " if isinstance(one, Clip) else ""
        texts.append(write_out(part, f"[{name}: {frames}{model.connector.count_tokens(part):,} tokens]"))
    return "".join(texts)


def shown_by_browsers(path: str) -> str:
    """Decode a picture whole, so that a damaged one is told at its upload; HEIC, which few browsers show, becomes JPEG.

    Clips were looked into by the server, and are decoded for an answer only.

    Returns:
        The path itself, or that of the JPEG beside it.

    Raises:
        UsageError: the picture cannot be read.
    """
    if begins_as_video(path):
        return path
    with ONE_PICTURE:
        picture = open_picture(path)
    with Path(path).open("rb") as file:
        if file.read(8)[4:] != b"ftyp":
            return path
    made = Path(path).with_suffix(".jpg")
    picture.save(made, quality=95)
    return str(made)


def still(one: Image.Image | Clip) -> Image.Image:
    """A picture, or the middle one of the frames of a clip that the model is shown."""
    if not isinstance(one, Clip):
        return one
    return Image.fromarray(one.frames[len(one.frames) // 2].permute(1, 2, 0).contiguous().numpy())
