"""Runs of a comparison: a system trained with one seed, and what it answers; both stay on disk and are never redone."""

from __future__ import annotations

import json
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout

from qformer import stages
from qformer.checkpoints import folder as checkpoint
from qformer.checkpoints.loading import load_vision_language
from qformer.data import sources
from qformer.evaluation.benchmarks import likeliest
from qformer.evaluation.choice import choice_losses
from qformer.evaluation.predictions import Predictions
from qformer.fields import Choice
from qformer.files.records import Form, append_record, read_object, replace_text
from qformer.llm.prompts import vqa_prompt
from qformer.stages.compare.questions import METRICS
from qformer.stages.compare.samples import Asked, Grayed, digest
from qformer.stages.features import fill
from qformer.stages.trainer_state import NonFiniteLoss, NonFiniteWeights
from qformer.types import BadSample, Tiles, TooLong, UsageError
from qformer.videos.rows import cut_row, read_row

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from qformer.data.base import Source
    from qformer.model.vision_language import VisionLanguageModel
    from qformer.schema import Config
    from qformer.stages.compare.questions import Question

RESULT, LOG, CLAIM = "result.json", "log.txt", "claim.lock"
TRAINED, DIVERGED, REFUSED, FAILED = "trained", "diverged", "refused", "failed"
FINAL = (TRAINED, DIVERGED)  # of which a second try would say the same
TOGETHER = 16  # questions that are asked at once


class Result(Form):
    """Contents of `RESULT`."""

    status: str
    reason: str = ""
    seconds: float = 0.0
    weights: str = ""
    exam: str = ""


@dataclass(frozen=True)
class Exam:
    """Questions that all runs are asked.

    Attributes:
        data: source of the questions.
        blind: ask them with gray pictures, too.
        choose: take the likeliest of the choices that a question brings, in place of what is written.
        metric: one of `qformer.stages.compare.questions.METRICS`.
    """

    data: Choice
    questions: tuple[Question, ...]
    blind: bool = False
    choose: bool = False
    metric: str = "accuracy"

    @cached_property
    def digest(self) -> str:
        """Hash of all questions, with their pictures and accepted answers."""
        asked: list[Any] = [[one.digest, one.text, one.accepted] for one in self.questions]
        return digest([asked, [one.choices for one in self.questions]] if self.choose else asked)

    def score(self, number: int, record: dict[str, Any]) -> float:
        """Score an answer to a question, in 0..1; a refused one nothing."""
        rule = METRICS[self.metric]
        return 0.0 if "refused" in record else float(rule(record["said"], self.questions[number].accepted))

    @property
    def views(self) -> tuple[str, ...]:
        """Kinds of what is shown: `answers` to the pictures, and `blind` ones to gray."""
        return ("answers", "blind") if self.blind else ("answers",)

    def open(self, view: str) -> Source:
        """The samples of the questions, as this view shows them."""
        asked = Asked(sources.for_run(self.data), [one.place for one in self.questions])
        return Grayed(asked) if view == "blind" else asked

    def file(self, folder: Path, view: str) -> Path:
        """File of the answers of a run."""
        return folder / f"{view}-{self.digest}.jsonl"


@dataclass(frozen=True)
class Run:
    """A system with one seed: configurations that are ready to train, in folders of their own."""

    system: str
    seed: int
    config: Config
    stage_one: Config | None = None

    @property
    def folder(self) -> Path:
        return Path(self.config.run)


def read_result(folder: Path) -> dict[str, Any] | None:
    """Read what became of a run; None: it has not ended, or its record is damaged."""
    try:
        return read_object(folder / RESULT, Result) if (folder / RESULT).is_file() else None
    except UsageError:
        return None


def forget_faults(runs: list[Run]) -> None:
    """Let runs that were refused or failed be tried again: their data or code may have changed."""
    for run in runs:
        for config in (run.config, run.stage_one):
            if config is None:
                continue
            found = read_result(Path(config.run))
            if found is None or found["status"] not in FINAL:
                (Path(config.run) / RESULT).unlink(missing_ok=True)


def is_done(run: Run, exam: Exam) -> bool:
    """True where nothing is left to train or to ask."""
    found = read_result(run.folder)
    return found is not None and (found["status"] != TRAINED or all(read_answers(run, exam, v) for v in exam.views))


def read_answers(run: Run, exam: Exam, view: str) -> list[dict[str, Any]] | None:
    """The records of all answers of a run, `said` and, for what it could not be shown, `refused`; None: not all."""
    file = exam.file(run.folder, view)
    if not file.is_file():
        return None
    try:
        known = Predictions(file, _made_by(run, exam, view)).known
    except UsageError:  # of weights that are no more
        file.unlink()
        return None
    found = [known.get(str(number)) for number in range(len(exam.questions))]
    return None if None in found else [record for record in found if record is not None]


def _made_by(run: Run, exam: Exam, view: str) -> dict[str, Any]:
    found = read_result(run.folder) or {}
    return {"weights": found.get("weights", ""), "questions": exam.digest, "view": view}


def carry_out(run: Run, exam: Exam) -> bool:
    """Train and ask whatever is not done yet; False: another process is at it, or at its stage one.

    Raises:
        UsageError: the disk is full, or cannot be written.
    """
    try:
        with _claimed(run.folder):
            if read_result(run.folder) is None and (run.stage_one is None or _stage_one(run.stage_one, run.folder)):
                _train(run.config, exam.digest)
            if (read_result(run.folder) or {}).get("status") == TRAINED:
                with _logged(run.folder), _guarded(run.folder):
                    _ask_all(run, exam)
    except Timeout:
        return False
    except OSError as error:
        raise UsageError(
            f"{error}; what is finished stays: free some space for '{run.folder.parent.parent}' and run the same "
            "command again"
        ) from error
    return True


def _stage_one(config: Config, folder: Path) -> bool:
    """Train the stage one that runs share, once; False: it came to nothing, which is written down for the run."""
    with _claimed(Path(config.run)):
        if read_result(Path(config.run)) is None:
            _train(config)
        found = read_result(Path(config.run))
    assert found is not None
    if found["status"] != TRAINED:
        _write(folder, found["status"], f"in stage one: {found['reason']}")
    return found["status"] == TRAINED


def _train(config: Config, exam: str = "") -> None:
    folder, start = Path(config.run), time.perf_counter()
    with _logged(folder), _guarded(folder):
        trained = checkpoint.find(stages.train(config))
        weights = checkpoint.read_meta(trained)["checksums"][checkpoint.WEIGHTS]
        _write(folder, TRAINED, seconds=round(time.perf_counter() - start, 1), weights=weights, exam=exam)


def _write(folder: Path, status: str, reason: str = "", **more: Any) -> None:
    replace_text(folder / RESULT, json.dumps({"status": status, "reason": reason, **more}))


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / CLAIM)
    with suppress(NotImplementedError):  # some network file systems have no locks
        lock.acquire(timeout=0)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _logged(folder: Path) -> Iterator[None]:
    """Put what is printed into the folder; one thread computes, so that no digit depends on the machine's load."""
    threads = torch.get_num_threads()
    with (folder / LOG).open("a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


@contextmanager
def _guarded(folder: Path) -> Iterator[None]:
    """Write down why a run ended early, whatever it was but the disk; other runs go on."""
    try:
        yield
    except (NonFiniteLoss, NonFiniteWeights) as error:
        _write(folder, DIVERGED, str(error))
    except OSError:
        raise
    except UsageError as error:
        _write(folder, REFUSED, str(error))
    except Exception as error:  # of a class of the user, say
        append_record(folder / LOG, {"error": repr(error)})
        _write(folder, FAILED, f"{type(error).__name__}: {error}")


def _ask_all(run: Run, exam: Exam) -> None:
    todo = [view for view in exam.views if read_answers(run, exam, view) is None]
    if not todo:
        return
    own = any(":" in choice.name for choice in (run.config.vision, run.config.resolution, run.config.connector))
    model = load_vision_language(str(run.folder), trust=own)  # classes that the user's own configuration names
    for view in todo:
        with Predictions(exam.file(run.folder, view), _made_by(run, exam, view)) as kept:
            _ask(model, run.config, exam, view, kept)
        kept.finish([str(number) for number in range(len(exam.questions))])


def _ask(model: VisionLanguageModel, config: Config, exam: Exam, view: str, kept: Predictions) -> None:
    """Ask by groups that are always the same, so that an interruption changes no digit."""
    reader = _Reader(model, config, exam.open(view), f"{view}-{exam.digest}")
    count = len(exam.questions)
    for group in (range(start, min(start + TOGETHER, count)) for start in range(0, count, TOGETHER)):
        if all(str(number) in kept.known for number in group):
            continue
        rows: dict[int, Tiles] = {}
        said: dict[int, dict[str, Any]] = {}
        for number in group:
            try:
                rows[number] = reader(number)
                model.require_positions(rows[number].plans[0])
            except BadSample as bad:
                rows.pop(number, None)
                said[number] = {"said": "", "refused": bad.detail}
        said |= _answers(model, rows, exam)
        kept.add([{"id": str(number), "of": exam.questions[number].digest, **said[number]} for number in group])


def _answers(model: VisionLanguageModel, rows: dict[int, Tiles], exam: Exam) -> dict[int, dict[str, Any]]:
    """The records of questions by their numbers; one that is too long to be asked says so."""
    chosen = {number: tiles for number, tiles in rows.items() if exam.choose and exam.questions[number].choices}
    written = {number: tiles for number, tiles in rows.items() if number not in chosen}
    found: dict[int, dict[str, Any]] = {}
    for part, ask in ((chosen, _choose), (written, _write_answers)):
        try:
            found |= ask(model, part, [exam.questions[number] for number in part]) if part else {}
        except TooLong as error:
            if len(rows) == 1:
                return {number: {"said": "", "refused": str(error)} for number in rows}
            for number, tiles in part.items():
                found |= _answers(model, {number: tiles}, exam)
    return found


def _write_answers(
    model: VisionLanguageModel, rows: dict[int, Tiles], asked: Sequence[Question]
) -> dict[int, dict[str, Any]]:
    said = model.answer(Tiles.join(list(rows.values())), [one.text for one in asked])
    return {number: {"said": one} for number, one in zip(rows, said, strict=True)}


@torch.no_grad()
def _choose(model: VisionLanguageModel, rows: dict[int, Tiles], asked: Sequence[Question]) -> dict[int, dict[str, Any]]:
    """The likeliest of the choices of each question, as in `qformer eval --bench choice`."""
    prompts = [vqa_prompt(one.text, "paper", model.llm.wording) for one in asked]
    seen = model.prefix(Tiles.join(list(rows.values())), [one.text for one in asked])
    losses = choice_losses(model, seen, prompts, [one.choices for one in asked])
    return {
        number: {"said": one.choices[likeliest(sums)], "losses": sums}
        for number, one, (sums, _) in zip(rows, asked, losses, strict=True)
    }


class _Reader:
    """Tiles of the samples of a source, with stored tokens where the image encoder is frozen."""

    def __init__(self, model: VisionLanguageModel, config: Config, source: Source, name: str) -> None:
        self.source, self.strategy, self.store = source, model.frontend.strategy, None
        if config.data.features is not None:
            path = str(Path(config.data.features.path) / name)
            features = config.data.features.model_copy(update={"path": path, "crops": 1})
            data = config.data.model_copy(update={"features": features, "crop": (1.0, 1.0), "flip": 0.0})
            device = model.frontend.device
            self.store = fill(config.model_copy(update={"data": data}), source, self.strategy, model.frontend.encoder)
            model.frontend.to(device)

    def __call__(self, number: int) -> Tiles:
        sample = self.source[number]
        if self.store is not None:
            return self.store.read(number, 0, sample, self.strategy)
        return cut_row(read_row(sample.image, self.strategy), self.strategy)
