"""`qformer eval` of what a model makes of single images: captions, answers, choices, statements, or one's own.

Each image is read and encoded once for all its questions. What is said is kept as it comes, so the same command goes on
after an interruption; processes started by torchrun share the images and give the numbers of one.
"""

from __future__ import annotations

import hashlib
import json
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.table import Table

from qformer import distributed
from qformer.answering.kept import KeptAnswers
from qformer.answering.server import Server
from qformer.checkpoints.loading import load, load_vision_language
from qformer.data.held_out import read_groups
from qformer.evaluation.benchmarks import ALL, AskOptions, ImageItems, Measured, choose, predict
from qformer.evaluation.predictions import Predictions
from qformer.files.soundness import raw
from qformer.llm.prompts import PRESETS
from qformer.lookup import find
from qformer.metrics.lemmas import load_lemmatizer
from qformer.model.image_text import ImageTextModel
from qformer.progress import Bar, track
from qformer.retrieval.reading import fingerprint
from qformer.stages.evaluate import answers
from qformer.stages.evaluate.retrieval import print_skipped
from qformer.stages.evaluate.settings import Settings, autocast, open_data, own_device, writable
from qformer.stages.loop import console
from qformer.types import TooLong, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from qformer.data.base import Source
    from qformer.evaluation.benchmarks import Benchmark, Item
    from qformer.model.vision_language import VisionLanguageModel
    from qformer.types import Tiles

ROWS = 40  # of a table on the terminal; a file has all


def evaluate_language(settings: Settings, bench: Benchmark | None = None) -> None:
    """Ask a model what the benchmark asks, score what it said, write what was asked for.

    Raises:
        UsageError: an option or data that cannot be used, a checkpoint of the other stage, or predictions of something
            else in the file that this run would go on from.
    """
    bench = bench or choose(settings.bench)
    with distributed.joined():
        console.quiet = distributed.rank() > 0
        source = open_data(settings, bench.source)
        _check(settings, bench)
        listed, skipped = bench.items(source, settings.limit)
        _check_column(settings.by, listed, bench.columns)
        model = _load(settings, bench)
        kept = settings.predictions
        if kept is None and settings.output is not None:
            kept = settings.output.with_suffix(".predictions.jsonl")
        store = Predictions(kept, made_by(settings, model, bench.beside), distributed.rank())
        asked = {item.id: item.digest for one in listed for item in one.items}
        if renewed := store.keep(asked):
            told = f"{renewed} answers in '{kept}' are to pictures, questions or choices that have changed"
            console.print(f"{told}: asking again", soft_wrap=True)
        resumed, start = len(asked.keys() & store.known), time.perf_counter()
        unreadable = _predict_all(settings, bench, model, source, listed, store)
        if distributed.rank() == 0:
            numbers = {"resumed": resumed, "seconds": time.perf_counter() - start, "predictions": kept and str(kept)}
            _report(settings, bench, source, listed, [*skipped, *unreadable], store, numbers)
        distributed.barrier()


def _load(settings: Settings, bench: Benchmark) -> VisionLanguageModel | ImageTextModel:
    device = own_device(settings)
    if bench.stage == "stage2":
        return load_vision_language(settings.checkpoint, device, settings.quantize, settings.trust)
    if settings.quantize not in (None, "none"):
        raise UsageError(f"{settings.bench} needs no language model to quantize; leave --quantize out")
    model = load(settings.checkpoint, device, trust=settings.trust)
    if not isinstance(model, ImageTextModel):
        raise UsageError(
            f"'{settings.checkpoint}' is a checkpoint of stage two; {settings.bench} needs one of stage one"
        )
    return model


def _check(settings: Settings, bench: Benchmark) -> None:
    """Before hours of work, not after them."""
    writable(settings.output, settings.html, settings.submission, settings.predictions)
    find(PRESETS, settings.preset, "preset")
    if settings.server is not None and not bench.judged:
        raise UsageError(f"--server judges the answers of hallusionbench; leave it out for {settings.bench}")
    if settings.server is not None and settings.output is None:
        raise UsageError("a judge's answers are kept beside those of the model, and none is asked for twice; give -o")
    if settings.server is not None:
        Server(settings.server, settings.model)  # refuses what is no address
    if settings.model is not None and settings.server is None:
        raise UsageError(f"--model {settings.model} names a judge behind a server; give --server URL as well")
    bench.check(_ask(settings))
    if settings.beams is not None and not bench.writes:
        raise UsageError(f"{settings.bench} compares given answers and writes none; leave --beams out")
    if settings.lemmatize:
        if not bench.lemmatizes:
            raise UsageError(f"{settings.bench} does not compare answers by lemmas; leave --lemmatize out")
        load_lemmatizer()


def _ask(settings: Settings) -> AskOptions:
    decoding = {} if settings.beams is None else {"num_beams": settings.beams}
    return AskOptions(settings.preset, settings.prompt, decoding)


def _check_column(name: str | None, listed: list[ImageItems], known: Sequence[str] | None = None) -> None:
    if name is not None and known is not None and name not in known:
        raise UsageError(f"--by is '{name}', by which these results cannot be told apart; give {' or '.join(known)}")
    facts = [item.facts for one in listed for item in one.items]
    if name is not None and not any(name in known for known in facts):
        columns = sorted({column for known in facts for column in known})
        raise UsageError(f"--by is '{name}', but no record has it; they have {', '.join(columns) or 'none'}")


def made_by(
    settings: Settings, model: VisionLanguageModel | ImageTextModel, beside: Sequence[str] = ()
) -> dict[str, Any]:
    """Everything that predictions depend on; predictions of other weights, prompts or data are never mixed in.

    Args:
        beside: options of the data that change no prediction.
    """
    weights = fingerprint(model)[:16] if isinstance(model, ImageTextModel) else _weights(model)
    data = sorted(word for word in settings.data if word.partition("=")[0] not in beside)
    asked = {"bench": settings.bench, "data": data, "prompt": settings.prompt}
    asked |= {name: value for name in ("quantize", "beams") if (value := getattr(settings, name)) is not None}
    return asked | {"preset": settings.preset, "precision": settings.precision, "weights": weights}


def _weights(model: VisionLanguageModel) -> str:
    digest = hashlib.sha256()
    norms = [norm for norm in (model.frontend.norm, model.frontend.norm_second) if norm is not None]
    states = [part.state_dict() for part in (model.connector, *norms)]
    for name, tensor in [pair for state in states for pair in sorted(state.items())]:
        digest.update(name.encode())
        digest.update(raw(tensor))
    first = next(model.llm.parameters()).detach().flatten()[:4096].float().cpu()
    digest.update(first.numpy().tobytes())
    digest.update(str(sum(parameter.numel() for parameter in model.parameters())).encode())
    return digest.hexdigest()[:16]


def _predict_all(
    settings: Settings, bench: Benchmark, model: Any, source: Source, listed: list[ImageItems], store: Predictions
) -> list[dict[str, Any]]:
    """Ask what has not been answered yet; returns what could not be read or asked, on the first process."""
    done = distributed.gather_objects(set(store.known))[0]  # all share the same work, whatever each has read
    todo = [ImageItems(one.image, [item for item in one.items if item.id not in done]) for one in listed]
    portions = [
        ImageItems(one.image, one.items[start : start + settings.batch])
        for one in todo
        for start in range(0, len(one.items), settings.batch)
    ]
    own = _groups(portions, settings.batch)[distributed.rank() :: distributed.world()]
    images = [portion.image for portion in portions]
    unreadable: dict[tuple[str, str], dict[str, Any]] = {}
    said: list[dict[str, Any]] = []
    with store, autocast(model, settings.precision):
        reading = read_groups(source, images, model.frontend.strategy, own)
        for group in track(reading, f"asking ({settings.bench})", len(own), disable=distributed.rank() > 0):
            unreadable |= {(record["index"], ""): record for record in group.skipped}
            if group.tiles is not None:
                items = [portions[number].items for number in group.numbers]
                records, long = _predict(bench, model, group.tiles, items, _ask(settings))
                for row, item, reason in long:
                    index = str(images[group.numbers[row]].index)
                    told = {"index": index, "kind": "too long", "detail": f"{item.id}: {reason}"}
                    unreadable[index, item.id] = told
                store.add(records)
                said += records
    for part in distributed.collect_objects(said):
        store.known |= {record["id"]: record for record in part}
    found = {key: record for part in distributed.collect_objects(unreadable) for key, record in part.items()}
    places = {str(one.image.index): number for number, one in enumerate(listed)}
    return sorted(found.values(), key=lambda record: places[record["index"]])


def _predict(
    bench: Benchmark, model: Any, tiles: Tiles, items: list[list[Item]], ask: AskOptions
) -> tuple[list[dict[str, Any]], list[tuple[int, Item, str]]]:
    """Predict for some images; also returns the row, item and reason of each question that is too long."""
    try:
        return predict(bench, model, tiles, items, ask), []
    except TooLong:
        pass  # some are: one by one shows which
    records: list[dict[str, Any]] = []
    long = []
    for row, item in [(row, item) for row, group in enumerate(items) for item in group]:
        try:
            records += predict(bench, model, tiles[row : row + 1], [[item]], ask)
        except TooLong as error:
            long.append((row, item, str(error)))
    return records, long


def _groups(portions: list[ImageItems], batch: int) -> list[range]:
    """Images whose questions are answered together: as many as there is room for."""
    groups, start, size = [], 0, 0
    for number, portion in enumerate(portions):
        if size and size + len(portion.items) > batch:
            groups.append(range(start, number))
            start, size = number, 0
        size += len(portion.items)
    return [*groups, range(start, len(portions))] if size else groups


def _report(
    settings: Settings,
    bench: Benchmark,
    source: Source,
    listed: list[ImageItems],
    skipped: list[dict[str, Any]],
    store: Predictions,
    numbers: dict[str, Any],
) -> None:
    items = [item for one in listed for item in one.items]
    store.finish([item.id for item in items])
    scored = [item for item in items if item.known and item.id in store.known]
    measured = Measured({}, [])
    if scored and settings.server is not None:
        _judge(settings, bench, scored, [store.known[item.id] for item in scored])
    if scored:
        measured = bench.score(scored, [store.known[item.id] for item in scored], settings.by, settings.lemmatize)
    title = f"{settings.bench}: {len(listed)} images, {len(items)} asked, {len(scored)} scored, {settings.precision}, "
    title += f"{numbers['seconds']:.0f} s"
    head, rows = lines(measured, len(scored))
    lacking = "" if any(item.known for item in items) else bench.truth
    _show(title, head, rows, measured, skipped, lacking)
    if settings.submission is not None:
        if placed := sum(not item.has_id for item in items):
            console.print(f"{placed} of {len(items)} records have no id: the submission has their place in the data")
        settings.submission.write_text(bench.submission(items, store.known), encoding="utf-8")
    if settings.output is not None:
        result = {"bench": settings.bench, "checkpoint": settings.checkpoint, "made_by": store.made_by}
        result |= {"images": len(listed), "asked": len(items), "scored": len(scored), "skipped": skipped, **numbers}
        result |= {"processes": distributed.world(), "lemmatize": settings.lemmatize, "scores": measured.total}
        result |= {"missing": measured.missing, "groups": measured.groups}
        result |= {"intervals": measured.intervals, "notes": measured.notes}
        settings.output.write_text(json.dumps(result, indent=1), encoding="utf-8")
    if settings.html is not None:
        images = {item.id: one.image for one in listed for item in one.items}
        shown = scored or [item for item in items if item.id in store.known]
        page = answers.page(settings.checkpoint, title, (head, rows), source, images, shown, store.known, measured)
        settings.html.write_text(page, encoding="utf-8")


def _judge(settings: Settings, bench: Benchmark, items: list[Item], records: list[dict[str, Any]]) -> None:
    """Have a model behind a server judge the answers; its replies are kept as they come."""
    assert settings.server is not None
    assert settings.output is not None
    judge = Server(settings.server, settings.model)
    kept = KeptAnswers(judge, settings.output.with_suffix(".judged.jsonl"), judge.identity)
    with Bar(console=console) as bar:
        task = bar.add_task("asking the judge", total=len(items))
        kept.on_answers = partial(bar.advance, task)
        bench.judge(items, records, lambda prompts: kept([[] for _ in prompts], prompts), judge.name())


def _show(
    title: str, head: list[str], rows: list[list[str]], measured: Measured, skipped: list[dict[str, Any]], lacking: str
) -> None:
    if measured.total:
        table = Table(*head, title=title)
        for row in rows[:ROWS]:
            table.add_row(*row)
        console.print(table)
        if len(rows) > ROWS:
            console.print(f"and {len(rows) - ROWS} rows more; -o writes all of them")
    else:
        why = f"the data have no {lacking}; --submission writes what was said" if lacking else "none could be asked"
        console.print(f"{title}: nothing is scored, since {why}")
    for note in measured.notes:
        console.print(note, soft_wrap=True)
    for name, reason in measured.missing.items():
        console.print(f"{name} is not available: {reason}")
    print_skipped(skipped)


def lines(measured: Measured, count: int) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table: all, and each value of each column; scores in % (captions: times 100, as usual).

    A score with a 95 % interval has its ends behind it.
    """
    names = list(measured.total)

    def row(label: str, counted: float, scores: Mapping[str, float]) -> list[str]:
        ends = measured.intervals.get(label, {})
        shown = {name: f"{100 * scores[name]:.2f}" for name in names if name in scores}
        shown |= {name: f"{shown[name]} ({100 * low:.1f} to {100 * high:.1f})" for name, (low, high) in ends.items()}
        return [label, str(int(counted)), *(shown.get(name, "-") for name in names)]

    rows = [row(ALL, count, measured.total)]
    for column, values in measured.groups.items():
        rows += [row(f"{column}: {value}", scores["count"], scores) for value, scores in values.items()]
    return ["", "count", *names], rows if names else []
