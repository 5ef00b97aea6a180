"""Captions against reference captions, as the COCO caption evaluation scores them (Chen et al. 2015, arXiv:1504.00325).

BLEU-1..4, ROUGE-L and CIDEr (clipped and with the length penalty, CIDEr-D, which is what is published as CIDEr of COCO)
are computed by the scorers of `pycocoevalcap` on the tokens of `qformer.evaluation.ptb`, so none of them needs Java.
METEOR and SPICE are Java programs: they run where Java and their files are, and are reported as missing elsewhere.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from qformer.evaluation.ptb import tokenize
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

PACKAGE = "pycocoevalcap"
INSTALL = "captions are scored by pycocoevalcap, which is not installed; run: pip install -e '.[metrics]'"
NAMES = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr", "METEOR", "SPICE")
PATIENCE = 3600  # seconds that a Java program may take
CORENLP = "stanford-corenlp-3.6.0"


@dataclass(frozen=True)
class CaptionScores:
    """What the captions of a set of images earn.

    Attributes:
        total: of the set, by the names of `NAMES`; those that could be computed.
        each: of every image, BLEU-4, ROUGE-L and CIDEr, in the order of the images.
        missing: why the others could not be computed, by name.
    """

    total: dict[str, float]
    each: dict[str, list[float]]
    missing: dict[str, str]


def require_scorers() -> None:
    """Before hours of work, not behind them.

    Raises:
        UsageError: `pycocoevalcap` is not installed.
    """
    if find_spec(PACKAGE) is None:
        raise UsageError(INSTALL)


def score_captions(said: Sequence[str], known: Sequence[Sequence[str]], java: bool = True) -> CaptionScores:
    """One caption for each image against its reference captions.

    BLEU compares counts of the whole set, and CIDEr weighs words by the references of the whole set: the scores of a
    part are not those of its images in a larger set.

    Args:
        said: a caption per image. known: its references, one or more, unprocessed like `said`.
        java: try METEOR and SPICE as well.

    Raises:
        UsageError: `pycocoevalcap` is not installed.
        ValueError: no images, images without references, or another number of captions than of images.
    """
    require_scorers()
    if not said or not all(known):
        raise ValueError("nothing to score: give at least one image, and at least one reference for each")
    references = _tokens(known)
    captions = {number: [text] for number, text in enumerate(tokenize(said))}
    if captions.keys() != references.keys():
        raise ValueError(f"got {len(captions)} captions for {len(references)} images; give one for each")
    total, each = _python_scores(references, captions)
    missing: dict[str, str] = {}
    for name, compute in (("METEOR", _meteor), ("SPICE", _spice)) if java else ():
        try:
            total[name] = compute(references, captions)
        except _Missing as reason:
            missing[name] = str(reason)
    return CaptionScores(total, each, missing)


Texts = dict[int, list[str]]


class _Missing(Exception):
    """Why a score cannot be had here."""


def _tokens(known: Sequence[Sequence[str]]) -> dict[int, list[str]]:
    tokens = iter(tokenize(text for references in known for text in references))
    return {number: [next(tokens) for _ in references] for number, references in enumerate(known)}


def _python_scores(references: Texts, captions: Texts) -> tuple[dict[str, float], dict[str, list[float]]]:
    scorers = {name: import_module(f"{PACKAGE}.{name}.{name}") for name in ("bleu", "rouge", "cider")}
    bleu, bleu_each = scorers["bleu"].Bleu(4).compute_score(references, captions, verbose=0)
    rouge, rouge_each = scorers["rouge"].Rouge().compute_score(references, captions)
    cider, cider_each = scorers["cider"].Cider().compute_score(references, captions)
    values = dict(zip(NAMES, [*bleu, rouge, cider], strict=False))
    each = {"BLEU-4": bleu_each[3], "ROUGE-L": rouge_each, "CIDEr": cider_each}
    return {name: float(value) for name, value in values.items()}, {
        name: [float(value) for value in scores] for name, scores in each.items()
    }


def _meteor(references: Texts, captions: Texts) -> float:
    """METEOR 1.5. Its program first counts what matches in each line and then combines the counts."""
    folder = _folder("meteor")
    for part in ("meteor-1.5.jar", "data/paraphrase-en.gz"):
        if not (folder / part).is_file():
            raise _Missing(f"there is no {folder / part}; install pycocoevalcap again")
    command = ["java", "-jar", "-Xmx2G", "meteor-1.5.jar", "-", "-", "-stdio", "-l", "en", "-norm"]
    lines = [
        " ||| ".join(["SCORE", *references[number], text.replace("|||", "").replace("  ", " ")])
        for number, (text,) in captions.items()
    ]
    counts = _java(command, folder, lines)
    if len(counts) != len(lines):
        raise _Missing(f"METEOR answered {len(counts)} of {len(lines)} lines")
    scores = _java(command, folder, [" ||| ".join(["EVAL", *counts])])
    try:
        return float(scores[-1])
    except (IndexError, ValueError) as error:
        raise _Missing(f"METEOR gave no score ({scores[-1:]})") from error


def _spice(references: Texts, captions: Texts) -> float:
    """SPICE 1.0: the mean F-score of scene graphs. It never downloads; its models are fetched by hand."""
    folder = _folder("spice")
    for part in (f"{CORENLP}.jar", f"{CORENLP}-models.jar"):
        if not (folder / "lib" / part).is_file():
            raise _Missing(
                f"SPICE needs {part}, which pycocoevalcap does not bring; "
                f"'python -m {PACKAGE}.spice.get_stanford_models' downloads it, then run the same command again"
            )
    with TemporaryDirectory() as scratch:
        asked, found = Path(scratch) / "captions.json", Path(scratch) / "scores.json"
        rows = [{"image_id": n, "test": text, "refs": references[n]} for n, (text,) in captions.items()]
        asked.write_text(json.dumps(rows), encoding="utf-8")
        command = ["java", "-jar", "-Xmx8G", "spice-1.0.jar", str(asked), "-cache", scratch, "-out", str(found)]
        _java([*command, "-silent"], folder, [])
        try:
            scores = [float(row["scores"]["All"]["f"]) for row in json.loads(found.read_text(encoding="utf-8"))]
            return sum(scores) / len(scores)
        except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
            raise _Missing(f"SPICE wrote no scores ({error})") from error


def _folder(name: str) -> Path:
    if shutil.which("java") is None:
        raise _Missing("Java is not installed")
    spec: Any = find_spec(PACKAGE)
    return Path(next(iter(spec.submodule_search_locations))) / name


def _java(command: list[str], folder: Path, lines: list[str]) -> list[str]:
    """What a program prints when it has read the lines."""
    text = "".join(f"{line}\n" for line in lines)
    try:
        done = subprocess.run(command, cwd=folder, input=text.encode(), capture_output=True, timeout=PATIENCE)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _Missing(f"{command[3]} did not end ({error})") from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise _Missing(f"{command[3]} failed ({said[0][:200] if said else done.returncode})")
    return done.stdout.decode(errors="replace").splitlines()
