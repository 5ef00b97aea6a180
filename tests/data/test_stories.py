"""Stories: true, seeded, and worded as stage two will ask."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import pytest

from qformer.llm.prompts import vqa_prompt
from qformer.scenes.scenes import Scenes
from qformer.scenes.stories import RUN, SELF_ASK, STATEMENTS, TASKS, Stories, statement
from qformer.scenes.text import WORDS, Question

COUNT = 400


def test_a_story_is_a_function_of_its_index() -> None:
    assert [Stories()[i] for i in (5, 3)] == [Stories()[i] for i in (3, 5)][::-1]
    assert Stories(seed=1)[3] != Stories()[3]
    assert Stories("test")[3] != Stories()[3]


@pytest.mark.parametrize("task", TASKS)
def test_every_task_can_be_had_alone(task: str) -> None:
    beginnings = {"describe": "", "ask": "Question: ", "dialogue": "Question: ", "self-ask": SELF_ASK, "context": ""}
    stories = [Stories(task=task)[i] for i in range(50)]
    assert all(story.prompt.startswith(beginnings[task]) for story in stories)
    assert (task == "describe") == all(story.prompt == "" for story in stories)


def test_tasks_come_in_the_shares_that_are_promised() -> None:
    kinds = Counter(Stories()[i].kind for i in range(2000))
    for task in ("describe", "self-ask", "dialogue"):
        assert kinds[task] / 2000 == pytest.approx(TASKS[task], abs=0.03)


def test_a_question_is_worded_as_stage_two_words_it() -> None:
    for i in range(COUNT):
        prompt = Stories(task="ask")[i].prompt
        question = re.fullmatch(r"Question: (.*\?) (?:Short answer|Answer):", prompt)
        assert question is not None, prompt
        assert prompt in {vqa_prompt(question[1], preset) for preset in ("paper", "lavis")}


def test_a_description_names_every_object_and_word() -> None:
    for i in range(COUNT):
        scene, text = Scenes("any", seed=0).scene(i), Stories()[i].description
        for item in scene.objects:
            assert f"{item.size} {item.colour} {item.shape}" in text
            assert item.position in text
            assert item.word is None or f"the word {item.word}" in text
        assert sum(text.count(f"the word {word}") for word in WORDS) == sum(o.word is not None for o in scene.objects)


def test_the_answer_follows_the_context() -> None:
    followed = misled = 0
    for i in range(COUNT):
        story = Stories(task="context")[i]
        if story.kind != "context":
            continue
        told = re.match(r"Context: (.*?)\. Question:", story.prompt)
        assert told is not None
        question = re.findall(r"Question: (.*?\?)", story.prompt)[-1]
        for kind, (pattern, _, _) in STATEMENTS.items():
            if re.fullmatch(pattern, question) and statement(Question(kind, question, ""), story.reply) == told[1]:
                followed += 1
                misled += not _holds(story.description, kind, question, story.reply)
                break
    assert followed > COUNT / 2
    assert misled > followed / 5


def _holds(description: str, kind: str, question: str, reply: str) -> bool:
    """Whether a claimed word or colour is at least in the description; others are not checked."""
    return reply in description if kind in ("word", "colour", "position") else True


def test_statements() -> None:
    assert statement(Question("colour", "what color is the star?", "red"), "blue") == "the star is blue"
    assert statement(Question("word", "what word is on the star?", "sun"), "cat") == "the word on the star is cat"
    assert statement(Question("count", "how many stars are there?", "one"), "two") == "the number of stars is two"


def test_unordered_stories_come_first_and_then_in_every_second_run() -> None:
    source = Stories(unordered=100)
    assert all(source[i].unordered for i in range(100))
    later = [source[i].unordered for i in range(128, 128 + 4 * RUN, RUN)]
    assert sorted(later) == [False, False, True, True]
    assert len({source[i].unordered for i in range(128, 128 + RUN)}) == 1
    assert not any(Stories()[i].unordered for i in range(0, 300, 10))
    assert replace(source[3], unordered=False) == Stories()[3]
