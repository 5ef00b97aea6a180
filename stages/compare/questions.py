"""Questions that all systems are asked, the skills that they need, and what answers to them are worth."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qformer.data.base import indices
from qformer.data.columns import columns_of
from qformer.data.texts import answers_of, clean_question
from qformer.evaluation.benchmarks import COLUMNS
from qformer.evaluation.vqa import accuracy
from qformer.metrics.documents import anls, relaxed_accuracy
from qformer.stages.compare.samples import describe, digest
from qformer.types import BadSample, UsageError
from qformer.videos import Clip, is_video
from qformer.videos.rows import glance, parts_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qformer.data.base import Source
    from qformer.types import Sample

ALL = "all"
#: Skills that several kinds of questions need.
SKILLS = {
    "reading": ("word", "text"),
    "counting": ("count", "more"),
    "place": ("position", "relation", "box", "content", "edge", "layout", "structure"),
    "attributes": ("colour", "shape", "state", "direction", "viewpoint"),
    "time": ("movement", "order", "change"),
}
SEVERAL, CLIPS = "several pictures", "clips"
TWINS = "twins"  # both questions of a pair are right
#: Rules by which an answer is worth something in 0..1.
METRICS = {"accuracy": accuracy, "anls": anls, "relaxed": relaxed_accuracy}


@dataclass(frozen=True)
class Question:
    """Question about a picture, several, or a clip.

    Attributes:
        place: index of its sample in the source.
        text, accepted: cleaned question, and accepted answers.
        kind: what the data call its type; empty where they do not.
        shows: `""` for one picture, `SEVERAL` or `CLIPS`.
        cluster: number of its image; questions of one image, and the twins of a pair, stand or fall together.
        pair: number of its pair of twins; None where it is none.
        choices: answers to choose from, where its record brings some; else empty.
        digest: hash of everything that it shows and asks.
    """

    place: Any
    text: str
    accepted: list[str]
    kind: str
    shows: str
    cluster: int
    pair: int | None
    choices: list[str]
    digest: str

    @property
    def skills(self) -> list[str]:
        """Skills that it needs, without its own kind."""
        return [skill for skill, kinds in SKILLS.items() if self.kind in kinds] + [self.shows] * bool(self.shows)


def list_questions(source: Source, limit: int) -> tuple[list[Question], list[dict[str, str]]]:
    """The first `limit` questions of a source that can be asked, and the records that cannot.

    Raises:
        UsageError: there is none.
    """
    found: list[Question] = []
    skipped: list[dict[str, str]] = []
    images: list[Any] = []
    pairs: dict[Any, int] = {}
    for place in indices(source):
        if len(found) == limit:
            break
        try:
            sample = source[place]
            glance(sample.image)
            if not (accepted := answers_of(sample)):
                raise BadSample("no question", f"{sample.key}; {columns_of(sample.facts)}")
        except BadSample as bad:
            skipped.append({"index": str(place), "kind": bad.kind, "detail": bad.detail})
            if len(skipped) >= max(limit, 100) and not found:
                break
            continue
        found.append(_question(sample, place, accepted, pairs))
        images.append(sample.image_id)
    if not found:
        first = skipped[0]["detail"] if skipped else "it is empty"
        raise UsageError(
            f"data.validation has no question with an answer ({first}); give held-out questions, such as "
            "data.validation='{name: canvases, split: val, questions: true}' or JSON lines with question and answer"
        )
    clusters = _clusters(images, [one.pair for one in found])
    return [replace(one, cluster=cluster) for one, cluster in zip(found, clusters, strict=True)], skipped


def _clusters(images: Sequence[Any], pairs: Sequence[int | None]) -> list[int]:
    """Number questions so that those of one image or one pair, also by way of others, have one number."""
    roots: dict[tuple[str, Any], tuple[str, Any]] = {}

    def root(key: tuple[str, Any]) -> tuple[str, Any]:
        while roots.setdefault(key, key) != key:
            roots[key] = roots[roots[key]]
            key = roots[key]
        return key

    for image, pair in zip(images, pairs, strict=True):
        if pair is not None:
            roots[root(("pair", pair))] = root(("image", image))
    numbers: dict[tuple[str, Any], int] = {}
    return [numbers.setdefault(root(("image", image)), len(numbers)) for image in images]


def _question(sample: Sample, place: Any, accepted: list[str], pairs: dict[Any, int]) -> Question:
    twin = sample.facts.get("pair")
    pair = pairs.setdefault((sample.key.rpartition("/")[0], twin), len(pairs)) if isinstance(twin, int) else None
    choices = sample.facts.get("choices")
    return Question(
        place=place,
        text=clean_question(sample.question or ""),
        accepted=accepted,
        kind=_kind(sample),
        shows=_shows(sample.image),
        cluster=0,  # until all are known
        pair=pair,
        choices=list(map(str, choices)) if isinstance(choices, list) and len(choices) > 1 else [],
        digest=digest(describe(sample)),
    )


def _kind(sample: Sample) -> str:
    kinds = (sample.facts.get(column) for column in ("question_type", "kind", *COLUMNS))
    return next((kind for kind in kinds if isinstance(kind, str) and kind), "")


def _shows(image: Any) -> str:
    parts = parts_of(image)
    if any(isinstance(one, Clip) or is_video(one) for one in parts):
        return CLIPS
    return SEVERAL if len(parts) > 1 else ""


def rows_by_skill(kinds: Sequence[str], shows: Sequence[str], skills: Sequence[Sequence[str]]) -> dict[str, list[int]]:
    """Numbers of the questions of each skill and of each kind, without those that hold all questions or equal a kind.

    A kind counts wherever it is asked; several pictures and clips by themselves are skills.
    """
    found: dict[str, list[int]] = {skill: [] for skill in [*SKILLS, SEVERAL, CLIPS]}
    for row, own in enumerate(skills):
        for skill in own:
            found.setdefault(skill, []).append(row)
    for row, kind in enumerate(kinds):
        if kind:
            found.setdefault(kind, []).append(row)
    of_kinds = {tuple(rows) for name, rows in found.items() if name not in (*SKILLS, SEVERAL, CLIPS)}
    return {
        name: rows
        for name, rows in found.items()
        if rows and len(rows) < len(kinds) and not (name in SKILLS and tuple(rows) in of_kinds)
    }


def rows_of_pairs(pairs: Sequence[int | None]) -> dict[int, list[int]]:
    """Numbers of the two questions of each pair of twins; a pair of which one is left out is none."""
    found: dict[int, list[int]] = {}
    for row, pair in enumerate(pairs):
        if pair is not None:
            found.setdefault(pair, []).append(row)
    return {pair: rows for pair, rows in found.items() if len(rows) == 2}
