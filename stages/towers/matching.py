"""An image encoder trained from scratch by matching pictures with texts, together with a BERT that is discarded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from qformer.files import pretrained
from qformer.stages.towers.build import build_vit
from qformer.types import UsageError

if TYPE_CHECKING:
    from qformer.config import BackboneConfig

MATCH_WIDTH = 128  # of the embeddings that an image encoder and its text tower share


class ContrastiveViT(nn.Module):
    """A ViT trained from scratch to match images and captions together with a text tower.

    Scores use late interaction, as in FILIP (Yao et al. 2021, section 3.2): every word is compared with its best patch,
    so that patches learn what is at their own place. The text tower is a BERT; only the ViT is kept afterward.

    Attributes:
        scale: logarithm of the inverse temperature, which starts at 0.07.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.max_tokens = config.max_tokens
        self.text, self.tokenizer = _read_text_tower(str(config.text))
        most = getattr(self.text.config, "max_position_embeddings", self.max_tokens)
        if self.max_tokens > most:
            raise UsageError(
                f"backbone.max_tokens {self.max_tokens} is more than the {most} positions of '{config.text}'; lower it"
            )
        if config.freeze_text:
            self.text.requires_grad_(False)
        self.image_proj = nn.Linear(config.width, MATCH_WIDTH, bias=False)
        self.text_proj = nn.Linear(self.text.config.hidden_size, MATCH_WIDTH, bias=False)
        self.scale = nn.Parameter(torch.tensor(2.7))
        self.vit = build_vit(config)

    def embed_texts(self, text: list[str]) -> tuple[Tensor, Tensor]:
        """B captions -> float[B, T, 128] and bool[B, T], True for tokens that are not padding."""
        length = {"truncation": True, "max_length": self.max_tokens}
        tokens = self.tokenizer(text, padding=True, split_special_tokens=True, return_tensors="pt", **length)
        tokens = tokens.to(self.scale.device)
        rows = self.text_proj(self.text(**tokens).last_hidden_state)
        return rows, tokens["attention_mask"].bool()

    def embed_images(self, pixels: Tensor) -> Tensor:
        """float[B, 3, h, w] in [0, 1] -> float[B, S, 128], each token of unit length."""
        return F.normalize(self.image_proj(self.tokens(pixels)), dim=-1)

    def tokens(self, pixels: Tensor) -> Tensor:
        """float[B, 3, h, w] in [0, 1] -> float[B, 1 + patches, width], the output of the ViT, CLS first."""
        return self.vit(pixel_values=(pixels - 0.5) / 0.5).last_hidden_state

    def forward(self, pixels: Tensor, text: list[str], same: Tensor) -> Tensor:
        """Compute the symmetric contrastive loss; `same` bool[B, B] marks equal images, which share the target."""
        logits = late_interaction(self.embed_images(pixels), *self.embed_texts(text)) * self.scale.clamp(max=4.6).exp()
        targets = same / same.sum(dim=1, keepdim=True)
        return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2

    def grounded(self, pixels: Tensor, regions: Tensor, text: list[str], true: Tensor) -> Tensor:
        """Compute the loss of matching phrases with the regions they describe, as in RegionCLIP (Zhong et al. 2022).

        A region is the mean of its patches, so that patches learn what is at their own place without having to find
        that place first. The loss is the cross-entropy over all regions, minus its minimum, the entropy of targets that
        several regions share.

        Args:
            pixels: float[B, 3, h, w] in [0, 1].
            regions: bool[R, B, patches], the patches of each region, all in one image.
            text: T phrases.
            true: float[R, T], 1 where a phrase describes a region; each phrase describes at least one.
        """
        tokens = self.tokens(pixels)[:, 1:].flatten(0, 1)  # (B * patches, H)
        weights = regions.flatten(1).to(tokens.dtype)  # (R, B * patches)
        rows = weights @ tokens / weights.sum(dim=1, keepdim=True)  # (R, H)
        words, mask = self.embed_texts(text)
        whole = F.normalize((words * mask[..., None]).sum(dim=1), dim=-1)  # (T, P)
        logits = whole @ F.normalize(self.image_proj(rows), dim=-1).T * self.scale.clamp(max=4.6).exp()  # (T, R)
        targets = true.T / true.T.sum(dim=1, keepdim=True)
        losses = F.cross_entropy(logits, targets, reduction="none") - torch.special.entr(targets).sum(dim=1)
        return losses.mean()


def late_interaction(image: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    """Compute the mean over the words of a text of the cosine with their best patch: float[I, B].

    Args:
        image: float[I, S, P], unit rows.
        text: float[B, T, P], rows of any length.
        mask: bool[B, T], True for words.
    """
    best = torch.einsum("isp,btp->ibts", image, F.normalize(text, dim=-1)).amax(dim=3)  # (I, B, T)
    return (best * mask).sum(dim=2) / mask.sum(dim=1)


def _read_text_tower(path: str) -> tuple[Any, Any]:
    sentence = "backbone.text '{path}' is no BERT ({reason}); give a folder or hub id of one"
    model = pretrained.read(AutoModel, path, sentence, dtype=torch.float32, add_pooling_layer=False)
    return model, pretrained.read(AutoTokenizer, path, sentence)
