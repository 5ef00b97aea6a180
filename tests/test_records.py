"""JSON of ours: what is not as it was written is named by file, line and key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qformer.files.records import (
    Form,
    Metrics,
    Step,
    append_record,
    read_lines,
    read_object,
    read_records,
    replace_text,
    replacing,
)
from qformer.types import UsageError

GOOD = '{"kind": "train", "step": 1, "itc": 2.5, "itm": NaN}\n'


class Shape(Form):
    step: int
    names: dict[str, list[str]] = {}  # noqa: RUF012


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "it is not JSON"),
        ("[1]", "it is not an object with keys"),
        ("7", "it is not an object with keys"),
        ('{"kind": "train"}', "step is missing"),
        ('{"step": 1, "itc": 2}', "kind is missing"),
        ('{"kind": "train", "step": "1"}', "step: input should be a valid integer, but got '1'"),
        ('{"kind": "train", "step": true}', "step: input should be a valid integer, but got True"),
        ('{"kind": "train", "step": 1, "itc": "2"}', "itc: input should be a valid number, but got '2'"),
        ('{"kind": "train", "step": 1, "itc": [2]}', r"itc: input should be a valid number, but got [2]"),
    ],
)
def test_a_line_of_another_form_is_named(tmp_path: Path, line: str, said: str) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(f"{GOOD}{line}\n{GOOD}")
    with pytest.raises(UsageError) as caught:
        read_lines(file, Metrics)
    assert f"line 2 of '{file}' is not as it was written ({said}); take it out" in str(caught.value)


def test_a_line_that_a_kill_cut_off_is_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(f'{GOOD}\n{GOOD}{{"kind": "tra')
    assert [line["itc"] for line in read_lines(file, Metrics)] == [2.5, 2.5]
    file.write_text('{"step": 3, "caption": "a cat"}\n')
    assert read_lines(file, Step) == [{"step": 3, "caption": "a cat"}]


def test_damaged_lines_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "lines").write_text('{"a": 1}\n' + "[" * 100_000 + "\n{\n" + '{"a": 2}\n')
    assert read_records(tmp_path / "lines") == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "cannot be read as JSON (Expecting value"),
        ("\udcff", "cannot be read as JSON ("),
        ("[" * 100_000, "cannot be read as JSON ("),
        ("[]", "it is not an object with keys"),
        ("{}", "step is missing"),
        ('{"step": 1, "names": {"a": ["b", 3]}}', "names.a.1: input should be a valid string, but got 3"),
    ],
)
def test_an_object_of_another_form_is_named(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "about.json"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UsageError) as caught:
        read_object(file, Shape)
    assert str(caught.value).startswith(f"'{file}' ")
    assert said in str(caught.value)


def test_a_line_is_added_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk half of it may have been written, onto which the next one would be put."""
    file = tmp_path / "metrics.jsonl"
    append_record(file, {"step": 1})
    real: Any = Path.open

    class Full:
        def __init__(self, opened: Any) -> None:
            self.opened = opened

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *error: object) -> None:
            self.opened.close()

        def tell(self) -> int:
            return self.opened.tell()

        def write(self, data: bytes) -> None:
            self.opened.write(data[:5])
            self.opened.flush()
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda *given, **options: Full(real(*given, **options)))
        with pytest.raises(OSError, match="No space"):
            append_record(file, {"step": 2})
    append_record(file, {"step": 3})
    assert file.read_text() == '{"step": 1}\n{"step": 3}\n'


def test_a_file_or_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    file, folder, link = tmp_path / "file.json", tmp_path / "folder", tmp_path / "link"
    replace_text(file, "old")
    (tmp_path / "file.json.partial").write_text("a kill left this")
    link.symlink_to(file)
    replace_text(link, "own")
    assert (file.read_text(), link.read_text(), link.is_symlink()) == ("old", "own", False)
    for name in ("first", "second"):
        with replacing(folder) as partial:
            partial.mkdir()
            (partial / name).write_text(name)
    assert [inside.name for inside in folder.iterdir()] == ["second"]

    def fail(target: Path) -> None:
        with replacing(target) as partial:
            partial.write_text("half")
            raise OSError("full")

    for target in (file, folder):
        with pytest.raises(OSError, match="full"):
            fail(target)
    assert file.read_text() == "old"
    assert (folder / "second").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"file.json", "folder", "link"}


def test_a_folder_that_somebody_makes_meanwhile_stays(tmp_path: Path) -> None:
    def make_both() -> None:
        with replacing(tmp_path / "folder") as partial:
            partial.mkdir()
            (tmp_path / "folder").mkdir()
            (tmp_path / "folder" / "theirs").write_text("")

    with pytest.raises(OSError, match="not empty"):
        make_both()
    assert (tmp_path / "folder" / "theirs").is_file()
