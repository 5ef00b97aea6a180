"""A person's tasks on the page in a real browser, on a phone where not said otherwise, most of them by keyboard alone.

One server and one browser for all of them. Each task counts what it takes; docs/demo.md has the numbers.
"""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect
from playwright.sync_api import Error as PlaywrightError

from benchmarks.demo_tasks import PHONE, Person
from qformer.demo import app, backend, server
from tests.demo.test_page import ASK, FLAGS, WAIT, answered, browser, browser_only, choose, replies, tab, write

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from qformer.model.vision_language import VisionLanguageModel

__all__ = ["FLAGS", "browser"]
#: Typed questions: markup, formulas, lines and templates are nothing but text.
VERBATIM = [
    "plain (a) b: c. d, e",
    "what is **bold**? a * b * c",
    "price $5 or $10? $x$ f(y): z.",
    "$$x^2$$ (hello) a.b:c \\(x\\) and \\[y\\]",
    "1. one\n2. two\n  `code` # head",
    "a <b> &amp; c <img src=q onerror=window.pwned=1>",
    "$$\\href{javascript:window.pwned=3}{click}$$ ${window.pwned=2} {{value}}",
]
#: JavaScript that is true as soon as the browser has written a picture and a conversation with this answer.
KEPT = """(answer) => new Promise((done) => {
  const request = indexedDB.open("qformer " + location.pathname, 1);
  request.onerror = () => done(false);
  request.onsuccess = () => {
    const kept = request.result.transaction("kept").objectStore("kept");
    const [talk, files] = [kept.get("talk"), kept.get("files")];
    kept.transaction.oncomplete = () => {
      request.result.close();
      done(!!files.result?.files.length && !!talk.result?.includes(answer));
    };
  };
})"""


@pytest.fixture(scope="module")
def gate() -> server.Gate:
    return server.Gate()


@pytest.fixture(scope="module")
def address(models: backend.Models, gate: server.Gate, verdicts: Path) -> Iterator[str]:
    with server.workplace() as folder:
        page = app.build(models, gate, [], feedback=verdicts)
        _, url, _ = server.launch(page, folder=folder, gate=gate, block=False, **app.LOOKS)
        yield url.rstrip("/")
        server.close(page, gate)


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("verdicts") / "verdicts.jsonl"


@pytest.fixture
def phone(address: str, browser: Browser) -> Iterator[Person]:
    opened = browser.new_page(viewport=PHONE)
    opened.set_default_timeout(WAIT)
    opened.goto(address)
    yield Person(opened)
    assert opened.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    assert opened.evaluate("window.pwned") is None
    opened.close()


def on_screen(page: Page, *places: str) -> bool:
    boxes: list[Any] = [page.locator(place).first.bounding_box() for place in places]
    return all(box["y"] >= 0 and box["y"] + box["height"] <= PHONE["height"] for box in boxes)


def pick(page: Page, preset: str) -> None:
    """Choose what to write, and wait until the page has taken it."""
    box = page.locator("#preset input")
    for _ in range(10):
        if box.input_value() == preset:
            break
        box.click()
        with contextlib.suppress(PlaywrightError):  # what the server sends meanwhile closes the list
            page.get_by_role("option", name=preset).click(timeout=3000)
    expect(box).to_have_value(preset)


@browser_only
def test_ask_correct_retry_and_keep(phone: Person, model: VisionLanguageModel, picture: Path, verdicts: Path) -> None:
    """Tasks 1 to 4, by keyboard after the picture is chosen; picture, answer and question stand on one screen."""
    page = phone.page
    choose(page, picture)
    phone.ask(ASK)
    first = answered(model, str(picture), ASK)
    assert replies(page, 1) == [first]
    assert on_screen(page, "#picture", "#chat .bot", "#question")
    assert page.evaluate("scrollY") == 0
    assert (phone.clicks, phone.keys) == (0, 1)
    expect(page.locator("#question textarea")).to_be_focused()

    phone.press("#chat [data-does=edit]")
    expect(page.locator("#question textarea")).to_have_value(ASK)
    expect(page.locator("#question textarea")).to_be_focused()
    phone.ask("where is the star?")
    second = answered(model, str(picture), "where is the star?")
    assert replies(page, 1) == [second]
    assert page.locator("#chat .user").all_inner_texts() == ["where is the star?"]

    phone.press("#chat [data-does=retry]")
    expect(page.locator("#chat ol.busy")).to_have_count(0)
    assert replies(page, 1) == [second]
    phone.press("#chat [data-does=no]")
    expect(page.locator("#chat [data-does=no]")).to_have_attribute("aria-pressed", "true")
    (verdict,) = map(json.loads, verdicts.read_text().splitlines())
    assert (verdict["liked"], verdict["question"], verdict["answer"]) == (False, "where is the star?", second)
    with page.expect_download() as download:
        phone.press("#save-html")
    assert "data:image/jpeg;base64" in download.value.path().read_text()
    assert (phone.clicks, phone.keys) == (0, 6)


@browser_only
def test_what_was_typed_is_shown(phone: Person, picture: Path) -> None:
    """Letter by letter, with its lines; what the model reads is in the exact prompt."""
    page = phone.page
    choose(page, picture)
    for number, text in enumerate(VERBATIM, start=1):
        phone.ask(text)
        replies(page, number)
    assert page.locator("#chat .user").all_inner_texts() == VERBATIM
    assert page.locator("#chat .katex, #chat .user *, #chat img").count() == 0
    page.locator("#prompt button").first.click()
    expect(page.locator("#prompt textarea")).not_to_have_value("")
    assert "{{value}}" not in page.locator("#chat .bot").last.inner_text()


@browser_only
def test_stop_while_waiting(phone: Person, gate: server.Gate, picture: Path) -> None:
    """The question waits in the conversation, with its place; what is there stays, and Stop is gone with the wait."""
    page = phone.page
    choose(page, picture)
    expect(page.locator("#stop")).not_to_be_visible()
    with gate.running():  # someone is in the model
        phone.ask(ASK)
        expect(page.locator("#chat .user")).to_have_text([ASK])
        expect(page.locator("#question textarea")).to_have_value("")
        phone.press("#stop")
        expect(page.locator("#chat .bot")).to_have_text("(stopped before a word)")
        page.wait_for_timeout(500)
        expect(page.locator("#chat .bot")).to_have_text("(stopped before a word)")  # nor is it told to have failed
    expect(page.locator("#stop")).not_to_be_visible()
    assert "Error" not in page.locator("body").inner_text()
    phone.ask("and now?")
    assert len(replies(page, 2)) == 2
    assert (phone.clicks, phone.keys) == (0, 3)


@browser_only
def test_errors_are_lines_of_the_conversation(phone: Person, picture: Path, tmp_path: Path) -> None:
    """Errors are in the words of a visitor; the question is not lost, and a broken picture is told at its upload."""
    page = phone.page
    phone.ask(ASK)
    fault = page.locator("#chat .fault")
    expect(fault).to_have_text("there is no picture yet; choose, drop or paste one")
    expect(page.locator("#question textarea")).to_have_value(ASK)
    (tmp_path / "cut.png").write_bytes(picture.read_bytes()[:-300])
    page.locator("#picture input[type=file]").set_input_files(tmp_path / "cut.png")
    expect(page.locator("#picture-told")).to_contain_text("cannot be read as a picture")
    expect(page.locator("#picture img")).to_have_count(0)
    choose(page, picture)
    expect(page.locator("#picture-told .fault")).to_have_count(0)
    pick(page, "Knowledge")
    phone.ask("x " * 990)
    expect(fault).to_contain_text("the question is too long for this model")
    phone.press("#chat [data-does=edit]")
    pick(page, "Short answer")
    phone.ask(f"{ASK} {'and ' * 50}")
    replies(page, 1)
    expect(page.locator("#chat .notes")).to_have_text(
        "only the first 50 words of the question were read, as in training"
    )
    expect(fault).to_have_count(0)
    assert page.locator(".toast-body").count() == 0


@browser_only
def test_reload_and_restart_keep_the_conversation(
    browser: Browser, models: backend.Models, model: VisionLanguageModel, picture: Path, tmp_path: Path
) -> None:
    """Tasks: a reload, and another server at the same address that knows nothing; then Clear, which forgets."""
    context = browser.new_context(viewport=PHONE)
    page, port = context.new_page(), None
    page.set_default_timeout(WAIT)
    markup = "<img src=q onerror=window.pwned=1>"
    hostile = tmp_path / f"{markup}.png"  # the name of a file is kept as well
    hostile.write_bytes(picture.read_bytes())
    ask, then = f"{ASK} {markup}", "where is it?"
    first = answered(model, str(picture), ask)
    for start in range(2):
        gate = server.Gate()
        with server.workplace() as folder:
            built = app.build(models, gate, [])
            started = server.launch(built, folder=folder, gate=gate, block=False, port=port, **app.LOOKS)
            port = int(started[1].rstrip("/").rpartition(":")[2])
            page.goto(started[1])
            if not start:
                choose(page, hostile)
                write(page, "question", ask)
                page.locator("#question textarea").press("Enter")
                replies(page, 1)
                page.wait_for_function(KEPT, arg=first)
                page.reload()
            page.locator("#picture img").first.wait_for()
            assert replies(page, 1) == [first]
            assert page.evaluate("window.pwned") is None
            if start:
                write(page, "question", then)
                page.locator("#question textarea").press("Enter")
                assert replies(page, 2) == [first, answered(model, str(picture), then, "", [[ask, first]])]
                page.locator("#clear").press("Enter")
                expect(page.locator("#chat .nothing")).to_be_visible()
                page.reload()
                page.locator("#chat .nothing").wait_for()
                page.wait_for_timeout(700)
                assert page.locator("#picture img, #chat .bot").count() == 0
            server.close(built, gate)
    context.close()


@browser_only
def test_what_is_kept_belongs_together(address: str, browser: Browser, picture: Path, tmp_path: Path) -> None:
    """A question after Clear, two tabs with two pictures, a choice that comes late, and a file that is gone."""
    other = tmp_path / "other.png"
    Image.new("RGB", (60, 60), "blue").save(other)
    context = browser.new_context()
    tabs = [context.new_page() for _ in range(2)]
    for one in tabs:
        one.set_default_timeout(WAIT)
        one.goto(address)
        one.locator("#chat .nothing").wait_for()

    def ask(page: Page, question: str, count: int) -> None:
        write(page, "question", question)
        page.locator("#question textarea").press("Enter")
        page.wait_for_function(KEPT, arg=replies(page, count)[-1])

    def names(page: Page) -> list[str]:
        return [*page.evaluate(KEPT.replace("done(!!", "done(files.result?.files.map((one) => one.name) || !!"))]

    first, second = tabs
    choose(first, picture)
    ask(first, ASK, 1)
    first.locator("#clear").click()
    expect(first.locator("#chat .nothing")).to_be_visible()
    ask(first, "and now?", 1)
    choose(second, other)
    ask(second, "blue?", 1)
    assert names(first) == [other.name]
    ask(first, "still?", 2)
    first.wait_for_function(KEPT, arg="still?")
    assert names(first) == [picture.name]
    first.reload()
    first.locator("#picture img").first.wait_for()
    replies(first, 2)
    assert [text.strip() for text in first.locator("#chat .message.user").all_inner_texts()] == ["and now?", "still?"]

    def late(route: Any) -> None:
        first.wait_for_timeout(400)
        route.fulfill(body="late", content_type="image/png")

    first.route("**/late.png", late)
    first.route("**/quick.png", lambda route: route.fulfill(body="quick", content_type="image/png"))
    keep = "(all) => Promise.all(all.map((one) => qformerKeep({ url: one, path: one, orig_name: one }, [])))"
    first.evaluate(keep, ["/late.png", "/quick.png"])
    assert names(first) == ["/quick.png"]
    first.evaluate(keep, ["/gradio_api/file=/gone.png"])  # refused, with the reason as JSON
    assert names(first) == []
    context.close()


@browser_only
def test_one_picture_for_all_tabs(phone: Person, picture: Path, tmp_path: Path) -> None:
    """Ask, match and caption without another upload; two photos compared in one question."""
    page = phone.page
    uploads: list[str] = []
    page.on("request", lambda request: uploads.append(request.url) if "/upload?" in request.url else None)
    choose(page, picture)
    phone.click("[role=tab]:text-is('Match')")
    write(page, "match-texts", "a red square\na green star")
    phone.press("#match-texts textarea", "Shift+Enter")
    expect(page.locator("#matches li")).to_have_count(2)
    phone.click("[role=tab]:text-is('Caption')")
    phone.press("#caption-go")
    expect(page.locator("#captions li").first).to_be_visible()
    phone.click("[role=tab]:text-is('Ask')")
    assert len(uploads) == 1
    other = tmp_path / "other.png"
    Image.new("RGB", (64, 64), "red").save(other)
    phone.press("#more-open button")
    page.locator("#more input[type=file]").first.set_input_files(other)
    expect(page.locator("#more img").first).to_be_visible()
    phone.ask("what has changed?")
    replies(page, 1)
    page.locator("#prompt button").first.press("Enter")
    assert page.locator("#prompt textarea").input_value().startswith("[picture 1: 8 tokens][picture 2: 8 tokens]")
    assert (phone.clicks, phone.keys) == (3, 4)


@browser_only
def test_find_a_picture_and_ask_about_it(phone: Person) -> None:
    page = phone.page
    phone.click("[role=tab]:text-is('Search')")
    write(page, "search-text", "a red square")
    phone.press("#search-text textarea, #search-text input")
    phone.press("#hits button")
    phone.press("#opened-ask")
    expect(page.locator("#picture img").first).to_be_visible()
    phone.ask(ASK)
    assert len(replies(page, 1)) == 1
    assert page.locator("#chat .fault, .toast-body").count() == 0
    assert (phone.clicks, phone.keys) == (1, 4)


@browser_only
@pytest.mark.parametrize(("width", "theme"), [(390, "light"), (1280, "dark")])
def test_no_serious_violation_of_accessibility(
    browser: Browser, address: str, picture: Path, width: int, theme: Any
) -> None:
    """Axe finds nothing serious in our own markup; what Gradio's components violate is listed in docs/demo.md."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
    page.goto(address)
    choose(page, picture)
    write(page, "question", ASK)
    page.locator("#ask").click()
    replies(page, 1)
    tab(page, "Look")
    write(page, "look-question", ASK)
    write(page, "look-answer", "red star")
    page.locator("#look-explain").click()
    page.locator(".words label").nth(2).wait_for()
    found = {}
    for name in ("Look", "Ask"):
        tab(page, name)
        page.wait_for_timeout(300)
        for one in axe.run(page).response["violations"]:
            if one["impact"] in ("serious", "critical"):
                found.setdefault(one["id"], []).extend(node["html"] for node in one["nodes"])
    page.close()
    print(json.dumps(found, indent=1))
    assert set(found) <= GRADIOS, found
    ours = ("talk", "message", "data-does", "explained", "figure", "fault", "<h1", "about")
    assert not [html for nodes in found.values() for html in nodes if any(mark in html for mark in ours)]


#: Rules that Gradio's own components violate.
GRADIOS: set[str] = set()
