"""Clips and rows of two pictures: what their texts say is seen in the frames, and answers follow from descriptions."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qformer import resolution
from qformer.canvases.canvas import held_out
from qformer.canvases.clips import KINDS, Clips, DrawnClip, clip_description, clip_questions
from qformer.canvases.text import VOCABULARY
from qformer.canvases.two_pictures import KINDS as ROW_KINDS
from qformer.canvases.two_pictures import TwoPictures, row_description, row_questions
from qformer.config import load_config
from qformer.data import sources
from qformer.data.held_out import ImageRecord
from qformer.data.loader import Batches
from qformer.evaluation.benchmarks import choose
from qformer.types import UsageError
from qformer.videos import Clip
from tests.data.canvas_reader import COUNTS, Known, Thing, look, named, read, solve

ROOT = Path(__file__).parent.parent.parent
MOVES = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


@cache
def clips(split: Any, count: int) -> tuple[DrawnClip, ...]:
    source = Clips(split, seed=1)
    return tuple(source.clip(i) for i in range(count))


def changes(clip: DrawnClip) -> list[tuple[str, str, str]]:
    """What happens, (shape, verb, how), in the order in which it is first seen: from one frame to the next."""
    found: dict[str, tuple[str, str, str]] = {}
    for before, after in zip(clip.frames, clip.frames[1:], strict=False):
        old, new = ({item.shape: item for item in frame.objects} for frame in (before, after))
        for shape in old.keys() | new.keys():
            if shape not in new:
                found.setdefault(shape, (shape, "disappear", ""))
            elif shape not in old:
                found.setdefault(shape, (shape, "appear", ""))
            elif old[shape].colour != new[shape].colour:
                found.setdefault(shape, (shape, "turn", new[shape].colour))
            elif old[shape] != new[shape]:
                step = np.sign([new[shape].x - old[shape].x, new[shape].y - old[shape].y]).astype(int).tolist()
                how = next(name for name, way in MOVES.items() if list(way) == step)  # straight
                assert found.setdefault(shape, (shape, "move", how)) == (shape, "move", how)
    return list(found.values())


EVENT = re.compile(
    r"(?:first |then )?(?:the \w+ (?P<shape>\w+) (?:(?P<move>moves) (?P<where>\w+) to the (?P<place>[\w ]+)"
    r"|(?P<gone>disappears)|turns (?P<colour>\w+))|(?P<new>an? .+) appears)"
)


def told(text: str) -> tuple[Known, Known, list[tuple[str, str, str]]]:
    """The start, the end and what happens, from a description alone."""
    opening, _, events = text.partition("; ")
    start = read(opening)
    things, found = {thing.shape: thing for thing in start.things}, []
    for part in re.split(r", (?=then )", events):
        match = EVENT.fullmatch(part)
        assert match, part
        if match["new"]:
            (thing,) = read(f"there is one object, {match['new']}").things
            things[thing.shape] = thing
            found.append((thing.shape, "appear", ""))
        elif match["gone"]:
            del things[match["shape"]]
            found.append((match["shape"], "disappear", ""))
        elif match["move"]:
            things[match["shape"]] = replace(things[match["shape"]], place=match["place"])
            found.append((match["shape"], "move", match["where"]))
        else:
            things[match["shape"]] = replace(things[match["shape"]], colour=match["colour"])
            found.append((match["shape"], "turn", match["colour"]))
    return start, Known(list(things.values()), start.edges, "", len(things)), found


def answer(start: list[Thing], end: list[Thing], happened: list[tuple[str, str, str]], question: str) -> str | None:
    question = question.removesuffix("?")
    asked, _, when = question.partition(" at the ")
    things = {"start": start, "end": end}.get(when, [])
    by_shape = {thing.shape: thing for thing in things}
    verbs = {shape: (verb, how) for shape, verb, how in happened}
    if match := re.fullmatch(r"where does the (\w+) move", question):
        return verbs[match[1]][1]
    if match := re.fullmatch(r"where is the (\w+)", asked):
        return by_shape[match[1]].place
    if match := re.fullmatch(r"what color is the (\w+)", asked):
        return by_shape[match[1]].colour
    if asked == "how many objects are there":
        return COUNTS[len(things)]
    if match := re.fullmatch(r"does the (\w+) (?:appear or disappear|disappear or appear)", question):
        return verbs[match[1]][0]
    if match := re.fullmatch(r"does the (\w+) (\w+)(?: (\w+))?", question):
        verb, how = verbs.get(match[1], ("", ""))
        return "yes" if verb == match[2] and match[3] in (None, how) else "no"
    match = re.fullmatch(r"what happens (first|second), (.+) or (.+)", question)
    assert match, question
    acts = [f"the {shape} {verb}s" for shape, verb, _ in happened]
    assert {match[2], match[3]} == set(acts)
    return acts[match[1] == "second"]


@pytest.mark.parametrize("split", ["train", "test"])
def test_what_is_told_is_what_the_frames_show(split: str) -> None:
    rng = np.random.default_rng(0)
    kinds = Counter()
    for clip in clips(split, 120):
        happened = changes(clip)
        assert 1 <= len(happened) <= 2
        start, end, found = told(clip_description(clip))
        assert found == happened
        seen = [look(frame) for frame in (clip.frames[0], clip.frames[-1])]
        bare = [replace(thing, box=None) for thing in (*seen[0].things, *seen[1].things)]
        assert {*start.things, *end.things} == set(bare)
        for question in clip_questions(clip, rng):
            for first, last in ((start, end), seen):
                given = answer(first.things, last.things, happened, question.question)
                assert given == question.answer, (question, clip_description(clip))
            kinds[question.kind] += 1
        assert 4 <= len(clip.frames) <= 8
        assert any(map(held_out, clip.frames)) == (split == "test")
    assert kinds.keys() == set(KINDS)


def test_answers_about_clips_are_balanced() -> None:
    found: dict[str, Counter[str]] = defaultdict(Counter)
    rng = np.random.default_rng(1)
    for clip in clips("test", 600):
        for question in clip_questions(clip, rng):
            found[question.kind][question.answer] += 1
            if question.kind == "yes/no":
                found[question.question.split()[3].strip("?")][question.answer] += 1
            if match := re.fullmatch(r"what happens \w+, (.+) or .+\?", question.question):
                found["order"]["first named" if match[1] == question.answer else "last named"] += 1
                del found["order"][question.answer]
    numbers = {"movement": 4, "change": 2, "colour": 8, "count": 4, "position": 9, "yes/no": 2, "order": 2}
    for kind in (*numbers, "move", "appear", "disappear", "turn"):
        number, answers = numbers.get(kind, 2), found[kind]
        assert len(answers) == number, kind
        assert max(answers.values()) / answers.total() < 1 / number + 2.5 / (number * answers.total()) ** 0.5, answers


def test_clips_are_pixels_of_their_frames() -> None:
    source = sources.build("clips", questions=True, count=9, sides=[120, 160], seed=4)
    forward = [source[i] for i in range(9)]
    for index in (8, 2):
        again = source[index]
        assert isinstance(again.image, Clip)
        assert again.image.frames.equal(forward[index].image.frames)
        clip = Clips(questions=True, count=9, sides=(120, 160), seed=4).clip(index)
        assert list(again.image.frames.shape) == [len(clip.frames), 3, clip.frames[0].height, clip.frames[0].width]
        assert again.image.fps == 1
        differ = [bool((a != b).any()) for a, b in zip(again.image.frames, again.image.frames[1:], strict=False)]
        assert sum(differ) >= len(clip.events)
    assert len({sample.facts["question_type"] for sample in forward}) == len(KINDS)
    two = Clips(objects=(2, 2), questions=True)  # which have one event
    assert two.kinds() == tuple(kind for kind in KINDS if kind != "order")
    order = {"objects": (2, 2), "questions": ("order",)}
    for options in ({"objects": (1, 4)}, {"objects": (2, 5)}, {"questions": ("edge",)}, order):
        with pytest.raises(UsageError):
            Clips(**options)


def test_answers_about_rows_follow_from_the_description() -> None:
    rng = np.random.default_rng(0)
    source = TwoPictures("test", seed=1)
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for index in range(250):
        row = source.row(index)
        parts = re.fullmatch(r"first picture: (.+); second picture: (.+)", row_description(row))
        assert parts
        for both in ([read(parts[1]), read(parts[2])], [look(canvas) for canvas in row]):
            pictures = dict(zip(("first", "second"), both, strict=True))
            for question in row_questions(row, rng, source.numbers):
                text = question.question
                if match := re.fullmatch(r"(.+) in the (first|second) picture\?", text):
                    assert solve(pictures[match[2]], match[1]) == question.answer, (question, row_description(row))
                elif text == "which picture has more objects?":
                    assert question.answer == max(pictures, key=lambda name: pictures[name].total)
                else:
                    match = re.fullmatch(r"which picture has an? (.+)\?", text)
                    assert match
                    assert [name for name, known in pictures.items() if named(known, match[1])] == [question.answer]
                found[question.kind][question.answer] += 1
    assert found.keys() == set(ROW_KINDS)
    for kind in ("which", "more", "state", "yes/no"):
        assert max(found[kind].values()) / found[kind].total() < 0.56, (kind, found[kind])
    assert max(found["count"].values()) / found["count"].total() < 0.2


def test_a_row_shows_two_pictures() -> None:
    source = sources.build("two_pictures", questions=["which"], count=5, sides=[120, 160])
    sample = source[4]
    assert isinstance(sample.image, list)
    assert [image.shape[2] for image in sample.image] == [3, 3]
    assert sample.answers[0] in ("first", "second")
    for split in ("train", "test"):
        row = TwoPictures(split).row(0)
        assert all(held_out(canvas) == (split == "test") for canvas in row)


@pytest.mark.parametrize("config", ["system_anyres", "system_qwen2vl", "quickstart/stage1"])
def test_batches_of_every_source_are_cut_by_any_strategy(config: str) -> None:
    for name in ("canvases", "two_pictures", "clips", "twins"):
        options = [f"data.train={{name: {name}, count: 20{'' if name == 'twins' else ', questions: true'}}}"]
        known = load_config(ROOT / "configs" / f"{config}.yaml", [*options, "data.batch=3"])
        source = sources.for_run(known.data.train)
        loaded = Batches(source, resolution.chosen(known.resolution, known.limits), known.data, 0)[0]
        assert not loaded.skipped
        assert len(loaded.batch.tiles) == len(loaded.batch.question or []) == 3
        if name == "clips":
            frames = 2 if config == "system_qwen2vl" else 1  # of a tile
            assert min(loaded.batch.tiles.counts) * frames >= 4  # one a second, so every frame


@pytest.mark.parametrize("name", ["canvases", "twins", "two_pictures", "clips"])
def test_texts_are_of_the_vocabulary_and_benchmarks_take_the_questions(name: str) -> None:
    source = sources.build(name, count=20, **({} if name == "twins" else {"questions": True}))
    listed, skipped = choose("vqa").items(source)
    assert not skipped
    assert sum(len(image.items) for image in listed) == 20
    assert isinstance(listed[0].image, ImageRecord)
    for index in range(20):
        sample = source[index]
        text = " ".join([*sample.captions, sample.question or "", *sample.answers])
        assert set(re.sub(r"[\[\],?:;]", " ", text).split()) <= set(VOCABULARY)
        assert all(len(caption.split()) <= 50 for caption in sample.captions)
