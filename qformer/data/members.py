"""Names in a tar: which of its files are one sample, and what each file is of it.

Webdataset's rule is that a name ends at its first dot: `17.jpg`, `17.txt` and `17.depth.png` are one sample. Names of
people have dots in them (`v1.2.jpg`, `v1.3.jpg`), and by that rule were one sample of many pictures. So files that
share a name up to the last dot are a sample of their own where that is what they look like.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from qformer.images.formats import SUFFIXES, of_a_system

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

IMAGES = {suffix[1:] for suffix in SUFFIXES} | {"img"}
TEXT = "txt"
MINGLED = 100  # files of one name up to the first dot, of which samples may stand between each other


class Member(NamedTuple):
    """A file of a tar.

    Attributes:
        key: folder and name up to the first dot. ending: the rest, in small letters. start, stop: bytes in the tar.
    """

    key: str
    ending: str
    start: int = 0
    stop: int = 0

    @property
    def stem(self) -> str:
        """What is between the first dot and the last: of `17.depth.png` `depth`, of `17.png` nothing."""
        return self.ending.rpartition(".")[0]

    @property
    def kind(self) -> str:
        """What is behind the last dot."""
        return self.ending.rpartition(".")[2]


def split(name: str) -> tuple[str, str] | None:
    """`a/17.seg.png` -> (`a/17`, `seg.png`); None for a name without either, or a file of a Mac or Windows."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    if not stem or not extension or of_a_system(name.split("/")):
        return None
    return f"{folder}/{stem}".lstrip("/"), extension.lower()


def own_stems(members: Iterable[Member]) -> set[str]:
    """Of files with the same key: the stems that are samples of their own.

    That is each stem with an image and a text; and all of them, where each has an image and none of the files is
    called by the key alone.
    """
    kinds: dict[str, set[str]] = {}
    for member in members:
        kinds.setdefault(member.stem, set()).add(member.kind)
    pictured = {stem for stem, found in kinds.items() if found & IMAGES}
    if "" not in kinds and pictured == kinds.keys():
        return pictured
    return {stem for stem in pictured if stem and TEXT in kinds[stem]}


def samples_of(run: Sequence[Member]) -> list[tuple[int, int]]:
    """Start and stop of each sample among files with the same key that stand together; they may overlap."""
    own = own_stems(run)
    rows: dict[object, tuple[int, int]] = {}
    before, part = None, 0
    for member in run:
        stem = member.stem if member.stem in own else ""
        if len(run) > MINGLED and stem != before:  # each would read all that is between its files
            part += 1
        before = stem
        start, _ = rows.get((stem, part), (member.start, 0))
        rows[stem, part] = start, member.stop
    return list(rows.values())


def sample_in(members: Sequence[Member]) -> tuple[str, dict[int, str]]:
    """The sample to which the first of these files belongs: its key, and the ending of each of its files by place."""
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
