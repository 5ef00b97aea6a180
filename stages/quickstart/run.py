"""`qformer quickstart`: train and evaluate both stages on drawn scenes with the mini towers, offline, in minutes.

Stage one starts from an untrained bridge. Stage two sees captions only, so every answer is zero-shot. The blind models
are trained the same way with one gray image, so their right answers need no vision. Models this small gain little from
a second core, so two processes share the four trainings of stage two.
"""

from __future__ import annotations

import json
import multiprocessing
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table

from qformer import load, stages
from qformer.config import by_prefix, load_config, shipped
from qformer.evaluation import retrieval
from qformer.model.assembly import build_image_text
from qformer.model.image_text import ImageTextModel
from qformer.stages.checking import check
from qformer.stages.features import validation_data
from qformer.stages.loop import console
from qformer.stages.quickstart import report
from qformer.stages.quickstart.clock import Clock, peak_memory
from qformer.stages.quickstart.exam import LANGUAGE_MODELS, OWN, Exam, names_own_class
from qformer.stages.stage1 import keep_tokens

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

    from qformer.data.held_out import HeldOut
    from qformer.schema import Config

CANDIDATES = 16
LOG = "beside.log"
QUESTIONS, CAPTIONS = 490, 100
#: The tasks of this process and of the second one. Training the seeing T5 takes longest.
HERE, BESIDE = (("see", "t5"), ("guess", "opt")), (("see", "opt"), ("guess", "t5"))


def run(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Train and evaluate everything in `folder`; the same command resumes. Returns the contents of `results.json`.

    Args:
        overrides: `stage1.KEY=VALUE` or `stage2.KEY=VALUE`, applied to the configurations of `configs/quickstart`.

    Raises:
        UsageError: an override that names neither stage, or that is not valid.
    """
    clock = Clock()
    changes = by_prefix(overrides, ("stage1", "stage2"))
    first = load_config(shipped()["quickstart/stage1.yaml"], [f"run={folder / 'stage1'}", *changes["stage1"]])
    exam = Exam(folder, changes["stage2"], QUESTIONS, CAPTIONS, names_own_class(first))
    for config in (first, *(exam.config(name, folder / name) for name in LANGUAGE_MODELS)):
        check(config)
    held = validation_data(first)
    assert held is not None
    with clock.phase("stage one", 140):
        step0 = _before_training(first, held)
        stages.train(first)
    with _second_process(exam) as theirs:
        with clock.phase("retrieval", 10):
            bridge = load(first.run, trust=names_own_class(first))
            assert isinstance(bridge, ImageTextModel)
            texts = [text for own in held.captions for text in own]
            groups = keep_tokens(held, bridge.frontend).groups
            scores = retrieval.score(bridge, groups, texts, CANDIDATES, show=True)
            recalls = {"step0": step0, **retrieval.recall_table(scores, held.captions)}
        with clock.phase("stage two", 130):
            seen = exam.take(HERE)
            with console.status("waiting for the other two models"):
                others, their_peak = theirs.recv()
    seen = seen.join(others)
    results = {
        "retrieval": recalls,
        "vqa": {name: seen.vqa(name) for name in LANGUAGE_MODELS},
        "captions": seen.captions(),
        "seconds": clock.seconds,
        "phases": clock.phases,
        "cpu_seconds": clock.cpu,
        "peak_memory_gb": peak_memory() + their_peak,
    }
    (folder / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    report.write(folder, results, held, scores, CANDIDATES, seen)
    _show(results, len(held), folder)
    return results


def bridge(folder: Path) -> Path:
    """Train stage one and the OPT bridge of a quickstart in `folder`, unless they exist; returns the run of the bridge.

    The runs are those of `run`, which also evaluates them.
    """
    stages.train(load_config(shipped()["quickstart/stage1.yaml"], [f"run={folder / 'stage1'}"]))
    stages.train(
        load_config(
            shipped()["quickstart/stage2.yaml"], [f"run={folder / 'opt'}", f"init={folder / 'stage1'}", *OWN["opt"]]
        )
    )
    return folder / "opt"


def _before_training(config: Config, held: HeldOut) -> dict[str, float]:
    """Measure the retrieval of the bridge that `stages.train` will start from."""
    torch.manual_seed(config.seed)
    model, _ = build_image_text(config)
    return retrieval.measure(model.eval(), held.groups, held.captions, 0)["itc"]


@contextmanager
def _second_process(exam: Exam) -> Iterator[Connection]:
    """Run the tasks `BESIDE` in another process, which sends its results; each has half of the threads until the end.

    It begins while this process still measures retrieval, since its imports alone take seconds.
    """
    threads = torch.get_num_threads()
    half = max(threads // 2, 1)
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    other = context.Process(target=_beside, args=(exam, half, send), daemon=False)
    other.start()
    send.close()
    torch.set_num_threads(half)
    try:
        yield receive
    except EOFError as error:
        raise RuntimeError(f"the second process failed; see {exam.folder / LOG}") from error
    except BaseException:
        other.terminate()  # it saves its current step, as this process does
        raise
    finally:
        other.join()
        torch.set_num_threads(threads)


def _beside(exam: Exam, threads: int, send: Connection) -> None:
    """Run the tasks of the second process, with its output in a log file."""
    torch.set_num_threads(threads)
    with (exam.folder / LOG).open("a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        send.send((exam.take(BESIDE), peak_memory()))


def _show(results: dict[str, Any], scenes: int, folder: Path) -> None:
    table = Table(f"{scenes} scenes, new combinations; %", "image to text R@1", "text to image R@1", title="retrieval")
    for name, values in results["retrieval"].items():
        table.add_row(name, *(f"{100 * values[key]:.1f}" for key in ("i2t_r1", "t2i_r1")))
    console.print(table)
    table = Table("zero-shot answers, %", "seeing", "blind", "most common", "new combinations", title="questions")
    for name, values in results["vqa"].items():
        shares = [values[key] for key in ("accuracy", "blind", "majority", "new_combinations")]
        table.add_row(name, *(f"{100 * share:.1f}" for share in shares))
    console.print(table)
    table = Table("color and shape named, %", "unseen scenes", "new combinations", title="captions of one object")
    for name, share in results["captions"]["by_model"].items():
        table.add_row(name, f"{100 * share:.1f}", f"{100 * results['captions']['new_combinations'][name]:.1f}")
    console.print(table)
    console.print(f"{results['seconds']:.0f} s, {results['peak_memory_gb']:.1f} GB; open {folder / 'report.html'}")
    console.print(f"next: qformer demo {folder / 'opt'}, or qformer caption {folder / 'opt'} IMAGE")
