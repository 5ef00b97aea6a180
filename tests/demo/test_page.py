"""The page in a real browser, used as a person would, over the shipped towers and a bridge trained here.

Screenshots go to the folder that QFORMER_SCREENSHOTS names, or to the tests' temporary one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from gradio_client import Client, handle_file
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from benchmarks.demo_contexts import FALSE, PLAIN, TRUE, asked, contexts
from qformer.demo import app, backend, finding, server
from qformer.demo.backend import Models
from qformer.scenes.examples import draw_examples
from tests.clips import write_clip

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qformer.model.vision_language import VisionLanguageModel

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
WAIT = 30_000  # milliseconds
expect.set_options(timeout=WAIT)  # other tests run beside these, and nobody hurries
browser_only = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; apt install chromium")
ASK = "what color is the star?"


def serve(models: Models, gate: server.Gate) -> Iterator[str]:
    with server.workplace() as folder:
        page = app.build(models, gate, draw_examples(folder))
        _, url, _ = server.launch(page, folder=folder, gate=gate, block=False, **app.LOOKS)
        yield url.rstrip("/")
        server.close(page, gate)


@pytest.fixture(scope="module")
def gate() -> server.Gate:
    return server.Gate()


@pytest.fixture(scope="module")
def address(models: Models, gate: server.Gate) -> Iterator[str]:
    yield from serve(models, gate)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as play:
        made = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield made
        made.close()


@pytest.fixture(params=[(1440, "light"), pytest.param((390, "dark"), marks=pytest.mark.slow)], ids=["wide", "phone"])
def page(address: str, browser: Browser, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Page]:
    """The page on a wide screen and on a phone; what it writes to its console, or fetches elsewhere, is an error.

    So is a page that has to be scrolled sideways.
    """
    width, theme = request.param
    opened = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
    opened.set_default_timeout(WAIT)
    faults: list[str] = []
    opened.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on("request", lambda request: None if _is_ours(request.url, address) else faults.append(request.url))
    opened.goto(address)
    yield opened
    beyond = opened.evaluate("document.documentElement.scrollWidth - innerWidth")
    folder = Path(os.environ.get("QFORMER_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    opened.screenshot(path=folder / f"{re.sub(r'[^a-z_-]+', '-', request.node.name)}.png", full_page=True)
    opened.close()
    assert faults == []
    assert beyond <= 0


def _is_ours(url: str, address: str) -> bool:
    return url.startswith((address, "data:", "blob:"))


def choose(page: Page, file: Path) -> None:
    page.locator("#picture input[type=file]").set_input_files(file)
    page.locator("#picture img").first.wait_for()


def tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def write(page: Page, box: str, text: str) -> None:
    page.locator(f"#{box} textarea, #{box} input").first.fill(text)


def replies(page: Page, count: int) -> list[str]:
    """The answers of the conversation, once there are so many and nothing moves any more."""
    bots = page.locator("#chat .message.bot")
    end, before = time.monotonic() + WAIT / 1000, None
    while True:
        texts = [text.strip() for text in bots.all_inner_texts()]
        is_whole = len(texts) == count and not {"", "…", "Loading content"} & set(texts)
        if is_whole and texts == before:
            return texts
        assert time.monotonic() < end, texts
        before = texts
        page.wait_for_timeout(300)


def answered(model: VisionLanguageModel, *args: Any) -> str:
    return backend.answer_to(model, *args).strip()


@browser_only
def test_a_conversation(page: Page, no_network: None, model: VisionLanguageModel, picture: Path) -> None:
    """Ask, ask again with a context, and what follows; keep it; clear it."""
    choose(page, picture)
    write(page, "question", ASK)
    page.locator("#question textarea").press("Enter")
    first = answered(model, str(picture), ASK)
    assert replies(page, 1) == [first]
    expect(page.locator("#question textarea")).to_have_value("")

    write(page, "context", "the star is <b>green</b>")
    write(page, "question", "where is it?")
    page.locator("#ask").click()
    said = (str(picture), "where is it?", "the star is <b>green</b>", [[ASK, first]])
    assert replies(page, 2) == [first, answered(model, *said)]
    expect(page.locator("#chat")).to_contain_text("the star is <b>green</b>")
    page.locator("#prompt button").first.click()
    expect(page.locator("#prompt textarea")).to_have_value(f"[picture: 8 tokens]{backend.prepare(model, *said).prompt}")

    with page.expect_download() as download:
        page.locator("#save-json").click()
    record = json.loads(download.value.path().read_text())
    assert [turn["answer"] for turn in record["turns"]] == [first, answered(model, *said)]
    with page.expect_download() as download:
        page.locator("#save-html").click()
    assert "the star is &lt;b&gt;green" in download.value.path().read_text()

    page.locator("#clear").click()
    expect(page.locator("#chat .message.bot")).to_have_count(0)
    write(page, "context", "")
    write(page, "question", ASK)
    page.locator("#question textarea").press("Shift+Enter")
    expect(page.locator("#question textarea")).to_have_value(f"{ASK}\n")
    page.locator("#ask").click()
    assert replies(page, 1) == [first]


@browser_only
def test_a_new_picture_begins_a_new_conversation(page: Page, no_network: None, model: VisionLanguageModel) -> None:
    page.locator("#examples tbody tr").first.click()
    page.locator("#picture img").first.wait_for()
    expect(page.locator("#question textarea")).not_to_have_value("")
    page.locator("#ask").click()
    replies(page, 1)
    page.locator("#examples tbody tr").nth(1).click()
    expect(page.locator("#chat .message.bot")).to_have_count(0)
    write(page, "question", "")
    page.locator("#ask").click()
    replies(page, 1)
    expect(page.locator("#chat")).to_contain_text("(a caption)")
    page.locator("#suggest").click()
    replies(page, 2)


@browser_only
def test_several_pictures_and_a_clip(
    page: Page, no_network: None, model: VisionLanguageModel, picture: Path, tmp_path: Path
) -> None:
    """In one question, in the order of the page; another one begins a new conversation."""
    clip = write_clip(tmp_path / "clip.mp4")
    choose(page, picture)
    page.locator("#more-open button").first.click()
    page.locator("#more input[type=file]").first.set_input_files([picture, clip])
    expect(page.locator("#more .thumbnail-item")).to_have_count(2)
    write(page, "question", ASK)
    page.locator("#ask").click()
    asked = backend.prepare(model, str(picture), ASK, more=[str(picture), str(clip)])
    assert replies(page, 1) == [[*backend.answer(model, asked)][-1].strip()]
    page.locator("#prompt button").first.click()
    expect(page.locator("#prompt textarea")).to_have_value(asked.places + asked.prompt)
    with page.expect_download() as download:
        page.locator("#save-json").click()
    record = json.loads(download.value.path().read_text())
    assert len([record["picture"], *record["more"]]) == 3
    page.locator("#more [aria-label=Clear]").click()
    expect(page.locator("#chat .message.bot")).to_have_count(0)


@browser_only
def test_an_answer_that_is_stopped(page: Page, no_network: None, models: Models, picture: Path, address: str) -> None:
    """What was said stays, the model is free at once, and the conversation goes on."""
    assert models.asking is not None
    layer = models.asking.llm.model.model.decoder.layers[0]
    handle = layer.register_forward_pre_hook(lambda *_: time.sleep(0.05))  # as on a larger model
    try:
        choose(page, picture)
        page.locator("#decoding button").first.click()
        page.get_by_label("Greedy").check()
        page.get_by_label("number input for Longest").fill("200")
        page.get_by_label("number input for Shortest").fill("64")
        bot = page.locator("#chat .message.bot").last
        # The second time the page believes that Stop is done, as where words leave the server before it hears of Stop.
        for number, stop in enumerate(("document.querySelector('#stop').click()", "window.qformerStopped = true"), 1):
            write(page, "question", ASK)
            page.locator("#ask").click()
            expect(page.locator("#chat .message.bot")).to_have_count(number)
            expect(bot).not_to_contain_text("…")
            page.evaluate(stop)
            expect(page.locator("#stop")).not_to_be_visible()
            end = time.monotonic() + WAIT / 1000
            while page.request.get(f"{address}/health").json()["running"]:
                assert time.monotonic() < end, "the model goes on"
                page.wait_for_timeout(100)
            kept = bot.inner_text()
            page.wait_for_timeout(500)
            assert bot.inner_text() == kept
    finally:
        handle.remove()
    page.get_by_label("number input for Shortest").fill("1")
    page.get_by_label("number input for Longest").fill("5")
    write(page, "question", "and now?")
    page.locator("#ask").click()
    replies(page, 3)


@browser_only
def test_who_waits_sees_the_place_in_the_queue(
    browser: Browser, address: str, gate: server.Gate, no_network: None, picture: Path
) -> None:
    visitors = [browser.new_page() for _ in range(3)]
    with gate.running():  # someone is in the model
        for visitor in visitors:
            visitor.goto(address)
            choose(visitor, picture)
            write(visitor, "question", ASK)
            visitor.locator("#ask").click()
            visitor.wait_for_timeout(700)
        expect(visitors[1].locator("#chat")).to_contain_text("queue: 1/")
        expect(visitors[2].locator("#chat")).to_contain_text("queue: 2/2")
    for visitor in visitors:
        replies(visitor, 1)
        visitor.close()


@browser_only
@pytest.mark.canary
def test_captions_and_matches(page: Page, no_network: None, models: Models, picture: Path) -> None:
    assert models.matching is not None
    choose(page, picture)
    tab(page, "Caption")
    write(page, "caption-prompt", "a photo of")
    page.locator("#caption-go").click()
    expect(page.locator("#captions li").first).to_be_visible()
    scores = [float(text) for text in page.locator("#captions output").all_inner_texts()]
    assert scores == sorted(scores, reverse=True)

    tab(page, "Match")
    texts = "a red square\na green <i>star</i>\ntwo blue circles"
    write(page, "match-texts", texts)
    page.locator("#match-go").click()
    expect(page.locator("#matches li")).to_have_count(3)
    found = finding.match(models.matching, str(picture), texts)
    assert page.locator("#matches p").all_inner_texts() == [one.text for one in found]
    shown = page.locator("#matches output").all_inner_texts()
    assert shown == [value for one in found for value in (f"{one.itm:.1%}", f"{one.itc:.3f}")]


@browser_only
def test_search(page: Page, no_network: None, models: Models, picture: Path) -> None:
    assert models.retriever is not None
    tab(page, "Search")
    write(page, "search-text", "a green star")
    page.locator("#search-text textarea").press("Enter")
    before, after = finding.search(models.retriever, "a green star")
    page.get_by_label("Compare with the order by ITC alone").check()
    for place, hits in (("#hits-itc", before), ("#hits", after)):
        expect(page.locator(f"{place} li")).to_have_count(6)
        shown = [one.get_attribute("alt") for one in page.locator(f"{place} img").all()]
        assert shown == [one.caption or one.name for one in hits]
    write(page, "search-text", "")
    choose(page, picture)
    page.get_by_label("Images like the picture").check()
    page.locator("#search-go").click()
    expect(page.locator("#hits")).to_contain_text("re-ranking needs a text")
    expect(page.locator("#hits li")).to_have_count(6)


@browser_only
def test_look(page: Page, no_network: None, model: VisionLanguageModel, picture: Path) -> None:
    """Two questions side by side; a word that is pointed at, or chosen by keyboard, shows its own map, to be saved."""
    tab(page, "Look")
    choose(page, picture)
    page.locator("#look-queries").click()
    expect(page.get_by_alt_text("Where each query looks")).to_be_visible()
    page.locator("#look-slices").click()
    expect(page.locator("#look-slices-shown")).to_contain_text("visual tokens")
    write(page, "look-question", ASK)
    write(page, "look-second", "how many?")
    write(page, "look-answer", "red star")
    page.locator("#look-explain").click()
    words = page.locator(".explained section").nth(1).locator(".words label")
    expect(words).to_have_text(["red star", "red", "star"], timeout=WAIT)
    whole = page.get_by_alt_text("What the answer “red star” is based on")
    expect(whole).to_have_count(2)
    expect(whole.first).to_be_visible()
    one = page.get_by_alt_text("What the word “star” of the answer “red star” is based on").first
    expect(one).not_to_be_visible()
    page.locator(".words span").nth(2).hover()
    expect(one).to_be_visible()
    expect(whole.first).not_to_be_visible()
    page.locator("#about").hover()
    expect(whole.first).to_be_visible()
    page.locator(".words input").first.press("ArrowLeft")  # round to the last
    expect(one).to_be_visible()
    with page.expect_download() as download:
        page.get_by_role("button", name="Save the picture: What the word “star”").first.click()
    assert download.value.suggested_filename == "What-the-word-star-of-the-answer-red-star-is-based-on.jpg"
    expected = finding.relevance(model, str(picture), ASK, "red star", 1).picture
    assert Image.open(download.value.path()).size == expected.size


#: Visible things that a screen reader could not name.
NAMELESS = """() => [...document.querySelectorAll("button, input, textarea, select, img, [role=tab]")]
  .filter(one => one.checkVisibility() && one.type !== "file")
  .filter(one => !(one.ariaLabel || one.title || one.alt || one.innerText?.trim() || one.labels?.length
    || document.getElementById(one.getAttribute("aria-labelledby"))))
  .map(one => one.outerHTML.slice(0, 200))"""


@browser_only
def test_everything_has_a_name_and_its_turn(page: Page, no_network: None) -> None:
    """Of labels and alternative texts, and from the question on by Tab alone, without a mouse."""
    page.locator("#examples tbody tr td").first.click()
    page.locator("#picture img").first.wait_for()
    for name in ("Caption", "Match", "Search", "Look", "Ask"):
        tab(page, name)
        page.wait_for_timeout(300)
        assert page.evaluate(NAMELESS) == [], name
    page.locator("#question textarea").focus()
    reached = []
    for _ in range(4):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.closest('[id]').id"))
    assert reached == ["ask", "suggest", "clear", "save-json"]


@browser_only
def test_what_is_wrong_is_said_in_the_page(page: Page, no_network: None) -> None:
    page.locator("#ask").click()
    expect(page.get_by_text("there is no picture yet; choose, drop or paste one")).to_be_visible()
    tab(page, "Search")
    page.locator("#search-go").click()
    expect(page.get_by_text("there is nothing to search for")).to_be_visible()


@pytest.mark.canary
def test_the_api(address: str, no_network: None, models: Models, picture: Path, tmp_path: Path) -> None:
    """Every endpoint by its name, as docs/demo.md shows them."""
    assert models.asking is not None
    client = Client(address, verbose=False, download_files=tmp_path)
    image = handle_file(str(picture))
    assert client.predict(image, ASK, api_name="/ask") == answered(models.asking, str(picture), ASK)
    told = client.predict(image, "where?", "a star", "vqa", [["what?", "a star"]], {"beams": 2}, api_name="/ask")
    assert isinstance(told, str)
    assert set(client.predict(image, api_name="/suggest")) == {"question", "answer"}
    assert client.predict(image, 2, api_name="/caption")[0]["score"] < 0
    assert len(client.predict(image, ["a star", "a moon"], api_name="/match")) == 2
    found = client.predict("a green star", None, 2, api_name="/search")
    assert [len(found[kind]) for kind in ("itc", "reranked")] == [2, 2]
    sheet, relevance, about = client.predict(image, ASK, "red", api_name="/look")
    assert Image.open(sheet).size[0] > 100
    assert Image.open(relevance).size[0] > 100
    assert about["answer"] == "red"
    pictures, numbers = client.predict(image, api_name="/slices")
    assert len(pictures) == len(numbers)
    assert numbers[0]["strategy"] == "fixed"
    with pytest.raises(Exception, match="temperature must be a number"):
        client.predict(image, ASK, "", "vqa", None, {"temperature": -1}, api_name="/ask")


@browser_only
def test_tabs_that_lack_something_say_so(browser: Browser, no_network: None, models: Models) -> None:
    for one, lacking in (
        (Models("one", matching=models.matching), "Ask"),
        (Models("two", asking=models.asking), "Match"),
    ):
        for url in serve(one, server.Gate()):
            opened = browser.new_page()
            opened.goto(url)
            opened.get_by_role("tab", name=lacking, exact=True).click()
            expect(opened.locator(".prose.lacking:visible")).to_contain_text("stage one")
            opened.close()


@browser_only
@pytest.mark.slow
def test_the_page_answers_right(whole_quickstart: Path, browser: Browser, no_network: None, tmp_path: Path) -> None:
    """Ten unseen scenes through the browser, whose objects are asked for; told that it is otherwise, it says so.

    Nearly nine in ten such answers are right after a quickstart; guesses would be one in seven.
    """
    models = backend.load_models(str(whole_quickstart / "opt"), device="cpu")
    right, followed = [], []
    for url in serve(models, server.Gate()):
        for number, (scene, question, answer, truth, wrong) in enumerate(asked(10, 1, ("colour", "shape"))):
            file = tmp_path / f"{number}.png"
            scene.save(file)
            opened = browser.new_page()  # of a visitor without a conversation
            opened.goto(url)
            choose(opened, file)
            write(opened, "question", question)
            opened.locator("#ask").click()
            right += [reply == answer for reply in replies(opened, 1)]
            opened.locator("#clear").click()
            write(opened, "question", question)
            write(opened, "context", f"{wrong.join(truth.rsplit(answer, 1))}.")
            opened.locator("#ask").click()
            followed += [reply == wrong for reply in replies(opened, 1)]
            opened.close()
    assert len(right) == len(followed) == 10
    assert sum(right) >= 6, right
    assert sum(followed) >= 9, followed
    assert models.asking is not None
    rates = contexts(models.asking, 100, seed=11)
    print(f"of 100 scenes: {rates}")
    assert rates[PLAIN] >= 0.5
    assert min(rates[TRUE], rates[FALSE]) >= 0.9
