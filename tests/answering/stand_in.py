"""A stand-in for an OpenAI-compatible server on this machine, which answers, fails, hangs or lies as it is told."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from PIL import Image

Answer = Callable[[list[Image.Image], str], str]
HTML = "<html><body>welcome</body></html>"


class StandIn:
    """A server that answers with `answer`; what stands in `faults` comes first, one entry for each request.

    Attributes:
        faults: `STATE`, `STATE text`, `hang`, `drip` (the head), `endless`, `cut`, `redirect URL`, or a text to send.
        asked: bodies of requests, and their headers in `heads`.
    """

    def __init__(self, answer: Answer = lambda _images, _text: "4") -> None:
        self.answer, self.models = answer, ["tiny"]
        self.faults: list[str] = []
        self.asked: list[dict[str, Any]] = []
        self.heads: list[dict[str, str]] = []
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._send(200, json.dumps({"data": [{"id": name} for name in outer.models]}))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append(body)
                outer.heads.append(dict(self.headers))
                with suppress(OSError):  # the client has left
                    self._reply(body)

            def _reply(self, body: dict[str, Any]) -> None:
                fault = outer.faults.pop(0) if outer.faults else ""
                if fault == "hang":
                    outer.over.wait(30)
                elif fault in ("drip", "endless"):
                    self._trickle(fault)
                elif fault == "cut":
                    self.send_response(200)
                    self.send_header("Content-Length", "1000")
                    self.end_headers()
                    self.wfile.write(b'{"choices": [')
                elif fault[:3].isdecimal() and fault[:1] in "45":
                    self._send(int(fault[:3]), fault[4:])
                elif fault.startswith("redirect "):
                    self.send_response(307)
                    self.send_header("Location", fault.removeprefix("redirect "))
                    self.end_headers()
                else:
                    self._send(200, fault or completion(outer.answer(*read(body))))

            def _trickle(self, what: str) -> None:
                self.wfile.write(b"HTTP/1.1 200 OK\r\n")
                if what == "endless":
                    self.wfile.write(b"\r\n")
                while not outer.over.wait(0.02 if what == "drip" else 0):
                    self.wfile.write(b"X-Drip: 1\r\n" if what == "drip" else b"x" * (1 << 20))

            def _send(self, status: int, text: str) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self._server.shutdown()
        self._server.server_close()


def completion(content: Any) -> str:
    """The body of a chat completion."""
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]})


def read(body: dict[str, Any]) -> tuple[list[Image.Image], str]:
    """Pictures and text of a request, as a server reads them."""
    *shown, last = body["messages"][0]["content"]
    pictures = []
    for one in shown:
        head, data = one["image_url"]["url"].split(",", 1)
        assert head == "data:image/png;base64"
        pictures.append(Image.open(io.BytesIO(base64.b64decode(data))))
    return pictures, last["text"]
