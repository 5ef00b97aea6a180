"""`qformer quickstart`: both stages on drawn scenes with the shipped mini towers, measured, offline, in minutes.

Stage one starts from an untrained bridge. Stage two sees captions only, so every answer is zero-shot. The blind models
are trained alike behind one grey picture: what they answer right needs no eyes. Models as small as these gain little
from a second core, so two processes share the four trainings of stage two.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import sys
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table

import stages
from qformer import load
from qformer.config import by_prefix, load_config
from qformer.evaluation import retrieval, zero_shot
from qformer.evaluation.zero_shot import NEW, SIZE, UNSEEN, BlindScenes
from qformer.llm.prompts import vqa_preset
from qformer.model.assembly import build_image_text
from qformer.model.image_text import ImageTextModel
from qformer.model.vision_language import VisionLanguageModel
from qformer.scenes.scenes import Scenes
from stages import report
from stages.checking import check
from stages.loop import console
from stages.stage1 import validation_data

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

    from qformer.data.held_out import Held
    from qformer.schema import Config

CANDIDATES = 16
LOG = "beside.log"
LANGUAGE_MODELS = ("opt", "t5")
QUESTIONS, CAPTIONS = 490, 100
#: What a model is given over the configuration of stage two: the T5 needs longer to speak.
OWN = {"opt": (), "t5": ("train.steps=800", "train.lr=1.4e-3", "llm.visual_scale=8")}
#: Who does what: this process, and the one beside it. The T5's seeing run is the longest.
HERE, BESIDE = (("see", "t5"), ("guess", "opt")), (("see", "opt"), ("guess", "t5"))
#: What the blind twin is given over the configuration of stage two: one grey patch of the shipped ViT.
BLIND = ("data.train.name=qformer.evaluation.zero_shot:BlindScenes", "resolution.name=fixed", "resolution.size=20")


@dataclass
class Clock:
    """Seconds of each phase beside its budget."""

    start: float = field(default_factory=time.perf_counter)
    phases: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str, budget: int) -> Iterator[None]:
        console.rule(f"{name} (budget {budget} s)")
        begun = time.perf_counter()
        yield
        self.phases[name] = time.perf_counter() - begun
        console.print(f"{name}: {self.phases[name]:.0f} of {budget} s")

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start


def run(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Train and measure everything in `folder`; the same command again resumes. Returns what `results.json` holds.

    Args:
        overrides: `stage1.KEY=VALUE` or `stage2.KEY=VALUE` over the configurations of `configs/quickstart`.

    Raises:
        UsageError: an override of neither stage, or one that is refused.
    """
    clock = Clock()
    changes = by_prefix(overrides, ("stage1", "stage2"))
    first = load_config(Path("configs/quickstart/stage1.yaml"), [f"run={folder / 'stage1'}", *changes["stage1"]])
    exam = Exam(folder, changes["stage2"], QUESTIONS, CAPTIONS, _names_own(first))
    for config in (first, *(exam.config(name, folder / name) for name in LANGUAGE_MODELS)):
        check(config)
    held = validation_data(first)
    assert held is not None
    with clock.phase("stage one", 150):
        step0 = _before_training(first, held)
        stages.train(first)
    with clock.phase("retrieval", 10):
        bridge = load(first.run, trust=_names_own(first))
        assert isinstance(bridge, ImageTextModel)
        texts = [text for own in held.captions for text in own]
        scores = retrieval.score(bridge, held.groups, texts, CANDIDATES, show=True)
        recalls = {"step0": step0, **retrieval.recall_table(scores, held.captions)}
    with clock.phase("stage two", 140):
        seen, peak = _both(exam)
    results = {
        "retrieval": recalls,
        "vqa": {name: seen.vqa(name) for name in LANGUAGE_MODELS},
        "captions": seen.captions(),
        "seconds": clock.seconds,
        "phases": clock.phases,
        "peak_memory_gb": peak,
    }
    (folder / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    report.write(folder, results, held, scores, CANDIDATES, seen)
    _show(results, len(held), folder)
    return results


def bridge(folder: Path) -> Path:
    """The OPT bridge of a quickstart in `folder` and stage one below it, trained if it is not there. Returns its run.

    It is that of `run`, which measures it too.
    """
    stages.train(load_config(Path("configs/quickstart/stage1.yaml"), [f"run={folder / 'stage1'}"]))
    stages.train(
        load_config(
            Path("configs/quickstart/stage2.yaml"), [f"run={folder / 'opt'}", f"init={folder / 'stage1'}", *OWN["opt"]]
        )
    )
    return folder / "opt"


@dataclass
class Seen:
    """Answers and captions of each language model for unseen scenes and for new ones, and its blind twin's answers."""

    replies: dict[str, dict[str, list[zero_shot.Reply]]] = field(default_factory=dict)
    blind: dict[str, list[zero_shot.Reply]] = field(default_factory=dict)
    told: dict[str, dict[str, list[zero_shot.Told]]] = field(default_factory=dict)
    prompts: dict[str, tuple[str, str]] = field(default_factory=dict)  # of captions, of questions

    def join(self, other: Seen) -> Seen:
        """Of both, in the order of `LANGUAGE_MODELS`."""
        parts = [{**getattr(self, part.name), **getattr(other, part.name)} for part in fields(self)]
        return Seen(*({name: part[name] for name in LANGUAGE_MODELS} for part in parts))

    def vqa(self, name: str) -> dict[str, Any]:
        share, by_kind = zero_shot.accuracy(self.replies[name][UNSEEN])
        return {
            "accuracy": share,
            "blind": zero_shot.accuracy(self.blind[name])[0],
            "majority": zero_shot.majority(self.replies[name][UNSEEN]),
            "by_kind": by_kind,
            "new_combinations": zero_shot.accuracy(self.replies[name][NEW])[0],
        }

    def captions(self) -> dict[str, Any]:
        by_model = {name: zero_shot.named(told[UNSEEN]) for name, told in self.told.items()}
        new = {name: zero_shot.named(told[NEW]) for name, told in self.told.items()}
        return {"named": min(by_model.values()), "by_model": by_model, "new_combinations": new}


def _before_training(config: Config, held: Held) -> dict[str, float]:
    """Retrieval of the bridge that `stages.train` will start from."""
    torch.manual_seed(config.seed)
    model, _ = build_image_text(config)
    return retrieval.measure(model.eval(), held.groups, held.captions, 0)["itc"]


@dataclass
class Exam:
    """Stage two of one quickstart: where it stands, and how much is asked; `trust` where stage one has a class of
    the user's own.
    """

    folder: Path
    overrides: list[str]
    questions: int
    captions: int
    trust: bool = False

    def take(self, tasks: tuple[tuple[str, str], ...]) -> Seen:
        """Train and ask the models of some tasks: `see` with its eyes open, `guess` is the blind twin."""
        seen = Seen()
        for what, name in tasks:
            {"see": self._see, "guess": self._guess}[what](name, seen)
        return seen

    def _see(self, name: str, seen: Seen) -> None:
        """Train the bridge to one language model, question it, and let it tell what it sees."""
        model = self._train(name, self.folder / name)
        seen.replies[name], seen.told[name] = {}, {}
        family = model.llm.family
        seen.prompts[name] = zero_shot.CAPTION_PROMPTS[family], vqa_preset("paper", family).template
        for split in (UNSEEN, NEW):
            asked = Scenes(split, SIZE, count=self.questions, questions=True)
            seen.replies[name][split] = zero_shot.answer_all(model, asked)
            alone = Scenes(split, SIZE, count=self.captions, objects=(1, 1), seed=1)
            seen.told[name][split] = zero_shot.caption_all(model, alone)

    def _guess(self, name: str, seen: Seen) -> None:
        """Train the blind twin of `_see`, whose picture is one grey patch, and ask it the same."""
        model = self._train(name, self.folder / f"{name}-blind", *BLIND)
        seen.blind[name] = zero_shot.answer_all(model, BlindScenes(UNSEEN, SIZE, count=self.questions, questions=True))

    def config(self, name: str, run: Path, *changes: str) -> Config:
        """Of the run that trains the bridge to one language model."""
        common = [f"run={run}", f"init={self.folder / 'stage1'}", f"llm.path=mini:{name}", *OWN[name]]
        return load_config(Path("configs/quickstart/stage2.yaml"), [*common, *self.overrides, *changes])

    def _train(self, name: str, run: Path, *changes: str) -> VisionLanguageModel:
        config = self.config(name, run, *changes)
        stages.train(config, self.trust)
        model = load(run, trust=self.trust or _names_own(config))
        assert isinstance(model, VisionLanguageModel)
        return model


def _names_own(config: Config) -> bool:
    """Whether the user has typed a class of the own, which what is trained here will then name, too."""
    return any(":" in choice.name for choice in (config.vision, config.resolution))


def _both(exam: Exam) -> tuple[Seen, float]:
    """All tasks, in two processes with half of the threads each; what they saw, and the GB that both took."""
    threads = torch.get_num_threads()
    half = max(threads // 2, 1)
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    other = context.Process(target=_beside, args=(exam, half, send), daemon=False)
    other.start()
    send.close()
    torch.set_num_threads(half)
    try:
        seen = exam.take(HERE)
        with console.status("waiting for the other two models"):
            theirs, their_peak = receive.recv()
    except EOFError as error:
        raise RuntimeError(f"the process beside this one has failed; see {exam.folder / LOG}") from error
    except BaseException:
        other.terminate()  # it saves what it is at, like this one
        raise
    finally:
        other.join()
        torch.set_num_threads(threads)
    return seen.join(theirs), _peak_memory() + their_peak


def _beside(exam: Exam, threads: int, send: Connection) -> None:
    """What the second process does; what it has to say stands in a file."""
    torch.set_num_threads(threads)
    with (exam.folder / LOG).open("a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        send.send((exam.take(BESIDE), _peak_memory()))


def _peak_memory() -> float:
    """Of this process, in GB: what the system counts as resident at its highest."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9


def _show(results: dict[str, Any], scenes: int, folder: Path) -> None:
    table = Table(f"{scenes} scenes, new combinations; %", "image to text R@1", "text to image R@1", title="retrieval")
    for name, values in results["retrieval"].items():
        table.add_row(name, *(f"{100 * values[key]:.1f}" for key in ("i2t_r1", "t2i_r1")))
    console.print(table)
    table = Table("zero-shot answers, %", "seeing", "blind", "commonest", "seeing, new combinations", title="questions")
    for name, values in results["vqa"].items():
        shares = [values[key] for key in ("accuracy", "blind", "majority", "new_combinations")]
        table.add_row(name, *(f"{100 * share:.1f}" for share in shares))
    console.print(table)
    table = Table("colour and shape named, %", "unseen scenes", "new combinations", title="captions of one object")
    for name, share in results["captions"]["by_model"].items():
        table.add_row(name, f"{100 * share:.1f}", f"{100 * results['captions']['new_combinations'][name]:.1f}")
    console.print(table)
    console.print(f"{results['seconds']:.0f} s, {results['peak_memory_gb']:.1f} GB; look at {folder / 'report.html'}")
    console.print(f"next: qformer demo {folder / 'opt'}, or qformer caption {folder / 'opt'} IMAGE")
