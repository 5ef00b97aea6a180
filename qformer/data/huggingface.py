"""Data sets of the `datasets` library: from the hub, saved to disk, or parquet, Arrow, JSON and CSV files.

A whole data set is memory-mapped and shuffled as one. With `streaming` its shards are taken one by one: each is
written to a tar once, when its turn comes (`qformer.data.shards`), which makes them countable and readable at any
place, so that a resumed run reads nothing again.
"""

from __future__ import annotations

import json
import tarfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from qformer import trust
from qformer.data.fetching import CHAIN, expand_local
from qformer.data.orders import Order, Seed, Shuffled, Windows
from qformer.data.shards import add_member
from qformer.data.sources import id_of, texts_of
from qformer.data.webdataset import Sharded, open_shards
from qformer.identity import plain_id
from qformer.lookup import nearest
from qformer.types import BadSample, Sample, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FILES = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "json", ".json": "json", ".csv": "csv"}
CAPTIONS = ("captions", "caption", "text")
#: Columns by which a submission names questions and images.
NUMBERS = ("question_id", "questionId", "qid", "id", "image_id", "img_id", "cocoid")
SAVED = "state.json"  # marks a folder of save_to_disk


@dataclass(frozen=True)
class HuggingFace(Sharded):
    """Rows with an image (encoded bytes, a path, or an `Image` feature) and captions (a text or a list of them).

    Attributes:
        path: hub id, folder of `save_to_disk`, folder of data files, or files (`train-*.parquet`, `{0..9}.arrow`, ...).
        config, revision: of the hub.
        split: such as train, or train[:10%].
        image, caption, question, answers: columns; without `caption`, the first of `captions`, `caption`, `text`.
        id: column whose equal values are the same image; without it images are, whose files or bytes are the same.
        question_id: column with the ids of questions, for submissions; `question_id`, `questionId` or `qid` by default.
        images: folder that image paths are relative to.
        streaming: take shard after shard instead of downloading everything first.
        window, keep_gb, cache: when streaming, as of `webdataset`.
    """

    path: str | list[str]
    config: str | None = None
    revision: str | None = None
    split: str = "train"
    image: str = "image"
    caption: str | None = None
    question: str | None = None
    answers: str | None = None
    id: str | None = None
    question_id: str | None = None
    images: str = "."
    streaming: bool = False
    window: int = 8
    keep_gb: float = 100.0
    cache: str | None = None
    rows: Any = field(init=False, repr=False, compare=False)
    shards: Any = field(init=False, repr=False, compare=False)
    _texts: dict[str, str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        data = self._load()
        names = list(data.column_names or next(iter(data), {}))
        caption = self.caption or next((name for name in CAPTIONS if name in names), None)
        if caption is None and self.question is None:
            raise UsageError(
                f"'{self.path}' has no column {', '.join(CAPTIONS)}; set data.caption to one of {', '.join(names)}"
            )
        texts = {"captions": caption, "question": self.question, "answers": self.answers}
        for column in (self.image, self.id, self.question_id, *texts.values()):
            if column is not None and column not in names:
                raise UsageError(f"'{self.path}' has no column '{column}': {nearest(column, names)}")
        object.__setattr__(self, "_texts", {key: column for key, column in texts.items() if column is not None})
        shards = None
        if self.streaming:
            data = data.decode(False)
            where = "/".join(filter(None, [str(self.path), self.config, self.revision, self.split]))
            shards = open_shards([f"{where}#{number}" for number in range(data.num_shards)], self._writer, self)
        object.__setattr__(self, "shards", shards)
        object.__setattr__(self, "rows", data if self.streaming else data.with_format("arrow"))

    def _load(self) -> Any:
        import datasets  # slow to import

        self._judge()
        try:
            if isinstance(self.path, str) and (Path(self.path) / SAVED).is_file():
                saved = datasets.load_from_disk(self.path)
                return saved.to_iterable_dataset() if self.streaming else saved
            if isinstance(self.path, str) and (Path(self.path) / "dataset_dict.json").is_file():
                saved = datasets.load_from_disk(str(Path(self.path) / self.split))
                return saved.to_iterable_dataset() if self.streaming else saved
            first = self.path if isinstance(self.path, str) else next(iter(self.path), "")
            kind = FILES.get(Path(first).suffix)
            if kind is None:
                place: dict[str, Any] = {"path": self.path, "name": self.config, "revision": self.revision}
            else:
                place = {"path": kind, "data_files": {self.split.partition("[")[0]: expand_local(self.path)}}
            return datasets.load_dataset(split=self.split, streaming=self.streaming, **place)
        except UsageError:
            raise
        except ConnectionError as error:
            raise UsageError(
                f"'{self.path}' is no local file or folder, and the hub cannot be reached ({_line(error)}); check "
                "data.path, or download the data set while there is a network"
            ) from error
        except Exception as error:  # of a damaged file or a hub's answer, nearly anything
            raise UsageError(f"'{self.path}' cannot be read as a data set ({_line(error)}); check data.path") from error

    def _judge(self) -> None:
        """Before `datasets` looks at them: addresses, also chained ones, and what a folder's own files name.

        Raises:
            UsageError: a name of one of the library's own readers, which would read whatever the working folder holds.
        """
        for name in [self.path] if isinstance(self.path, str) else self.path:
            if "://" in name or CHAIN in name:
                trust.judge(name, trust.CALLED)
            if elsewhere := next(_elsewhere(Path(name), self.split), None):
                trust.judge(elsewhere, trust.CALLED)
        if not isinstance(self.path, str) or "/" in self.path or Path(self.path).suffix in FILES:
            return
        if not Path(self.path).exists():
            raise UsageError(f"'{self.path}' does not say whose data set it is; give owner/name, a folder or files")

    def __len__(self) -> int:
        return super().__len__() if self.streaming else len(self.rows)

    def order(self, seed: Seed) -> Order:
        return Windows(self.shards, self.window, seed) if self.streaming else Shuffled(len(self), seed)

    def indices(self) -> Iterator[Any]:
        return super().indices() if self.streaming else iter(range(len(self)))

    def __getitem__(self, index: Any) -> Sample:
        if self.streaming:
            return super().__getitem__(index)
        key = f"{self.path}/{self.split}:{index}"
        try:
            row = self.rows[index].to_pylist()[0]
        except UnicodeDecodeError as error:
            raise BadSample("not utf-8", f"{key}: {error}") from error
        image = self._image(row[self.image])
        if image is None:
            raise BadSample("no image", key)
        return self._sample(key, image, self._described(row))

    def sample(self, key: str, members: dict[str, bytes]) -> Sample:
        """Of a shard that was written by `_write`."""
        record = json.loads(members["json"])
        if record["fault"] is not None:
            raise BadSample(record["fault"], key)
        return self._sample(key, members["img"] if record["path"] is None else Path(record["path"]), record)

    def _sample(self, key: str, image: bytes | Path, record: dict[str, Any]) -> Sample:
        facts = record.get("facts", {})  # which tars of earlier versions lack
        return Sample(image, key, id_of(record, "id", self.path), facts=facts, **texts_of(record))

    def _described(self, row: dict[str, Any]) -> dict[str, Any]:
        none = {"captions": None, "question": None, "answers": None}
        own = {key: row[column] for key, column in self._texts.items()}
        facts = {key: row[key] for key in NUMBERS if plain_id(row.get(key)) is not None}
        if self.question_id is not None:
            facts["question_id"] = row[self.question_id]
        return none | own | {"id": row[self.id] if self.id is not None else None, "facts": facts}

    def _image(self, cell: Any) -> bytes | Path | None:
        value = (cell.get("bytes") or cell.get("path")) if isinstance(cell, dict) else cell
        if isinstance(value, str):
            return Path(self.images) / value
        return value if isinstance(value, bytes) else None

    def _writer(self, name: str) -> Callable[[Path], None]:
        return partial(self._write, int(name.rpartition("#")[2]))

    def _write(self, shard: int, path: Path) -> None:
        """A shard of the stream as a tar, one sample per row.

        Raises:
            FileNotFoundError: it is not there any more. UsageError: the network fails.
        """
        with path.open("wb") as file:
            try:
                with tarfile.open(fileobj=file, mode="w") as tar:
                    for number, row in enumerate(self.rows.shard(num_shards=self.rows.num_shards, index=shard)):
                        image = self._image(row[self.image])
                        fault = "no image" if image is None else None
                        record = self._described(row) | {"fault": fault, "path": None}
                        if isinstance(image, Path):
                            record["path"] = str(image)
                        add_member(tar, f"{number:08d}.json", json.dumps(record, default=lambda _: None).encode())
                        if isinstance(image, bytes):
                            add_member(tar, f"{number:08d}.img", image)
            except FileNotFoundError:
                raise
            except OSError as error:
                raise UsageError(
                    f"shard {shard} of '{self.path}' could not be fetched ({_line(error)}); start again when the "
                    "network is back, and the run goes on"
                ) from error
            except Exception as error:  # a damaged file: what came before it is used, the rest counts as one bad sample
                file.write(f"damaged: {_line(error)}".encode())


def _elsewhere(folder: Path, split: str) -> Iterator[str]:
    """Files that a data set's own card or state names and that do not lie in it: addresses, other folders."""
    for file in (folder / "README.md", folder / ".huggingface.yaml", folder / SAVED, folder / split / SAVED):
        try:
            text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
            told = yaml.safe_load(text.split("\n---", 1)[0].removeprefix("---") if file.suffix == ".md" else text)
        except (OSError, ValueError, RecursionError, yaml.YAMLError):
            told = None  # `datasets` will say what is wrong
        for key in ("configs", "_data_files") if isinstance(told, dict) else ():
            for name in texts_within(told.get(key)):
                if "://" in name or CHAIN in name or name.startswith(("/", "~")) or ".." in Path(name).parts:
                    yield name


def texts_within(value: Any) -> Iterator[str]:
    """All texts in plain data."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from texts_within(inner)


def _line(error: Exception) -> str:
    """An error of a library on one line, with what caused it."""
    cause = f": {error.__cause__}" if error.__cause__ is not None else ""
    return " ".join(f"{error}{cause}".split())[:300]
