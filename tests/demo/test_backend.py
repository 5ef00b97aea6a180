"""What the page does, without a page: checks, wording, scores, transcripts, and which models a checkpoint brings."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image

from qformer.cli.page import REAL, REAL_GALLERY, find_default
from qformer.demo import backend, finding, markup, searching
from qformer.demo.backend import Decoding
from qformer.demo.transcript import Turn, as_html, as_json
from qformer.images import photos
from qformer.model.image_text import ImageTextModel
from qformer.model.vision_language import VisionLanguageModel
from qformer.scenes.examples import EXAMPLE_SIZE, EXAMPLES, draw_examples
from qformer.scenes.scenes import Scenes
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from qformer.demo.backend import Models

ASK = "what color is the star?"
SCRIPT = '<script>alert("1")</script> & co'


# ---- which models


def test_a_checkpoint_of_stage_two_brings_the_stage_one_it_started_from(models: Models, trained: Path) -> None:
    assert isinstance(models.asking, VisionLanguageModel)
    assert isinstance(models.matching, ImageTextModel)
    assert models.retriever is not None
    assert models.looking is models.asking
    assert models.name == f"{trained.parent.name}/opt", "visitors need not know where the checkpoint lies"


def test_a_checkpoint_of_stage_one_matches_and_looks(trained: Path) -> None:
    models = backend.load_models(str(trained.parent / "stage1"), device="cpu")
    assert models.asking is None
    assert models.looking is models.matching
    with pytest.raises(UsageError, match="is a checkpoint of stage one"):
        backend.load_models(str(trained.parent / "stage1"), stage1=str(trained.parent / "stage1"), device="cpu")
    with pytest.raises(UsageError, match="--stage1 needs one of stage one"):
        backend.load_models(str(trained), stage1=str(trained), device="cpu")


# ---- ask


def test_context_and_question_reach_the_model(model: VisionLanguageModel, picture: Path) -> None:
    tiles = model.frontend.tiles([picture])
    assert backend.answer_to(model, str(picture), "  ", "") == model.generate(tiles)[0]
    assert backend.answer_to(model, str(picture), "What is\nit?") == model.answer(tiles, ["what is it?"])[0]
    told = model.answer(tiles, ["what is it?"], context="Context: a star.")[0]
    for context in (" Context: a star. ", "a star"):
        asked = backend.prepare(model, str(picture), "What is it?", context)
        assert asked.prompt == "Context: a star. Question: what is it? Answer:"
        assert [*backend.answer(model, asked)] == [told]


def test_earlier_turns_stand_in_the_prompt(model: VisionLanguageModel, picture: Path) -> None:
    asked = backend.prepare(model, str(picture), "where?", "", [["what?", "a star"]])
    assert asked.prompt == "Question: what? Answer: a star. Question: where? Answer:"
    tiles = model.frontend.tiles([picture])
    assert [*backend.answer(model, asked)][-1] == model.answer(tiles, ["where?"], history=[[("what?", "a star")]])[0]


def test_words_come_one_by_one_without_beams(model: VisionLanguageModel, picture: Path) -> None:
    greedy = Decoding.of({"method": "greedy", "max_new_tokens": 20, "min_new_tokens": 20})
    asked = backend.prepare(model, str(picture), "Write a story.", task="writing", decoding=greedy)
    texts = [*backend.answer(model, asked)]
    tiles = model.frontend.tiles([picture])
    sizes = {"max_new_tokens": 20, "min_new_tokens": 20}
    assert texts[-1] == model.answer(tiles, ["Write a story."], task="writing", num_beams=1, **sizes)[0]
    assert len(texts) > 2
    assert all(later.startswith(sooner) for sooner, later in pairwise(texts))


@pytest.mark.filterwarnings("ignore:.*were left out")
def test_a_long_context_is_cut_and_told(model: VisionLanguageModel, picture: Path) -> None:
    asked = backend.prepare(model, str(picture), ASK, "a word " * 600)
    assert asked.cut
    assert asked.prompt.endswith(f"Question: {ASK} Answer:")
    assert not backend.prepare(model, str(picture), ASK, "a word").cut


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"task": "caption"}, "the task is 'caption'"),
        ({"task": ["vqa"]}, "the task is"),
        ({"question": 7}, "question must be text"),
        ({"question": "a" * 3000}, "3,000 characters"),
        ({"context": "a\x00b"}, "control character"),
        ({"history": "what?"}, "not a list of"),
        ({"history": [["what?"]]}, "not a list of"),
        ({"history": [["what?", 3]]}, "answer of the history must be text"),
        ({"image": None}, "no picture yet"),
        ({"image": ["a"]}, "the picture is a list"),
    ],
)
def test_what_cannot_be_asked(model: VisionLanguageModel, picture: Path, given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        backend.prepare(model, **{"image": str(picture), "question": ASK, **given})


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ([1], "decoding is a list"),
        ({"beam": 3}, "did you mean 'beams'"),
        ({"beams": math.nan}, "beams must be a whole number from 1 to 10"),
        ({"beams": 2.5}, "a whole number"),
        ({"top_p": "0.5"}, "top_p must be a number"),
        ({"temperature": 0}, "temperature must be a number from 0.05"),
        ({"max_new_tokens": 10**9}, "from 1 to 256"),
        ({"method": "magic"}, "one of beams, greedy, nucleus"),
    ],
)
def test_decoding_that_cannot_be(given: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        Decoding.of(given)


def test_a_shortest_answer_longer_than_the_longest(model: VisionLanguageModel, picture: Path) -> None:
    with pytest.raises(UsageError, match="min_new_tokens must be between 0 and max_new_tokens"):
        backend.prepare(model, str(picture), ASK, decoding=Decoding(min_new_tokens=20))


def test_files_that_are_no_pictures(model: VisionLanguageModel, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UsageError, match="cannot be read as a picture"):
        backend.prepare(model, str(tmp_path / "text.png"), "what?")


def test_the_model_asks_itself(model: VisionLanguageModel, picture: Path) -> None:
    torch.manual_seed(0)
    question, answer = backend.suggest(model, str(picture))
    assert question
    assert answer == model.answer(model.frontend.tiles([picture]), [question])[0]


# ---- captions, matches, hits


def test_captions_are_ordered_by_the_likelihood_of_their_tokens(model: VisionLanguageModel, picture: Path) -> None:
    torch.manual_seed(0)
    found = finding.captions(model, str(picture), 4, "a photo of")
    assert 1 < len(found) <= 4
    assert len({caption.text for caption in found}) == len(found)
    tiles = model.frontend.tiles([picture])
    assert model.generate(tiles, "a photo of", num_beams=5)[0] in {caption.text for caption in found}
    with torch.no_grad():
        losses = [model.llm.loss(*model.prefix(tiles), [one.text], ["a photo of"], 99) for one in found]
    scores = [-float(total / count) for total, count in losses]
    assert [one.score for one in found] == pytest.approx(scores, abs=1e-4)
    assert scores == sorted(scores, reverse=True)


def test_matches_are_the_scores_of_stage_one(models: Models, picture: Path) -> None:
    assert models.matching is not None
    texts = ["a red square", "a green star", "two blue circles"]
    found = finding.match(models.matching, str(picture), "\n\na red square\nA green star!\ntwo blue circles\n")
    assert {one.text for one in found} == {"a red square", "A green star!", "two blue circles"}
    tiles = models.matching.frontend.tiles([picture] * 3)
    with torch.no_grad():
        chances = models.matching.match_logits(tiles, texts).softmax(dim=1)[:, 1].tolist()
        rows, _ = models.matching.embed_images(tiles)
        cosines = torch.einsum("bqp,bp->bq", rows, models.matching.embed_texts(texts)).amax(dim=1).tolist()
    order = sorted(range(3), key=lambda number: -chances[number])
    assert [one.itm for one in found] == pytest.approx([chances[number] for number in order], abs=1e-5)
    assert [one.itc for one in found] == pytest.approx([cosines[number] for number in order], abs=1e-5)


def test_texts_that_cannot_be_matched(models: Models, picture: Path) -> None:
    assert models.matching is not None
    for texts in ("", " \n?\n", None, []):
        with pytest.raises(UsageError, match="no text to match"):
            finding.match(models.matching, str(picture), texts)
    with pytest.raises(UsageError, match="got 33 texts"):
        finding.match(models.matching, str(picture), "\n".join(f"star {number}" for number in range(33)))


def test_hits_before_and_after_ranking_again(models: Models, picture: Path) -> None:
    assert models.retriever is not None
    before, after = finding.search(models.retriever, "a green star", None, 3, 6)
    by_cosine = models.retriever.search("a green star", None, 6, 0)
    ranked = models.retriever.search("a green star", None, 3, 6)
    assert [one.itc for one in before] == [hit.itc for hit in by_cosine[:3]]
    assert [one.itm for one in after] == [hit.probability for hit in ranked]
    assert [one.score for one in after] == sorted((hit.score for hit in ranked), reverse=True)
    for place, (one, hit) in enumerate(zip(after, ranked, strict=True)):
        was = [other.id for other in by_cosine].index(hit.id)
        assert one.fresh == (was >= 3)
        assert one.moved == (0 if one.fresh else was - place)
    assert all(one.picture is not None and max(one.picture.size) <= finding.THUMBNAIL for one in before)
    alike, none = finding.search(models.retriever, "", str(picture), 2)
    assert (len(alike), none) == (2, [])
    with pytest.raises(UsageError, match="nothing to search for"):
        finding.search(models.retriever, " ")


def test_explained_answers(models: Models, picture: Path) -> None:
    assert models.asking is not None
    found = finding.relevance(models.asking, str(picture), ASK)
    assert found.answer == backend.answer_to(models.asking, str(picture), ASK)
    given = finding.relevance(models.asking, str(picture), ASK, "red or blue", 1)
    assert "".join(given.tokens).strip() == "red or blue"
    with pytest.raises(UsageError, match="no question"):
        finding.relevance(models.asking, str(picture), " ")


# ---- what is shown and kept


class Texts(HTMLParser):
    """The text and the tags of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.tags = "", set[str]()
        self.feed(page)

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        assert not [value for name, value in attrs if name in ("src", "href") and not value.startswith("data:")]


def test_transcripts_are_whole_and_escaped(picture: Path) -> None:
    turns = [Turn(SCRIPT, "red", SCRIPT, prompt=SCRIPT), Turn("", "a star", suggested=True, stopped=True)]
    shown = Image.open(picture)
    record = json.loads(as_json("runs/opt", turns, shown))
    assert [turn["question"] for turn in record["turns"]] == [SCRIPT, ""]
    assert record["picture"].startswith("data:image/jpeg;base64,")
    page = Texts(as_html("runs/opt", turns, shown))
    assert "script" not in page.tags
    assert page.text.count(SCRIPT) == 3


def test_what_the_page_shows_is_escaped() -> None:
    pages = [
        markup.match_bars([finding.Match(SCRIPT, 0.5, 0.25)]),
        markup.caption_bars([finding.Caption(SCRIPT, -1.0)]),
        searching.hit_cards([finding.ShownHit("0", SCRIPT, SCRIPT, None, 0.5, 0.5)], "hits"),
        markup.figure(Image.new("RGB", (4, 4)), SCRIPT),
    ]
    for page in map(Texts, map(str, pages)):
        assert SCRIPT in page.text
        assert "script" not in page.tags
    assert "width: 25.0%" in pages[0]


def test_examples_are_questions_about_drawn_scenes_and_one_is_misled(tmp_path: Path) -> None:
    rows = draw_examples(tmp_path)
    assert [context for _, _, context in rows[:-1]] == [""] * EXAMPLES
    file, question, context = rows[-1]
    assert [file, question] == rows[0][:2]
    truth = Scenes("test", size=8, seed=7, count=4, questions=True)[0].answers[0]
    assert context
    assert not context.endswith(f" {truth}.")
    assert all(Image.open(row[0]).size == (EXAMPLE_SIZE,) * 2 for row in rows)


def test_examples_for_photos_are_free_ones_or_the_user_s_own(
    tmp_path: Path, models: backend.Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of scikit-image where it is installed, found without importing it; else files of the gallery."""
    data, shown = tmp_path / "skimage" / "data", tmp_path / "shown"
    data.mkdir(parents=True)
    shown.mkdir()
    (tmp_path / "skimage" / "__init__.py").write_text("raise RuntimeError('imported')")
    for name in ("chelsea.png", "coffee.png", "brick.png"):
        Image.new("RGB", (640, 320), "brown").save(data / name)
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = backend.draw_photos(shown, models)
    assert [row[1:] for row in rows] == [
        ["what animal is in the photo?", ""],
        ["what color is the cup?", ""],
        ["what animal is in the photo?", "there is a dog in the photo."],
    ]
    assert Image.open(rows[1][0]).size == (320, 160)
    for file in data.iterdir():
        file.unlink()
    own = [str(data / "gone.png"), str(shown / "photo0.png")]
    assert photos.draw_photos(tmp_path, own) == [[str(tmp_path / "photo0.png"), "what is in the photo?", ""]]
    assert backend.draw_photos(shown, models) == []  # scenes are no files


# ---- the command


def test_a_bridge_on_photos_is_offered_first(
    tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/real").mkdir(parents=True)
    (tmp_path / "runs/real/stage2").symlink_to(trained)
    assert find_default() == (str(REAL), None)
    assert "the bridge on photos in 'runs/real/stage2'" in capsys.readouterr().out
    (tmp_path / "runs/real/photos").mkdir()
    (tmp_path / "runs/real/photos/gallery.json").touch()
    assert find_default() == (str(REAL), REAL_GALLERY)


def test_wrong_use_of_the_command(run: Callable[..., tuple[int, str, str]], trained: Path) -> None:
    code, _, told = run("demo", str(trained), "--auth", "me")
    assert (code, "--auth user:password" in told) == (2, True)
    code, _, told = run("demo", str(trained.parent / "stage1"), "--index", "nowhere", "--device", "cpu")
    assert (code, "no gallery at 'nowhere'" in told) == (2, True)
    code, _, told = run("demo", "nowhere")
    assert (code, "no checkpoint at 'nowhere'" in told) == (2, True)
