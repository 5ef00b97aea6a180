"""Data sets of the `datasets` library: from the hub, saved to disk, or parquet, Arrow, JSON and CSV files.

A data set is memory-mapped and shuffled as a whole. With `streaming`, its shards are read one by one: each is written
to a tar when it is first needed (`qformer.data.shards`). Samples of a tar can be counted and read in any order, so a
resumed run reads nothing twice.
"""

from __future__ import annotations

import csv
import glob
import json
import re
import tarfile
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from qformer import trust
from qformer.data.base import Order, Seed, Shuffled
from qformer.data.columns import CONVERSATION, IMAGES, QUESTION_IDS, ColumnOptions, Columns, columns_of, id_of, unfold
from qformer.data.encodings import refuse_utf16
from qformer.data.fetching import CHAIN, REMOTE, expand_local
from qformer.data.orders import Windows
from qformer.data.shards import add_member
from qformer.data.webdataset import Sharded, open_shards
from qformer.formats import VideoFile
from qformer.lookup import nearest
from qformer.types import BadSample, Sample, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FILES = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv"}
SEPARATORS = {".csv": ",", ".tsv": "\t"}
OTHERS = (";", "\t", "|")  # other separators in files that are called .csv
IDS = (*QUESTION_IDS, "id", "image_id", "img_id", "cocoid")
NUMBER = re.compile(r"(0|[1-9][0-9]{0,17})(?:\.0)?")
SAVED = "state.json"  # marks a folder of save_to_disk
SPLITS = "dataset_dict.json"  # marks one with several splits
TEXTS = ("captions", "question", "answers", "facts")
VALIDATION = {"validation", "valid", "val", "dev"}


@dataclass(frozen=True)
class HuggingFace(ColumnOptions, Sharded):
    """Rows with an image (encoded bytes, base64, a path, or an `Image` feature) and captions or questions.

    `ColumnOptions` names the columns. In a table with captions, questions are read only if `question` is given.

    Attributes:
        path: hub id, folder of `save_to_disk`, folder of data files, or files (`train-*.parquet`, `{0..9}.arrow`, ...).
        config, revision: configuration and revision on the hub.
        split: such as train (the default) or train[:10%]; a saved data set that is not a `DatasetDict` is one split.
        question_id: column with the ids of questions, for submissions; `question_id`, `questionId` or `qid` by default.
        images: folder that paths of images and videos are relative to.
        video: column with video files, for rows without a picture; `video` by default.
        streaming: read shard after shard instead of downloading everything first.
        window, keep_gb, cache: options of streaming, as in `webdataset`.
    """

    path: str | list[str]
    config: str | None = None
    revision: str | None = None
    split: str | None = None
    question_id: str | None = None
    images: str = "."
    video: str | None = None
    streaming: bool = False
    window: int = 8
    keep_gb: float = 100.0
    cache: str | None = None
    rows: Any = field(init=False, repr=False, compare=False)
    shards: Any = field(init=False, repr=False, compare=False)
    _columns: Any = field(init=False, repr=False, compare=False)
    _features: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        data = self._load()
        names = list(data.column_names or next(iter(data), {}))
        object.__setattr__(self, "_columns", self._resolve_columns(names))
        object.__setattr__(self, "_features", dict(data.features or {}))
        self._check_captions(names)
        if not self.streaming and not len(data):
            raise UsageError(f"'{self.path}' has no row in split '{self._split}'; give a larger part of it")
        shards = None
        if self.streaming:
            data = data.decode(False)
            where = "/".join(filter(None, [str(self.path), self.config, self.revision, self._split]))
            shards = open_shards([f"{where}#{number}" for number in range(data.num_shards)], self._writer, self)
        object.__setattr__(self, "shards", shards)
        object.__setattr__(self, "rows", data if self.streaming else data.with_format("arrow"))

    @property
    def _split(self) -> str:
        return self.split or "train"

    def _resolve_columns(self, names: list[str]) -> Columns:
        """Choose the columns to read among those of the data set.

        Raises:
            UsageError: a named column does not exist, or there is nothing to read.
        """
        named = Columns.of(self)
        for column in [*named.needed(), *filter(None, [self.question_id])]:
            if column not in names:
                raise UsageError(f"'{self.path}' has no column '{column}': {nearest(column, names)}")
        columns = named.among([*names, *(("question", "answers") if CONVERSATION in names else ())])
        if columns.image is None and columns.video is None:
            listed = Path(str(self.path)).suffix.lower() in (".json", ".jsonl")
            raise UsageError(
                f"'{self.path}' has no column {', '.join(IMAGES)}, video; set data.image to one of {_join_names(names)}"
                f"{', or read it by name: jsonl' if listed else ''}"
            )
        statements = {"statement", "sentence"} & {*names, self.statement and "statement"}
        if columns.caption is None and columns.question is None and not statements:
            raise UsageError(
                f"'{self.path}' has no column captions, caption, text; set data.caption to one of "
                f"{_join_names(names)}, or data.question and data.answers"
            )
        return replace(columns, question=None) if columns.caption is not None and self.question is None else columns

    def _check_captions(self, names: list[str]) -> None:
        kind = str(getattr(self._features.get(self._columns.caption), "dtype", ""))
        if kind.startswith(("int", "uint", "float", "double", "bool")) and not self._class_names(self._columns.caption):
            raise UsageError(
                f"column '{self._columns.caption}' of '{self.path}' holds numbers ({kind}), and captions are texts; "
                f"set data.caption to one of {_join_names(names)}"
            )

    def _class_names(self, column: str) -> list[str] | None:
        """Get the names of the classes in a column of class numbers, else None."""
        return getattr(self._features.get(column), "names", None)

    def _load(self) -> Any:
        import datasets  # slow to import

        self._check_trust()
        try:
            if isinstance(self.path, str) and any((Path(self.path) / name).is_file() for name in (SAVED, SPLITS)):
                saved = self._load_saved(datasets)
                return saved.to_iterable_dataset() if self.streaming else saved
            first = self.path if isinstance(self.path, str) else next(iter(self.path), "")
            kind = FILES.get(Path(first).suffix.lower())
            if kind is None:
                self._refuse_file(first)
                place: dict[str, Any] = {"path": self.path, "name": self.config, "revision": self.revision}
            else:
                files = expand_local(self.path)
                if len(kinds := {Path(file).suffix.lower() for file in files}) > 1:
                    raise UsageError(f"'{self.path}' are files of {', '.join(sorted(kinds))}; give those of one kind")
                self._check_split(files)
                literal = [name if REMOTE.match(name) else glob.escape(name) for name in files]
                place = {"path": kind, "data_files": {self._split.partition("[")[0]: literal}, **_csv_options(files[0])}
            return datasets.load_dataset(split=self._split, streaming=self.streaming, **place)
        except UsageError:
            raise
        except ConnectionError as error:
            raise UsageError(
                f"'{self.path}' is not a local file or folder, and the hub cannot be reached ({_one_line(error)}); "
                "check data.path, or download the data set while there is a network"
            ) from error
        except Exception as error:  # a damaged file or an answer of a hub can raise nearly anything
            raise UsageError(
                f"'{self.path}' cannot be read as a data set ({_one_line(error)}); check data.path"
            ) from error

    def _load_saved(self, datasets: Any) -> Any:
        """Load the split of a data set from `save_to_disk`.

        Raises:
            UsageError: there is no such split.
        """
        saved = datasets.load_from_disk(str(self.path))
        if (Path(str(self.path)) / SAVED).is_file():
            own = str(saved.split or "train")
            if self.split in (None, own):
                return saved
            saved = {own.partition("[")[0]: saved}
        try:
            wanted = datasets.ReadInstruction.from_spec(self._split)
            parts = wanted.to_absolute({name: len(rows) for name, rows in saved.items()})
        except (ValueError, AssertionError) as error:
            raise UsageError(
                f"'{self.path}' has no split '{self._split}' ({_one_line(error)}); it has {', '.join(map(str, saved))}"
            ) from error
        chosen = [
            saved[part.splitname].select(range(len(saved[part.splitname]))[part.from_ : part.to]) for part in parts
        ]
        return chosen[0] if len(chosen) == 1 else datasets.concatenate_datasets(chosen)

    def _check_split(self, files: list[str]) -> None:
        """Refuse a split that is not in the names of the files, since it would contain all their rows."""
        name = self._split.partition("[")[0]
        wanted = VALIDATION if name in VALIDATION else {name}
        names = [f"{Path(file).parent.name}/{Path(file).name}".lower() for file in files]
        if name != "train" and not all(any(word in file for word in wanted) for file in names):
            raise UsageError(
                f"the files of '{self.path}' are one split, and '{name}' is not in their names; leave data.split out, "
                "or take a part of them, such as train[80%:]"
            )

    def _refuse_file(self, name: str) -> None:
        if Path(name).is_file():
            raise UsageError(
                f"'{name}' is a file of a kind that is not supported; give {', '.join(FILES)}, or for one JSON object "
                "per line name: jsonl"
            )

    def _check_trust(self) -> None:
        """Check addresses in the path, and those that files in a folder name, before `datasets` opens them.

        Raises:
            UsageError: the name of a built-in reader of the library, which would read the working directory.
        """
        for name in [self.path] if isinstance(self.path, str) else self.path:
            if "://" in name or CHAIN in name:
                trust.judge(name, trust.CALLED)
            if elsewhere := next(_find_references(Path(name)), None):
                trust.judge(elsewhere, trust.CALLED)
        if not isinstance(self.path, str) or "/" in self.path or Path(self.path).suffix.lower() in FILES:
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
        key = f"{self.path}/{self._split}:{index}"
        try:
            row = self.rows[index].to_pylist()[0]
        except UnicodeDecodeError as error:
            raise BadSample("not utf-8", f"{key}: {error}") from error
        image = self._columns.picture(row, Path(self.images))
        if image is None:
            raise BadSample("no image", f"{key} has none in '{self._columns.image}'; {columns_of(row)}")
        return self._sample(key, image, self._read_texts(row))

    def sample(self, key: str, members: dict[str, bytes]) -> Sample:
        """Build a sample from the members of a shard that `_write` has written."""
        record = json.loads(members["json"])
        if record["fault"] is not None:
            raise BadSample(record["fault"], key)
        paths = record["path"] if isinstance(record["path"], list) else [record["path"]]
        kind = VideoFile if record.get("video") else Path
        names = ["img"] if len(paths) == 1 else [f"{number}.img" for number in range(len(paths))]
        image = [members[name] if path is None else kind(path) for name, path in zip(names, paths, strict=True)]
        return self._sample(key, image if len(image) > 1 else image[0], record)

    def _sample(self, key: str, image: Any, record: dict[str, Any]) -> Sample:
        record = {"facts": {self.id: record.get("id")}} | record  # for cached shards of older versions
        same = id_of(record["facts"], self.id, self.path)
        return Sample(image=image, key=key, image_id=same, **{key: record[key] for key in TEXTS})

    def _read_texts(self, row: dict[str, Any]) -> dict[str, Any]:
        """Read the texts of a row, with class numbers replaced by names."""
        named = {name: self._class_names(name) for name in row}
        known = unfold({name: _class_name(value, named[name]) for name, value in row.items()})
        texts: dict[str, Any] = self._columns.texts(known)
        if self.question_id is not None:
            texts["facts"]["question_id"] = row[self.question_id]
        return texts | ({"facts": _parse_ids(texts["facts"])} if self._is_text_table else {})

    @property
    def _is_text_table(self) -> bool:
        """True if all cells are read as text, including numbers."""
        return Path(self.path if isinstance(self.path, str) else self.path[0]).suffix.lower() in SEPARATORS

    def _writer(self, name: str) -> Callable[[Path], None]:
        return partial(self._write, int(name.rpartition("#")[2]))

    def _write(self, shard: int, path: Path) -> None:
        """Write a shard of the stream as a tar with one sample per row.

        Raises:
            FileNotFoundError: the shard does not exist anymore.
            UsageError: the network fails.
        """
        with path.open("wb") as file:
            try:
                with tarfile.open(fileobj=file, mode="w") as tar:
                    for number, row in enumerate(self.rows.shard(num_shards=self.rows.num_shards, index=shard)):
                        image = self._columns.picture(row, Path(self.images))
                        fault = "no image" if image is None else None
                        parts = image if isinstance(image, list) else [image]
                        paths = [str(part) if isinstance(part, Path) else None for part in parts]
                        record = self._read_texts(row) | {"fault": fault, "path": paths if len(paths) > 1 else paths[0]}
                        record["video"] = isinstance(parts[0], VideoFile)
                        add_member(tar, f"{number:08d}.json", json.dumps(record, default=lambda _: None).encode())
                        for place, part in enumerate(parts):
                            if isinstance(part, bytes):
                                name = "img" if len(parts) == 1 else f"{place}.img"
                                add_member(tar, f"{number:08d}.{name}", part)
            except FileNotFoundError:
                raise
            except OSError as error:
                raise UsageError(
                    f"shard {shard} of '{self.path}' could not be fetched ({_one_line(error)}); run the command again "
                    "when the network is back, to continue"
                ) from error
            except Exception as error:  # a damaged file: rows before the damage are used, the rest is one bad sample
                file.write(f"damaged: {_one_line(error)}".encode())


def _csv_options(file: str) -> dict[str, Any]:
    """Options to read a text table with unconverted cells, since pandas would change values like `None` and 007."""
    separator = SEPARATORS.get(Path(file).suffix.lower())
    if separator is None or not Path(file).is_file():
        return {}
    import datasets  # slow to import

    with open(file, "rb") as start:
        refuse_utf16(file, start.read(1000))
    try:
        with open(file, encoding="utf-8-sig", newline="") as lines:
            head = lines.readline()
            separator = separator if separator in head else next((one for one in OTHERS if one in head), separator)
            lines.seek(0)
            padded = f"{separator} " in head
            names = next(csv.reader(lines, delimiter=separator, skipinitialspace=padded), [])
    except UnicodeDecodeError as error:
        raise UsageError(
            f"'{file}' is not UTF-8 text; save it as UTF-8, such as with iconv -f CP1252 -t UTF-8"
        ) from error
    text = datasets.Value("string")
    # pandas writes the column of row numbers without a name
    features = datasets.Features({name or f"Unnamed: {n}": text for n, name in enumerate(names)})
    options = {"sep": separator, "skipinitialspace": padded, "features": features}
    return options | {"keep_default_na": False, "encoding": "utf-8-sig"}


def _parse_ids(facts: dict[str, Any]) -> dict[str, Any]:
    """Convert ids like "42" or "42.0" to numbers, which evaluation servers of benchmarks require."""
    numbers = {name: NUMBER.fullmatch(facts[name]) for name in IDS if isinstance(facts.get(name), str)}
    return facts | {name: int(found[1]) for name, found in numbers.items() if found}


def _class_name(value: Any, names: list[str] | None) -> Any:
    """Look up the name of a class by its number; None for -1, which means no class."""
    if names is None or not isinstance(value, int):
        return value
    return names[value] if 0 <= value < len(names) else None


def _join_names(names: list[str]) -> str:
    return ", ".join(map(str, names))[:300]


def _find_references(folder: Path) -> Iterator[str]:
    """Find addresses and files outside the folder that a data set's own card or state names."""
    for file in (folder / "README.md", folder / ".huggingface.yaml", folder / SAVED, *folder.glob(f"*/{SAVED}")):
        try:
            text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
            values = yaml.safe_load(text.split("\n---", 1)[0].removeprefix("---") if file.suffix == ".md" else text)
        except (OSError, ValueError, RecursionError, yaml.YAMLError):
            values = None  # `datasets` will report the fault
        for key in ("configs", "_data_files") if isinstance(values, dict) else ():
            for name in texts_within(values.get(key)):
                if "://" in name or CHAIN in name or name.startswith(("/", "~")) or ".." in Path(name).parts:
                    yield name


def texts_within(value: Any) -> Iterator[str]:
    """Yield all texts in plain data."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from texts_within(inner)


def _one_line(error: Exception) -> str:
    """Format an error of a library and its cause on one line."""
    cause = f": {error.__cause__}" if error.__cause__ is not None else ""
    return " ".join(f"{error}{cause}".split())[:300]
