"""`Retriever`: text, image or both -> the images of a gallery, by ITC and then re-ranked by ITM (BLIP-2, section 4.4).

Three scores: `itc`, a cosine; `itm`, the raw logit of 'they match'; and `probability`, that of ITM's two classes. The
order is that of `score`: ITM logit + cosine where a hit was re-ranked, as in the original; the cosine elsewhere, behind
them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qformer.data.texts import MAX_WORDS, clean_caption
from qformer.images import read_file, read_image
from qformer.resolution.base import cut_all
from qformer.retrieval.embedders import Embedder, as_embedder, read_texts
from qformer.retrieval.entries import conditions, is_utf8, maxsim
from qformer.retrieval.gallery import Gallery
from qformer.retrieval.places import digest, find, plain_bytes, spelled
from qformer.trust import Untrusted
from qformer.types import BadSample, Tiles, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from qformer.images import ImageLike
    from qformer.model.image_text import ImageTextModel
    from qformer.retrieval.entries import Entry, Place

SHORTLIST = 64
ENCODED = 16  # images whose keys and values are held at once


@dataclass(frozen=True)
class Hit:
    """An image, or a caption of one, that was found.

    Attributes:
        id, path, captions, width, height: of the entry. caption: the one that was found, or None.
        score: what orders the hits. itc: cosine with the text, or with the image. itm: logit of 'they match', None
            where ITM did not look; probability: of a match by ITM.
        similarity: to the image of a query that also has a text, in [-1, 1].
        fault: why the image is not at `path` as it was indexed: `missing`, `changed` or `unreadable`; empty where it
            is. Of several places of a content `path` is the first that still holds it.
    """

    id: str
    path: str
    score: float
    itc: float
    itm: float | None = None
    probability: float | None = None
    similarity: float | None = None
    caption: str | None = None
    captions: tuple[str, ...] = ()
    width: int = 0
    height: int = 0
    fault: str = ""


class Retriever:
    """Searches a gallery with the model that made it.

    A CLIP-like model (`qformer.retrieval.embedders.ClipEmbedder`) has no ITM: then nothing is re-ranked, whatever the
    `shortlist`.

    Attributes:
        embedder: what images and texts are embedded by. model: the stage-one model that re-ranks, None without.
        unread: paths of the last search whose images could not be read again, or are others by now, so that they were
            not re-ranked.
    """

    def __init__(
        self,
        gallery: Gallery | str | Path,
        model: Embedder | ImageTextModel,
        name: str = "the model",
        trust: bool = False,
    ) -> None:
        """Open the gallery, where it is not open yet; for `trust` see `Gallery.open`.

        Raises:
            UsageError: there is none, or another model made it.
        """
        self.gallery = gallery if isinstance(gallery, Gallery) else Gallery.open(gallery, trust)
        self.embedder = as_embedder(model)
        self.model = self.embedder.matcher and self.embedder.matcher.eval()
        sizes = {"queries": self.embedder.rows, "width": self.embedder.width}
        self.gallery.check(self.embedder.fingerprint(), name, sizes)
        self.unread: list[str] = []
        self._found: dict[str, tuple[str, str]] = {}  # places and faults of the entries that the last search looked for
        self._sources: dict[int, Any] = {}

    def text_to_image(
        self, text: str, k: int = 10, shortlist: int = SHORTLIST, where: Sequence[str] = (), exact: bool = False
    ) -> list[Hit]:
        """The k images that fit a text best.

        Args:
            shortlist: candidates by ITC that ITM re-ranks; 0 for none.
            where: conditions on columns, such as `width>1000` (`gallery.conditions`).
            exact: read every entry, instead of asking the index of a large gallery.

        Raises:
            UsageError: an empty text or one that is no UTF-8, a condition that is none, or a `k` below 1.
        """
        return self.search(text, None, k, shortlist, where, exact)

    def image_to_image(
        self, image: ImageLike, k: int = 10, where: Sequence[str] = (), exact: bool = False
    ) -> list[Hit]:
        """The k images most like an image, by the mean over its rows of the best cosine with a row of theirs.

        Raises:
            BadSample: the image cannot be read.
        """
        return self.search(None, image, k, 0, where, exact)

    @torch.no_grad()
    def search(
        self,
        text: str | None,
        image: ImageLike | None,
        k: int = 10,
        shortlist: int = SHORTLIST,
        where: Sequence[str] = (),
        exact: bool = False,
    ) -> list[Hit]:
        """By text, by image, or by both: then the candidates of either are ordered by the mean of both scores, each
        brought to mean 0 and deviation 1 over the candidates. See `text_to_image`.

        Raises:
            UsageError: neither text nor image, or see `text_to_image`. BadSample: see `image_to_image`.
        """
        if text is None and image is None:
            raise UsageError("there is nothing to search for; give a text, an image, or both")
        self._begin(k, shortlist)
        only, wanted = conditions(where), max(k, shortlist if text is not None else 0)
        texts = None if text is None else self._read_text(text)
        queries = [
            None if texts is None else self._embed_text(texts),
            None if image is None else self._embed_image(image),
        ]
        found: dict[str, None] = {}
        for query in queries:
            if query is not None:
                found |= dict.fromkeys(id_ for id_, _ in self.gallery.store.nearest(query, wanted, only, exact))
        entries = self.gallery.store.get(list(found))
        by_text, by_image = (self._cosines(entries, query) for query in queries)
        hits = [
            _hit(entry, by_text.get(id_, by_image.get(id_, 0.0)), by_image.get(id_) if by_text else None)
            for id_, entry in entries.items()
        ]
        hits = _balanced(hits) if by_text and by_image else _ranked(hits)
        if texts is not None and shortlist > 0 and self.model is not None:
            hits = self._rerank(hits, entries, texts, shortlist)
        return self._placed((_balanced(hits) if by_text and by_image else hits)[:k], entries)

    def _begin(self, k: int, shortlist: int) -> None:
        """Raises UsageError: they are no numbers of hits."""
        for name, value, least in (("k", k, 1), ("shortlist", shortlist, 0)):
            if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
                raise UsageError(f"{name} is {value!r}; give a whole number of at least {least}")
        self.unread, self._found = [], {}

    def _find(self, entry: Entry) -> tuple[str, str]:
        if entry.id not in self._found:
            self._found[entry.id] = find(entry, self._record)
        return self._found[entry.id]

    def _placed(self, hits: list[Hit], entries: dict[str, Entry]) -> list[Hit]:
        """Hits with the places where they stand today."""
        found = [(hit, *self._find(entries[hit.id])) for hit in hits]
        return [replace(hit, path=path, fault=fault) for hit, path, fault in found]

    @torch.no_grad()
    def image_to_text(
        self, image: ImageLike, k: int = 10, shortlist: int = SHORTLIST, where: Sequence[str] = ()
    ) -> list[Hit]:
        """The k captions of the gallery that fit an image best; `Hit.caption` is the caption.

        Raises:
            BadSample: the image cannot be read. UsageError: see `text_to_image`.
        """
        self._begin(k, shortlist)
        pixels = read_image(image)
        found = self.gallery.store.nearest_captions(self._embed_image(pixels), max(k, shortlist), conditions(where))
        entries = self.gallery.store.get(list(dict.fromkeys(id_ for id_, _, _ in found)))
        hits = [
            replace(_hit(entries[id_], cosine), caption=entries[id_].captions[number])
            for id_, number, cosine in found
            if id_ in entries
        ]
        if shortlist > 0 and hits and self.model is not None:
            tiles = cut_all([pixels], self.model.frontend.strategy)
            first = hits[:shortlist]
            logits = self._match(tiles, [hit.caption or "" for hit in first], [(0, n) for n in range(len(first))])
            hits = _ranked([_matched(hit, pair) for hit, pair in zip(first, logits, strict=True)]) + hits[shortlist:]
        return self._placed(hits[:k], entries)

    def open_image(self, hit: Hit | str) -> Tensor:
        """The picture of a hit (or of an id), uint8[3, h, w].

        Raises:
            BadSample: kinds `missing` (it is not where it was indexed), `changed` (that holds another one by now) and
                `unreadable`.
        """
        id_ = hit if isinstance(hit, str) else hit.id
        entry = self.gallery.store.get([id_]).get(id_)
        if entry is None:
            raise BadSample("missing", id_)
        return self._open(entry)

    def _open(self, entry: Entry) -> Tensor:
        faults = []
        for place in entry.places:
            try:
                if place.size >= 0:
                    return _picture(read_file(Path(spelled(place.name))), entry.id, place.name)
                return _picture(self._record(place), entry.id, place.name)
            except BadSample as bad:
                faults.append(bad)
        raise faults[0]

    def _record(self, place: Place) -> Any:
        """The picture of a record, as its source gives it.

        Raises:
            BadSample: kind `missing`: its source is gone, has become shorter, or holds another record there.
        """
        try:
            if place.source not in self._sources:
                self._sources[place.source] = self.gallery.source(place.source)
            sample = self._sources[place.source][place.number]
        except Untrusted:  # that the image is missing would be a lie
            raise
        except (UsageError, IndexError) as error:
            raise BadSample("missing", f"{place.name}: {error}") from error
        if sample.key != place.name:
            raise BadSample("missing", place.name)
        return read_file(sample.image) if isinstance(sample.image, Path) else sample.image

    def _read_text(self, text: str) -> str:
        if not isinstance(text, str) or not is_utf8(text):
            raise UsageError(f"the text to search for is {text!a}, which is no text in UTF-8; write what to look for")
        cleaned = clean_caption(text)
        if not any(map(str.isalnum, cleaned)):
            raise UsageError(
                f"the text to search for is {text!r}, which has no letter or digit; write what to look for"
            )
        return cleaned

    def words_read(self, text: str) -> int | None:
        """How many words of a text the model reads, None if it reads all of them."""
        words, cleaned = clean_caption(text).split(), len(text.split()) > MAX_WORDS
        before = len(words)
        while len(words) > 1 and self.embedder.count(" ".join(words)) > self.embedder.limit:
            words.pop()
        return len(words) if cleaned or len(words) < before else None

    def is_unknown(self, text: str) -> bool:
        """Whether the model knows no letter of a text, so that what it finds for it means nothing."""
        tokenizer: Any = self.embedder.tokenizer
        ids = tokenizer(clean_caption(text), add_special_tokens=False)["input_ids"]
        return set(ids) <= {tokenizer.unk_token_id}

    def _embed_text(self, text: str) -> Tensor:
        return self.embedder.embed_texts([text]).float().cpu()  # (1, P)

    def _embed_image(self, image: ImageLike) -> Tensor:
        rows, valid = self.embedder.embed_images([read_image(image)])
        return rows[0][valid[0]].float().cpu()  # (V, P)

    def _cosines(self, entries: dict[str, Entry], query: Tensor | None) -> dict[str, float]:
        if query is None:
            return {}
        return {id_: float(maxsim(query, torch.from_numpy(entry.embeds).float())) for id_, entry in entries.items()}

    def _rerank(self, hits: list[Hit], entries: dict[str, Entry], text: str, shortlist: int) -> list[Hit]:
        """The first hits by ITM; those whose image cannot be read any more, or is another one, stay behind them."""
        first = hits[:shortlist]
        stored = self.gallery.store.get([hit.id for hit in first], True) if self.gallery.about.get("features") else {}
        matched, left = [], []
        for start in range(0, len(first), ENCODED):
            ready = []
            for hit in first[start : start + ENCODED]:
                try:
                    ready.append((hit, self._tiles(stored.get(hit.id) or entries[hit.id])))
                except BadSample as bad:
                    path, fault = self._find(entries[hit.id])
                    self._found[hit.id] = path, fault or bad.kind
                    self.unread.append(path)
                    left.append(hit)
            if ready:
                tiles = Tiles.join([tiles for _, tiles in ready])
                logits = self._match(tiles, [text], [(row, 0) for row in range(len(ready))])
                matched += [_matched(hit, pair) for (hit, _), pair in zip(ready, logits, strict=True)]
        return _ranked(matched) + left + hits[shortlist:]

    def _tiles(self, entry: Entry) -> Tiles:
        """Its tokens, or the picture that they are made of.

        Raises:
            BadSample: there is no picture to make them of, or another one where it stood.
        """
        path, fault = self._find(entry)
        if fault and (entry.features is None or fault == "changed"):
            raise BadSample(fault, path)
        assert self.model is not None
        if entry.features is None:
            return cut_all([self._open(entry)], self.model.frontend.strategy)
        plan = self.model.frontend.strategy.plan(entry.width, entry.height)
        return Tiles([], [plan], [torch.from_numpy(rows.copy()) for rows in entry.features])

    def _match(self, tiles: Tiles, texts: list[str], pairs: list[tuple[int, int]]) -> list[list[float]]:
        """ITM's two logits of each pair: no match, match."""
        assert self.model is not None
        tokens = read_texts(self.model, texts)
        logits = self.model.match_logits(self.model.encode_images(tiles), tokens, torch.tensor(pairs))
        return logits.float().tolist()


def _picture(data: Any, id_: str, name: str) -> Tensor:
    """Decoded, if it still is the content that was indexed. Raises BadSample: kind `changed`, it is not."""
    if digest(plain_bytes(data)) != id_:
        raise BadSample("changed", name)
    return read_image(data)


def _hit(entry: Entry, itc: float, similarity: float | None = None) -> Hit:
    about = {"captions": tuple(entry.captions), "width": entry.width, "height": entry.height}
    return Hit(entry.id, entry.path, itc, itc, similarity=similarity, **about)  # type: ignore[arg-type]


def _matched(hit: Hit, logits: Sequence[float]) -> Hit:
    no, yes = logits
    probability = float(torch.tensor([no, yes]).softmax(dim=0)[1])
    return replace(hit, score=yes + hit.itc, itm=yes, probability=probability)


def _ranked(hits: list[Hit]) -> list[Hit]:
    return sorted(hits, key=lambda hit: -hit.score)


def _balanced(hits: list[Hit]) -> list[Hit]:
    """Hits of text and image by the mean of both scores, in units of their deviation; those not re-ranked last."""
    ordered: list[Hit] = []
    for group in ([hit for hit in hits if hit.itm is not None], [hit for hit in hits if hit.itm is None]):
        if not group:
            continue
        scores = torch.tensor([[hit.itc + (hit.itm or 0.0), hit.similarity or 0.0] for hit in group])
        units = (scores - scores.mean(dim=0)) / scores.std(dim=0, correction=0).clamp(min=1e-6)
        both = units.mean(dim=1).tolist()
        ordered += _ranked([replace(hit, score=score) for hit, score in zip(group, both, strict=True)])
    return ordered
