"""`qformer quickstart --real`: both stages on captioned photos with small pre-trained towers, on a CPU.

The image encoder's tokens of the training photos are stored once, and both stages read them. Stage two sees captions
only, so every answer is zero-shot. The blind twin is trained the same way on gray pictures, so its right answers need
no vision: what it reads before each caption never changes, which is learned in fewer steps.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

from rich.table import Table

from qformer import load, stages
from qformer.checkpoints.folder import read_meta
from qformer.config import by_prefix, load_config, shipped
from qformer.data import sources
from qformer.data.held_out import list_images
from qformer.devices import choose, fastest_precision
from qformer.evaluation import retrieval
from qformer.evaluation.linear import LINEAR
from qformer.files.pretrained import tower
from qformer.files.records import LINEAR_MAP, LinearMapNumbers, read_object
from qformer.model.image_text import ImageTextModel
from qformer.model.vision_language import VisionLanguageModel
from qformer.progress import console
from qformer.stages.checking import check
from qformer.stages.evaluate.settings import autocast
from qformer.stages.quickstart import real_exam as exam
from qformer.stages.quickstart import real_report as report
from qformer.stages.quickstart.clock import Clock, peak_memory
from qformer.stages.quickstart.exam import names_own_class
from qformer.stages.quickstart.own_photos import OwnPhotos
from qformer.stages.quickstart.photos import blind, divide
from qformer.stages.quickstart.questions import make_questions
from qformer.template import AUTO
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from qformer.config import Choice
    from qformer.schema import Config

CANDIDATES = 10  # that ITM re-ranks; with five captions for each of 500 photos, most of the time goes there
CAPTIONED, ASKED = 500, 1000  # of the held-out photos, the first so many
BLIND_SHARE = 4  # the blind twin takes this part of the steps


def run(folder: Path, data: list[str], photos: Path | None, overrides: list[str]) -> dict[str, Any]:
    """Train and evaluate everything in `folder`; the same command resumes. Returns the contents of `results.json`.

    Args:
        data: a source of captioned photos as on the command line; without any, public photos are fetched.
        photos: a folder of the user's own, which are captioned and made searchable at the end.
        overrides: `stage1.KEY=VALUE` or `stage2.KEY=VALUE`, applied to the configurations of `configs/real`.

    Raises:
        UsageError: towers or photos that are missing, or an override that is not valid.
    """
    clock = Clock()
    own = None if photos is None else OwnPhotos.open(photos)
    first, second = _configurations(folder, data, overrides)
    held = _held_out(first)
    with clock.phase("features"):
        stages.fill_features(first)
    with clock.phase("stage one"):
        precision = _precision(stages.train(first), first)
    bridge = load(first.run, trust=names_own_class(first))
    assert isinstance(bridge, ImageTextModel)
    with clock.phase("retrieval"), autocast(bridge, precision):
        found = _retrieve(bridge, held, first)
    with clock.phase("stage two"):
        model, faster = _train(second)
    with clock.phase("captions"):  # in fp32: autocast would convert all weights again for each word
        said = exam.caption_all(model, held, min(CAPTIONED, len(held.listed)))
        scores = exam.score_all(said, held)
    questions = make_questions([one.captions for one in held.listed])
    with clock.phase("questions"), faster:
        losses = exam.answer_all(model, held, questions)
    questions = [questions[place] for place in losses]
    size = bridge.frontend.encoder.patch_size
    with clock.phase("blind twin"):
        twin, _ = _train(_twin(second, folder, size))
        with faster:
            answers = exam.Answers(questions, list(losses.values()), exam.guess_all(twin, questions, size))
    shown, told = [], ""
    if own is not None:
        with clock.phase("own photos"):
            shown = own.caption(model, folder / "photos.jsonl")
            told = _index(own, bridge, folder)
    results = {
        "retrieval": found.recalls,
        "captions": scores,
        "vqa": answers.measure(),
        "seconds": clock.seconds,
        "phases": clock.phases,
        "cpu_seconds": clock.cpu,
        "peak_memory_gb": peak_memory(),
    }
    _keep(folder, results, held, answers, said)
    report.write(folder, results, report.Shown(held, found, said, answers, shown), CANDIDATES)
    _show(results, folder)
    if told:
        console.print(told, soft_wrap=True)
    return results


def _configurations(folder: Path, data: list[str], overrides: list[str]) -> tuple[Config, Config]:
    """Read the configurations of both stages, with the user's photos; raises as `run`."""
    changes = by_prefix(overrides, ("stage1", "stage2"))
    store = f"data.features.path={folder / 'store'}"
    runs = {"stage1": [f"run={folder / 'stage1'}", store]}
    runs["stage2"] = [f"run={folder / 'stage2'}", f"init={folder / 'stage1'}", store]
    first, second = (load_config(shipped()[f"real/{name}.yaml"], [*runs[name], *changes[name]]) for name in runs)
    assert second.llm is not None
    for path in (first.vision.options.get("path", ""), first.text.bert, second.llm.path):
        tower(path)  # before photos are fetched
    first, second = _in_fast_precision(first, second)
    train, held = divide(data)
    return _with_data(first, train, held), _with_data(second, train, held)


def _in_fast_precision(first: Config, second: Config) -> tuple[Config, Config]:
    """Keep the weights of the frozen towers in the precision in which this machine computes fastest.

    What the user has set stays. Training takes that precision too (`train.precision: auto`), but the towers compute in
    that of their weights.
    """
    fastest, _ = fastest_precision(choose(None).type)
    assert second.llm is not None
    if first.vision.name == "hf" and "precision" not in first.vision.options:
        first = first.model_copy(update={"vision": first.vision.model_copy(update={"precision": fastest})})
    if second.llm.dtype == "auto":
        second = second.model_copy(update={"llm": second.llm.model_copy(update={"dtype": fastest})})
    return first, second


def _with_data(config: Config, train: Choice, held: Choice) -> Config:
    chosen = config.data.model_copy(update={"train": train, "validation": held})
    return check(config.model_copy(update={"data": chosen}))


def _held_out(config: Config) -> exam.Photos:
    assert config.data.validation is not None
    source = sources.for_run(config.data.validation, config.run)
    return exam.Photos(source, list_images(source, ASKED)[0])


def _retrieve(bridge: ImageTextModel, held: exam.Photos, config: Config) -> report.Found:
    """Search the photos of validation by their captions, and the captions by the photos."""
    numbers: list[int] = []
    with TemporaryFile() as file:
        images = retrieval.Images(bridge, file)
        for group in held.groups(bridge, range(min(config.data.validation_size, len(held.listed)))):
            images.add(group.tiles)
            numbers += group.numbers
        captions = [held.listed[number].captions for number in numbers]
        texts = [text for own in captions for text in own]
        scores = images.score(texts, CANDIDATES if bridge.can_match else 0, show=True)
    recalls = retrieval.recall_table(scores, captions)
    if not bridge.can_match:
        del recalls["reranked"]
    return report.Found(numbers, scores, _linear(Path(config.run) / LINEAR_MAP, recalls["itc"]) | recalls)


def _linear(file: Path, like: Iterable[str]) -> dict[str, dict[str, float]]:
    """The row of the linear map, which stage one has measured on the same photos when it began, where it could."""
    if not file.is_file():
        return {}
    found = read_object(file, LinearMapNumbers)[LINEAR]
    return {LINEAR: {name: found[name] for name in like}}


def _train(config: Config) -> tuple[VisionLanguageModel, Any]:
    """Train stage two; returns the model, and the autocast in which it was trained."""
    precision = _precision(stages.train(config), config)
    model = load(config.run, trust=True)  # it names our own source of gray pictures, or a class that the user typed
    assert isinstance(model, VisionLanguageModel)
    return model, autocast(model, precision)


def _precision(trained: Path, config: Config) -> str:
    """The dtype that a run took, which its configuration may have left to the device."""
    return read_meta(trained).get("precision") or config.train.precision


def _twin(config: Config, folder: Path, size: int) -> Config:
    """The configuration of the blind twin: every picture is one gray patch, which is encoded in no time."""
    steps = max(config.train.steps // BLIND_SHARE, 2)
    train = config.train.model_copy(
        update={"steps": steps, "warmup": min(config.train.warmup, steps - 1), "validate_every": 0}
    )
    data = config.data.model_copy(
        update={"train": blind(config.data.train, size), "validation": None, "features": None}
    )
    resolution = config.resolution.model_copy(update={"size": size})
    assert config.llm is not None
    changes: dict[str, Any] = {"train": train, "data": data, "resolution": resolution}
    if config.start == "warm":  # which is solved on photos
        changes |= {"start": "paper", "llm": config.llm.model_copy(update={"visual_scale": AUTO})}
    return check(config.model_copy(update={"run": str(folder / "stage2-blind"), **changes}))


def _index(own: OwnPhotos, bridge: ImageTextModel, folder: Path) -> str:
    """Make the user's photos searchable; returns the command that searches them, or why there is none."""
    try:
        own.index(bridge, folder / "stage1", folder / "photos")
    except UsageError as error:  # the results of an hour are not lost for it
        return f"your photos cannot be searched: {error}"
    return f"search your photos: qformer search {folder / 'stage1'} {folder / 'photos'} 'a dog on a beach'"


def _keep(
    folder: Path, results: dict[str, Any], held: exam.Photos, answers: exam.Answers, said: dict[int, str]
) -> None:
    """Write `results.json`, and captions and answers as JSON lines."""
    (folder / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    captions = [
        {"photo": held.listed[number].key, "caption": text, "captions": held.listed[number].captions}
        for number, text in said.items()
    ]
    columns = zip(answers.questions, answers.said, answers.guessed, answers.calibrated, strict=True)
    asked = [
        {**asdict(one), "photo": held.listed[one.photo].key, "said": own, "blind": guess, "calibrated": calibrated}
        for one, own, guess, calibrated in columns
    ]
    for name, rows in (("captions", captions), ("answers", asked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _show(results: dict[str, Any], folder: Path) -> None:
    """Print the figures of the report."""
    for title, (head, rows) in report.tables(results).items():
        table = Table(*head, title=title)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print(f"{results['seconds']:.0f} s, {results['peak_memory_gb']:.1f} GB; open {folder / 'report.html'}")
    console.print(
        f"next: qformer demo {folder / 'stage2'}, or qformer caption {folder / 'stage2'} IMAGE", soft_wrap=True
    )
