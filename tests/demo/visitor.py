"""Someone who uses a running page by its API."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

if TYPE_CHECKING:
    from collections.abc import Iterator

META = {"_type": "gradio.FileData"}
API = "/gradio_api"


class Visitor:
    """A client of one page, as the browser's part of Gradio is."""

    def __init__(self, address: str) -> None:
        self.http = httpx.Client(base_url=address, timeout=60, trust_env=False)

    def upload(self, content: bytes | Path, name: str = "picture.png") -> httpx.Response:
        data = content.read_bytes() if isinstance(content, Path) else content
        return self.http.post(f"{API}/upload", files={"files": (name, io.BytesIO(data), "image/png")})

    def picture(self, file: Path) -> dict[str, Any]:
        """An uploaded picture, as a request refers to it."""
        response = self.upload(file)
        assert response.status_code == 200, response.text
        return {"path": response.json()[0], "meta": META}

    def post(self, data: Any, name: str = "ask", **more: Any) -> httpx.Response:
        if name == "ask" and isinstance(data, list) and len(data) == 3:
            data = [*data, "vqa", None, None]  # no history, and the decoding of the task
        body = json.dumps({"data": data, **more})  # httpx would not send half a character
        return self.http.post(f"{API}/call/{name}", content=body, headers={"Content-Type": "application/json"})

    def events(self, event: str, name: str = "ask") -> Iterator[tuple[str, Any]]:
        """What comes back of a request: kinds and values."""
        with self.http.stream("GET", f"{API}/call/{name}/{event}") as response:
            assert response.status_code == 200
            kind = ""
            for line in response.iter_lines():
                head, _, value = line.partition(": ")
                if head == "event":
                    kind = value
                elif head == "data":
                    yield kind, json.loads(value)

    def outcome(self, data: list[Any], name: str = "ask") -> tuple[str, Any]:
        """`complete` and the answer, or `error` and the sentence, whether it comes at once or later."""
        response = self.post(data, name)
        if response.status_code != 200:
            return str(response.status_code), response.json()["detail"]
        kind, value = list(self.events(response.json()["event_id"], name))[-1]
        return kind, value["error"] if kind == "error" else value[0]

    def health(self) -> dict[str, Any]:
        return self.http.get("/health").json()
