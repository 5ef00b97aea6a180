"""The official BLIP-2 files by their names in LAVIS, and their download."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from qformer.types import UsageError

SITE = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/"


@dataclass(frozen=True)
class Release:
    """One file of the release.

    Attributes:
        file: its name on the site.
        use: purpose of the file.
        llm: hub id of the language model, whose weights are not in the file.
        prompt: text in front of every caption.
        tower: name of the file of the image encoder, if that was frozen and is not in this file.
    """

    file: str
    use: str
    llm: str | None = None
    prompt: str = ""
    tower: str | None = "eva_vit_g"


OPT, T5 = "facebook/opt-", "google/flan-t5-"
RELEASES = {
    "blip2_pretrained": Release("blip2_pretrained.pth", "stage one, ViT-g: retrieval, features, start of training"),
    "blip2_pretrained_vitL": Release("blip2_pretrained_vitL.pth", "stage one, CLIP ViT-L", tower="clip_vit_L"),
    "pretrain_opt2.7b": Release("blip2_pretrained_opt2.7b.pth", "zero-shot captions and answers", f"{OPT}2.7b"),
    "pretrain_opt6.7b": Release("blip2_pretrained_opt6.7b.pth", "zero-shot captions and answers", f"{OPT}6.7b"),
    "pretrain_flant5xl": Release("blip2_pretrained_flant5xl.pth", "zero-shot answers to instructions", f"{T5}xl"),
    "pretrain_flant5xl_vitL": Release(
        "blip2_pretrained_flant5xl_vitL.pth", "the same on CLIP ViT-L", f"{T5}xl", tower="clip_vit_L"
    ),
    "pretrain_flant5xxl": Release("blip2_pretrained_flant5xxl.pth", "zero-shot answers to instructions", f"{T5}xxl"),
    "caption_coco_opt2.7b": Release(
        "blip2_caption_opt2.7b.pth", "captions, fine-tuned on COCO at 364 px", f"{OPT}2.7b", "a photo of", None
    ),
    "caption_coco_opt6.7b": Release(
        "blip2_caption_opt6.7b.pth", "captions, fine-tuned on COCO at 364 px", f"{OPT}6.7b", "a photo of", None
    ),
    "caption_coco_flant5xl": Release(
        "blip2_caption_flant5xl.pth", "captions, fine-tuned on COCO at 364 px", f"{T5}xl", "a photo of", None
    ),
    "coco": Release("blip2_finetune_coco.pth", "retrieval, fine-tuned on COCO at 364 px", tower=None),
    "eva_vit_g": Release("eva_vit_g.pth", "the image encoder ViT-g alone", tower=None),
    "clip_vit_L": Release("clip_vit_L.pth", "the image encoder CLIP ViT-L alone", tower=None),
}


def of_file(path: str | Path) -> Release | None:
    """Find the release of a file by its name; None for any other file."""
    return next((release for release in RELEASES.values() if release.file == Path(path).name), None)


def local(path: str) -> str:
    """Resolve the name of a release to its file, downloading it if necessary; keep any other path.

    Raises:
        UsageError: the file cannot be downloaded.
    """
    return str(fetch(path)) if path in RELEASES else path


def fetch(name: str) -> Path:
    """Find the file of a release in torch's download folder, as LAVIS does, or download it there.

    Raises:
        UsageError: the file cannot be downloaded.
    """
    release = RELEASES[name]
    kept = Path(torch.hub.get_dir()) / "checkpoints" / release.file
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(SITE + release.file, str(kept))
        except OSError as error:  # includes URLError
            raise UsageError(
                f"'{name}' cannot be downloaded ({error}); get {SITE + release.file} where there is a network "
                f"and put it at {kept}"
            ) from error
    return kept
