"""Stories about canvases, clips and two pictures: true, seeded, and answered by their descriptions."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from qformer.canvases import clips, two_pictures
from qformer.canvases import stories as canvas_stories
from qformer.canvases.canvas import EDGES
from qformer.canvases.questions import KINDS
from qformer.canvases.source import Canvases
from qformer.canvases.stories import BOXED, DRILLED, SCENES, CanvasStories, about_canvas, statement
from qformer.scenes.stories import RUN, TASKS, Stories, Story
from qformer.scenes.text import Question
from qformer.types import UsageError

COUNT = 400
PUNCTUATION = re.compile(r"[\s,.;:?\[\]]+")


@pytest.fixture(scope="module")
def asked() -> list[Story]:
    return [CanvasStories(task="ask")[i] for i in range(3 * COUNT)]


def test_a_story_is_a_function_of_its_index() -> None:
    assert [CanvasStories()[i] for i in (5, 3)] == [CanvasStories()[i] for i in (3, 5)][::-1]
    assert CanvasStories(seed=1)[3] != CanvasStories()[3]
    assert CanvasStories("test")[3] != CanvasStories()[3]


def test_former_stories_are_among_them() -> None:
    former = [replace(CanvasStories()[i]) == Stories()[i] for i in range(COUNT)]
    assert sum(former) / COUNT == pytest.approx(SCENES, abs=0.06)


def test_every_kind_of_every_source_is_asked(asked: list[Story]) -> None:
    assert {story.kind for story in asked} >= {*KINDS, *clips.KINDS, *two_pictures.KINDS}


def test_answers_stand_in_the_description(asked: list[Story]) -> None:
    """Where the answer is a word or a box of the description, and the question is about one picture."""
    checked: Counter[str] = Counter()
    for story in asked:
        question, told = story.prompt, story.description
        if story.kind in ("colour", "word", "position", "edge", "direction", "box"):
            assert story.reply in told, story
            checked[story.kind] += 1
        if story.kind == "shape":
            assert re.search(rf"\b{story.reply}(s|es)?\b", told), story
        if story.kind == "content":
            (box,) = re.findall(r"\[.*?\]", question)
            phrase = next(part for part in re.split(r", (?!\d)| and ", told) if box in part)
            assert all(word in phrase for word in story.reply.split()[1:]), story
            checked["content"] += 1
        if story.kind == "edge" and "picture" not in question:
            (edge,) = re.findall(r"the (\w+) edge", question)
            assert f"the {edge} edge is {story.reply}" in told, story
        if "how many objects are there?" in question and "there are" in told:
            assert f"there are {story.reply} " in told, story
    assert min(checked.values()) > 5, checked
    assert len(checked) == 7


def test_boxes_are_told_where_they_are_asked_for_and_sometimes_otherwise(asked: list[Story]) -> None:
    without = [story for story in asked if story.kind not in BOXED]
    assert all("in the box [" in story.description for story in asked if story.kind in BOXED)
    assert 0.02 < sum("in the box [" in story.description for story in without) / len(without) < 0.25


@pytest.mark.parametrize("options", [{"seed": -1}, {"count": 0}, {"drill": -1}, {"unordered": -1}], ids=str)
def test_impossible_options_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=rf"{next(iter(options))} is {next(iter(options.values()))}"):
        CanvasStories(**options)  # type: ignore[arg-type]


def test_a_caption_that_leaves_something_out_is_no_description() -> None:
    source, short = Canvases("any"), 0
    for i in range(COUNT):
        canvas, topic = source.canvas(i), about_canvas(source, i, np.random.default_rng(i))
        facts = [f"the {edge} edge is {colour}" for edge, colour in zip(EDGES, canvas.edges, strict=True) if colour]
        facts += [f"the word {item.word} on it" for item in canvas.told() if item.word]
        assert all(fact in told for told in topic.whole for fact in facts), topic.whole
        short += any(fact not in told for told in topic.captions[:2] for fact in facts)
    assert short > 3


def test_a_total_is_told_where_it_is_asked_for() -> None:
    for i in range(COUNT):
        story = CanvasStories(task="ask")[i]
        is_former = story == Stories(task="ask")[i]
        if story.kind == "count" and "how many objects are there" in story.prompt and not is_former:
            assert re.search(r"there (is|are) (one|two|three|\w+)( scattered)? objects?", story.description)


@pytest.mark.parametrize("task", TASKS)
def test_words_are_those_of_the_vocabulary(task: str) -> None:
    known = {*CanvasStories.words, "picture", "question", "short", "answer", "context", "ask", "about", "relative"}
    source = CanvasStories(task=task)  # type: ignore[arg-type]
    told = [source[i] for i in range(60) if source[i] != Stories(task=task)[i]]  # type: ignore[arg-type]
    for text in (text for story in told for text in (story.description, story.prompt, story.reply)):
        assert {word.lower() for word in PUNCTUATION.split(text) if word} <= known | {"number", "points"}, text


def test_the_answer_follows_the_context() -> None:
    """A claim of a context is the answer, whether it is true or not."""
    followed = misled = 0
    for i in range(COUNT):
        story = CanvasStories(task="context")[i]
        if story == Stories(task="context")[i] or story.kind != "context":
            continue
        claim, question = re.fullmatch(r"Context: (.*?)\. Question: (.*\?) (?:Short a|A)nswer:", story.prompt).groups()  # type: ignore[union-attr]
        forms = [statement(Question(kind, question, "")) for kind in canvas_stories.STATEMENTS]
        claims = {found[0].format(claim=one) for found in forms if found for one in (story.reply, f"a {story.reply}")}
        if claim in claims:
            followed += 1
            misled += story.reply not in story.description
    assert followed > COUNT / 3
    assert misled > followed / 8


def test_statements() -> None:
    for kind, question, expected in (
        ("colour", "what color are the stars?", "the stars are {claim}"),
        ("edge", "what color is the left edge?", "the left edge is {claim}"),
        ("shape", "what shape is the red object?", "the red object is {claim}"),
        ("count", "how many red stars are there?", "the number of red stars is {claim}"),
        ("direction", "where does the arrow point?", "the arrow points {claim}"),
        ("direction", "where do the arrows point?", "the arrows point {claim}"),
        ("state", "is the red star hollow or filled?", "the red star is {claim}"),
    ):
        found = statement(Question(kind, question, ""))
        assert found is not None
        assert found[0] == expected
    assert statement(Question("box", "what is the box of the star?", "[1, 2, 3, 4]")) is None


def test_a_dialogue_does_not_ask_twice() -> None:
    for i in range(100):
        story = CanvasStories(task="dialogue")[i]
        if story != Stories(task="dialogue")[i]:
            questions = re.findall(r"Question: (.*?\?)", story.prompt)
            assert 1 <= len(set(questions)) == len(questions) <= 3


def test_unordered_stories_come_first_and_then_in_every_second_run() -> None:
    source = CanvasStories(unordered=100)
    assert all(source[i].unordered for i in range(0, 100, 9))
    later = [source[i].unordered for i in range(128, 128 + 4 * RUN, RUN)]
    assert sorted(later) == [False, False, True, True]
    assert not any(CanvasStories()[i].unordered for i in range(0, 300, 10))


def test_the_first_stories_drill_the_hard_kinds() -> None:
    source, usual = CanvasStories(drill=300), CanvasStories()
    asked = [story for story in (source[i] for i in range(300)) if story.kind in DRILLED]
    assert len(asked) > 150 > 2 * sum(usual[i].kind in DRILLED for i in range(300))
    kinds = Counter(story.kind for story in asked)
    assert set(kinds) == set(DRILLED)
    assert all(abs(kinds[kind] / len(asked) - share) < 0.15 for kind, share in DRILLED.items())
    boxes = [story for story in asked if story.kind == "box"]  # of the drill nearly all
    assert all(f"in the box {story.reply}" in story.description for story in boxes)
    assert all("; second picture: " in story.description for story in asked if story.kind == "which")
    assert len({story.description for story in asked}) > 60
    assert all(source[i] == usual[i] for i in range(300, 330))  # later ones are as they were
    mixed = CanvasStories(drill=300, unordered=1)
    assert all(mixed[i].unordered for i in range(2 * RUN, 3 * RUN))  # and whole runs stay unordered
    alone = [CanvasStories(drill=1, count=1, seed=seed)[0] for seed in range(40)]
    assert {story.kind for story in alone} - set(DRILLED)  # one topic does not have every kind
