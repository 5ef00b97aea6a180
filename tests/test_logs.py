"""Logs in files: everything that is reported, in bounded sizes and numbers."""

from __future__ import annotations

import logging
import stat
import sys
import traceback
from pathlib import Path

import pytest

from qformer.files import logs
from qformer.types import UsageError


def test_errors_warnings_and_refusals_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "page.log"
    with logs.logging_to(file):
        logging.getLogger("qformer.demo.guard").info("192.0.2.1 POST '/x': 403 'no'")
        logging.getLogger("elsewhere").info("of no interest")
        try:
            raise ValueError("what went wrong")
        except ValueError:
            traceback.print_exc()  # as Gradio reports the errors of functions
        print("x" * 50_000, "\ud800", file=sys.stderr)
    written = file.read_text()
    assert "INFO 192.0.2.1 POST '/x': 403 'no'" in written
    assert "of no interest" not in written
    assert "ValueError: what went wrong" in written
    assert len(written) < 2 * logs.MAX_LINE
    assert capsys.readouterr().err == ""
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    print("after", file=sys.stderr)
    assert capsys.readouterr().err == "after\n"
    assert "after" not in file.read_text()


def test_it_never_grows_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "MAX_BYTES", 2_000)
    with logs.logging_to(tmp_path / "page.log"):
        for number in range(500):
            print(f"line {number}", file=sys.stderr)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["page.log", *(f"page.log.{number}" for number in range(1, logs.FILES))]
    assert all(file.stat().st_size <= 2_000 for file in files)
    assert "line 499" in files[0].read_text()


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    with (
        pytest.raises(UsageError, match=r"the log '.*' cannot be written \(.*\); give --log another file"),
        logs.logging_to(tmp_path),
    ):
        pass


def test_a_full_disk_costs_lines_and_nothing_else() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with logs.logging_to(Path("/dev/full")):
        print("lost", file=sys.stderr)
