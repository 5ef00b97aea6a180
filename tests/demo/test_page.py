"""The page in a real browser, used as a person would, over the shipped towers and a bridge trained here."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

import stages
from demo import app, backend, server
from qformer.config import load_config
from qformer.data.scenes import Scenes
from qformer.model.loading import load_vision_language
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qformer.model.vision_language import VisionLanguageModel

ROOT = Path(__file__).parent.parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
browser_only = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; apt install chromium")


@pytest.fixture(scope="module")
def address(model: VisionLanguageModel) -> Iterator[str]:
    gate = server.Gate()
    with server.workplace() as folder:
        page = app.build(model, "test", backend.draw_examples(folder), gate)
        _, url, _ = server.launch(page, folder=folder, gate=gate, block=False, theme=app.THEME)
        yield url
        server.close(page, gate)


@pytest.fixture(params=[1280, 390], ids=["desk", "phone"])
def page(address: str, no_network: None, request: pytest.FixtureRequest) -> Iterator[Page]:
    """A browser on the page; what it writes to its console, and what it fetches from elsewhere, is an error.

    So is a page that has to be scrolled sideways.
    """
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        opened = browser.new_page(viewport={"width": request.param, "height": 900})
        faults: list[str] = []
        opened.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        opened.on("request", lambda request: None if _is_ours(request.url, address) else faults.append(request.url))
        opened.goto(address)
        yield opened
        beyond = opened.evaluate("document.documentElement.scrollWidth - innerWidth")
        browser.close()
        assert faults == []
        assert beyond <= 0


def _is_ours(url: str, address: str) -> bool:
    return url.startswith((address, "data:", "blob:"))


def choose(page: Page, file: Path) -> None:
    page.locator("#picture input[type=file]").set_input_files(file)
    page.locator("#picture img").first.wait_for()


@browser_only
def test_ask_with_and_without_context(page: Page, model: VisionLanguageModel, picture: Path) -> None:
    choose(page, picture)
    page.locator("#question textarea").fill("what color is the star?")
    page.locator("#ask").click()
    said = page.locator("#answer textarea")
    expect(said).to_have_value(backend.answer(model, str(picture), "what color is the star?", ""))
    page.locator("#context textarea").fill("Context: the star is green.")
    page.locator("#context textarea").press("Enter")
    told = backend.answer(model, str(picture), "what color is the star?", "Context: the star is green.")
    expect(said).to_have_value(told)


@browser_only
def test_no_question_gives_a_caption_and_an_example_fills_the_form(page: Page, model: VisionLanguageModel) -> None:
    page.locator("table tbody tr").first.click()
    page.locator("#picture img").first.wait_for()
    expect(page.locator("#question textarea")).not_to_have_value("")
    page.locator("#question textarea").fill("")
    page.locator("#ask").click()
    expect(page.locator("#answer textarea")).not_to_have_value("")


@browser_only
def test_what_is_wrong_is_said_in_the_page(page: Page) -> None:
    page.locator("#ask").click()
    expect(page.get_by_text("there is no picture yet")).to_be_visible()


def test_files_that_are_no_pictures(model: VisionLanguageModel, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UsageError, match="cannot be read as a picture"):
        backend.answer(model, str(tmp_path / "text.png"), "what?", "")
    with pytest.raises(UsageError, match="no picture yet"):
        backend.answer(model, None, "what?", "")


def test_context_and_question_reach_the_model(model: VisionLanguageModel, picture: Path) -> None:
    tiles = model.frontend.tiles([picture])
    assert backend.answer(model, str(picture), "  ", "") == model.generate(tiles)[0]
    asked = model.answer(tiles, ["what is it?"], context="Context: a star.")[0]
    assert backend.answer(model, str(picture), "What is it?", " Context: a star. ") == asked


def test_examples_are_questions_about_drawn_scenes_and_one_is_misled(tmp_path: Path) -> None:
    rows = backend.draw_examples(tmp_path)
    assert [context for _, _, context in rows[:-1]] == [""] * backend.EXAMPLES
    file, question, context = rows[-1]
    assert [file, question] == rows[0][:2]
    assert context.startswith("Context: ")
    truth = Scenes("test", size=8, seed=7, count=4, questions=True)[0].answers[0]
    assert not context.endswith(f" {truth}.")
    assert all(Image.open(row[0]).size == (backend.EXAMPLE_SIZE,) * 2 for row in rows)


def test_a_checkpoint_of_stage_one_has_no_page(tmp_path: Path) -> None:
    few = ["train.steps=2", "train.warmup=1", "data.batch=4", "data.validation_size=4", f"run={tmp_path}"]
    stages.train(load_config(ROOT / "configs/quickstart/stage1.yaml", few))
    with pytest.raises(UsageError, match="stage one, which has no language model"):
        app.serve(str(tmp_path), "cpu", None)


@browser_only
@pytest.mark.slow
def test_the_page_answers_right(whole_quickstart: Path, no_network: None, tmp_path: Path) -> None:
    """Ten unseen scenes through the browser, of which six in ten are right on average; by chance it is two."""
    model = load_vision_language(whole_quickstart / "opt", "cpu")
    source = Scenes("val", size=240, seed=11, count=10, questions=True)
    right = []
    gate = server.Gate()
    with server.workplace() as folder, sync_playwright() as play:
        blocks = app.build(model, "test", [], gate)
        _, url, _ = server.launch(blocks, folder=folder, gate=gate, block=False, theme=app.THEME)
        browser = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        opened = browser.new_page()
        for number in range(10):
            sample = source[number]
            file = tmp_path / f"{number}.png"
            Image.fromarray(sample.image).save(file)
            opened.goto(url)
            choose(opened, file)
            opened.locator("#question textarea").fill(sample.question or "")
            opened.locator("#ask").click()
            said = opened.locator("#answer textarea")
            expect(said).not_to_have_value("")
            right.append(said.input_value() == sample.answers[0])
        browser.close()
        server.close(blocks, gate)
    assert sum(right) >= 3, right
