"""A person's ten tasks on a running page, in Chromium on a phone's screen: clicks, keys and seconds of each.

    qformer demo runs/quickstart/opt --index gallery --port 7860
    python benchmarks/demo_tasks.py photo.jpg another.jpg [--address http://127.0.0.1:7860]

Needs `playwright` and a Chromium. A task lasts from its first click or key until what was wanted can be seen; the
choice of a file and the typing of a text take no time and count as neither.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

PHONE = {"width": 390, "height": 844}
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
READY = "document.querySelectorAll('#chat .bot').length === {} && !document.querySelector('#chat ol.busy')"
ASKED = "(text) => [...document.querySelectorAll('#chat .user')].at(-1)?.textContent === text"
BUSY = "document.querySelector('#chat ol.busy')"


class Person:
    """A person at a page, whose clicks and keys are counted."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.clicks = self.keys = 0

    def click(self, place: str) -> None:
        self.clicks += 1
        self.page.locator(place).first.click()

    def press(self, place: str, key: str = "Enter") -> None:
        self.keys += 1
        self.page.locator(place).first.press(key)

    def write(self, box: str, text: str) -> None:
        self.page.locator(f"#{box} textarea, #{box} input").first.fill(text)

    def ask(self, text: str) -> None:
        self.write("question", text)
        self.press("#question textarea")

    def ask_and_read(self, text: str, answers: int) -> None:
        """Ask, and wait until the conversation has so many answers and none is being written."""
        self.ask(text)
        self.page.wait_for_function(ASKED, arg=text)
        self.page.wait_for_function(READY.format(answers))

    def choose(self, box: str, file: Path) -> None:
        self.page.locator(f"#{box} input[type=file]").first.set_input_files(file)
        self.page.locator(f"#{box} img").first.wait_for()

    def open(self, tab: str) -> None:
        self.click(f"[role=tab]:text-is('{tab}')")

    def wait(self, place: str) -> None:
        self.page.locator(place).first.wait_for()


def tasks(one: Person, photo: Path, other: Path) -> dict[str, Callable[[], Any]]:
    """Ten tasks, in an order in which each may rest on those before."""
    page = one.page

    def correct() -> None:
        one.press("#chat [data-does=edit]")
        page.wait_for_function("document.querySelector('#question textarea').value")
        one.ask_and_read("what is in the middle?", 1)

    def again() -> None:
        one.press("#chat [data-does=retry]")
        page.wait_for_function(BUSY)
        page.wait_for_function(READY.format(1))

    def save() -> None:
        with page.expect_download():
            one.press("#save-html")

    def stop() -> None:
        one.ask("and at the top?")
        one.press("#stop")
        page.wait_for_function(READY.format(2))

    def come_back() -> None:
        page.reload()
        page.wait_for_function(READY.format(2))

    def caption() -> None:
        one.open("Caption")
        one.press("#caption-go")
        one.wait("#captions li")

    def find() -> None:
        one.open("Search")
        one.write("search-text", "a dog")
        one.press("#search-text textarea, #search-text input")
        one.press("#hits button")
        one.press("#opened-ask")
        page.wait_for_function("!document.querySelector('#chat .bot')")
        one.ask_and_read("what is it?", 1)

    def explain() -> None:
        one.open("Look")
        one.write("look-question", "what is it?")
        one.press("#look-explain")
        one.wait("#look-relevance .maps img")

    def compare() -> None:
        one.open("Ask")
        one.press("#more-open button")
        one.choose("more", other)
        one.ask_and_read("what has changed?", 1)

    return {
        "ask about a photo": lambda: one.ask_and_read("what is it?", 1),
        "correct the question": correct,
        "ask it again": again,
        "save the conversation": save,
        "stop an answer": stop,
        "reload, and go on": come_back,
        "write captions of the same photo": caption,
        "find a picture, and ask about it": find,
        "see what an answer is based on": explain,
        "compare two photos in one question": compare,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("--address", default="http://127.0.0.1:7860")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    given = parser.parse_args()
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=given.chromium, args=FLAGS)
        page = browser.new_page(viewport=PHONE)
        page.set_default_timeout(120_000)
        page.goto(given.address)
        one = Person(page)
        one.wait("#question textarea")
        one.choose("picture", given.photo)
        print("| task | clicks | keys | seconds |\n|---|---|---|---|")
        for name, task in tasks(one, given.photo, given.other).items():
            one.clicks = one.keys = 0
            began = time.monotonic()
            task()
            print(f"| {name} | {one.clicks} | {one.keys} | {time.monotonic() - began:.1f} |", flush=True)
            page.wait_for_timeout(1_500)  # the browser keeps what it keeps
        browser.close()


if __name__ == "__main__":
    main()
