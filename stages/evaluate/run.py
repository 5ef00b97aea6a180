"""`qformer eval`: a checkpoint on the benchmark of a name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qformer.evaluation.benchmarks import choose
from qformer.evaluation.retrieval import Retrieval
from qformer.stages.evaluate.language import evaluate_language
from qformer.stages.evaluate.photo_pairs import evaluate_photo_pairs
from qformer.stages.evaluate.retrieval import evaluate_retrieval
from qformer.suites.mmvp_statements import MmvpVlm
from qformer.types import UsageError

if TYPE_CHECKING:
    from qformer.stages.evaluate.settings import Settings


def evaluate(settings: Settings) -> None:
    """Measure, print, and write what was asked for.

    Raises:
        UsageError: an unknown benchmark; see `evaluate_retrieval`, `evaluate_photo_pairs`, `evaluate_language`.
    """
    bench = choose(settings.bench)
    if settings.others and not isinstance(bench, MmvpVlm):
        raise UsageError(
            f"'{settings.checkpoint}' and '{settings.others[0]}' were given; {settings.bench} measures one model at a "
            "time, and mmvp-vlm alone puts several into a table"
        )
    if isinstance(bench, Retrieval):  # compares all images with all texts; the others look at one image at a time
        evaluate_retrieval(settings, bench)
    elif isinstance(bench, MmvpVlm):
        evaluate_photo_pairs(settings)
    else:
        evaluate_language(settings, bench)
