"""Image-text retrieval: ITC selects candidates, ITM re-ranks them (BLIP-2, section 4.4).

Images are added group by group, as they are read. Their ITC rows stay in memory. The image tokens for matching are kept
in a file; without one, images are encoded a second time. Several processes divide the images and texts, and get the
same scores as one process.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate, zip_longest
from typing import IO, TYPE_CHECKING

import torch
from torch import Tensor

from qformer import distributed, losses
from qformer.alignment import pooled
from qformer.data.held_out import list_images
from qformer.data.texts import usable_captions
from qformer.evaluation.benchmarks import Benchmark, ImageItems, Item, Measured, Record, new_item
from qformer.files.records import ORIGINAL
from qformer.model.image_text import trim
from qformer.progress import track
from qformer.retrieval.embedders import read_texts
from qformer.types import Tokens, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from qformer.data.base import Source
    from qformer.evaluation.benchmarks import AskOptions
    from qformer.model.image_text import ImageTextModel
    from qformer.model.qformer import KeyValues
    from qformer.types import Sample, Tiles, VisualTokens

NO_CANDIDATE = -100.0
CUTOFFS = (1, 5, 10)
ROWS = 256  # rows of a table, or texts, that are processed at once


@dataclass
class Scores:
    """Scores of I images and T texts, on the CPU.

    Attributes:
        itc: float[I, T], cosines.
        itm: float[I, T], the logit of a match for the candidates of either direction, else 0.
        match: half[I, T], the probability of a match for the same pairs, else 0.
        of_image: bool[I, T], the candidates of each image. of_text: those of each text.
    """

    itc: Tensor
    itm: Tensor
    match: Tensor
    of_image: Tensor
    of_text: Tensor

    @property
    def image_to_text(self) -> Tensor:
        """Scores float[I, T]: logit + cosine for the candidates of each image; -100 elsewhere, as in the original."""
        return (self.itm + self.itc).masked_fill_(~self.of_image, NO_CANDIDATE)

    @property
    def text_to_image(self) -> Tensor:
        """Scores float[I, T], like `image_to_text`, for the candidates of each text."""
        return (self.itm + self.itc).masked_fill_(~self.of_text, NO_CANDIDATE)


@dataclass
class _Kept:
    """Image tokens of a group in a file: bytes from `start`, for tokens of this shape."""

    start: int
    shape: VisualTokens


@dataclass
class _Group:
    """Images that were encoded together: their ITC rows on the CPU, and the source of their tokens for matching."""

    rows: Tensor
    valid: Tensor
    source: Tiles | _Kept
    pooled: Tensor | None


class Images:
    """The images of a benchmark. With W processes, process r adds groups r, r + W, r + 2 W, ...

    With a `file`, open for writing and reading, each image is encoded only once, and its tokens are kept there in the
    encoder's own dtype. If it `pools`, the mean tokens of each image are kept too, for a linear map of them.
    """

    def __init__(self, model: ImageTextModel, file: IO[bytes] | None = None, pools: bool = False) -> None:
        self.model = model
        self.file = file
        self.pools = pools
        self._groups: list[_Group | None] = []

    @torch.no_grad()
    def add(self, tiles: Tiles | None) -> None:
        """Add one group; None if none of its images can be used.

        Raises:
            OSError: the file cannot be written.
        """
        if tiles is None:
            self._groups.append(None)
            return
        encoded = self.model.frontend.encode_tiles(tiles)
        rows, valid = self.model.embed_images(encoded)
        source = tiles if self.file is None else self._keep(encoded, self.file)
        mean = pooled(encoded).cpu() if self.pools else None
        self._groups.append(_Group(rows.float().cpu(), valid.cpu(), source, mean))

    def pooled(self) -> Tensor:
        """Get what `qformer.alignment.pooled` made of the images of all processes, float[I, D or 2 * D]."""
        own = [None if group is None else group.pooled for group in self._groups]
        turns = zip_longest(*distributed.gather_objects(own))
        return torch.cat([rows for turn in turns for rows in turn if rows is not None])

    @torch.no_grad()
    def score(self, texts: Sequence[str], k: int = 128, show: bool = False) -> Scores:
        """Compute the ITC cosines of all pairs, and the ITM logits of the k best candidates of each query.

        Args:
            k: number of candidates, in either direction.
            show: draw a progress bar.
        """
        k = k if self.model.can_match else 0
        tokens = read_texts(self.model, texts)
        text_embeds = self._embed_texts(tokens)
        starts, count = self._starts()
        groups = [(start, group) for start, group in zip(starts, self._groups, strict=True) if group is not None]
        itc = torch.zeros(count, len(texts))
        for start, group in groups:
            rows, valid = group.rows.to(text_embeds.device), group.valid.to(text_embeds.device)
            with torch.autocast(rows.device.type, enabled=False):  # half precision would produce ties
                columns = [losses.similarity(rows, part, valid).T.cpu() for part in text_embeds.split(ROWS)]
            itc[start : start + len(rows)] = torch.cat(columns, dim=1)
        _sum(itc)
        of_image, of_text = _top(itc, k), _top(itc.T, k).T
        itm, match = torch.zeros_like(itc), torch.zeros_like(itc, dtype=torch.float16)
        for start, group in track(groups, "re-ranking", disable=not show or not k):
            part = slice(start, start + len(group.rows))
            pairs = (of_image[part] | of_text[part]).nonzero()
            if len(pairs):
                logits = self.model.match_logits(self._encode(group.source), tokens, pairs).float().cpu()
                itm[part][pairs[:, 0], pairs[:, 1]] = logits[:, 1]
                match[part][pairs[:, 0], pairs[:, 1]] = logits.softmax(dim=1)[:, 1].half()
        _sum(itm)
        _sum(match)
        return Scores(itc, itm, match, of_image, of_text)

    def _keep(self, encoded: VisualTokens, file: IO[bytes]) -> _Kept:
        packed = encoded.packed.cpu().contiguous()
        start = file.seek(0, os.SEEK_END)
        file.write(packed.flatten().view(torch.uint8).numpy().data)
        file.flush()  # a full disk is told here
        return _Kept(start, encoded.repack(packed.to("meta")))

    def _encode(self, source: Tiles | _Kept) -> KeyValues:
        if not isinstance(source, _Kept):
            return self.model.encode_images(source)
        assert self.file is not None
        self.file.seek(source.start)
        shape = source.shape.packed
        packed = torch.frombuffer(bytearray(self.file.read(shape.nbytes)), dtype=shape.dtype).view(shape.shape)
        return self.model.encode_images(source.shape.repack(packed.to(self.model.device)))

    def _embed_texts(self, tokens: Tokens) -> Tensor:
        """Embed the texts, float[T, P] with unit rows; each process embeds its share, sorted by length."""
        order = tokens.mask.sum(dim=1).argsort(stable=True)
        embeds = torch.zeros(len(tokens), self.model.config.embed_width)
        for texts in order.split(ROWS)[distributed.rank() % distributed.world() :: distributed.world()]:
            embeds[texts] = self.model.embed_texts(trim(tokens.select(texts))).float().cpu()
        _sum(embeds)
        return embeds.to(self.model.device)

    def _starts(self) -> tuple[list[int], int]:
        """Compute the index of the first image of each own group, and the number of images in all processes."""
        counts = distributed.gather_objects([0 if group is None else len(group.rows) for group in self._groups])
        in_order = [count for turn in zip_longest(*counts, fillvalue=0) for count in turn]
        starts = list(accumulate(in_order, initial=0))
        own = starts[distributed.rank() % distributed.world() :: distributed.world()]
        return own[: len(self._groups)], starts[-1]


class Retrieval(Benchmark):
    """Texts that look for their image, and images that look for their texts.

    All images are compared with all texts, so what was made of them waits in `images`, and records are empty.

    Attributes:
        k: candidates by ITC that ITM re-ranks. scores: what `compare` found. pools: see `Images`.
    """

    stage = "stage1"
    merges = True
    writes = False
    truth = "captions"

    def __init__(self) -> None:
        self.k = 128
        self.pools = False
        self.images: Images | None = None
        self.scores: Scores | None = None

    def item(self, sample: Sample, place: int) -> Item:
        """An image with its captions. Raises BadSample: it has none."""
        item = new_item(sample, place)
        item.accepted = usable_captions(sample)
        return item

    def items(self, source: Source, limit: int | None = None) -> tuple[list[ImageItems], list[Record]]:
        """As of any benchmark, but what stands behind `limit` images is not read."""
        listed, skipped = list_images(source, limit)
        return [ImageItems(one, [Item(str(n), n, accepted=one.captions)]) for n, one in enumerate(listed)], skipped

    def begin(self, model: ImageTextModel, file: IO[bytes] | None = None) -> None:
        """Forget all images; see `Images`."""
        self.images, self.scores = Images(model, file, self.pools), None

    def predict(
        self, model: ImageTextModel, tiles: Tiles | None, items: Sequence[Sequence[Item]], ask: AskOptions | None = None
    ) -> list[Record]:
        """Add a group of images, None if none of it can be used.

        Raises:
            OSError: the file cannot be written.
        """
        if self.images is None:
            self.begin(model)
        assert self.images is not None
        self.images.add(tiles)
        return [{} for group in items for _ in group]

    def compare(self, items: Sequence[Item], show: bool = False) -> Scores:
        """Scores of the images that were added with the captions of all, which several processes make together."""
        assert self.images is not None, "nothing was added"
        self.scores = self.images.score([text for item in items for text in item.accepted], self.k, show)
        return self.scores

    def score(
        self, items: Sequence[Item], records: Sequence[Record], by: str | None = None, lemmas: bool = False
    ) -> Measured:
        """The one group `ranked by`: `full_table`, where captions are equal also `_original`; see `rank_table`."""
        scores = self.scores or self.compare(items)
        captions = [item.accepted for item in items]
        table = full_table(rank_table(scores, captions))
        if count_equal(captions):
            strict = full_table(rank_table(scores, captions, equal=False))
            table |= {f"{kind}{ORIGINAL}": values for kind, values in strict.items()}
        kinds = {kind: values for kind, values in table.items() if self.k or kind.startswith("itc")}
        return Measured({}, [], {"ranked by": kinds})

    def submit(self, items: Sequence[Item], records: Mapping[str, Record]) -> list[Record] | Record:
        """Raises UsageError: no server takes rankings."""
        raise UsageError("no server takes the ranks of retrieval; leave --submission out")


def score(
    model: ImageTextModel, groups: Sequence[Tiles], texts: Sequence[str], k: int = 128, show: bool = False
) -> Scores:
    """Score images that are in memory, in groups that are encoded at once; see `Images.score`."""
    images = Images(model)
    for tiles in track(groups, "embedding images", disable=not show):
        images.add(tiles)
    return images.score(texts, k, show)


def _sum(table: Tensor) -> None:
    """Sum a table over processes, in place; each has filled in its own rows and left zeros in the others."""
    if distributed.world() > 1:
        for part in table.split(ROWS):
            part.copy_(distributed.total(part.float()))


def _top(scores: Tensor, k: int) -> Tensor:
    """Mark the k largest scores of each row, as bool of the same shape."""
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    return chosen.scatter_(1, scores.topk(min(k, scores.shape[1]), dim=1).indices, True) if k else chosen


def ranks(scores: Tensor, truth: Tensor) -> Tensor:
    """Compute the rank of the best right column of each row, from 1: long[queries].

    Ties and NaN count against the model, so a right column that is not a candidate comes after all wrong ones.

    Args:
        scores: float[queries, candidates].
        truth: bool of the same shape, with at least one True in every row.
    """
    places = []
    for part, right in zip(scores.split(ROWS), truth.split(ROWS), strict=True):
        part, right = part.contiguous(), right.contiguous()  # transposed tables are slow to read
        best_right = part.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        places.append((~(part < best_right) & ~right).sum(dim=1) + 1)
    return torch.cat(places)


def recalls(scores: Tensor, truth: Tensor) -> dict[int, float]:
    """Compute R@1, R@5 and R@10: the share of rows with a right column among the best 1, 5 and 10.

    The arguments are those of `ranks`. If several columns are right, the best one counts.
    """
    places = ranks(scores, truth)
    return {cutoff: (places <= cutoff).double().mean().item() for cutoff in CUTOFFS}


def measure(
    model: ImageTextModel, groups: Sequence[Tiles], captions: Sequence[Sequence[str]], k: int, show: bool = False
) -> dict[str, dict[str, float]]:
    """Measure the recalls in both directions, `itc` and (with k > 0) `reranked`: `i2t_r1` ... `t2i_r10`, fractions.

    If captions of different images are equal, also `itc_original` and `reranked_original`: see `rank_table`.

    Args:
        captions: the captions of each image, any number.
    """
    scores = score(model, groups, [text for own in captions for text in own], k, show)
    table = recall_table(scores, captions)
    if count_equal(captions):
        strict = recall_table(scores, captions, equal=False)
        table |= {f"{kind}{ORIGINAL}": values for kind, values in strict.items()}
    return {kind: values for kind, values in table.items() if k or kind.startswith("itc")}


def recall_table(scores: Scores, captions: Sequence[Sequence[str]], equal: bool = True) -> dict[str, dict[str, float]]:
    """Compute `itc` and `reranked` of `measure` from scores; for `equal` see `true_pairs`."""
    names = [f"{way}_r{cutoff}" for way in ("i2t", "t2i") for cutoff in CUTOFFS]
    table = full_table(rank_table(scores, captions, equal))
    return {kind: {name: table[kind][name] for name in names} for kind in ("itc", "reranked")}


def true_pairs(captions: Sequence[Sequence[str]], equal: bool = True) -> Tensor:
    """Mark the texts that are right for each image, bool[I, T]: its captions and, if `equal`, identical texts."""
    owner = torch.tensor([image for image, own in enumerate(captions) for _ in own])
    if not equal:
        return owner[None, :] == torch.arange(len(captions))[:, None]
    numbers: dict[str, int] = {}
    words = torch.tensor([numbers.setdefault(text, len(numbers)) for own in captions for text in own])
    is_caption = torch.zeros(len(captions), len(numbers), dtype=torch.bool)
    is_caption[owner, words] = True
    return is_caption[:, words]


def count_equal(captions: Sequence[Sequence[str]]) -> int:
    """Count the captions that are identical to a caption of another image."""
    images = Counter(text for own in captions for text in set(own))
    return sum(images[text] > 1 for own in captions for text in own)


def rank_table(scores: Scores, captions: Sequence[Sequence[str]], equal: bool = True) -> dict[str, dict[str, Tensor]]:
    """Compute the `ranks` of the right texts for each image, `i2t` long[I], and vice versa, `t2i` long[T].

    There is a pair of them for each kind of score: `itc`, `itm` (logits only) and `reranked` (logit + cosine, as in the
    original).

    Args:
        equal: count a text that is identical to a caption of the image as right. In the original each text belongs to
            one image, so identical ones tie and are never found.
    """
    truth = true_pairs(captions, equal)
    itm = scores.itm
    return {
        "itc": {"i2t": ranks(scores.itc, truth), "t2i": ranks(scores.itc.T, truth.T)},
        "itm": {
            "i2t": ranks(itm.masked_fill(~scores.of_image, NO_CANDIDATE), truth),
            "t2i": ranks(itm.masked_fill(~scores.of_text, NO_CANDIDATE).T, truth.T),
        },
        "reranked": {"i2t": ranks(scores.image_to_text, truth), "t2i": ranks(scores.text_to_image.T, truth.T)},
    }


def full_table(places: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, float]]:
    """Compute all measures of a `rank_table`, for each kind of score.

    They are R@n as fractions (`i2t_r1` ... `t2i_r10`); their means `i2t_mean_recall`, `t2i_mean_recall` and, over all
    six, `mean_recall`; and the mean and median ranks `i2t_mean_rank`, `i2t_median_rank` and the same for t2i.
    """
    table = {}
    for kind, ways in places.items():
        values: dict[str, float] = {}
        for way, found in ways.items():
            values |= {f"{way}_r{n}": (found <= n).double().mean().item() for n in CUTOFFS}
        for way in ways:
            values[f"{way}_mean_recall"] = sum(values[f"{way}_r{n}"] for n in CUTOFFS) / len(CUTOFFS)
        values["mean_recall"] = (values["i2t_mean_recall"] + values["t2i_mean_recall"]) / 2
        for way, found in ways.items():
            values[f"{way}_mean_rank"] = found.double().mean().item()
            values[f"{way}_median_rank"] = found.double().quantile(0.5).item()
        table[kind] = values
    return table
