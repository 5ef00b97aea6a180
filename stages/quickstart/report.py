"""The quickstart's `report.html`: one file with all results, images included."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from markupsafe import Markup
from PIL import Image

from qformer.evaluation.zero_shot import SIZE, UNSEEN
from qformer.figures import page as sheet
from qformer.figures.page import picture, table
from qformer.scenes.scenes import Scenes, draw
from qformer.stages.quickstart.shown import BEST, STYLE, percent, png, query, telling, template

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from qformer.data.held_out import HeldOut
    from qformer.evaluation.retrieval import Scores
    from qformer.evaluation.zero_shot import Captioned, Reply
    from qformer.scenes.text import Scene
    from qformer.stages.quickstart.exam import ExamResults

SHOWN = 12
REPORT = template("""\
<h1>BLIP-2, from an untrained bridge</h1>
<p class=soft>Both stages on drawn scenes in {{ "%.0f s and %.1f GB" | format(seconds, memory) }}.
No picture below was trained on; those of new combinations hold shapes in a color, or in an order, that no training
picture showed.</p>
{{ tables }}
<h2>Learning</h2>
{{ figure("stage1", "stage one") }}
<div class=side>{% for name in prompts %}{{ figure(name, "stage two, " + name | upper) }}{% endfor %}</div>
<h2>Retrieval: a caption looks for its picture</h2>
<p>The {{ best }} best of {{ scenes }}, by ITC, then with {{ candidates }} candidates re-ranked by ITM. The right one is
outlined.</p>
{{ searches(queries) }}
<h2>Captions of one object</h2>
<div class=cards>
{% for picture, captions in captioned %}
<div class=card>{{ picture }}
{% for name, one in captions.items() %}<p><b>{{ name | upper }}</b> {{ marked(one.caption, one.named) }}</p>{% endfor %}
</div>
{% endfor %}
</div>
<h2>Questions, never seen in stage two</h2>
<div class=cards>
{% for picture, asked, replies in answered %}
<div class=card>{{ picture }}<p>{{ asked.question }}</p>
{% for name, (reply, blind) in replies.items() %}
<p><b>{{ name | upper }}</b> {{ marked(reply.text, reply.right) }} <span class=soft>blind: {{ blind.text }}</span></p>
{% endfor %}
<p class=soft>right: {{ asked.answer }}</p></div>
{% endfor %}
</div>
<h2>Prompts</h2>
<p>The text that follows the picture, and that the model continues:</p>
<pre><code>
{%- for name, (caption, question) in prompts.items() -%}
{{ name | upper }}, caption: {{ caption or "(nothing)" }}
{{ name | upper }}, question: {{ question }}{{ "" if loop.last else "\n" }}
{%- endfor -%}
</code></pre>
""")


def write(
    folder: Path, results: dict[str, Any], held: HeldOut, scores: Scores, candidates: int, seen: ExamResults
) -> None:
    """Write `report.html` into `folder`.

    Args:
        results: the contents of `results.json`.
        held: the scenes for retrieval, one caption each.
        scores: the retrieval scores of these images and captions.
        candidates: the number of candidates that ITM re-ranked.
    """
    report = REPORT.render(
        folder=folder,
        png=png,
        seconds=results["seconds"],
        memory=results["peak_memory_gb"],
        tables=_tables(results, len(held)),
        best=BEST,
        scenes=len(held),
        candidates=candidates,
        queries=[_query(number, held, scores) for number in telling(scores, range(len(held)))],
        captioned=[_captioned(seen, number) for number in range(SHOWN // 2)],
        answered=[_answered(seen, number) for number in range(SHOWN)],
        prompts=seen.prompts,
    )
    page = sheet.page("qformer quickstart", [Markup(report)], STYLE)
    (folder / "report.html").write_text(page, encoding="utf-8")


def _tables(results: dict[str, Any], scenes: int) -> Markup:
    names = {"step0": "untrained", "itc": "ITC", "reranked": "re-ranked by ITM"}
    retrieval = [
        [names[name], *(percent(values[f"{way}_r{n}"]) for way in ("i2t", "t2i") for n in (1, 5, 10))]
        for name, values in results["retrieval"].items()
    ]
    captions = results["captions"]
    answers = [
        [
            name.upper(),
            *(percent(values[key]) for key in ("accuracy", "blind", "majority", "new_combinations")),
            *(percent(captions[key][name]) for key in ("by_model", "new_combinations")),
        ]
        for name, values in results["vqa"].items()
    ]
    kinds = list(next(iter(results["vqa"].values()))["by_kind"])
    by_kind = [[n.upper(), *(percent(v["by_kind"][k]) for k in kinds)] for n, v in results["vqa"].items()]
    return (
        sheet.section("Results, in %")
        + table(
            [
                f"{scenes} scenes, new combinations",
                *(f"{way} R@{n}" for way in ("image to text", "text to image") for n in (1, 5, 10)),
            ],
            retrieval,
        )
        + table(
            [
                "zero-shot",
                *("right answers", "blind", "most common answer", "new combinations"),
                *("captions with color and shape", "new combinations"),
            ],
            answers,
        )
        + table(["by kind", *kinds], by_kind)
    )


def _query(number: int, held: HeldOut, scores: Scores) -> tuple[str, dict[str, list[Markup]]]:
    """One caption, and its best pictures before and after re-ranking."""
    return held.captions[number][0], query(
        number, number, scores, lambda image, kind: _picture(_held_pixels(held, image), kind)
    )


def _held_pixels(held: HeldOut, image: int) -> Tensor:
    for group in held.groups:
        if image < len(group):
            return group[image : image + 1].pixels[0]
        image -= len(group)
    raise IndexError(image)


def _picture(pixels: Tensor, kind: str = "") -> Markup:
    """uint8[3, h, w] as an HTML image."""
    return picture(Image.fromarray(pixels.permute(1, 2, 0).numpy()), kind, "scene", "PNG")


def _captioned(seen: ExamResults, number: int) -> tuple[Markup, dict[str, Captioned]]:
    """A picture, and the caption that each language model gave it."""
    captions = {name: by_split[UNSEEN][number] for name, by_split in seen.captioned.items()}
    return _picture(_drawn(next(iter(captions.values())).scene)), captions


def _drawn(scene: Scene) -> Tensor:
    return torch.from_numpy(draw(scene, SIZE, SIZE)).permute(2, 0, 1)


def _answered(seen: ExamResults, number: int) -> tuple[Markup, Reply, dict[str, tuple[Reply, Reply]]]:
    """A picture, its question, and the reply of each language model with that of its blind twin."""
    replies = {name: by_split[UNSEEN] for name, by_split in seen.replies.items()}
    first = next(iter(replies.values()))
    source = Scenes(UNSEEN, size=SIZE, count=len(first), questions=True)
    pairs = {name: (own[number], seen.blind[name][number]) for name, own in replies.items()}
    return _picture(_drawn(source.scene(number))), first[number], pairs
