"""Grouping of the files of a tar into samples, by their names.

In webdataset, the key of a sample ends at the first dot: `17.jpg`, `17.txt` and `17.depth.png` are one sample. But
users' names may contain dots (`v1.2.jpg`, `v1.3.jpg`), and this rule would merge such files into one sample with many
images. So files with the same name up to the last dot are a sample of their own if they look like one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from qformer.formats import SUFFIXES, is_system_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

IMAGES = {suffix[1:] for suffix in SUFFIXES} | {"img"}
TEXT = "txt"
MINGLED = 100  # files with one key, up to which the files of its samples may be interleaved


class Member(NamedTuple):
    """File in a tar.

    Attributes:
        key: folder and name up to the first dot.
        ending: the rest of the name, in lower case.
        start, stop: range of bytes in the tar.
    """

    key: str
    ending: str
    start: int = 0
    stop: int = 0

    @property
    def stem(self) -> str:
        """Part of the name between the first dot and the last: `depth` of `17.depth.png`, empty for `17.png`."""
        return self.ending.rpartition(".")[0]

    @property
    def kind(self) -> str:
        """Part of the name after the last dot."""
        return self.ending.rpartition(".")[2]


def split(name: str) -> tuple[str, str] | None:
    """Split `a/17.seg.png` into (`a/17`, `seg.png`); None for a name without both, or a system file."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    if not stem or not extension or is_system_file(name.split("/")):
        return None
    return f"{folder}/{stem}".lstrip("/"), extension.lower()


def own_stems(members: Iterable[Member]) -> set[str]:
    """Find the stems that are samples of their own, among files with the same key.

    These are the stems with an image and a text, or all stems if each has an image and no stem is empty.
    """
    kinds: dict[str, set[str]] = {}
    for member in members:
        kinds.setdefault(member.stem, set()).add(member.kind)
    pictured = {stem for stem, found in kinds.items() if found & IMAGES}
    if "" not in kinds and pictured == kinds.keys():
        return pictured
    return {stem for stem in pictured if stem and TEXT in kinds[stem]}


def samples_of(run: Sequence[Member]) -> list[tuple[int, int]]:
    """Find start and stop of each sample among consecutive files with the same key; ranges may overlap."""
    own = own_stems(run)
    rows: dict[object, tuple[int, int]] = {}
    before, part = None, 0
    for member in run:
        stem = member.stem if member.stem in own else ""
        if len(run) > MINGLED and stem != before:  # each sample would read everything between its files
            part += 1
        before = stem
        start, _ = rows.get((stem, part), (member.start, 0))
        rows[stem, part] = start, member.stop
    return list(rows.values())


def sample_in(members: Sequence[Member]) -> tuple[str, dict[int, str]]:
    """Find the sample of the first of these files: its key, and the endings of its files by position."""
    own = own_stems(members)
    first = members[0].stem if members[0].stem in own else ""
    kept = {
        place: member for place, member in enumerate(members) if (member.stem if member.stem in own else "") == first
    }
    stems = {member.stem for member in kept.values()}
    key = members[0].key
    if len(stems) > 1 or stems == {""}:
        return key, {place: member.ending for place, member in kept.items()}
    return f"{key}.{stems.pop()}", {place: member.kind for place, member in kept.items()}
