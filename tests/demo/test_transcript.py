"""The conversation that a browser holds: what it may send, what is bounded, and what the model is told of it."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import gradio as gr
import pytest
from PIL import Image

from qformer import formats
from qformer.demo import about, asking, limits, look, markup, shown
from qformer.demo.exchange import MAX_JSON
from qformer.demo.transcript import MOST_TURNS, Conversation, Turn
from qformer.types import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from qformer.demo.backend import Models


def test_a_conversation_travels_as_text() -> None:
    talk = Conversation("/a.png", ("/b.mp4",)).and_then(Turn("what <b>\n$$x$$", "red", options={"top_p": 0.9}))
    assert Conversation.of(talk.text) == talk
    assert "<" not in talk.text
    assert Conversation.of("") == Conversation.of(None) == Conversation()
    assert talk.about("/a.png", ["/b.mp4"]) is talk
    assert talk.about("/other.png", ["/b.mp4"]).turns == ()


@pytest.mark.parametrize(
    "sent",
    [
        "[]",
        "{",
        '{"turns": 3}',
        '{"turns": [3]}',
        '{"turns": [{}]}',
        '{"turns": [{"question": 3}]}',
        '{"turns": [{"question": "a", "stopped": "yes"}]}',
        '{"turns": [{"question": "a", "unknown": 1}]}',
        '{"turns": [], "picture": 3}',
        '{"turns": [], "more": [{}]}',
        "[" * 100_000,
        '{"turns": [{"question": "a", "options": ' + '{"a":' * 600 + "1" + "}" * 602 + "]}",
        ["a list"],
        7,
    ],
)
def test_what_no_page_of_ours_sends_is_refused(sent: Any) -> None:
    with pytest.raises(UsageError, match=r"cannot be read|must be text"):
        Conversation.of(sent)


def test_a_conversation_is_bounded_and_the_oldest_turns_go() -> None:
    talk = Conversation("/a.png")
    for number in range(MOST_TURNS + 5):
        talk = talk.and_then(Turn(str(number)))
    assert [talk.turns[0].question, talk.turns[-1].question] == ["5", str(MOST_TURNS + 4)]
    for number in range(5):
        talk = talk.and_then(Turn(str(number), context="x" * 150_000))
    assert [turn.question for turn in talk.turns] == ["3", "4"]
    for number in range(5):  # a request counts bytes, and a letter may have four of them
        talk = talk.and_then(Turn(str(number), context="\N{PANDA FACE}" * 20_000, prompt="\N{PANDA FACE}" * 20_000))
    assert [turn.question for turn in talk.turns] == ["3", "4"]
    assert len(json.dumps(talk.text, ensure_ascii=False).encode()) < MAX_JSON / 2


def test_stop_edit_and_what_the_model_is_told() -> None:
    talk = Conversation("/a.png").and_then(Turn("What, now?", "red", read="what now?"))
    waiting = talk.and_then(Turn("and then?", state="waiting"))
    assert waiting.is_busy
    assert waiting.settled().turns[-1] == Turn("and then?", stopped=True)
    assert waiting.settled("busy").turns[-1] == Turn("and then?", error="busy")
    written = waiting.with_last(answer="a st", read="and then?", state="writing").settled("gone")
    assert (written.turns[-1].answer, written.turns[-1].stopped, written.turns[-1].error) == ("a st", True, "")
    assert written.history() == [("what now?", "red"), ("and then?", "a st")]
    assert waiting.settled("busy").history() == [("what now?", "red")]
    edited = Conversation.of(json.dumps(json.loads(talk.text) | {"editing": True})).and_then(Turn("better?"))
    assert [turn.question for turn in edited.turns] == ["better?"]
    assert not edited.editing
    drawn = markup.talk(waiting, judged=True)
    assert drawn.count('class="message user"') == 2
    assert 'class="talk busy"' in drawn
    assert drawn.count("data-does") == 3  # copy and thumbs of the first, nothing of the one that waits


def test_tokens_are_divided_among_words() -> None:
    assert look.words("bottom center", [" bottom", " cen", "ter"]) == [("bottom", [0]), ("center", [1, 2])]
    assert look.words("red, star", ["red", ",", "", "st", "ar"]) == [("red,", [0, 1]), ("star", [2, 3, 4])]
    assert look.words("", ["</s>"]) == []


def test_each_word_has_its_map_in_the_markup() -> None:
    blank = Image.new("RGB", (4, 4))
    page = markup.explained([("what <b>?", "a b", [("a b", blank), ("a", blank), ("b", blank)])])
    assert (page.count("<figure"), page.count("<input"), page.count("checked")) == (3, 3, 1)
    assert "what &lt;b&gt;?" in page
    assert "the word “b” of the answer “a b”" in page
    assert markup.CSS.count(":nth-child(17):hover") == 2


def test_the_header_says_what_runs(models: Models, picture: Path) -> None:
    said = about.facts(models)
    assert said[0] == models.name
    assert "stages one and two" in said
    assert any(part.startswith("sees with vit (") for part in said)
    assert any(part.startswith("writes with opt (") for part in said)
    assert said[-2:] == ["cpu, float32", f"gallery of {len(models.retriever.gallery.store)} pictures"]  # type: ignore[union-attr]
    assert models.of_scenes
    assert about.hints(models, []) == about.SCENES
    assert about.hints(models, [["a.png", "what?", ""]]).question == "what?"


def test_pictures_are_decoded_at_their_upload(picture: Path, tmp_path: Path) -> None:
    assert shown.shown_by_browsers(str(picture)) == str(picture)
    cut = tmp_path / "cut.png"
    cut.write_bytes(picture.read_bytes()[:-300])
    limits.check_file(cut)  # its header is whole
    with pytest.raises(UsageError, match="cannot be read as a picture"):
        shown.shown_by_browsers(str(cut))


@pytest.mark.skipif("HEIF" not in formats.FORMATS, reason="pillow-heif is not installed")
def test_heic_becomes_a_jpeg_that_browsers_show(picture: Path, tmp_path: Path) -> None:
    import pillow_heif

    file = tmp_path / "photo.heic"
    pillow_heif.from_pillow(Image.open(picture)).save(file)
    limits.check_file(file)
    made = shown.shown_by_browsers(str(file))
    assert Image.open(made).format == "JPEG"
    assert Image.open(made).size == Image.open(picture).size


def test_verdicts_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request may hold a forged turn of nearly a megabyte, and there may be any number of requests."""
    page: Any = SimpleNamespace(feedback=tmp_path / "verdicts.jsonl", models=SimpleNamespace(name="x"))
    like, thumb = asking._make_like(page), gr.EventData(None, {"index": 0, "liked": "yes"})
    turn = Turn("q", "a")
    like(Conversation(turns=(turn,)).text, thumb)
    whole = page.feedback.read_bytes()
    assert json.loads(whole)["question"] == "q"
    with pytest.raises(gr.Error, match="too long for a verdict"):
        like(Conversation(turns=(Turn("q", "a" * 900_000),)).text, thumb)
    monkeypatch.setattr(asking, "MAX_FEEDBACK", len(whole) - 1)
    with pytest.raises(gr.Error, match="the file for verdicts is full"):
        like(Conversation(turns=(turn,)).text, thumb)
    assert page.feedback.read_bytes() == whole
