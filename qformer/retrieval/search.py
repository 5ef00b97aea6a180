"""`Retriever`: text, image or both -> the images of a gallery, by ITC and then re-ranked by ITM (BLIP-2, section 4.4).

Three scores: `itc`, a cosine; `itm`, the raw logit of 'they match'; and `probability`, the softmax over ITM's two
classes. Hits are ordered by `score`: ITM logit + cosine for re-ranked hits, as in the original, followed by the others
by their cosine.
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
from qformer.retrieval.places import digest, find, find_spelling, plain_bytes
from qformer.trust import Untrusted
from qformer.types import BadSample, Tiles, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from qformer.images import ImageLike
    from qformer.model.image_text import ImageTextModel
    from qformer.retrieval.entries import Entry, Place

SHORTLIST = 64
ENCODED = 16  # images whose keys and values are in memory at once


@dataclass(frozen=True)
class Hit:
    """An image, or a caption of one, that a search found.

    Attributes:
        id, captions, width, height: fields of the entry.
        path: first place that still holds the content.
        caption: the caption that was found, or None.
        score: value by which hits are ordered.
        itc: cosine with the text, or with the image.
        itm: logit of 'they match'; None if the hit was not re-ranked. probability: of a match, by ITM.
        similarity: cosine with the image, in [-1, 1], if the query also has a text.
        fault: `missing`, `changed` or `unreadable` if the image is not at `path` as it was indexed; else empty.
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
    """Search of a gallery with the model that made it.

    A CLIP-like model (`qformer.retrieval.embedders.ClipEmbedder`) has no ITM: then nothing is re-ranked, whatever the
    `shortlist`.

    Attributes:
        embedder: embeds images and texts. model: the stage-one model that re-ranks; None without.
        unread: paths in the last search that were not re-ranked, since their images could not be read or have changed.
    """

    def __init__(
        self,
        gallery: Gallery | str | Path,
        model: Embedder | ImageTextModel,
        name: str = "the model",
        trust: bool = False,
    ) -> None:
        """Open the gallery, unless it is open; for `trust` see `Gallery.open`.

        Raises:
            UsageError: no gallery there, or another model made it.
        """
        self.gallery = gallery if isinstance(gallery, Gallery) else Gallery.open(gallery, trust)
        self.embedder = as_embedder(model)
        self.model = self.embedder.matcher and self.embedder.matcher.eval()
        sizes = {"queries": self.embedder.rows, "width": self.embedder.width}
        self.gallery.check(self.embedder.fingerprint(), name, sizes)
        self.unread: list[str] = []
        self._found: dict[str, tuple[str, str]] = {}  # path and fault by entry, of the last search
        self._sources: dict[int, Any] = {}

    def text_to_image(
        self, text: str, k: int = 10, shortlist: int = SHORTLIST, where: Sequence[str] = (), exact: bool = False
    ) -> list[Hit]:
        """Find the k images that fit a text best.

        Args:
            shortlist: candidates by ITC that ITM re-ranks; 0 for none.
            where: conditions on columns, such as `width>1000` (`entries.conditions`).
            exact: read every entry, instead of searching the index of a large gallery.

        Raises:
            UsageError: an empty text or one that is not UTF-8, an invalid condition, or a `k` below 1.
        """
        return self.search(text, None, k, shortlist, where, exact)

    def image_to_image(
        self, image: ImageLike, k: int = 10, where: Sequence[str] = (), exact: bool = False
    ) -> list[Hit]:
        """Find the k images most like an image, by the mean over its rows of the best cosine with theirs.

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
        """Search by text, by image, or by both.

        With both, the candidates of either are ordered by the mean of both scores, each standardized to mean 0 and
        deviation 1 over the candidates. See `text_to_image`.

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
        hits = _balance(hits) if by_text and by_image else _rank(hits)
        if texts is not None and shortlist > 0 and self.model is not None and self.model.can_match:
            hits = self._rerank(hits, entries, texts, shortlist)
        return self._locate((_balance(hits) if by_text and by_image else hits)[:k], entries)

    def _begin(self, k: int, shortlist: int) -> None:
        """Check the numbers of hits and candidates, and forget the last search.

        Raises:
            UsageError: not a whole number, or too small.
        """
        for name, value, least in (("k", k, 1), ("shortlist", shortlist, 0)):
            if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
                raise UsageError(f"{name} is {value!r}; give a whole number of at least {least}")
        self.unread, self._found = [], {}

    def _find(self, entry: Entry) -> tuple[str, str]:
        if entry.id not in self._found:
            self._found[entry.id] = find(entry, self._record)
        return self._found[entry.id]

    def _locate(self, hits: list[Hit], entries: dict[str, Entry]) -> list[Hit]:
        """Hits with the paths where their images are today."""
        found = [(hit, *self._find(entries[hit.id])) for hit in hits]
        return [replace(hit, path=path, fault=fault) for hit, path, fault in found]

    @torch.no_grad()
    def image_to_text(
        self, image: ImageLike, k: int = 10, shortlist: int = SHORTLIST, where: Sequence[str] = ()
    ) -> list[Hit]:
        """Find the k captions of the gallery that fit an image best; `Hit.caption` is the caption.

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
            hits = _rank([_with_match(hit, pair) for hit, pair in zip(first, logits, strict=True)]) + hits[shortlist:]
        return self._locate(hits[:k], entries)

    def open_image(self, hit: Hit | str) -> Tensor:
        """Read the picture of a hit (or of an id), uint8[3, h, w].

        Raises:
            BadSample: kinds `missing` (not where it was indexed), `changed` (another picture is there now) and
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
                    return _picture(read_file(Path(find_spelling(place.name))), entry.id, place.name)
                return _picture(self._record(place), entry.id, place.name)
            except BadSample as bad:
                faults.append(bad)
        raise faults[0]

    def _record(self, place: Place) -> Any:
        """Read the picture of a record from its source.

        Raises:
            BadSample: kind `missing`: the source is gone, has fewer records, or holds another record there.
        """
        try:
            if place.source not in self._sources:
                self._sources[place.source] = self.gallery.source(place.source)
            sample = self._sources[place.source][place.number]
        except Untrusted:  # the image is not missing
            raise
        except (UsageError, IndexError) as error:
            raise BadSample("missing", f"{place.name}: {error}") from error
        if sample.key != place.name:
            raise BadSample("missing", place.name)
        return read_file(sample.image) if isinstance(sample.image, Path) else sample.image

    def _read_text(self, text: str) -> str:
        if not isinstance(text, str) or not is_utf8(text):
            raise UsageError(f"the text to search for is {text!a}, which is not UTF-8 text; write what to look for")
        cleaned = clean_caption(text)
        if not any(map(str.isalnum, cleaned)):
            raise UsageError(
                f"the text to search for is {text!r}, which has no letter or digit; write what to look for"
            )
        return cleaned

    def words_read(self, text: str) -> int | None:
        """Number of words of a text that the model reads; None if it reads all of them."""
        words, cleaned = clean_caption(text).split(), len(text.split()) > MAX_WORDS
        before = len(words)
        while len(words) > 1 and self.embedder.count(" ".join(words)) > self.embedder.limit:
            words.pop()
        return len(words) if cleaned or len(words) < before else None

    def is_unknown(self, text: str) -> bool:
        """Check whether the model knows no letter of a text, so that its hits mean nothing."""
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
        """Re-rank the first hits by ITM; those whose image cannot be read or has changed follow them."""
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
                matched += [_with_match(hit, pair) for (hit, _), pair in zip(ready, logits, strict=True)]
        return _rank(matched) + left + hits[shortlist:]

    def _tiles(self, entry: Entry) -> Tiles:
        """Stored tokens of an entry, or its picture.

        Raises:
            BadSample: the picture is needed but cannot be read, or has changed.
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
        """ITM's two logits for each pair: no match, match."""
        assert self.model is not None
        tokens = read_texts(self.model, texts)
        logits = self.model.match_logits(self.model.encode_images(tiles), tokens, torch.tensor(pairs))
        return logits.float().tolist()


def _picture(data: Any, id_: str, name: str) -> Tensor:
    """Decode a picture that still is the content that was indexed.

    Raises:
        BadSample: kind `changed`: it is another content.
    """
    if digest(plain_bytes(data)) != id_:
        raise BadSample("changed", name)
    return read_image(data)


def _hit(entry: Entry, itc: float, similarity: float | None = None) -> Hit:
    about = {"captions": tuple(entry.captions), "width": entry.width, "height": entry.height}
    return Hit(entry.id, entry.path, itc, itc, similarity=similarity, **about)  # type: ignore[arg-type]


def _with_match(hit: Hit, logits: Sequence[float]) -> Hit:
    no, yes = logits
    probability = float(torch.tensor([no, yes]).softmax(dim=0)[1])
    return replace(hit, score=yes + hit.itc, itm=yes, probability=probability)


def _rank(hits: list[Hit]) -> list[Hit]:
    return sorted(hits, key=lambda hit: -hit.score)


def _balance(hits: list[Hit]) -> list[Hit]:
    """Order hits of text and image by the mean of both standardized scores, those not re-ranked last."""
    ordered: list[Hit] = []
    for group in ([hit for hit in hits if hit.itm is not None], [hit for hit in hits if hit.itm is None]):
        if not group:
            continue
        scores = torch.tensor([[hit.itc + (hit.itm or 0.0), hit.similarity or 0.0] for hit in group])
        units = (scores - scores.mean(dim=0)) / scores.std(dim=0, correction=0).clamp(min=1e-6)
        both = units.mean(dim=1).tolist()
        ordered += _rank([replace(hit, score=score) for hit, score in zip(group, both, strict=True)])
    return ordered
