"""Figures of a run: loss curves with their chance levels, and captions next to their photos."""

from __future__ import annotations

import math
import textwrap
import warnings
from typing import TYPE_CHECKING, Any

import matplotlib

from qformer import distributed
from qformer.figures import published
from qformer.files.records import LINEAR_MAP, ORIGINAL, LinearMapNumbers, Metrics, read_lines, read_object, replacing
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from qformer.schema import Config

matplotlib.use("Agg")
from matplotlib import pyplot as plt

LISTED = 14  # captions next to an image

TITLES = {
    "itc": "ITC: image-text contrastive",
    "itm": "ITM: image-text matching",
    "itg": "ITG: image-grounded text generation",
    "lm": "LM: language modeling",
    "loss": "sum of the losses",
    "contrastive": "contrastive",
    "grounded": "phrases and the regions they name",
    "labels": "properties of objects, sum",
    "shape": "shapes",
    "word": "words on objects",
    "masked": "hidden patches",
}


def chance(name: str, config: Config) -> float | None:
    """Loss of a model at chance, if it is a fixed number.

    ITC: ln of the batch. ITM: 0.6365, with one matched row to two unmatched ones. ITG: ln of the vocabulary. `loss`:
    the weighted sum of the three.
    """
    if name in ("itc", "contrastive"):
        batch = config.data.batch * distributed.world()
        return math.log(batch) if config.data.train.name != "phrases" else None
    if name == "itm":
        return -(math.log(1 / 3) + 2 * math.log(2 / 3)) / 3
    if name == "loss":
        weights = {"itc": 1.0, "itm": config.loss.itm, "itg": config.loss.itg}
        return sum(weight * (chance(part, config) or 0.0) for part, weight in weights.items())
    return math.log(config.qformer.vocab_size) if name == "itg" else None


def curves(run: Path, config: Config) -> None:
    """Draw `metrics.jsonl` as `curves.png`: a panel per loss, and one for retrieval if it was measured.

    The panels also show the chance level and, for the paper's sizes, published losses (see docs/training.md); that of
    retrieval shows the linear map of the frozen towers, where the run has measured it.
    """
    records = read_lines(run / "metrics.jsonl", Metrics)
    train = [record for record in records if record["kind"] == "train"]
    held_out = [record for record in records if record["kind"] == "validation"]
    known = published.losses(config)
    names = [name for name in TITLES if train and name in train[0] and (name != "loss" or name in known)]
    measured_at_ten = {key for record in held_out for key in record if key.endswith("_r10")}
    recalls = sorted(key for key in measured_at_ten if ORIGINAL not in key)
    panels = len(names) + bool(recalls)
    figure, axes = plt.subplots(1, panels, figsize=(4.2 * panels, 3.4), squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], names, strict=False):
        axis.plot([r["step"] for r in train], [r[name] for r in train], label="training")
        if any(name in r for r in held_out):
            measured = [(r["step"], r[name]) for r in held_out if name in r]
            axis.plot(*zip(*measured, strict=True), "o-", label="held out", markersize=4)
        if (level := chance(name, config)) is not None:
            axis.axhline(level, color="grey", linestyle=":", label=f"chance {level:.2f}")
        if points := known.get(name):
            axis.plot(*zip(*points, strict=True), "x", color="grey", label="published, 4.6 M pairs")
        axis.set(title=TITLES[name], xlabel="step")
        axis.legend(fontsize=8)
    if recalls:
        for key in recalls:
            axes[0][-1].plot(
                *zip(*[(r["step"], 100 * r[key]) for r in held_out if key in r], strict=True),
                "o-",
                label=key,
                markersize=4,
            )
        for way, level in _linear_map(run).items():
            axes[0][-1].axhline(level, color="grey", linestyle=":", label=f"linear map, {way} {level:.1f}")
        axes[0][-1].set(title="held-out retrieval, R@10 (%)", xlabel="step")
        axes[0][-1].legend(fontsize=8)
    _save(figure, run / "curves.png", dpi=110)


def _linear_map(run: Path) -> dict[str, float]:
    """R@10 of the linear map in %, `i2t` and `t2i`; empty if the run has not measured it."""
    try:
        numbers = read_object(run / LINEAR_MAP, LinearMapNumbers)["linear"]
        return {way: 100 * numbers[f"{way}_r10"] for way in ("i2t", "t2i")}
    except (UsageError, KeyError):
        return {}


def captions(path: Path, images: Sequence[Tensor], texts: Sequence[dict[str, Any]]) -> None:
    """Draw a row of images (uint8[3, h, w]) with the model's `caption` above and the `truth` below each."""
    figure, axes = plt.subplots(1, len(images), figsize=(2.9 * len(images), 3.2), squeeze=False)
    for axis, image, text in zip(axes[0], images, texts, strict=True):
        axis.imshow(image.permute(1, 2, 0).numpy())
        axis.set_axis_off()
        axis.set_title(_lines(text["caption"] or "(nothing)"), fontsize=9, weight="bold")
        axis.text(0.5, -0.04, _lines(text["truth"]), transform=axis.transAxes, ha="center", va="top", fontsize=8)
    _save(figure, path, dpi=110, bbox_inches="tight")


def ranked_captions(path: Path, images: Sequence[Tensor], records: Sequence[dict[str, Any]]) -> None:
    """Draw images (uint8[3, h, w]) next to their captions, the best first; dropped captions are gray.

    A record holds rows (caption, score, origin) under `kept` and `dropped`.
    """
    rows = math.ceil(len(images) / 2)
    figure = plt.figure(figsize=(20, 2.3 * rows))
    for number, (image, record) in enumerate(zip(images, records, strict=True)):
        left, bottom, height = 0.5 * (number % 2), 1 - (number // 2 + 1) / rows, 0.94 / rows
        picture = figure.add_axes((left + 0.005, bottom, 0.1, height), anchor="N")
        picture.imshow(image.permute(1, 2, 0).numpy())
        picture.set_axis_off()
        listed = [(row, "black", "bold") for row in record["kept"]]
        listed += [(row, "grey", "normal") for row in record["dropped"]]
        for line, ((caption, score, origin), color, weight) in enumerate(listed[:LISTED]):
            style: dict[str, Any] = {"color": color, "weight": weight, "fontsize": 9, "va": "top"}
            top = bottom + height * (1 - line / LISTED)
            figure.text(left + 0.11, top, f"{score:.3f}", **style)
            figure.text(left + 0.135, top, origin, **style)
            figure.text(left + 0.17, top, textwrap.shorten(_shown(caption), 90, placeholder=" ..."), **style)
    _save(figure, path, dpi=80)


def _save(figure: Any, path: Path, **options: Any) -> None:
    """Replace a picture; if its name is a link, replace the link and not the file that it points to."""
    with replacing(path) as partial, warnings.catch_warnings(action="ignore", category=UserWarning):
        figure.savefig(partial, format="png", **options)  # which warns of characters that the font lacks
    plt.close(figure)


def _lines(text: str) -> str:
    return textwrap.fill(_shown(text), 30)


def _shown(text: str) -> str:
    """Replace unprintable characters, which an untrained model writes, and keep matplotlib from reading formulas."""
    return "".join(letter if letter.isprintable() else "?" for letter in text).replace("$", r"\$")
