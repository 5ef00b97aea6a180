"""Files that `qformer mine-pairs` writes: pairs, a sheet, questions to fill in, patterns that a model names."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.table import Table

from qformer.answering.server import Server
from qformer.canvases.pairs import PATTERNS as BY_KIND
from qformer.commands.tagging import Ask, Tag, tag_pairs
from qformer.figures.blind_sheet import ShownPair, blind_sheet
from qformer.files.records import append_record, read_records, replace_records, replace_text, replacing
from qformer.images import read_image
from qformer.progress import Bar, console
from qformer.retrieval.search import Retriever
from qformer.types import BadSample, UsageError

if TYPE_CHECKING:
    from qformer.commands.encoders import TwoEncoders
    from qformer.evaluation.mining import BlindPair
    from qformer.retrieval.gallery import Gallery

PATTERNS = tuple(BY_KIND.values())
PAIRS, SHEET, QUESTIONS, SUMMARY, SKIPPED = "pairs.jsonl", "sheet.html", "Questions.csv", "mined.json", "skipped.jsonl"
IMAGES, UNTAGGED = "MMVP Images", "untagged.jsonl"
HEAD = ("Index", "Question", "Options", "Correct Answer", "Pattern")
QUALITY = 95  # of JPEG files, without subsampled colors


@dataclass
class Shown:
    """A pair of the sheet: its number among the pairs from 0, a key by content, and both pictures as JPEG files."""

    number: int
    key: str
    files: list[Path] = field(default_factory=list)


@dataclass
class PairFiles:
    """The files of a folder.

    Attributes:
        pairs: all that are kept. ids, paths: of each picture, by its row number.
        record: what was done, as `mined.json` holds it. words: thresholds that are quantiles, in words.
        shown: pairs of the sheet.
    """

    folder: Path
    gallery: Gallery
    embedder: TwoEncoders
    pairs: list[BlindPair]
    ids: list[str]
    paths: list[str]
    record: dict[str, Any]
    words: dict[float, str]
    shown: list[Shown] = field(default_factory=list)
    patterns: dict[str, str] = field(default_factory=dict)

    def write(self, most: int, once: bool, skipped: list[dict[str, Any]]) -> None:
        """Write everything; questions that have been filled in are kept.

        Args:
            most: pairs on the sheet. once: none of its pictures in two pairs.
            skipped: records of pictures that could not be read.

        Raises:
            UsageError: questions that are filled in for other pairs, or are broken.
        """
        skipped = list(skipped)
        self.patterns = {key: one["pattern"] for key, one in self._tags().items() if one["pattern"]}
        pictures = self.folder / "work" / "pictures"
        with replacing(pictures) as partial:
            partial.mkdir()
            self._choose(partial, most, once, skipped)
        for one in self.shown:
            one.files = [pictures / file.name for file in one.files]
        filled = self._filled()
        replace_records(self.folder / SKIPPED, skipped)
        self.record |= {"skipped": len(skipped), "shown": [one.key for one in self.shown]}
        with replacing(self.folder / IMAGES) as partial:
            pictures.rename(partial)
        for one in self.shown:
            one.files = [self.folder / IMAGES / file.name for file in one.files]
        if not filled:  # patterns that a model named for other pairs are never taken for a person's
            (self.folder / QUESTIONS).unlink(missing_ok=True)
        replace_text(self.folder / SUMMARY, json.dumps(self.record, indent=1))
        self._write_texts(filled)

    def _choose(self, folder: Path, most: int, once: bool, skipped: list[dict[str, Any]]) -> None:
        """Choose the pairs of the sheet, whose pictures can still be read, and write these as row N.jpg."""
        retriever = Retriever(self.gallery, self.embedder)
        used: set[int] = set()
        for number, pair in enumerate(self.pairs):
            if len(self.shown) == most:
                break
            if once and used & {pair.first, pair.second}:
                continue
            one = Shown(number, f"{self.ids[pair.first]} {self.ids[pair.second]}")
            try:
                for row in (pair.first, pair.second):
                    pixels = retriever.open_image(self.ids[row])
                    one.files.append(folder / f"{2 * len(self.shown) + len(one.files) + 1}.jpg")
                    picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
                    picture.save(one.files[-1], quality=QUALITY, subsampling=0)
            except BadSample as bad:
                skipped.append({"path": self.paths[row], "kind": bad.kind, "detail": bad.detail})
                for file in one.files:
                    file.unlink(missing_ok=True)
                continue
            used |= {pair.first, pair.second}
            self.shown.append(one)

    def _filled(self) -> list[list[str]]:
        """Question, options and answer of each row of `Questions.csv`, if a person filled anything in; else none.

        Raises:
            UsageError: it is filled in for other pairs, or is broken.
        """
        file = self.folder / QUESTIONS
        if not file.is_file():
            return []
        try:
            head, *rows = csv.reader(io.StringIO(file.read_text(encoding="utf-8-sig"), newline=""))
            names = [name.strip().lower() for name in head]
            places = [names.index(name.lower()) for name in HEAD[1:4]]
            written = [row for row in rows if any(cell.strip() for cell in row)]
            rows = [[row[place].strip() for place in places] for row in written]
        except (ValueError, IndexError, csv.Error) as error:
            told = f"'{file}' is not the table that was written ({error}); repair it, or move it away"
            raise UsageError(told) from error
        try:
            before = json.loads((self.folder / SUMMARY).read_text(encoding="utf-8"))["shown"]
        except (OSError, ValueError, RecursionError, KeyError, TypeError):
            before = None
        place = names.index("pattern") if "pattern" in names else len(names)
        patterns = ["".join(row[place : place + 1]).strip() for row in written]
        if not any(any(row) for row in rows) and not self._has_own(patterns, before):
            return []
        if before != [one.key for one in self.shown] or len(rows) != 2 * len(self.shown):
            told = f"'{file}' is filled in, but not for the pairs that were found now"
            raise UsageError(f"{told}; move it away, or give a new folder with -o")
        return rows

    def _has_own(self, patterns: list[str], shown: Any) -> bool:
        """Tell if a person wrote a pattern: one that no model named for its pair, of those whose keys are given."""
        keys = [str(key) for key in shown for _ in range(2)] if isinstance(shown, list) else []
        named = {(str(one.get("key")), one["pattern"]) for one in self._replies()}
        return any(one and (key, one) not in named for one, key in zip_longest(patterns, keys[: len(patterns)]))

    def _write_texts(self, filled: list[list[str]]) -> None:
        """Write the files in which patterns stand; questions only where none is filled in."""
        tags = {one.number: self.patterns.get(one.key) for one in self.shown}
        records = []
        for number, pair in enumerate(self.pairs):
            images, ids = ([names[row] for row in (pair.first, pair.second)] for names in (self.paths, self.ids))
            found = {"first": pair.first, "second": pair.second, "near": pair.near, "far": pair.far}
            records.append({"pair": number + 1, **found, "images": images, "ids": ids, "pattern": tags.get(number)})
        replace_records(self.folder / PAIRS, records)
        if not filled:
            table = io.StringIO(newline="")
            rows = csv.writer(table)
            rows.writerow(HEAD)
            for row in range(2 * len(self.shown)):
                rows.writerow([row + 1, "", "", "", tags[self.shown[row // 2].number] or ""])
            replace_text(self.folder / QUESTIONS, table.getvalue())
        replace_text(self.folder / SHEET, self._sheet(filled, tags))

    def _sheet(self, filled: list[list[str]], tags: dict[int, str | None]) -> str:
        shown = []
        for place, one in enumerate(self.shown):
            pair = self.pairs[one.number]
            question, options = filled[2 * place][:2] if filled else ("", "")
            first, second = (_open(file) for file in one.files)
            names = (Path(self.paths[pair.first]).name, Path(self.paths[pair.second]).name)
            told = (question, halves_of(options))
            shown.append(ShownPair((first, second), names, pair.near, pair.far, tags[one.number] or "", *told))
        near, far = self.record["near"], self.record["far"]
        notes = [
            f"near: {near['encoder']} ({near['pooling']}), above {near['above']:.4g}; far: {far['encoder']} "
            f"({far['pooling']}), below {far['below']:.4g}; {self.record['pairs']:,} pairs of "
            f"{self.record['images']:,} pictures, the widest gaps first, {len(shown):,} here.",
            "To ask: write a question with two options to which the pictures give different answers, mark what is "
            f"true of each picture, and save the questions as {QUESTIONS} beside this page. To answer: open the page "
            "that the same command writes then, mark what you see, and save the answers: a person's row beside the "
            "models'.",
        ]
        key = hashlib.sha256(json.dumps([[one.key for one in self.shown], filled]).encode()).hexdigest()[:16]
        return blind_sheet("Pairs that one encoder does not tell apart", notes, self.counts(), shown, PATTERNS, key)

    def counts(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows of the table of how many pairs each threshold gives; the chosen ones stand in brackets."""
        counts = self.record["counts"]
        chosen = (self.record["near"]["above"], self.record["far"]["below"])
        name = lambda value: self.words.get(value, f"{value:.4g}")  # noqa: E731
        head = ["pairs", *(f"far < {name(far)}" for far in counts["far_below"])]
        rows = [
            [f"near > {name(near)}"]
            + [
                f"[{count:,}]" if (near, far) == chosen else f"{count:,}"
                for far, count in zip(counts["far_below"], row, strict=True)
            ]
            for near, row in zip(counts["near_above"], counts["pairs"], strict=True)
        ]
        return head, rows

    def table(self) -> Table:
        """The same for a terminal."""
        head, rows = self.counts()
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for name in head:
            table.add_column(name, justify="left" if name == head[0] else "right")
        for row in rows:
            table.add_row(*row)
        return table

    def _tags(self, model: str | None = None) -> dict[str, dict[str, Any]]:
        """Replies by the key of their pair, the newest of each; of one model alone if it is given."""
        return {str(one.get("key")): one for one in self._replies() if model in (None, one.get("model"))}

    def _replies(self) -> list[dict[str, Any]]:
        """All replies that can be used, in their order."""
        kept = read_records(self._tagged) if self._tagged.is_file() else []
        return [one for one in kept if isinstance(one, dict) and one.get("pattern", 0) in (None, *PATTERNS)]

    @property
    def _tagged(self) -> Path:
        return self.folder / "work" / "tags.jsonl"

    def tag(self, ask: Ask, model: str) -> None:
        """Have a model name the pattern of each pair of the sheet; replies that are there are not asked for again.

        Raises:
            UsageError: the server has failed several times in a row; everything is written, and replies are kept.
        """
        known = self._tags(model)
        self.patterns |= {key: one["pattern"] for key, one in known.items() if one["pattern"]}
        open_ = [one for one in self.shown if one.key not in known]
        untold = [(key, one["reply"]) for key, one in known.items() if not one["pattern"]]
        missed = [{"key": key, "kind": "no pattern", "detail": reply} for key, reply in untold]

        def keep(tag: Tag) -> None:
            append_record(self._tagged, {"key": tag.key, "reply": tag.reply, "pattern": tag.pattern, "model": model})
            if tag.pattern is None:
                missed.append({"key": tag.key, "kind": "no pattern", "detail": tag.reply})
            else:
                self.patterns[tag.key] = tag.pattern

        def skip(key: str, reason: str) -> None:
            missed.append({"key": key, "kind": "no reply", "detail": reason})

        with Bar(console=console) as bar:
            task = bar.add_task("patterns asked for", total=len(open_))

            def pairs() -> Iterator[tuple[str, Image.Image, Image.Image]]:
                for one in open_:
                    yield (one.key, *map(_open, one.files))  # type: ignore[misc]
                    bar.advance(task)

            try:
                tag_pairs(pairs(), ask, PATTERNS, keep, skip)
            except UsageError as error:
                told = f"{error}; pairs are written, {len(self.patterns):,} of {len(self.shown):,} with a pattern"
                raise UsageError(f"{told}, and the same command asks for the others") from error
            finally:
                self._write_texts(self._filled())
                replace_records(self.folder / UNTAGGED, missed)
        if missed:
            told = f"{len(missed):,} of {len(self.shown):,} pairs got no pattern; see {self.folder / UNTAGGED}"
            print(f"qformer: {told}", file=sys.stderr)


def halves_of(options: str) -> tuple[str, str]:
    """Texts of both options as a person has typed them, also of a cell that is not finished."""
    first, _, second = re.sub(r"\(b\)", "(b)", options, count=1, flags=re.IGNORECASE).partition("(b)")
    return re.sub(r"\A\s*\(a\)", "", first, flags=re.IGNORECASE).strip(), second.strip()


def asker(url: str | None, model: str | None, timeout: float) -> Server | None:
    """The model behind a server, which is not asked yet, or None without a server.

    Raises:
        UsageError: an address that is none.
    """
    if url is None:
        if model is not None:
            raise UsageError(f"--model {model} names a model behind a server; give --server URL as well")
        return None
    return Server(url, model, timeout=timeout)


def _open(file: Path) -> Image.Image:
    return Image.fromarray(read_image(file).permute(1, 2, 0).contiguous().numpy())
