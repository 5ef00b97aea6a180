"""Contact sheets: what is asked and found stands in them, in order, and nothing in a text becomes markup."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

from PIL import Image

from qformer.figures import page as sheet
from qformer.figures.page import Card

EVIL = "<script>alert('x')</script> & \"quoted\" <img src=x onerror=alert(1)>"


class Seen(HTMLParser):
    """Tags in order, texts, and the bytes of the images."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        sources = [str(told["src"]) for tag, told in self.tags if tag == "img"]
        self.images = [
            Image.open(io.BytesIO(base64.b64decode(re.sub("^data:image/(jpeg|png);base64,", "", source))))
            for source in sources
        ]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_search_with_a_picture_that_is_gone() -> None:
    red, wide = Image.new("RGB", (30, 20), "red"), Image.new("RGBA", (1000, 500), "blue")
    hits = [
        Card(wide, ["the first"], {"ITC": 0.25, "ITM": "no"}, right=False),
        Card(None, ["the second"], gone="no file any more"),
        Card(red, [], right=True),
    ]
    seen = Seen(sheet.contact_sheet("a title", Card(red, ["looked for"]), hits, "a note"))
    assert [image.size for image in seen.images] == [(30, 20), (sheet.SIDE, sheet.SIDE // 2), (30, 20)]
    order = [
        seen.text.index(word) for word in ("a note", "looked for", "ITC 0.250", "ITM no", "the first", "no file any")
    ]
    assert order == sorted(order)
    assert [told["class"] for tag, told in seen.tags if tag == "li"] == ["hit", "hit", "hit yes"]
    assert wide.size == (1000, 500)  # the caller's own image stays as it is
    assert not [told for tag, told in seen.tags if tag in ("script", "link")]
    assert "Nothing was found" in sheet.contact_sheet("a title", Card(lines=["asked"]), [])


def test_texts_are_escaped_wherever_they_stand() -> None:
    hit = Card(Image.new("RGB", (8, 8)), [EVIL, EVIL], {EVIL: EVIL})
    page = sheet.contact_sheet(EVIL, Card(lines=[EVIL], scores={EVIL: 1}), [hit, Card(gone=EVIL)], EVIL)
    seen = Seen("".join([page, sheet.search(Card(), {EVIL: [hit]}), sheet.table([EVIL], [[EVIL]])]))
    assert not [tag for tag, told in seen.tags if tag == "script" or "onerror" in told]
    assert len(seen.images) == 2
    assert seen.text.count(EVIL) == 17
