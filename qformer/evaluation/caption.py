"""Scores of captions against references, as in the COCO caption evaluation (Chen et al. 2015, arXiv:1504.00325).

BLEU-1..4, ROUGE-L and CIDEr (CIDEr-D with clipping and length penalty, which is published as CIDEr on COCO) are
computed by the scorers of `pycocoevalcap` on the tokens of `qformer.metrics.ptb`, so they do not need Java. METEOR
and SPICE are Java programs: they run if Java and their files are installed, and are reported as missing otherwise.
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

from qformer.metrics.ptb import tokenize
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

PACKAGE = "pycocoevalcap"
INSTALL = "captions are scored by pycocoevalcap, which is not installed; run: pip install -e '.[metrics]'"
NAMES = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr", "METEOR", "SPICE")
PATIENCE = 3600  # seconds until a Java program is stopped
CORENLP = "stanford-corenlp-3.6.0"


@dataclass(frozen=True)
class CaptionScores:
    """Scores of the captions of a set of images.

    Attributes:
        total: scores of the set, by the names of `NAMES`, as far as they could be computed.
        each: BLEU-4, ROUGE-L and CIDEr of every image, in the order of the images.
        missing: the reason for each score that could not be computed, by name.
    """

    total: dict[str, float]
    each: dict[str, list[float]]
    missing: dict[str, str]


def require_scorers() -> None:
    """Check that the scorers are installed, before hours of work.

    Raises:
        UsageError: `pycocoevalcap` is not installed.
    """
    if find_spec(PACKAGE) is None:
        raise UsageError(INSTALL)


def score_captions(predictions: Sequence[str], known: Sequence[Sequence[str]], java: bool = True) -> CaptionScores:
    """Score one caption for each image against its references.

    BLEU uses counts of the whole set, and CIDEr weights words by the references of the whole set, so the scores of a
    subset differ from those of the same images in a larger set.

    Args:
        predictions: one caption per image.
        known: the references of each image, one or more, not preprocessed either.
        java: also try METEOR and SPICE.

    Raises:
        UsageError: `pycocoevalcap` is not installed.
        ValueError: no images, images without references, or a number of captions that differs from that of images.
    """
    require_scorers()
    if not predictions or not all(known):
        raise ValueError("nothing to score: give at least one image, and at least one reference for each")
    references = _tokens(known)
    captions = {number: [text] for number, text in enumerate(tokenize(predictions))}
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
    """A score cannot be computed on this machine; the message is the reason."""


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
    """Compute METEOR 1.5; its program first counts the matches of each line and then combines the counts."""
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
    """Compute SPICE 1.0, the mean F-score of scene graphs; its models must have been downloaded by the user."""
    folder = _folder("spice")
    for part in (f"{CORENLP}.jar", f"{CORENLP}-models.jar"):
        if not (folder / "lib" / part).is_file():
            raise _Missing(
                f"SPICE needs {part}, which pycocoevalcap does not include; download it by "
                f"'python -m {PACKAGE}.spice.get_stanford_models', then run the same command again"
            )
    with TemporaryDirectory() as scratch:
        given, found = Path(scratch) / "captions.json", Path(scratch) / "scores.json"
        rows = [{"image_id": n, "test": text, "refs": references[n]} for n, (text,) in captions.items()]
        given.write_text(json.dumps(rows), encoding="utf-8")
        command = ["java", "-jar", "-Xmx8G", "spice-1.0.jar", str(given), "-cache", scratch, "-out", str(found)]
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
    """Run a program with the lines as its input and return the lines that it prints."""
    text = "".join(f"{line}\n" for line in lines)
    try:
        done = subprocess.run(command, cwd=folder, input=text.encode(), capture_output=True, timeout=PATIENCE)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _Missing(f"{command[3]} did not run to its end ({error})") from error
    if done.returncode:
        message = done.stderr.decode(errors="replace").strip().splitlines()
        raise _Missing(f"{command[3]} failed ({message[0][:200] if message else done.returncode})")
    return done.stdout.decode(errors="replace").splitlines()
