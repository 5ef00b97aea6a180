"""`report.html` of the quickstart on photos: one file with all results, small pictures included."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from markupsafe import Markup
from PIL import Image

from qformer.evaluation.linear import LINEAR
from qformer.figures import page as sheet
from qformer.figures.page import table
from qformer.images import read_image
from qformer.stages.quickstart.questions import KINDS
from qformer.stages.quickstart.shown import BEST, QUERIES, STYLE, percent, png, query, telling, template
from qformer.types import BadSample

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from qformer.evaluation.retrieval import Scores
    from qformer.stages.quickstart.questions import Closed
    from qformer.stages.quickstart.real_exam import Answers, Photos

CAPTIONS, ANSWERS, OWN = 12, 18, 24  # cards
SIDE = 240  # pixels of a photo
ROWS = {LINEAR: "linear map of the frozen towers", "itc": "ITC", "reranked": "re-ranked by ITM"}
REPORT = template("""\
<h1>BLIP-2 on photos, between frozen towers</h1>
<p class=soft>Both stages in {{ "%.0f s and %.1f GB" | format(seconds, memory) }}, {{ "%.0f" | format(cpu) }} s of CPU.
No photo below was trained on.</p>
<h2>Results</h2>
<p class=soft>"Blind" is the same model trained on gray pictures, "commonest" always the commonest answer of a kind.
"Calibrated" takes the answer that gains most over blind, not the likeliest. Intervals are a bootstrap over photos.</p>
<div class=side>
{% for title, (head, rows) in tables.items() %}<div><h3>{{ title }}</h3>{{ table(head, rows) }}</div>
{% endfor %}
</div>
<h2>Learning</h2>
{{ figure("stage1", "stage one") }}
<div class=side>{{ figure("stage2", "stage two") }}{{ figure("stage2-blind", "its blind twin") }}</div>
<h2>Retrieval: a caption looks for its photo</h2>
<p>The {{ best }} best of {{ photos }}, by ITC{% if reranked %}, then with {{ candidates }} candidates re-ranked by
ITM{% endif %}. The right one is outlined.</p>
{{ searches(queries) }}
<h2>Captions</h2>
<p>Bold is what the model wrote, below it what two people did.</p>
<div class=cards>
{% for picture, caption, truth in captioned %}
<div class=card>{{ picture }}<p><b>{{ caption }}</b></p>
{% for text in truth %}<p class=soft>{{ text }}</p>{% endfor %}</div>
{% endfor %}
</div>
<h2>Questions, never seen in stage two</h2>
<p>The likeliest of the answers to choose from; questions and right answers are made from the captions of people.</p>
<div class=cards>
{% for picture, one, answer, guess in answered %}
<div class=card>{{ picture }}<p>{{ one.question }}</p>
<p><b>{{ marked(answer, answer == one.answer) }}</b> <span class=soft>blind: {{ guess }}</span></p>
<p class=soft>right: {{ one.answer }}</p></div>
{% endfor %}
</div>
{% if own %}
<h2>Your photos</h2>
<p>Search them: <code>qformer search {{ folder / "stage1" }} {{ folder / "photos" }} "a dog on a beach"</code></p>
<div class=cards>
{% for picture, caption in own %}<div class=card>{{ picture }}<p><b>{{ caption }}</b></p></div>
{% endfor %}
</div>
{% endif %}
""")


@dataclass(frozen=True)
class Found:
    """Retrieval among held-out photos.

    Attributes:
        numbers: of the photos, in the rows of `scores`, whose columns are their captions.
        recalls: by kind of score, see `qformer.evaluation.retrieval.recall_table`.
    """

    numbers: list[int]
    scores: Scores
    recalls: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Shown:
    """Texts of the models for the held-out photos, and for the user's `own`."""

    held: Photos
    found: Found
    said: dict[int, str]
    answers: Answers
    own: list[tuple[Path, str]] = field(default_factory=list)

    def picture(self, number: int, side: int = SIDE, kind: str = "") -> Markup:
        """A held-out photo as an HTML image, or a note in its place."""
        return _picture(lambda: self.held.listed[number].read(self.held.source), side, kind)


def write(folder: Path, results: dict[str, Any], shown: Shown, candidates: int) -> None:
    """Write `report.html` into `folder`.

    Args:
        results: the contents of `results.json`.
        candidates: the number of candidates that ITM re-ranked.
    """
    report = REPORT.render(
        folder=folder,
        png=png,
        seconds=results["seconds"],
        memory=results["peak_memory_gb"],
        cpu=sum(results["cpu_seconds"].values()),
        tables=tables(results),
        table=table,
        best=BEST,
        photos=len(shown.found.numbers),
        candidates=candidates,
        reranked="reranked" in shown.found.recalls,
        queries=_queries(shown),
        captioned=[
            (shown.picture(number), text, shown.held.listed[number].captions[:2])
            for number, text in spread(list(shown.said.items()), CAPTIONS)
        ],
        answered=_answered(shown),
        own=[(_picture(partial(read_image, path), SIDE), text) for path, text in shown.own[:OWN]],
    )
    page = sheet.page("qformer quickstart --real", [Markup(report)], STYLE)
    (folder / "report.html").write_text(page, encoding="utf-8")


def phase_rows(results: dict[str, Any]) -> list[list[str]]:
    """Rows of a table: each phase with its seconds and CPU-seconds."""
    rows = [
        [name, f"{seconds:.0f}", f"{results['cpu_seconds'][name]:.0f}"] for name, seconds in results["phases"].items()
    ]
    return [*rows, ["all", f"{results['seconds']:.0f}", f"{sum(results['cpu_seconds'].values()):.0f}"]]


def retrieval_rows(results: dict[str, Any]) -> list[list[str]]:
    """Rows of a table: R@1, R@5 and R@10 in both directions, in %."""
    return [
        [ROWS[name], query, *(percent(values[f"{way}_r{n}"]) for n in (1, 5, 10))]
        for name, values in results["retrieval"].items()
        for way, query in (("i2t", "image"), ("t2i", "text"))
    ]


def answer_rows(vqa: dict[str, Any]) -> list[list[str]]:
    """Rows of a table: questions, right answers, those of the blind twin and of the commonest answer, in %."""
    count, baselines = str(vqa["questions"]), {name: vqa[name] for name in ("blind", "majority")}
    rows = []
    for name, values in (("all", vqa), ("calibrated", vqa["calibrated"])):
        low, high = values["interval"]
        gained = f"{percent(values['difference'])} ({percent(low)} to {percent(high)})"
        rows.append([name, count, *_shares({**baselines, "accuracy": values["accuracy"]}, gained)])
    for kind, values in vqa["by_kind"].items():
        rows.append([kind, str(values["count"]), *_shares(values, percent(values["accuracy"] - values["blind"]))])
    return rows


def _shares(values: dict[str, Any], gained: str) -> list[str]:
    right, blind, common = (percent(values[key]) for key in ("accuracy", "blind", "majority"))
    return [right, blind, gained, common]


PHASES = ["phase", "s", "s of CPU"]
RECALLS = ["ranked by", "query", "R@1", "R@5", "R@10"]
SHARES = ["zero-shot", "count", "right", "blind", "difference (95 %)", "commonest"]
SCORES = ("CIDEr", "BLEU-4", "ROUGE-L")


def tables(results: dict[str, Any]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """All tables by their titles, each with its head and its rows."""
    found = {"retrieval among held-out photos, %": (RECALLS, retrieval_rows(results))}
    if scores := results["captions"]:
        found["captions, times 100"] = list(SCORES), [[percent(scores[name]) for name in SCORES]]
    if results["vqa"]:
        found["closed questions, %"] = SHARES, answer_rows(results["vqa"])
    return found | {"time": (PHASES, phase_rows(results))}


def _queries(shown: Shown) -> list[tuple[str, dict[str, list[Markup]]]]:
    """Captions, one of each photo, and their best photos before re-ranking and, where there is any, after it."""
    numbers, scores, reranked = shown.found.numbers, shown.found.scores, "reranked" in shown.found.recalls
    texts = [(row, text) for row, number in enumerate(numbers) for text in shown.held.listed[number].captions]
    firsts = list({row: place for place, (row, _) in reversed(list(enumerate(texts)))}.values())[::-1]

    def show(row: int, kind: str) -> Markup:
        return shown.picture(numbers[row], SIDE // 2, kind)

    places = telling(scores, firsts) if reranked else spread(firsts, QUERIES)
    return [(texts[place][1], query(place, texts[place][0], scores, show, reranked)) for place in places]


def _answered(shown: Shown) -> list[tuple[Markup, Closed, str, str]]:
    """Questions of all kinds in turn, each with its photo and the answers of both models."""
    rows = list(zip(shown.answers.questions, shown.answers.said, shown.answers.guessed, strict=True))
    each = ANSWERS // len(KINDS)
    chosen = [row for kind in KINDS for row in spread([row for row in rows if row[0].kind == kind], each)]
    return [(shown.picture(one.photo), one, answer, guess) for one, answer, guess in chosen]


def spread(rows: list[Any], count: int) -> list[Any]:
    """A few rows, from all over."""
    count = min(count, len(rows))
    return [rows[place * len(rows) // count] for place in range(count)]


def _picture(read: Callable[[], Tensor], side: int, kind: str = "") -> Markup:
    try:
        drawn = Image.fromarray(read().permute(1, 2, 0).numpy())
    except BadSample:
        return Markup("<p class=soft>cannot be read any more</p>")
    drawn.thumbnail((side, side))
    return sheet.picture(drawn, kind, "photo")
