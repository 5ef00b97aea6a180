"""Caption scores: small cases by hand; what Java is needed for never crashes and never waits."""

from __future__ import annotations

import math
import subprocess
from typing import Any

import pytest

from qformer.evaluation import caption
from qformer.evaluation.caption import score_captions
from qformer.types import UsageError


def test_by_hand() -> None:
    """`a cat sat` against one reference of four words: every n-gram is right, the length is not."""
    scores = score_captions(["A cat sat."], [["a cat sat down"]], java=False)
    short = math.exp(1 - 4 / 3)
    assert scores.total["BLEU-1"] == pytest.approx(short, abs=1e-6)
    assert scores.total["BLEU-3"] == pytest.approx(short, abs=1e-6)
    assert scores.total["ROUGE-L"] == pytest.approx((1 + 1.2**2) * 1 * 0.75 / (0.75 + 1.2**2 * 1))
    assert scores.missing == {}


def test_cider_counts_what_tells_images_apart() -> None:
    """A caption that is its reference earns 10, one without a common word 0; their mean is the score of the set."""
    said = ["a red bus in the street", "two dogs"]
    known = [["A red bus in the street!"], ["people eat at some table"]]
    scores = score_captions(said, known, java=False)
    assert scores.each["CIDEr"] == pytest.approx([10, 0], abs=1e-6)
    assert scores.total["CIDEr"] == pytest.approx(5, abs=1e-6)
    assert scores.each["ROUGE-L"] == pytest.approx([1, 0])


def test_an_empty_caption_earns_nothing() -> None:
    scores = score_captions(["", "a dog runs on grass"], [["a cat"], ["a dog runs on grass"]], java=False)
    assert scores.each["CIDEr"][0] == scores.each["ROUGE-L"][0] == 0
    assert scores.total["BLEU-1"] < 1


def test_without_java_two_scores_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caption.shutil, "which", lambda name: None)
    scores = score_captions(["a cat"], [["a cat"]])
    assert scores.missing == {"METEOR": "Java is not installed", "SPICE": "Java is not installed"}


@pytest.mark.parametrize("fault", ["hangs", "fails"])
def test_a_java_program_that_fails_costs_its_score_alone(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def run(command: list[str], **options: Any) -> Any:
        if fault == "hangs":
            raise subprocess.TimeoutExpired(command, 1)
        return subprocess.CompletedProcess(command, 1, b"", b"Could not reserve enough space\n")

    monkeypatch.setattr(caption.shutil, "which", lambda name: "/bin/java")
    monkeypatch.setattr(caption.subprocess, "run", run)
    scores = score_captions(["a cat"], [["a cat"]])
    assert ("did not run to its end" if fault == "hangs" else "Could not reserve") in scores.missing["METEOR"]
    assert "get_stanford_models" in scores.missing["SPICE"]
    assert "CIDEr" in scores.total


def test_wrong_use(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="at least one"):
        score_captions([], [])
    with pytest.raises(ValueError, match="at least one"):
        score_captions(["a cat"], [[]])
    with pytest.raises(ValueError, match="1 captions for 2"):
        score_captions(["a cat"], [["a cat"], ["a dog"]])
    monkeypatch.setattr(caption, "PACKAGE", "no_such_package")
    with pytest.raises(UsageError, match=r"\.\[metrics\]"):
        score_captions(["a cat"], [["a cat"]])


@pytest.mark.slow
def test_meteor_runs_where_java_is() -> None:
    pytest.importorskip("pycocoevalcap")
    if caption.shutil.which("java") is None:
        pytest.skip("no java here")
    total = score_captions(["a cat sat on a mat"], [["a cat sat on a mat"]]).total
    assert total["METEOR"] == pytest.approx(1.0, abs=1e-2)
