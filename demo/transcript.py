"""A conversation about a picture, to keep: as JSON, or as one HTML file that needs nothing else."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from qformer.figures.page import ENVIRONMENT, data_uri

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

SIDE = 640  # pixels of the picture in a transcript, at most
PAGE = ENVIRONMENT.from_string("""\
<!doctype html><html lang="en"><head><meta charset="utf-8"><title>qformer: a conversation about a picture</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 44rem; margin: 2rem auto; padding: 0 1rem }
img { max-width: 100%; border-radius: .5rem }
dt { font-weight: 600; margin-top: 1.2rem } dd { margin: .2rem 0 0 }
small, summary { opacity: .7 } pre { white-space: pre-wrap; overflow-wrap: anywhere }
</style></head><body><h1>About a picture</h1><p><small>{{ model }}</small></p>
{% for picture in pictures %}<img src="{{ picture }}" alt="picture {{ loop.index }} of the conversation">{% endfor %}
<dl>
{% for turn in turns %}
<dt>{{ turn.question or "A caption" }}
{% if turn.notes %}<br><small>{{ turn.notes | join("; ") }}</small>{% endif %}</dt>
<dd>{{ turn.answer }}<details><summary>prompt</summary><pre>{{ turn.prompt }}</pre></details></dd>
{% endfor %}
</dl></body></html>
""")


@dataclass(frozen=True)
class Turn:
    """A question with its answer.

    Attributes:
        prompt: exact text after the image. options: of the decoding. suggested: the model asked the question itself.
        stopped: the visitor stopped the answer.
    """

    question: str
    answer: str
    context: str = ""
    task: str = "vqa"
    prompt: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    suggested: bool = False
    stopped: bool = False

    @property
    def notes(self) -> list[str]:
        """Remarks below the question."""
        context = [f"context: {self.context}"] if self.context else []
        return context + ["asked by the model itself"] * self.suggested + ["stopped"] * self.stopped


def as_json(model: str, turns: Sequence[Turn], *pictures: Image.Image) -> str:
    """The conversation, the model's name, and the pictures as data URIs: `picture`, and further ones as `more`."""
    shown = [data_uri(one, SIDE) for one in pictures]
    record = {"model": model, "picture": shown[0] if shown else None, "turns": [asdict(turn) for turn in turns]}
    return json.dumps(record | ({"more": shown[1:]} if shown[1:] else {}), ensure_ascii=False, indent=1)


def as_html(model: str, turns: Sequence[Turn], *pictures: Image.Image) -> str:
    """The conversation as one HTML file with the pictures inside."""
    return PAGE.render(model=model, turns=turns, pictures=[data_uri(one, SIDE) for one in pictures])
