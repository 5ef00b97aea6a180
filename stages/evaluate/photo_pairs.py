"""`qformer eval --bench mmvp-vlm`: a model that compares photos with texts, on MMVP-VLM, beside what it names.

What was compared is kept pair by pair, so the same command goes on after an interruption. One process does it: the
benchmark has 270 photos.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table

from qformer import distributed
from qformer.data.arguments import pairs as read_options
from qformer.data.folders import list_images
from qformer.evaluation.predictions import Predictions
from qformer.images import read_image
from qformer.lookup import nearest
from qformer.mmvp.folder import read_mmvp_vlm
from qformer.progress import track
from qformer.retrieval.embedders import load_embedder
from qformer.stages.evaluate.language import lines
from qformer.stages.evaluate.photo_towers import PhotoTower, short_name, side_of, towers_table
from qformer.stages.evaluate.retrieval import print_skipped
from qformer.stages.evaluate.settings import Settings, autocast, own_device, writable
from qformer.stages.loop import console
from qformer.suites.mmvp_questions import PEOPLE
from qformer.suites.mmvp_statements import (
    PhotoPair,
    compare_pair,
    correlate,
    measure_pairs,
    pair_up,
    read_pattern_scores,
)
from qformer.types import BadSample, UsageError

if TYPE_CHECKING:
    from qformer.retrieval.embedders import Embedder

OPTIONS = ("path", "mllm", "zero_shot")
UNUSED = ("prompt", "preset", "submission", "by", "lemmatize", "beams", "quantize", "html", "server", "model", "k")
CLASS_PROMPT = "a photo of a {}"


def evaluate_photo_pairs(settings: Settings) -> None:
    """Compare each statement with both photos, and print accuracy by pattern: of one model, or of several in a table.

    Options of `--data`: `path`, the folder; `mllm`, what `--bench mmvp -o` wrote of another model, for the correlation
    of their patterns; `zero_shot`, a folder with a folder of photos for each class, named by it.

    Raises:
        UsageError: an option or data that cannot be used, or a model of another kind.
    """
    options = _options(settings)
    pairs = pair_up(read_mmvp_vlm(options["path"]))[: settings.limit]
    mllm = Path(options["mllm"]) if "mllm" in options else None
    others = {} if mllm is None else read_pattern_scores(mllm)
    if distributed.rank() > 0:
        return
    towers = []
    for name in (settings.checkpoint, *settings.others):
        tower = _measure(settings, name, pairs, options.get("zero_shot"))
        for column, accuracy in others.items():
            assert mllm is not None
            tower.correlations[column] = correlate(tower.measured, accuracy, mllm)
        towers.append(tower)
    if len(towers) == 1:
        _report(settings, towers[0], mllm)
    else:
        _report_all(settings, towers, others)


def _options(settings: Settings) -> dict[str, str]:
    """Options of `--data`, after a look at all that would stop hours of work."""
    options = {name: str(value) for name, value in read_options(settings.data).items()}
    unknown = [name for name in options if name not in OPTIONS]
    if unknown or "path" not in options:
        hint = nearest(unknown[0], OPTIONS) if unknown else "give path, MMVP-VLM's folder"
        raise UsageError(f"--data has {', '.join(options) or 'nothing'}: {hint}")
    for option in UNUSED:
        if getattr(settings, option) != getattr(Settings, option):
            raise UsageError(
                f"--{option} is for other benchmarks; leave it out for mmvp-vlm, whose models only compare"
            )
    writable(settings.output, settings.predictions)
    if len({settings.checkpoint, *settings.others}) <= len(settings.others):
        raise UsageError("a model was given twice; give each of them once")
    return options


def _measure(settings: Settings, name: str, pairs: list[PhotoPair], classes: str | None) -> PhotoTower:
    """Compare all pairs by a model, and name the photos of the classes.

    Raises:
        UsageError: it is of another kind, or no pair can be read.
    """
    start = time.perf_counter()
    embedder = load_embedder(name, own_device(settings) or _default_device(), trust=settings.trust)
    with autocast(embedder.model, settings.precision):
        records, skipped, resumed = _compare_all(settings, name, embedder, pairs)
    known = [pair for pair in pairs if pair.id in records]
    if not known:
        raise UsageError(f"none of the {len(pairs)} pairs could be read ({skipped[:3]}); check --data")
    measured = measure_pairs(known, [records[pair.id] for pair in known])
    parameters = sum(parameter.numel() for parameter in embedder.model.parameters())
    tower = PhotoTower(name, measured, len(known), skipped, resumed, parameters, side_of(embedder.model))
    if classes is not None:
        with autocast(embedder.model, settings.precision):
            tower.zero_shot = zero_shot(embedder, Path(classes), settings.batch)
    tower.seconds = time.perf_counter() - start
    return tower


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _compare_all(
    settings: Settings, name: str, embedder: Embedder, pairs: list[PhotoPair]
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]], int]:
    """Records by the id of the pair, those that could not be read, and how many were known before."""
    kept = settings.predictions or (settings.output and settings.output.with_suffix(".predictions.jsonl"))
    if kept is not None and settings.others:
        kept = kept.with_name(f"{kept.name.partition('.')[0]}.{short_name(name)}.predictions.jsonl")
    data = [word for word in settings.data if word.startswith("path=")]
    made_by = {"bench": settings.bench, "data": data, "weights": embedder.fingerprint()}
    if settings.precision != Settings.precision:
        made_by["precision"] = settings.precision
    store = Predictions(kept, made_by)
    store.keep({pair.id: pair.digest for pair in pairs})
    resumed = sum(pair.id in store.known for pair in pairs)
    skipped = []
    with store:
        for pair in track([one for one in pairs if one.id not in store.known], "comparing photos and statements"):
            try:
                images = [read_image(one.image) for one in (pair.first, pair.second)]
            except BadSample as bad:
                skipped.append({"index": pair.id, "kind": bad.kind, "detail": bad.detail})
                continue
            logits = compare_pair(embedder, images, [pair.first.prompt, pair.second.prompt])
            store.add([{"id": pair.id, "of": pair.digest, **logits}])
    store.finish([pair.id for pair in pairs])
    return store.known, skipped, resumed


def zero_shot(embedder: Embedder, folder: Path, batch: int) -> tuple[float, int, int]:
    """Share of photos whose nearest class name is right, the number of photos, and that of classes.

    Args:
        folder: a folder of photos for each class, named by it; `_` counts as a space.

    Raises:
        UsageError: there are fewer than two classes, or no photo can be read.
    """
    places = sorted(place for place in folder.iterdir() if place.is_dir()) if folder.is_dir() else []
    if len(places) < 2:
        raise UsageError(f"'{folder}' has {len(places)} folders; give one with photos for each class, at least two")
    texts = [CLASS_PROMPT.format(place.name.replace("_", " ")) for place in places]
    shown = [(image, number) for number, place in enumerate(places) for image in list_images(place).images]
    right = count = 0
    for start in track(range(0, len(shown), batch), "naming photos"):
        images, classes = [], []
        for path, number in shown[start : start + batch]:
            try:
                images.append(read_image(path))
                classes.append(number)
            except BadSample:
                continue
        scores = embedder(images, [texts] * len(images)) if images else []
        right += sum(max(range(len(own)), key=own.__getitem__) == k for own, k in zip(scores, classes, strict=True))
        count += len(images)
    if not count:
        raise UsageError(f"no photo below '{folder}' can be read; put some into the folder of each class")
    return right / count, count, len(places)


def _report(settings: Settings, tower: PhotoTower, mllm: Path | None) -> None:
    measured = tower.measured
    for column, found in tower.correlations.items():
        told = ", ".join(f"{way} {value}" for way, value in found.items())
        whose = "that of people in " if column == PEOPLE else ""
        measured.notes.append(f"correlation over patterns with {whose}'{mllm}': {told}")
    if tower.zero_shot is not None:
        share, count, classes = tower.zero_shot
        measured.notes.append(f"zero-shot accuracy: {100 * share:.1f} % of {count} images, {classes} classes")
    head, rows = lines(measured, tower.pairs)
    _print(f"{settings.bench}: {tower.pairs} pairs, {tower.seconds:.0f} s", head, rows)
    for note in measured.notes:
        console.print(note, soft_wrap=True, markup=False)
    print_skipped(tower.skipped)
    if settings.output is not None:
        result = {"bench": settings.bench, "precision": settings.precision, **tower.record()}
        settings.output.write_text(json.dumps(result, indent=1), encoding="utf-8")


def _report_all(settings: Settings, towers: list[PhotoTower], others: dict[str, dict[str, float]]) -> None:
    head, rows = towers_table(towers, others)
    seconds = sum(tower.seconds for tower in towers)
    _print(f"{settings.bench}: {len(towers)} models, {towers[0].pairs} pairs, {seconds:.0f} s", head, rows)
    for tower in towers:
        print_skipped(tower.skipped)
    if settings.output is not None:
        result = {
            "bench": settings.bench,
            "precision": settings.precision,
            "models": [tower.record() for tower in towers],
            "others": others,
        }
        result["table"] = {"head": head, "rows": rows}
        settings.output.write_text(json.dumps(result, indent=1), encoding="utf-8")


def _print(title: str, head: list[str], rows: list[list[str]]) -> None:
    table = Table(*head, title=title)
    for row in rows:
        table.add_row(*row)
    console.print(table)
