"""A conversation about a picture, to keep: as JSON, or as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import asdict, dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

SIDE = 640  # pixels of the picture in a transcript, at most
STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 44rem; margin: 2rem auto; padding: 0 1rem }
img { max-width: 100%; border-radius: .5rem }
dt { font-weight: 600; margin-top: 1.2rem } dd { margin: .2rem 0 0 }
small, summary { opacity: .7 } pre { white-space: pre-wrap; overflow-wrap: anywhere }
"""


@dataclass(frozen=True)
class Turn:
    """A question with its answer.

    Attributes:
        prompt: exactly what stood behind the image. options: how it was decoded. suggested: the model asked itself.
        stopped: the answer was not waited for.
    """

    question: str
    answer: str
    context: str = ""
    task: str = "vqa"
    prompt: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    suggested: bool = False
    stopped: bool = False


def as_json(model: str, turns: Sequence[Turn], picture: Image.Image | None = None) -> str:
    """The conversation, the model's name, and the picture as a data URI."""
    shown = None if picture is None else data_uri(picture, SIDE)
    record = {"model": model, "picture": shown, "turns": [asdict(turn) for turn in turns]}
    return json.dumps(record, ensure_ascii=False, indent=1)


def as_html(model: str, turns: Sequence[Turn], picture: Image.Image | None = None) -> str:
    """One file in which every text is escaped; the picture is inside."""
    parts = [f'<img src="{data_uri(picture, SIDE)}" alt="the picture that was asked about">'] if picture else []
    for turn in turns:
        notes = [f"context: {turn.context}"] if turn.context else []
        notes += ["asked by the model itself"] if turn.suggested else []
        notes += ["stopped"] if turn.stopped else []
        note = f"<br><small>{escape('; '.join(notes))}</small>" if notes else ""
        parts.append(
            f"<dt>{escape(turn.question) or 'A caption'}{note}</dt><dd>{escape(turn.answer)}"
            f"<details><summary>prompt</summary><pre>{escape(turn.prompt)}</pre></details></dd>"
        )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>qformer: a conversation about a picture'
        '</title><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><h1>About a picture</h1><p><small>{escape(model)}</small></p>"
        f"{''.join(parts[:1] if picture else [])}<dl>{''.join(parts[1:] if picture else parts)}</dl></body></html>"
    )


def data_uri(picture: Image.Image, side: int) -> str:
    """The picture as JPEG, at most `side` pixels wide and high, inside an address."""
    small = picture.convert("RGB")
    small.thumbnail((side, side))
    data = io.BytesIO()
    small.save(data, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode("ascii")
