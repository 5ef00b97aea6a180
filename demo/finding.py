"""Captions, matches, hits of a gallery and the tab Look, as plain functions like those of `demo/backend.py`.

All input of a visitor is checked; unusable input raises a `UsageError` of one sentence.
"""

from __future__ import annotations

import io
import os
import re
import tempfile
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from qformer import resolution
from qformer.data.texts import clean_caption
from qformer.demo import look
from qformer.demo.backend import answer, prepare
from qformer.demo.limits import (
    MAX_BYTES,
    MAX_CONTEXT,
    MAX_QUESTION,
    check_number,
    check_picture,
    check_text,
    open_picture,
)
from qformer.demo.shown import ONE_PICTURE, row_of
from qformer.evaluation.choice import choice_losses
from qformer.files.records import replacing
from qformer.images import read_file, read_image
from qformer.lookup import find
from qformer.resolution.measures import useful
from qformer.retrieval import places as kept
from qformer.retrieval.gallery import MANIFEST
from qformer.retrieval.places import in_words
from qformer.types import BadSample, UsageError

if TYPE_CHECKING:
    from qformer.model.image_text import ImageTextModel
    from qformer.model.vision_language import VisionLanguageModel
    from qformer.retrieval.entries import Entry
    from qformer.retrieval.search import Hit, Retriever

THUMBNAIL = 192  # pixels
LARGEST = 4096  # pixels of a side of a hit whose file is not shown as it is
GONE = (
    "the gallery is no longer where it was when this page was started; who runs the page can put it back or restart it"
)
MOST_CAPTIONS, MOST_TEXTS, MOST_HITS = 10, 32, 24


@dataclass(frozen=True)
class Caption:
    """A caption, and the mean log-likelihood of its tokens with the end token, after the image and the prompt."""

    text: str
    score: float


@torch.no_grad()
def captions(
    model: VisionLanguageModel,
    image: str | None,
    count: Any = 5,
    prompt: Any = None,
    top_p: Any = 0.9,
    temperature: Any = 1.0,
    more: Any = None,
) -> list[Caption]:
    """Write distinct captions, the likeliest first: one by beam search, the others by nucleus sampling.

    Args:
        count: largest number of captions; duplicates count once.
        prompt: start of every caption; None or empty for the prompt of training.
        more: further files that the captions are about, see `qformer.demo.shown.row_of`.
    """
    row = row_of(model, image, more)
    wanted = int(check_number("number of captions", count, 1, MOST_CAPTIONS, whole=True))
    start = check_text("beginning", prompt, MAX_QUESTION).strip() or model.prompt
    drawn: dict[str, Any] = {
        "do_sample": True,
        "num_beams": 1,
        "top_p": check_number("top_p", top_p, 0.01, 1),
        "temperature": check_number("temperature", temperature, 0.05, 5),
    }
    seen = model.prefix(model.frontend.tiles([row]))
    texts = model.llm.decode(model.llm.generate(*seen, [start], seen.places, num_beams=5))
    if wanted > 1:
        texts += model.llm.decode(
            model.llm.generate(*seen, [start], seen.places, num_return_sequences=2 * (wanted - 1), **drawn)
        )
    unlike = list(dict.fromkeys(text for text in texts if text))[:wanted]
    sums, counts = choice_losses(model, seen, [start], [unlike])[0]
    scored = [Caption(text, -total / max(n, 1)) for text, total, n in zip(unlike, sums, counts, strict=True)]
    return sorted(scored, key=lambda caption: -caption.score)


@dataclass(frozen=True)
class Match:
    """A text with its cosine of ITC, and its probability of a match by ITM."""

    text: str
    itc: float
    itm: float


@torch.no_grad()
def match(model: ImageTextModel, image: str | None, texts: Any) -> list[Match]:
    """Rank texts by how well they fit the picture, the best by ITM first.

    Args:
        texts: a string with one text per line, or a list.

    Raises:
        UsageError: no text, or more than `MOST_TEXTS`.
    """
    if not model.can_match:
        raise UsageError("this checkpoint was trained without ITM (loss.itm: 0); open one that can match")
    picture = open_picture(image)
    lines = texts if isinstance(texts, list) else check_text("list of texts", texts, MAX_CONTEXT).splitlines()
    given = [check_text("text", line, MAX_QUESTION).strip() for line in lines]
    given = list(dict.fromkeys(line for line in given if any(map(str.isalnum, line))))
    if not given:
        raise UsageError("there is no text to match; write one per line")
    if len(given) > MOST_TEXTS:
        raise UsageError(f"got {len(given)} texts; give at most {MOST_TEXTS}, one per line")
    seen = model.frontend.encode_tiles(model.frontend.tiles([picture]))
    cleaned = model.tokenize([clean_caption(line) for line in given])
    rows, valid = model.embed_images(seen)
    cosines = (model.embed_texts(cleaned).float() @ rows[0][valid[0]].float().T).amax(dim=1).tolist()
    pairs = torch.tensor([(0, number) for number in range(len(given))])
    chances = model.match_logits(model.encode_images(seen), cleaned, pairs).float().softmax(dim=1)[:, 1].tolist()
    return sorted(map(Match, given, cosines, chances), key=lambda one: -one.itm)


@dataclass(frozen=True)
class ShownHit:
    """A hit as the page shows it.

    Attributes:
        id: of the entry. where: path of its picture (a `path` would be fetched). score: value that orders hits.
        itc, itm: cosine, and the probability of a match if it was re-ranked.
        moved: places by which re-ranking moved it up. fresh: it was not among the hits shown before re-ranking.
        fault: reason why there is no picture, such as `missing` or `damaged`; empty if there is one.
    """

    id: str
    where: str
    caption: str
    picture: Image.Image | None
    score: float
    itc: float
    itm: float | None = None
    moved: int = 0
    fresh: bool = False
    fault: str = ""

    @property
    def name(self) -> str:
        return Path(self.where).name


def count(retriever: Retriever) -> int:
    """Number of images in a gallery today.

    Raises:
        UsageError: the gallery is gone.
    """
    gallery = retriever.gallery
    if not (gallery.folder / MANIFEST).is_file():
        raise UsageError(GONE)
    return len(gallery.store)


def search(
    retriever: Retriever, text: Any = "", image: str | None = None, k: Any = 8, shortlist: Any = 64
) -> tuple[list[ShownHit], list[ShownHit]]:
    """Search a gallery by a text, an image, or both: hits by ITC alone, and re-ranked by ITM.

    Without a text nothing is re-ranked, and the second list is empty.

    Raises:
        UsageError: neither text nor image, invalid numbers, or the gallery is gone.
    """
    count(retriever)
    words = check_text("text", text, MAX_QUESTION).strip() or None
    picture = None if image is None else open_picture(image)
    if words is None and picture is None:
        raise UsageError("there is nothing to search for; write a text, choose a picture, or both")
    shown = int(check_number("number of hits", k, 1, MOST_HITS, whole=True))
    candidates = int(check_number("number of candidates", shortlist, 1, 256, whole=True))
    before = retriever.search(words, picture, shown, 0)
    after = [] if words is None else retriever.search(words, picture, shown, max(candidates, shown))
    pictures = {hit.id: _thumbnail(retriever, hit) for hit in {hit.id: hit for hit in [*before, *after]}.values()}
    places = {hit.id: place for place, hit in enumerate(before)}
    ranked = [
        replace(_found(hit, pictures), moved=places.get(hit.id, place) - place, fresh=hit.id not in places)
        for place, hit in enumerate(after)
    ]
    return [_found(hit, pictures) for hit in before], ranked


def _found(hit: Hit, pictures: dict[str, tuple[Image.Image | None, str]]) -> ShownHit:
    caption = hit.captions[0] if hit.captions else ""
    picture, fault = pictures[hit.id]
    return ShownHit(hit.id, hit.path, caption, picture, hit.score, hit.itc, hit.probability, fault=fault)


def _thumbnail(retriever: Retriever, hit: Hit) -> tuple[Image.Image | None, str]:
    """Thumbnail of a hit, or the reason why there is none."""
    try:
        picture = Image.fromarray(retriever.open_image(hit).permute(1, 2, 0).numpy())
    except BadSample as bad:
        return None, _fault(bad, hit.path)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return picture, ""


def _fault(bad: BadSample, path: str) -> str:
    """Fault of a hit's picture; a file that has changed may be another picture, or none any more."""
    if bad.kind == "changed":
        try:
            read_image(read_file(Path(path)))
        except BadSample as worse:
            return "changed" if worse.kind == "missing" else "damaged"
    return bad.kind


@dataclass(frozen=True)
class OpenedHit:
    """A hit in full: a file of the page, which its boxes of pictures take as a value, its path, and its captions."""

    file: str
    path: str
    captions: list[str]


def open_hit(retriever: Retriever, id_: Any) -> OpenedHit:
    """Copy the picture of a hit into the page's folder, as it is if visitors could upload it, else as PNG or JPEG.

    Raises:
        UsageError: no such picture, or it is gone, changed or damaged.
    """
    count(retriever)
    known = isinstance(id_, str) and re.fullmatch("[0-9a-f]{32}", id_)
    entry = retriever.gallery.store.get([id_]).get(id_) if known else None
    if entry is None:
        raise UsageError("this picture is not in the gallery; search again")
    with ONE_PICTURE:
        return _copy(retriever, entry)


def _copy(retriever: Retriever, entry: Entry) -> OpenedHit:
    try:
        picture = Image.fromarray(retriever.open_image(entry.id).permute(1, 2, 0).numpy())
    except BadSample as bad:
        raise UsageError(f"this picture is {in_words(_fault(bad, entry.path))}; index its folder again") from bad
    path, fault = kept.find(entry, lambda place: b"")  # of a record the picture alone is taken
    # One copy of each, whoever asks: its id is a digest of its content.
    folder = Path(os.environ.get("GRADIO_TEMP_DIR") or tempfile.mkdtemp()) / f"hit-{entry.id}"
    folder.mkdir(exist_ok=True)
    file = next(folder.iterdir(), folder / f"{Path(path).stem[:100] or 'hit'}.png")
    if file.exists():
        os.utime(file)  # not old
        return OpenedHit(str(file), path, list(entry.captions))
    try:
        data = check_picture("" if fault else path)
        file = file.with_suffix(Path(path).suffix[:10] or ".png")
    except UsageError:  # a kind of file, or a size, that the page does not take
        large = picture.width * picture.height > MAX_BYTES / 8
        file = file.with_suffix(".jpg" if large else ".png")
        picture.thumbnail((LARGEST, LARGEST))
        made = io.BytesIO()
        picture.save(made, "JPEG" if large else "PNG", quality=95)
        data = made.getvalue()
    with replacing(file) as partial:
        partial.write_bytes(data)
    return OpenedHit(str(file), path, list(entry.captions))


def queries(model: VisionLanguageModel | ImageTextModel, image: str | None) -> Image.Image:
    """Draw the attention of each query, as one sheet of small pictures."""
    picture = open_picture(image)
    return look.sheet(picture, look.query_maps(model, picture))


@dataclass(frozen=True)
class Relevance:
    """An answer, its tokens as text, and the picture with the relevance for the answer drawn over it."""

    answer: str
    tokens: list[str]
    picture: Image.Image


def relevance(
    model: VisionLanguageModel, image: str | None, question: Any, explained: Any = "", token: Any = None
) -> Relevance:
    """Draw which parts of the picture an answer, or one token of it, is based on (`look.answer_relevance`).

    Args:
        explained: answer to explain; empty for the model's own. token: index of a token; None for all of them.

    Raises:
        UsageError: no question, or a token that the answer does not have.
    """
    picture = open_picture(image)
    asked = prepare(model, image, question)
    if not asked.question:
        raise UsageError("there is no question; write one to explain its answer")
    answered = check_text("answer", explained, MAX_QUESTION).strip() or [*answer(model, asked)][-1]
    if not answered:
        raise UsageError("the model gives no answer to this question; write the answer to explain")
    chosen = None if token is None else int(check_number("number of the token", token, 0, 1000, whole=True))
    tokens, heat = look.answer_relevance(model, picture, asked.question, answered, chosen)
    return Relevance(answered, tokens, look.overlay(picture, heat))


def slices(
    model: VisionLanguageModel | ImageTextModel, image: str | None
) -> list[tuple[Image.Image, str, dict[str, Any]]]:
    """Draw the tiles of each strategy on the picture, with its name and numbers; those that refuse it are left out."""
    picture = open_picture(image)
    own = model.frontend.strategy.rule
    found = []
    for name in look.STRATEGIES:
        options: dict[str, Any] = {}
        if is_dataclass(own) and find(resolution.STRATEGIES, name, "strategy") is type(own):
            options = {field.name: getattr(own, field.name) for field in fields(own) if field.init}
        try:
            drawn, numbers = look.slices(picture, name, **options)
        except UsageError:  # too thin for this one
            continue
        plan = resolution.build(name, **options).plan(*picture.size)
        seen = {"sizes": [tile.size for tile in plan.tiles], "useful": useful(plan), "own": bool(options)}
        found.append((drawn, name, numbers | seen))
    return found
