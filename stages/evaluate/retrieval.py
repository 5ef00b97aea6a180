"""`qformer eval`: benchmarks of a checkpoint, as a table, as JSON, and as a sheet of hits and misses.

Images are read and encoded in groups; what matching needs of them waits in a temporary file. Processes started by
torchrun share the work and give the numbers of one.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from tempfile import TemporaryFile, gettempdir
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal
from rich.table import Table

from qformer import distributed, load
from qformer.data.held_out import ImageRecord, read_groups
from qformer.evaluation import retrieval
from qformer.evaluation.benchmarks import ImageItems, Measured
from qformer.evaluation.linear import LINEAR
from qformer.files import records
from qformer.files.logs import printable
from qformer.model.image_text import ImageTextModel
from qformer.progress import track
from qformer.stages import linear
from qformer.stages.evaluate import hits
from qformer.stages.evaluate.settings import Settings, autocast, open_data, own_device, writable
from qformer.stages.loop import console
from qformer.types import UsageError

if TYPE_CHECKING:
    from qformer.data.base import Source
    from qformer.evaluation.linear import LinearMap

KINDS = {"itc": "ITC", "itm": "ITM", "reranked": "ITM + ITC", LINEAR: "linear map"}
SHOWN = 5  # skipped samples whose reason is printed
UNMATCHED = "This checkpoint was trained without ITM (loss.itm: 0), so ITC alone is measured."
STRICT = "Rows named 'original' accept only a text's own image, so that equal captions count as misses."
MORE_ROOM = "set TMPDIR to a folder with more room, or measure ITC alone with -k 0"
QUERIES = {"i2t": "image", "t2i": "text"}


def evaluate_retrieval(settings: Settings, bench: retrieval.Retrieval | None = None) -> None:
    """Image-text retrieval in both directions: by ITC, by ITM, and by their sum as in the original.

    Raises:
        UsageError: data that cannot be used, a checkpoint that is not of stage one, or no room.
    """
    bench = bench or retrieval.Retrieval()
    bench.k = settings.k
    for option in ("prompt", "predictions", "submission", "by", "lemmatize", "beams", "server", "model"):
        if getattr(settings, option):
            raise UsageError(f"--{option} is for benchmarks in which the model writes; leave it out for retrieval")
    with distributed.joined():
        console.quiet = distributed.rank() > 0
        source = open_data(settings, "jsonl")
        writable(settings.output, settings.html)
        model = _load(settings)
        if settings.k and not model.can_match:
            console.print(UNMATCHED, soft_wrap=True)
            settings, bench.k = replace(settings, k=0), 0
        listed, skipped = bench.items(source, settings.limit)
        baseline, note = _linear_map(settings, model)
        bench.pools = distributed.gather_objects(baseline is not None)[0]
        start = time.perf_counter()
        readable, unreadable, scores = _score(settings, bench, model, source, listed)
        seconds = time.perf_counter() - start
        pooled = bench.images.pooled() if bench.images is not None and bench.pools else None
        if distributed.rank() == 0:
            measured = bench.score([item for one in readable for item in one.items], [])
            images = [one.image for one in readable]
            if baseline is not None and pooled is not None:
                measured.groups["ranked by"] |= baseline.measure(pooled, [image.captions for image in images])
            _report(settings, source, images, [*skipped, *unreadable], scores, measured, seconds)
            console.print(note, soft_wrap=True)
        distributed.barrier()


def _load(settings: Settings) -> ImageTextModel:
    model = load(settings.checkpoint, own_device(settings), trust=settings.trust)
    if not isinstance(model, ImageTextModel):
        raise UsageError(f"'{settings.checkpoint}' is a checkpoint of stage two; retrieval needs one of stage one")
    return model


def _linear_map(settings: Settings, model: ImageTextModel) -> tuple[LinearMap | None, str]:
    """Solve the linear map of the frozen towers in rank 0, and say on what; or None, and say why there is none."""
    if distributed.rank() > 0:
        return None, ""
    try:
        solved = linear.of_checkpoint(settings.checkpoint, model, settings.trust, show=True)
    except UsageError as error:
        return None, f"{linear.NONE}: {error}."
    return solved, (
        f"The linear map of the frozen towers was solved on {solved.photos:,} training photos with {solved.texts:,} "
        "captions; a bridge should retrieve better than it."
    )


def _score(
    settings: Settings, bench: retrieval.Retrieval, model: ImageTextModel, source: Source, listed: list[ImageItems]
) -> tuple[list[ImageItems], list[dict[str, Any]], retrieval.Scores]:
    """The images that could be read, records of the others, and scores of those with their captions."""
    show, world = distributed.rank() == 0, distributed.world()
    groups = [range(start, min(start + settings.batch, len(listed))) for start in range(0, len(listed), settings.batch)]
    own = groups[distributed.rank() :: world]
    readable: list[int] = []
    unreadable: list[dict[str, Any]] = []
    with TemporaryFile() as file, autocast(model, settings.precision):  # it goes with the process, even a killed one
        bench.begin(model, file if settings.k else None)
        reading = read_groups(source, [one.image for one in listed], model.frontend.strategy, own)
        for group in track(reading, "embedding images", len(own), disable=not show):
            try:
                bench.predict(model, group.tiles, [listed[number].items for number in group.numbers])
            except OSError as error:
                raise UsageError(f"no room in '{gettempdir()}' ({error.strerror}); {MORE_ROOM}") from error
            if group.tiles is not None and not readable:
                _check_room(file.tell() / len(group.numbers) * len(listed))
            readable += group.numbers
            unreadable += group.skipped
        readable = sorted(number for part in distributed.gather_objects(readable) for number in part)
        unreadable = [record for part in distributed.gather_objects(unreadable) for record in part]
        places = {str(one.image.index): number for number, one in enumerate(listed)}
        unreadable.sort(key=lambda record: places[record["index"]])
        if not readable:
            raise UsageError(f"none of the {len(listed)} images could be read ({unreadable[:3]}); check --data")
        used = [listed[number] for number in readable]
        return used, unreadable, bench.compare([item for one in used for item in one.items], show)


def _check_room(needed: float) -> None:
    """The image tokens of all processes."""
    free = shutil.disk_usage(gettempdir()).free
    if needed > free:
        raise UsageError(
            f"the image tokens need {decimal(int(needed))} in '{gettempdir()}', where {decimal(free)} are free; "
            f"{MORE_ROOM}"
        )


def _report(
    settings: Settings,
    source: Source,
    images: list[ImageRecord],
    skipped: list[dict[str, Any]],
    scores: retrieval.Scores,
    measured: Measured,
    seconds: float,
) -> None:
    captions = [image.captions for image in images]
    equal, kinds = retrieval.count_equal(captions), measured.groups["ranked by"]
    texts = sum(map(len, captions))
    title = f"{len(images)} images, {texts} texts, k = {settings.k}, {settings.precision}, {seconds:.0f} s"
    head, rows = lines(kinds)
    table = Table(*head, title=title)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if equal:
        told = f"{equal} texts are word for word a caption of another image: either image counts as found."
        console.print(f"{told} {STRICT}")
    print_skipped(skipped)
    if settings.output is not None:
        result = {"checkpoint": settings.checkpoint, "images": len(images), "texts": texts, "k": settings.k}
        result |= {"equal_captions": equal}
        result |= {"precision": settings.precision, "processes": distributed.world(), "seconds": seconds}
        pairs_scored = int((scores.of_image | scores.of_text).sum())
        result |= {"pairs": pairs_scored, "skipped": skipped, **kinds}
        settings.output.write_text(json.dumps(result, indent=1), encoding="utf-8")
    if settings.html is not None:
        places = retrieval.rank_table(scores, captions)
        page = hits.page(settings.checkpoint, title, (head, rows), source, images, scores, places)
        settings.html.write_text(page, encoding="utf-8")


def print_skipped(skipped: list[dict[str, Any]]) -> None:
    """Print how many samples could not be used, and why for the first few."""
    if skipped:
        console.print(f"skipped {len(skipped)} samples:")
    for fault in skipped[:SHOWN]:
        told = printable(f"{fault['kind']}: {fault['detail']}")
        console.print(f"  {told}", highlight=False, soft_wrap=True)


def lines(measured: dict[str, dict[str, float]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table: recalls in %, their mean, and the mean and median rank."""
    head = ["ranked by", "query", *(f"R@{n}" for n in retrieval.CUTOFFS), "mean", "mean rank", "median rank"]
    rows = []
    for kind, values in measured.items():
        for way, told in QUERIES.items():
            shares = [values[f"{way}_r{n}"] for n in retrieval.CUTOFFS]
            percent = [f"{100 * share:.1f}" for share in (*shares, values[f"{way}_mean_recall"])]
            places = [f"{values[f'{way}_{name}_rank']:.1f}" for name in ("mean", "median")]
            plain = kind.removesuffix(records.ORIGINAL)
            rows.append([KINDS[plain] if plain == kind else f"{KINDS[plain]}, original", told, *percent, *places])
    return head, rows
