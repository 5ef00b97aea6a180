"""Data source `clips`: short clips in which objects move, appear, disappear or turn another color, and their texts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch

from qformer.canvases.canvas import DIRECTIONS, TOLD, Canvas, CanvasObject, held_out
from qformer.canvases.drawing import draw_canvas
from qformer.canvases.drawn import Asking
from qformer.canvases.layout import Shell, are_apart, compose
from qformer.canvases.names import NUMBERS, full_name, name
from qformer.canvases.text import canvas_captions, canvas_description
from qformer.scenes.text import COLOURS, Question, pick, with_article
from qformer.videos import Clip

if TYPE_CHECKING:
    from collections.abc import Sequence

EVENTS = ("move", "appear", "disappear", "turn")
KINDS = ("movement", "order", "change", "colour", "count", "position", "yes/no")
FRAMES = (4, 8)  # least and greatest number of frames, one a second
STEPS = {"up": (-1, 0), "right": (0, 1), "down": (1, 0), "left": (0, -1)}  # of cells: rows, columns


@dataclass(frozen=True)
class Event:
    """Something that happens to one object, whose shape no other object of the clip has.

    Attributes:
        kind: one of `EVENTS`.
        before, after: the object; in `appear` and `disappear` they are equal.
        frames: first frame that shows something of it, and first that shows all of it; they differ in `move` only.
        how: direction of a movement, or the new color; else empty.
    """

    kind: str
    before: CanvasObject
    after: CanvasObject
    frames: tuple[int, int]
    how: str = ""

    def at(self, frame: int) -> CanvasObject | None:
        """Object as a frame shows it; None while it is not there."""
        start, end = self.frames
        done = min(max((frame - start + 1) / (end - start + 1), 0), 1)
        if self.kind == "move":
            (x, y, *_), (left, top, *_) = self.before.box, self.after.box
            x, y = round(x + done * (left - x)), round(y + done * (top - y))
            return replace(self.before, x=x + self.before.side / 2, y=y + self.before.side / 2)
        there = {"appear": done == 1, "disappear": done < 1}.get(self.kind, True)
        return (self.after if done == 1 else self.before) if there else None


@dataclass(frozen=True)
class DrawnClip:
    """Frames of a clip, and its one or two events, one after the other."""

    frames: tuple[Canvas, ...]
    events: tuple[Event, ...]


@dataclass(frozen=True)
class Clips(Asking[DrawnClip]):
    """Drawn clips of four to eight frames, one a second, each a `qformer.videos.Clip`; options as of `Asking`."""

    NAME: ClassVar[str] = "clips"
    STREAM: ClassVar[int] = 5
    KINDS: ClassVar[tuple[str, ...]] = KINDS
    BOUNDS: ClassVar[tuple[int, int]] = (2, TOLD)

    split: Literal["train", "val", "test", "any"] = "train"
    sides: tuple[int, int] = (120, 240)
    objects: tuple[int, int] = (2, 4)

    def clip(self, index: int) -> DrawnClip:
        """Get the clip of a sample without drawing it."""
        return self.composed(index)[0]

    def possible(self) -> tuple[str, ...]:
        """Kinds of questions that so many objects allow: a clip of two objects has one event, and no order."""
        return KINDS if self.numbers[1] > 2 else tuple(kind for kind in KINDS if kind != "order")

    def draw(self, rng: np.random.Generator) -> DrawnClip:
        number = int(rng.integers(self.objects[0], self.objects[1] + 1))
        length = int(rng.integers(FRAMES[0], FRAMES[1] + 1))
        events = 1 if number == 2 else int(rng.integers(1, 3))  # of two objects, both could vanish
        kinds = [pick(rng, EVENTS) for _ in range(events)]
        while True:
            canvas = compose(rng, self.split, (number, number), self.sides, self.aspect)
            found = _happen(rng, canvas, kinds, length)
            if found is not None and (
                self.split == "any" or any(map(held_out, found.frames)) == (self.split == "test")
            ):
                return found

    def ask(self, shown: DrawnClip, rng: np.random.Generator) -> list[Question]:
        return clip_questions(shown, rng, self.numbers)

    def tell(self, shown: DrawnClip, rng: np.random.Generator) -> list[str]:
        """Write captions: all events, all events and the objects at the start in short, each event."""
        told = happenings(shown)
        start = canvas_captions(shown.frames[0], rng)[2]
        return [_in_order(told), f"{start}, {_in_order(told)}", *(told if len(told) > 1 else [])]

    def picture(self, shown: DrawnClip) -> Clip:
        frames = np.stack([draw_canvas(frame) for frame in shown.frames])
        return Clip(torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous(), 1.0)


def _happen(rng: np.random.Generator, canvas: Canvas, kinds: Sequence[str], length: int) -> DrawnClip | None:
    """Let events happen to different objects of a canvas; None where they cannot."""
    items = canvas.objects
    if len({item.shape for item in items}) < len(items) or len(items) < len(kinds):
        return None
    middle = int(rng.integers(1, length - 1))
    windows = [(1, middle), (middle + 1, length - 1)] if len(kinds) > 1 else [(1, length - 1)]
    events: list[Event] = []
    for number, kind, window in zip(rng.permutation(len(items)).tolist(), kinds, windows, strict=False):
        others = [item for item in items if item is not items[number]] + [event.after for event in events]
        event = _draw_event(rng, canvas, items[number], kind, window, others)
        if event is None:
            return None
        events.append(event)
    acting = {id(event.before): event for event in events}
    frames = []
    for frame in range(length):
        there = [acting[id(item)].at(frame) if id(item) in acting else item for item in items]
        frames.append(canvas.with_objects(item for item in there if item is not None))
    return DrawnClip(tuple(frames), tuple(events)) if all(frame.objects for frame in frames) else None


def _draw_event(
    rng: np.random.Generator,
    canvas: Canvas,
    item: CanvasObject,
    kind: str,
    window: tuple[int, int],
    others: Sequence[CanvasObject],
) -> Event | None:
    if kind == "move":
        return _draw_move(rng, canvas, item, window, others)
    at = int(rng.integers(window[0], window[1] + 1))
    colour = pick(rng, [one for one in COLOURS if one != item.colour]) if kind == "turn" else ""
    return Event(kind, item, replace(item, colour=colour or item.colour), (at, at), colour)


def _draw_move(
    rng: np.random.Generator,
    canvas: Canvas,
    item: CanvasObject,
    window: tuple[int, int],
    others: Sequence[CanvasObject],
) -> Event | None:
    """Draw a straight move into another cell, with nothing in the way; None where there is none."""
    direction, far = pick(rng, DIRECTIONS), int(rng.integers(1, 3))
    row, column = (place + far * step for place, step in zip(canvas.cell(item), STEPS[direction], strict=True))
    if not (0 <= row <= 2 and 0 <= column <= 2) or (row, column) in map(canvas.cell, others):
        return None
    left, top, *_ = item.box
    span = Shell.of(canvas).span((row, column), item.side)
    if direction in ("left", "right"):
        left = int(rng.integers(span[0], max(span[2], span[0]) + 1))
    else:
        top = int(rng.integers(span[1], max(span[3], span[1]) + 1))
    after = replace(item, x=left + item.side / 2, y=top + item.side / 2)
    event = Event("move", item, after, window, direction)
    way = [step for frame in range(window[0], window[1] + 1) if (step := event.at(frame)) is not None]
    free = all(are_apart(step.box[:2], step.side, other.box[:2], other.side) for step in way for other in others)
    return event if free and span[0] <= left <= span[2] and span[1] <= top <= span[3] else None


def happenings(clip: DrawnClip) -> list[str]:
    """Sentences that tell the events, in order: `the red star moves left to the center`."""
    found = []
    for event in clip.events:
        thing = f"the {name(event.before)}"
        found.append(
            {
                "move": f"{thing} moves {event.how} to the {clip.frames[0].position(event.after)}",
                "appear": f"{with_article(full_name(clip.frames[0], event.after))} appears",
                "disappear": f"{thing} disappears",
                "turn": f"{thing} turns {event.how}",
            }[event.kind]
        )
    return found


def _in_order(told: Sequence[str]) -> str:
    return f"first {told[0]}, then {told[1]}" if len(told) > 1 else told[0]


def clip_description(clip: DrawnClip) -> str:
    """Describe a clip in full, its start and what happens: every question about it can be answered from this text."""
    return f"{canvas_description(clip.frames[0])}; {_in_order(happenings(clip))}"


def clip_questions(clip: DrawnClip, rng: np.random.Generator, numbers: tuple[int, int] = (2, TOLD)) -> list[Question]:
    """Write one question of each kind of `KINDS` that the clip allows; their texts do not hint at the answers.

    Args:
        numbers: least and greatest number of objects of the clips, for the balance of counts.
    """
    event = pick(rng, clip.events)
    the, end = f"the {event.before.shape}", bool(rng.random() < 0.5)
    when, seen = ("end", event.after) if end else ("start", event.before)
    truth = bool(rng.random() < 0.5)
    verb = event.kind if truth else pick(rng, [one for one in EVENTS if one != event.kind])
    claim = f"turn {event.how if truth else pick(rng, COLOURS)}" if verb == "turn" else verb
    found = [Question("yes/no", f"does {the} {claim}?", "yes" if truth else "no")]
    if event.kind == "move":
        found.append(Question("movement", f"where does {the} move?", event.how))
        found.append(Question("position", f"where is {the} at the {when}?", clip.frames[0].position(seen)))
    elif event.kind == "turn":
        found.append(Question("colour", f"what color is {the} at the {when}?", seen.colour))
    else:
        verbs = "appear or disappear" if rng.random() < 0.5 else "disappear or appear"
        found.append(Question("change", f"does {the} {verbs}?", event.kind))
        number = len(clip.frames[-1 if end else 0].objects)
        if number in (numbers[0] - 1, numbers[1]) or rng.random() < 0.5:  # those between are twice as frequent
            found.append(Question("count", f"how many objects are there at the {when}?", NUMBERS[number]))
    if len(clip.events) > 1:
        acts = [f"the {one.before.shape} {one.kind}s" for one in clip.events]
        first, second = acts if rng.random() < 0.5 else acts[::-1]
        found.append(Question("order", f"what happens {'second' if end else 'first'}, {first} or {second}?", acts[end]))
    return found
