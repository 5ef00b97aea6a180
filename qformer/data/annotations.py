"""Annotation files of public data sets: COCO's, Karpathy's splits and BLIP's lists, Visual Genome's regions.

Each image is one sample with all its captions, one of which is drawn at each visit, so an epoch counts images.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qformer.data.columns import strings, without_halves
from qformer.data.documents import read_json
from qformer.identity import plain_id
from qformer.types import BadSample, Sample, UsageError

Facts = dict[str, Any]
# File name of the image, or `BAD` and the kind of fault; captions; other fields.
Entry = tuple[str, list[str], Facts]
BAD = "\0"  # prefix of a kind of fault in place of a file name


class Annotated:
    """Images of a folder with captions from one JSON file."""

    path: str
    images: str
    entries: list[Entry]

    def __post_init__(self) -> None:
        path = Path(self.path)
        if not path.is_file():
            raise UsageError(f"no file at '{path}'; data.path must be the JSON file with the annotations")
        if not Path(self.images).is_dir():
            raise UsageError(f"no folder at '{self.images}'; data.images must be the folder that holds the images")
        entries = self.read(read_json(path))
        if not entries:
            raise UsageError(f"'{path}' has no matching image; check the file and the options of data.train")
        object.__setattr__(self, "entries", entries)

    def read(self, values: Any) -> list[Entry]:
        raise NotImplementedError

    def refuse(self, expected: str) -> UsageError:
        return UsageError(f"'{self.path}' does not have the form that data.name requires; expected {expected}")

    def file(self, name: str) -> Path:
        return Path(self.images) / name

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:
        name, captions, facts = self.entries[index]
        if name.startswith(BAD):
            raise BadSample(name.removeprefix(BAD), f"{self.path}: image {captions[0]}")
        image = self.file(name)
        return Sample(image=image, key=str(image), captions=captions, facts=facts)


@dataclass(frozen=True)
class Coco(Annotated):
    """COCO's `captions_train2017.json`: `images` with `id` and `file_name`, `annotations` with `image_id`, `caption`.

    NoCaps has the same form; its images also have a `domain`, and its test images have no captions.

    Attributes:
        path: the JSON file.
        images: folder with the images, such as train2017.
    """

    path: str
    images: str
    entries: Any = field(init=False, repr=False, compare=False)

    def read(self, values: Any) -> list[Entry]:
        images, annotations = _get(values, "images"), _get(values, "annotations")
        listed = isinstance(annotations, list) or (annotations is None and bool(images))  # test images have none
        if not isinstance(images, list) or not listed:
            raise self.refuse("an object with lists `images` and `annotations`, as COCO's captions_train2017.json")
        if annotations is None and "sentences" in images[0]:
            raise UsageError(f"'{self.path}' has the form of karpathy; read it by name: karpathy")
        entries: list[Entry] = []
        by_id: dict[str | None, list[str]] = {}
        for record in images:
            number, name = plain_id(_get(record, "id")), _get(record, "file_name")
            if number is None or not isinstance(name, str):
                entries.append((BAD + "no image", [str(record)[:200]], {}))
            elif str(number) in by_id:
                entries.append((BAD + "duplicate id", [str(number)], {}))
            else:
                own = by_id[str(number)] = []
                entries.append((name, own, _image_facts(record, "id")))
        known = list(by_id)
        for record in annotations or []:
            number = plain_id(_get(record, "image_id"))  # 42 and "42" are the same image, since files mix them
            if str(number) not in by_id:
                by_id[str(number)] = []
                entries.append((BAD + "no image", [f"{number}, which is no `id` of the file"], {}))
            by_id[str(number)] += strings(_get(record, "caption"))
        if annotations and len(by_id) > len(known) and not any(by_id[number] for number in known):
            raise UsageError(
                f"no `image_id` of the annotations of '{self.path}', such as {_get(annotations[0], 'image_id')!r}, is "
                f"the `id` of one of its images{f', such as {known[0]!r}' if known else ''}; give a complete file"
            )
        return entries


@dataclass(frozen=True)
class Karpathy(Annotated):
    """Karpathy's `dataset_coco.json` (also Flickr30k, Flickr8k), or BLIP's lists such as `coco_karpathy_train.json`.

    Attributes:
        path: the JSON file.
        images: folder that `filepath/filename`, or the `image` of a list, is relative to.
        split: split of Karpathy's file, train by default; `train` includes `restval`, as is usual. A list is a single
            split, which must be in its file name if it is given.
    """

    path: str
    images: str
    split: str | None = None
    entries: Any = field(init=False, repr=False, compare=False)

    def read(self, values: Any) -> list[Entry]:
        if isinstance(values, list):
            marked = any(_get(r, "split") for r in values)
            if self.split is not None and not marked and self.split not in Path(self.path).stem.lower():
                raise UsageError(f"'{self.path}' is a list, which is one split; leave data.split out")
            if values and all(_get(r, "question") for r in values):
                raise UsageError(f"'{self.path}' is a list of questions; read it by name: jsonl")
            values = [r for r in values if not marked or self.split in (None, _get(r, "split"))]
            return _group(
                [(_get(r, "image"), strings(_get(r, "caption")), _image_facts(r, "image_id", "img_id")) for r in values]
            )
        found = _get(values, "images")
        if not isinstance(found, list):
            raise self.refuse("an object with a list `images`, or a list of objects with `image` and `caption`")
        if "annotations" in values:
            raise UsageError(f"'{self.path}' has the form of coco; read it by name: coco")
        wanted = {"train", "restval"} if self.split in (None, "train") else {self.split}
        known = {str(_get(record, "split")) for record in found}
        if found and not known & {*wanted}:
            raise UsageError(f"'{self.path}' has no split '{self.split or 'train'}'; it has {', '.join(sorted(known))}")
        rows = []
        for record in found:
            if _get(record, "split") in wanted or not isinstance(record, dict):
                name, folder = _get(record, "filename"), _get(record, "filepath")
                sentences = _get(record, "sentences")
                raw = [_get(one, "raw") for one in sentences] if isinstance(sentences, list) else []
                whole = f"{folder}/{name}" if isinstance(folder, str) and isinstance(name, str) else name
                rows.append((whole, strings(raw), _image_facts(record, "cocoid")))
        return _group(rows)


@dataclass(frozen=True)
class VisualGenome(Annotated):
    """Visual Genome's `region_descriptions.json`: the phrases of the regions are captions of the whole image.

    Attributes:
        path: the JSON file.
        images: folder with VG_100K and VG_100K_2, or with the images themselves.
    """

    path: str
    images: str
    entries: Any = field(init=False, repr=False, compare=False)

    def read(self, values: Any) -> list[Entry]:
        if not isinstance(values, list):
            raise self.refuse("a list of objects with `id` and `regions`, as Visual Genome's region_descriptions.json")
        rows = []
        for record in values:
            regions, number = _get(record, "regions"), _get(record, "id")
            phrases = [_get(region, "phrase") for region in regions] if isinstance(regions, list) else []
            name = f"{number}.jpg" if isinstance(number, int | str) else None
            rows.append((name, strings(phrases), _image_facts(record, "id")))
        return _group(rows)

    def file(self, name: str) -> Path:
        places = [Path(self.images) / folder / name for folder in ("VG_100K", "VG_100K_2", ".")]
        return next((place for place in places if place.exists()), places[0])


def _get(record: Any, key: str) -> Any:
    return record.get(key) if isinstance(record, dict) else None


def _image_facts(record: Any, *names: str) -> Facts:
    """Get the id of an image from the first of these fields that has one (NoCaps' lists: `img_id`), and its domain."""
    number = next((known for name in names if (known := plain_id(_get(record, name))) is not None), None)
    domain = _get(record, "domain")
    facts = {} if number is None else {"image_id": number}
    return facts | ({"domain": without_halves(domain)} if isinstance(domain, str) else {})


def _group(rows: list[tuple[Any, list[str], Facts]]) -> list[Entry]:
    """Group rows of (file, captions, facts) by file, so that each image has one entry."""
    entries: list[Entry] = []
    by_name: dict[str, list[str]] = {}
    for number, (name, captions, facts) in enumerate(rows):
        if not isinstance(name, str):
            entries.append((BAD + "no image", [str(number)], {}))
        elif name in by_name:
            by_name[name] += captions
        else:
            by_name[name] = list(captions)
            entries.append((name, by_name[name], facts))
    return entries
