"""Remains of runs as plain data: scores of their answers, curves, retrieval of their stage one."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qformer.checkpoints import folder as checkpoint
from qformer.evaluation.linear import LINEAR
from qformer.files.records import LINEAR_MAP, LinearMapNumbers, Metrics, read_lines, read_object
from qformer.stages.compare.runs import REFUSED, read_answers, read_result
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qformer.schema import Config
    from qformer.stages.compare.runs import Exam, Run

FILE = "comparison.json"
RECALLS = ("i2t_r1", "t2i_r1", "i2t_r10", "t2i_r10")


def of_run(run: Run, exam: Exam) -> dict[str, Any]:
    """Scores of every question by view, and the curve of a run; without scores where it came to nothing."""
    result = read_result(run.folder) or {"status": REFUSED, "reason": "it has not run"}
    entry: dict[str, Any] = {"seed": run.seed, "status": result["status"], "reason": result.get("reason", "")}
    entry |= {"folder": f"{run.folder.parent.name}/{run.folder.name}", "seconds": result.get("seconds", 0.0)}
    for view in exam.views:
        records = read_answers(run, exam, view)
        if records is not None:
            entry[view] = [exam.score(number, record) for number, record in enumerate(records)]
            entry[f"{view}_refused"] = sum("refused" in record for record in records)
    same = result.get("exam") in (None, "", exam.digest)  # not of a file that has changed since
    points, keys = _validations(run.config) if same else [], ("step", "loss", "accuracy")
    return entry | {"curve": [{key: one[key] for key in keys if key in one} for one in points]}


def _validations(config: Config) -> list[dict[str, Any]]:
    """Held-out numbers of a run, by step; none where a former comparison has trained it beside other held-out data."""
    folder = Path(config.run)
    with suppress(UsageError):  # it has no checkpoint, or none that can be read
        data = checkpoint.read_config(folder, trust=True).data
        if (data.validation, data.validation_size) != (config.data.validation, config.data.validation_size):
            return []
    file = folder / "metrics.jsonl"
    records = read_lines(file, Metrics) if file.is_file() else []
    return [record for record in records if record["kind"] == "validation"]


def retrieval(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Recall in 0..1 of each stage one, and of the linear map of its frozen towers on the same pictures."""
    found = []
    folders = {run.stage_one.run: (run.seed, run.stage_one) for run in runs if run.stage_one is not None}
    for folder, (seed, config) in folders.items():
        systems = list(dict.fromkeys(one.system for one in runs if one.stage_one and one.stage_one.run == folder))
        bridge = _recalls(config)
        if bridge:
            found.append({"systems": systems, "seed": seed, "bridge": bridge, "linear": _linear(Path(folder))})
    return found


def _recalls(config: Config) -> dict[str, float]:
    last: dict[str, Any] = next(reversed(_validations(config)), {})
    best = "reranked" if f"reranked_{RECALLS[0]}" in last else "itc"
    return {key: last[f"{best}_{key}"] for key in RECALLS if f"{best}_{key}" in last}


def _linear(folder: Path) -> dict[str, float] | None:
    """Recall of the linear map; None where it could not be solved."""
    if not (folder / LINEAR_MAP).is_file():
        return None
    try:
        kept = read_object(folder / LINEAR_MAP, LinearMapNumbers)[LINEAR]
    except UsageError:
        return None
    return {key: kept[key] for key in RECALLS if key in kept}
