"""Stage one: the Q-Former learns with ITC, ITM and ITG what in an image belongs to a text (BLIP-2, section 3.2).

The same model scores retrieval afterwards: cosine (ITC) for a shortlist, matching logits (ITM) to re-rank it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qformer import distributed, losses
from qformer.config import LossConfig
from qformer.model.captions import Captioning
from qformer.model.exchange import GlobalBatch, fetch_images, gather_batch, mean_count
from qformer.model.frontend import FrontEnd, join_tiles
from qformer.model.qformer import KeyValues, QFormer
from qformer.types import Batch, Tiles, Tokens, UsageError, VisualTokens

if TYPE_CHECKING:
    from qformer.vision.base import VisionEncoder


@dataclass
class Features:
    """Features of one mode.

    Attributes:
        embeds: float[B, V, H] of queries (image, multimodal) or float[B, T, H] of text.
        projected: the same rows in the ITC space, float[B, ..., P], unit length; None for multimodal.
        mask: bool, rows that exist.
    """

    embeds: Tensor
    projected: Tensor | None
    mask: Tensor


class ImageTextModel(Captioning, nn.Module):
    """Frozen encoder, Q-Former and the heads of stage one.

    An encoder alone sees whole images, as BLIP-2 does; a `FrontEnd` may cut them. `tokenizer` is a BERT tokeniser of
    transformers whose bos token is `[DEC]`. Images of several tiles: ITC reads each tile by itself (Q rows per tile),
    ITM and ITG let the queries read all tiles at once.
    """

    def __init__(
        self,
        encoder: VisionEncoder | FrontEnd,
        qformer: QFormer,
        tokenizer: Any,
        config: LossConfig | None = None,
        max_tokens: int = 32,
        pooling: Literal["class", "mean"] = "class",
    ) -> None:
        super().__init__()
        self.config = config or LossConfig()
        self.max_tokens = max_tokens
        self.pooling = pooling
        self.reader_learns = True  # False: no gradient is computed for the text path
        self.tokenizer = tokenizer
        hidden = qformer.config.hidden_size
        self.frontend = FrontEnd.for_qformer(encoder)
        self.qformer = qformer
        self.vision_proj = nn.Linear(hidden, self.config.embed_width)
        self.text_proj = nn.Linear(hidden, self.config.embed_width)
        self.itm_head = nn.Linear(hidden, 2)
        self.temp = nn.Parameter(torch.tensor(self.config.temperature))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """One step of stage one: float scalars `itc`, `itm`, `itg` and their weighted sum `loss`.

        The queries of ITC come from the pass of ITG: they do not see its text, and so share its dropout.
        """
        tokens = self.tokenize(batch.text)
        targets = target_places(tokens)  # on the CPU, where no device waits for the count
        count = mean_count(len(targets), self.device) if batch.targets is None else batch.targets.to(self.device)
        tokens, targets = tokens.to(self.device), targets.to(self.device)
        encoded = self.frontend.encode_tiles(batch.tiles)
        image, image_embeds, valid, text_embeds, text_rows = self.read(encoded, tokens)

        everyone = gather_batch(
            image_embeds, text_embeds, valid, tokens, batch.image_id, self.config.gather_grad == "full"
        )
        embeds = image_embeds, text_embeds, valid
        found = {"itc": self.contrastive_loss(*embeds, everyone)}
        if self.config.itm:
            image_for_text, text_for_image = batch.negatives or self.mine_negatives(*embeds, everyone)
            negatives = image_for_text.to(self.device), everyone.text_place(text_for_image.to(self.device))
            if distributed.world() > 1:
                others, places = fetch_images(encoded, negatives[0], self.qformer.place_tokens is not None)
                image, negatives = image.join(self.keys_values(others)[1]), (places, negatives[1])
            found["itm"] = self.matching_loss(image, everyone.tokens, negatives, ~everyone.same.all(dim=1))
        if text_rows is not None:
            found["itg"] = self.captioning_loss(text_rows, tokens, targets, count)
        return {"loss": self.weigh(found), **found}

    def weigh(self, found: dict[str, Tensor]) -> Tensor:
        """Sum the losses with their weights."""
        weights = {"itc": 1.0, "itm": self.config.itm, "itg": self.config.itg}
        return torch.stack([weights[name] * loss for name, loss in found.items()]).sum()

    @property
    def can_match(self) -> bool:
        """True unless the head of ITM was left untrained: then nothing can be re-ranked."""
        return self.config.itm > 0

    def count_targets(self, batch: Batch) -> int:
        """Number of tokens that ITG predicts."""
        return len(target_places(self.tokenize(batch.text)))

    def read(
        self, encoded: VisualTokens, tokens: Tokens
    ) -> tuple[KeyValues, Tensor, Tensor | None, Tensor, Tensor | None]:
        """The passes of ITC and ITG over B pairs.

        Returns:
            Keys and values of the images; the ITC embeddings of images, float[B, V, P] with bool[B, V] or None, and
            of texts, float[B, P]; the text rows of ITG, float[B, T, H], None where it has no weight.
        """
        tile_image, image = self.keys_values(encoded)
        text_rows = None
        if self.config.itg:
            start = self._start_decoding(tokens.ids)
            queries, text_rows = self.qformer.joint(image, None, start, tokens.mask, "causal")
        if tile_image is not image or text_rows is None:
            queries = self.qformer.encode_image(tile_image)
        image_embeds, valid = join_tiles(self._project_image(queries), None, encoded.counts)
        return image, image_embeds, valid, self.embed_texts(tokens), text_rows

    @property
    def device(self) -> torch.device:
        return self.temp.device

    def tokenize(self, text: list[str] | Tokens, max_tokens: int | None = None) -> Tokens:
        """`[CLS] words [SEP]`, cut at `max_tokens`, padded on the right to the longest row; on the CPU."""
        if isinstance(text, Tokens):
            return text
        limit = min(max_tokens or self.max_tokens, self.qformer.config.max_positions)
        made = self.tokenizer(text, padding="longest", truncation=True, max_length=limit, return_tensors="pt")
        return Tokens(made["input_ids"], made["attention_mask"].bool())

    def embed_images(self, images: Tiles | VisualTokens) -> tuple[Tensor, Tensor]:
        """The ITC rows of B images: float[B, V, P] of unit length and bool[B, V]; V = Q for one tile."""
        encoded = images if isinstance(images, VisualTokens) else self.frontend.encode_tiles(images)
        queries = self.qformer.encode_image(self.frontend.adapt(encoded))
        embeds, valid = join_tiles(self._project_image(queries), None, encoded.counts)
        return embeds, valid if valid is not None else embeds.new_ones(embeds.shape[:2], dtype=torch.bool)

    def embed_texts(self, text: list[str] | Tokens) -> Tensor:
        """The ITC embedding of B texts, see `read_texts`: float[B, P] of unit length."""
        tokens = self.tokenize(text).to(self.device)
        with torch.set_grad_enabled(self.reader_learns and torch.is_grad_enabled()):
            rows = self.read_texts(tokens)
        return F.normalize(self.text_proj(rows), dim=-1)

    def read_texts(self, tokens: Tokens) -> Tensor:
        """Read what ITC projects of each text, float[B, H]: its `[CLS]` row or the mean of its rows."""
        if self.pooling == "class":
            return self.qformer.encode_cls(tokens.ids, tokens.mask)
        rows, mask = self.qformer.encode_text(tokens.ids, tokens.mask), tokens.mask[..., None]  # (B, T, H), (B, T, 1)
        return (rows * mask).sum(dim=1) / mask.sum(dim=1)

    def encode_images(self, images: Tiles | VisualTokens) -> KeyValues:
        """Everything that matching needs of B images, once: pass it to `match_scores` for any number of texts."""
        return self.keys_values(images if isinstance(images, VisualTokens) else self.frontend.encode_tiles(images))[1]

    def match_scores(
        self,
        images: Tiles | KeyValues,
        text: list[str] | Tokens,
        pairs: Tensor | None = None,
        chunk: int | None = None,
    ) -> Tensor:
        """Raw ITM logits of 'they match', the mean over the queries: float[n]. See `match_logits`."""
        return self.match_logits(images, text, pairs, chunk)[:, 1]

    def match_logits(
        self,
        images: Tiles | KeyValues,
        text: list[str] | Tokens,
        pairs: Tensor | None = None,
        chunk: int | None = None,
    ) -> Tensor:
        """ITM logits of 'they do not' and 'they match': float[n, 2]; their softmax are the probabilities.

        Args:
            images: B images, or what `encode_images` made of them.
            text: texts, `[CLS]` first.
            pairs: long[n, 2] of (image, text), many to many; None pairs image i with text i.
            chunk: pairs that are scored at once, which bounds the memory; by default 256, fewer of long images, and on
                a CPU 16 for each thread, which its caches hold.

        Raises:
            UsageError: no pairs are given for another number of images than of texts.
        """
        image = images if isinstance(images, KeyValues) else self.encode_images(images)
        tokens = self.tokenize(text)
        if pairs is None:
            if len(image) != len(tokens):
                raise UsageError(
                    f"got {len(image)} images and {len(tokens)} texts; say with `pairs` which belong together"
                )
            pairs = torch.arange(len(tokens)).repeat(2, 1).T
        if not len(pairs):
            return torch.empty(0, 2, device=self.device)
        if chunk is None:
            chunk = min(256, 1 + 65536 // image.layers[0][0].shape[2])
            if self.device.type == "cpu":
                chunk = min(chunk, 16 * torch.get_num_threads())
        pairs, lengths = pairs.cpu(), tokens.mask.sum(dim=1).cpu()
        order = (lengths[pairs[:, 1]] * len(tokens) + pairs[:, 1]).argsort()  # equal lengths, then equal texts together
        scores = [self._match(image, tokens, part) for part in pairs[order].split(chunk)]
        return torch.cat(scores)[order.argsort().to(self.device)]

    def _match(self, image: KeyValues, tokens: Tokens, pairs: Tensor) -> Tensor:
        """float[n, 2] of a few pairs long[n, 2], which are on the CPU; half-precision scores would often be equal."""
        texts, places = pairs[:, 1].unique(return_inverse=True)
        some = trim(tokens.select(texts)).to(self.device)
        pairs = torch.stack([pairs[:, 0], places], dim=1).to(self.device)
        rows = self.qformer.match_pairs(image, some.ids, some.mask, pairs)
        with torch.autocast(self.device.type, enabled=False):
            return self._match_logits(rows.to(self.itm_head.weight.dtype))

    def features(
        self,
        tiles: Tiles | None = None,
        text: list[str] | Tokens | None = None,
        mode: Literal["image", "text", "multimodal"] = "image",
    ) -> Features:
        """Feature extraction as in the original: image, text, or the queries after reading both.

        Raises:
            ValueError: what the mode needs was not given.
        """
        for name, given, needless in (("tiles", tiles, "text"), ("text", text, "image")):
            if given is None and mode != needless:
                raise ValueError(f"mode '{mode}' needs {name}; pass it too")
        if mode == "image":
            assert tiles is not None
            visual = self.frontend(tiles)
            queries, mask = join_tiles(self.qformer.encode_image(visual), None, tiles.counts)
            mask = queries.new_ones(queries.shape[:2], dtype=torch.bool) if mask is None else mask
            return Features(queries, self._project_image(queries), mask)
        assert text is not None
        tokens = self.tokenize(text).to(self.device)
        if mode == "text":
            rows = self.qformer.encode_text(tokens.ids, tokens.mask)
            return Features(rows, F.normalize(self.text_proj(rows), dim=-1), tokens.mask)
        assert tiles is not None
        queries = self.qformer.match(self.encode_images(tiles), None, tokens.ids, tokens.mask)
        return Features(queries, None, queries.new_ones(queries.shape[:2], dtype=torch.bool))

    def keys_values(self, encoded: VisualTokens) -> tuple[KeyValues, KeyValues]:
        """Keys and values per tile and per image; the same object where every image is one tile."""
        return self.qformer.join_keys_values(self.frontend.adapt(encoded))

    def _project_image(self, queries: Tensor) -> Tensor:
        return F.normalize(self.vision_proj(queries), dim=-1)

    def _start_decoding(self, ids: Tensor) -> Tensor:
        """The first id, `[CLS]`, becomes `[DEC]`: it tells the Q-Former to generate."""
        start = ids.new_full((len(ids), 1), self.tokenizer.bos_token_id)
        return torch.cat([start, ids[:, 1:]], dim=1)

    def contrastive_loss(self, image: Tensor, text: Tensor, valid: Tensor | None, everyone: GlobalBatch) -> Tensor:
        """ITC of B own rows with the columns of everyone."""
        columns = everyone.image, everyone.text, everyone.same
        return losses.contrastive(image, text, *columns, self.temp, self.config.smoothing, valid, everyone.valid)

    @torch.no_grad()
    def mine_negatives(
        self, image: Tensor, text: Tensor, valid: Tensor | None, everyone: GlobalBatch, rows: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """An image for each text, drawn first, and a text for each image: numbers in the global batch.

        So many `rows` are compared and drawn for at a time, all by default.
        """
        starts = range(0, len(text), rows or len(text))
        parts = [slice(start, start + (rows or len(text))) for start in starts]
        image_for_text, text_for_image = [], []
        for part in parts:
            scores = losses.similarity(everyone.image, text[part], everyone.valid)  # (b texts, N images)
            image_for_text.append(losses.hard_negatives(scores / self.temp, everyone.same[part])[0])
        for part in parts:
            own_valid = None if valid is None else valid[part]
            scores = losses.similarity(image[part], everyone.text, own_valid).T  # (b images, N texts)
            text_for_image.append(losses.hard_negatives(scores / self.temp, everyone.same[part])[0])
        return torch.cat(image_for_text), torch.cat(text_for_image)

    def matching_loss(
        self, image: KeyValues, tokens: Tokens, negatives: tuple[Tensor, Tensor], legal: Tensor
    ) -> Tensor:
        """3B rows: own pairs, own text with a negative image, own image with a negative text.

        `image` and `tokens` hold the B own images and texts first, behind them those of others; `negatives` are
        places in them, and `legal` is bool[B].
        """
        count = len(legal)
        own = torch.arange(count, device=self.device)
        image_for_text, text_for_image = negatives
        texts = torch.cat([own, own, text_for_image])
        images = torch.cat([own, image_for_text, own])
        rows = self.qformer.match(image.select(images), None, tokens.ids[texts], tokens.mask[texts])
        missing = torch.where(legal, 0, losses.IGNORE)  # a row without a legal negative is left out
        labels = torch.cat([torch.ones_like(own), missing, missing])
        return losses.matching(self._match_logits(rows), labels)

    def _match_logits(self, queries: Tensor) -> Tensor:
        """float[n, Q, H] -> float[n, 2]: the head on every query, then the mean of the logits."""
        return self.itm_head(queries).mean(dim=1)

    def captioning_loss(self, text_rows: Tensor, tokens: Tokens, targets: Tensor, count: Tensor | None) -> Tensor:
        """Each token predicts the next; logits only where there is a target. `count`: see `losses.captioning`."""
        rows = text_rows[:, :-1].flatten(0, 1)[targets]  # (targets, H)
        labels = tokens.ids[:, 1:].flatten()[targets]
        return losses.captioning(self.qformer.logits(rows), labels, self.config.smoothing, count)


def target_places(tokens: Tokens) -> Tensor:
    """Which of the flattened positions long[B * (T - 1)] predict a token that exists."""
    return tokens.mask[:, 1:].flatten().nonzero().squeeze(1)


def trim(tokens: Tokens) -> Tokens:
    """Cut padding on the right that none of these texts needs."""
    longest = int(tokens.mask.sum(dim=1).max())
    return Tokens(tokens.ids[:, :longest], tokens.mask[:, :longest])
