"""`qformer probe A B`: results of earlier runs side by side, with the differences to the first and their intervals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from qformer.figures.probe_runs import comparison_page, comparison_table
from qformer.figures.probes import NONE
from qformer.files.records import Form, read_object, replace_text, to_json, writing
from qformer.probing.comparison import compare
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

RESULT, PAGE, COMPARISON = "probes.json", "comparison.html", "comparison.json"
MOST = 1 << 31  # answers, pixels and objects; beyond it numbers are no counts
Count = Annotated[int, Field(ge=0, lt=MOST)]
Answers = dict[Annotated[str, Field(pattern=rf"^({NONE}|[0-9]{{1,9}})$")], Count]
Mean = Annotated[float, Field(ge=0, lt=MOST)] | None
Three = Field(min_length=3, max_length=3)


class PositionEntry(Form):
    """Counting by position in `probes.json`."""

    objects: Count
    mean: Annotated[list[Annotated[list[Mean], Three]], Three]
    answers: Answers
    cells: Annotated[list[Answers], Field(min_length=9, max_length=9)] | None = None


class RateEntry(Form):
    """Answers of a kind in `probes.json`, and those that were asked for."""

    count: Count
    asked: Count


class Probes(Form):
    """Parts of a `probes.json` that are compared; probes that were not made are missing."""

    name: str
    tile: Annotated[int, Field(gt=0, lt=MOST)]
    seed: int | None = None
    counting_position: PositionEntry | None = None
    counting_size: dict[str, Answers] | None = None
    padding_baseline: dict[str, dict[str, RateEntry]] | None = None


def find_results(paths: Sequence[str]) -> list[Path]:
    """Files of results that paths name, each the file or its folder; none unless all of several do."""
    found = [Path(path, RESULT) if Path(path).is_dir() else Path(path) for path in paths]
    return found if len(found) > 1 and all(one.suffix == ".json" and one.is_file() for one in found) else []


def compare_results(files: Sequence[Path], output: Path | None, as_json: bool) -> None:
    """Print the comparison, and write it with its page to a folder if one is given.

    Raises:
        UsageError: a file is no result of `qformer probe`.
    """
    results = [_read(file) for file in files]
    names = _names(files)
    rows = compare(results)
    if not rows:
        raise UsageError(f"'{files[0]}' and the others hold no answers; give results of probes that asked somebody")
    warnings = _warnings(results, names)
    told = {
        "runs": [
            {"run": name, "of": result["name"], "tile": result["tile"], "seed": result.get("seed")}
            for name, result in zip(names, results, strict=True)
        ],
        "rows": [row.record() for row in rows],
        "warnings": warnings,
    }
    if output is not None:
        with writing(output):
            output.mkdir(parents=True, exist_ok=True)
            replace_text(output / COMPARISON, json.dumps(told, indent=1) + "\n")
            replace_text(output / PAGE, comparison_page(results, names, rows, warnings))
    if as_json:
        print(to_json(told))
        return
    head, table = comparison_table(rows, names)
    widths = [max(map(len, column)) for column in zip(head, *table, strict=True)]
    for row in [head, *table]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for line in [*warnings, *([f"written to {output / PAGE}"] if output is not None else [])]:
        print(line)


def _read(file: Path) -> dict[str, Any]:
    """A result, looked through once, so that a broken one is named.

    Raises:
        UsageError: it is no result.
    """
    try:
        result = read_object(file, Probes)
        compare([result])
    except UsageError as error:
        raise UsageError(f"{error}; give {RESULT} of qformer probe, or the folder that it wrote") from error
    except (ValueError, KeyError, OverflowError, ZeroDivisionError) as error:
        raise UsageError(
            f"'{file}' is no result of qformer probe ({error!r:.80}); give {RESULT}, or the folder that it wrote"
        ) from error
    return result


def _names(files: Sequence[Path]) -> list[str]:
    """Shortest names that tell the files apart, from their folders."""
    parts = [
        file.parent.parts if file.name == RESULT else file.with_suffix("").parts for file in map(Path.absolute, files)
    ]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-depth:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{number}" for number, _ in enumerate(files, start=1)]


def _warnings(results: Sequence[dict[str, Any]], names: Sequence[str]) -> list[str]:
    """Sentences on what the runs do not share."""
    told = []
    for key, what in (
        ("tile", "tiles of other sizes, so pictures of other sizes"),
        ("seed", "other drawings (--seed)"),
    ):
        if len({str(result.get(key)) for result in results}) > 1:
            values = ", ".join(f"{name} {result.get(key)}" for name, result in zip(names, results, strict=True))
            told.append(f"the runs had {what}: {values}")
    counted = [one["objects"] for result in results if (one := result.get("counting_position"))]
    if len(set(counted)) > 1:
        told.append(f"the runs counted different numbers of objects: {', '.join(map(str, counted))}")
    return told
