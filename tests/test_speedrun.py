"""The photos of the speedrun: their rule gives the same split everywhere, and another split is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import speedrun

TRAIN, DEV = ([f"{place * 7919 % 99991}_{part}" for place in range(count)] for part, count in (("a", 6000), ("b", 9)))


def test_the_rule_gives_the_same_photos_everywhere() -> None:
    parts = speedrun.draw(TRAIN[::-1], DEV)
    assert parts == speedrun.draw(TRAIN, DEV[::-1])
    assert len(set(parts["train"])) == speedrun.TRAIN
    assert parts["dev"] == sorted(DEV)
    assert speedrun.digest(parts["train"]) == "fbfba8e2a1a862d8cabceba81c1727510f45880b0ec7eba3d036d6ef7b59e276"


def test_a_file_is_written_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*words: str) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["speedrun.py", *words])
        with pytest.raises(SystemExit) as ended:
            speedrun.main()
        return ended.value.code, capsys.readouterr().out.strip()

    names = {"train": TRAIN[:8], "dev": DEV}
    for part, own in names.items():
        (tmp_path / f"Flickr_8k.{part}Images.txt").write_text("".join(f"{name}.jpg\n" for name in own))
    lines = [f"{name}.jpg#{place}\ta cat {place} .\n" for own in names.values() for name in own for place in range(5)]
    (tmp_path / "Flickr8k.token.txt").write_text("".join(lines))
    monkeypatch.setattr(speedrun, "TRAIN", 4)
    monkeypatch.setattr(speedrun, "MEASURED", 3)
    parts = speedrun.draw(TRAIN[:8], DEV)
    digests = {"train": speedrun.digest(parts["train"]), "dev": speedrun.digest(sorted(DEV)[:3])}
    monkeypatch.setattr(speedrun, "DIGESTS", digests)
    file = tmp_path / "photos.jsonl"
    expected = (0, "4 photos to train on, the first 3 of 'dev' to measure")
    assert call(str(tmp_path), str(tmp_path), "-o", str(file)) == expected
    assert call(str(file)) == expected
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [Path(record["image"]).stem for record in records] == parts["train"] + parts["dev"]
    assert records[0]["captions"] == [f"a cat {place} ." for place in range(5)]
    file.write_text("".join(f"{json.dumps(record)}\n" for record in records[1:]))
    code, said = call(str(file))
    assert (code, said.partition(" (")[0]) == (1, "the 3 photos of 'train' are not those of the speedrun")
