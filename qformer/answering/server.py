"""Client of servers that speak OpenAI's chat completions, such as vLLM, llama.cpp, SGLang and Ollama.

Pictures travel inside the request, as PNG in base64. What a server replies is a stranger's text: it is bounded, checked
and never run. The key is read from the environment, sent to this server alone, and struck out of everything it says.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from qformer.answering.json_calls import Fault, request_json
from qformer.types import UsageError

if TYPE_CHECKING:
    from PIL import Image

#: Environment variable of the key. Not OPENAI_API_KEY, which would go to any server that somebody tries.
KEY = "QFORMER_API_KEY"
CHAT, MODELS = "/chat/completions", "/models"
LISTED = 8  # names of models in a message
REMEDIES = {
    401: f"set the environment variable {KEY}",
    403: f"set the environment variable {KEY}",
    404: "check the address, such as http://localhost:8000/v1, and the name of the model",
    429: "wait and run the same command again",
}


@dataclass
class Server:
    """A model behind an OpenAI-compatible server: pictures and a question -> text.

    Attributes:
        url: address, such as `http://localhost:8000/v1`; without a path `/v1` is added.
        model: its name there; None: the only one that the server lists.
        timeout: seconds for a whole reply. tries: how often a request is made. wait: seconds before the second try.
        most_tokens: length of an answer, in the server's tokens.

    Raises:
        UsageError: an address that is none, or holds a password.
    """

    url: str
    model: str | None = None
    timeout: float = 120.0
    tries: int = 3
    wait: float = 1.0
    most_tokens: int = 256
    _key: str = field(init=False, repr=False)
    _own: dict[str, Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.url = _base(self.url)
        if self.timeout <= 0 or self.tries < 1:
            raise UsageError(f"a server was given {self.timeout:g} s and {self.tries} tries; give positive numbers")
        self._key = os.environ.get(KEY, "").strip()
        if not self._key.isascii() or not self._key.isprintable():
            raise UsageError(f"the environment variable {KEY} holds characters that no key has; copy the key again")
        # What newer models of OpenAI refuse is left out or renamed after their first complaint.
        self._own = {"temperature": 0, "max_tokens": self.most_tokens}

    @property
    def identity(self) -> dict[str, str]:
        """Server and model, for records; the key is not in it."""
        return {"server": self.url, "model": self.name()}

    def name(self) -> str:
        """Name of the model; a server is asked for its list where none was given.

        Raises:
            UsageError: the server cannot be reached, or does not list exactly one model.
        """
        if self.model is None:
            listed = self._request(MODELS, None, lambda values: [str(one["id"]) for one in values["data"]])
            if len(listed) != 1:
                some = ", ".join(one[:80] if one.isprintable() else f"{one!a:.80}" for one in listed[:LISTED]) or "none"
                raise UsageError(
                    f"the server at '{self.url}' lists {len(listed)} models ({some}); choose one with --model"
                )
            if not listed[0].isprintable():
                raise UsageError(f"the server at '{self.url}' lists a model {listed[0]!a:.80}; choose one with --model")
            self.model = listed[0]
        return self.model

    def __call__(self, images: Sequence[Image.Image | Sequence[Image.Image]], questions: Sequence[str]) -> list[str]:
        """Answers to B questions, one after the other: each is about its image, or about several that it shows.

        Raises:
            UsageError: unequal numbers of images and questions, or see `complete`.
        """
        if len(images) != len(questions):
            raise UsageError(f"got {len(questions)} questions for {len(images)} images; give one for each image")
        return [
            self.complete(shown if isinstance(shown, Sequence) else [shown], question)
            for shown, question in zip(images, questions, strict=True)
        ]

    def complete(self, images: Sequence[Image.Image], text: str) -> str:
        """Text of the model about these pictures, in this order, and a text behind them; empty if it refuses.

        Raises:
            UsageError: no usable reply after all tries.
        """
        shown = [{"type": "image_url", "image_url": {"url": _data_url(image)}} for image in images]
        content = [*shown, {"type": "text", "text": text}]
        body = {"model": self.name(), "messages": [{"role": "user", "content": content}]}
        return self._request(CHAT, body, _said)

    def _request(self, path: str, body: dict[str, Any] | None, read: Any) -> Any:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        while True:
            try:
                sent = None if body is None else body | self._own
                given = request_json(self.url + path, sent, headers, self.timeout, self.tries, self.wait, read)
                return self._struck(given) if isinstance(given, str) else given
            except Fault as fault:
                if body is not None and fault.status == 400 and self._give_way(str(fault)):
                    continue
                told = self._struck(str(fault))
                remedy = REMEDIES.get(fault.status, "see what it says there, then run the same command again")
                raise UsageError(f"the server at '{self.url}' did not answer {path} ({told}); {remedy}") from fault

    def _give_way(self, complaint: str) -> bool:
        """Leave out or rename the setting that a server complains about; False if it is none of ours."""
        if "max_tokens" in self._own and "max_completion_tokens" in complaint:
            self._own["max_completion_tokens"] = self._own.pop("max_tokens")
            return True
        return "temperature" in complaint and self._own.pop("temperature", None) is not None

    def _struck(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def _base(url: str) -> str:
    """Address up to what is before `/chat/completions`.

    Raises:
        UsageError: not an address of HTTP, or one with a password or a query.
    """
    try:
        parts = urlsplit(url.strip())
        known = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        known = False
    if not known or not url.isprintable() or " " in url.strip():
        raise UsageError(f"'{url}' is not the address of a server; give one such as http://localhost:8000/v1")
    if parts.username is not None or parts.query or parts.fragment:
        raise UsageError(
            f"the address of the server at '{parts.hostname}' holds a password, a query or a fragment; give the "
            f"address alone, and the key in the environment variable {KEY}"
        )
    path = parts.path.rstrip("/").removesuffix(CHAT)
    return urlunsplit((parts.scheme, parts.netloc, path or "/v1", "", ""))


def _data_url(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.convert("RGB").save(stream, "PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"


def _said(values: Any) -> str:
    """Text of the first choice of a chat completion; empty where there is none but a refusal.

    Raises:
        TypeError, KeyError, IndexError: another shape.
    """
    message = values["choices"][0]["message"]
    content = message["content"]
    if isinstance(content, list):  # some servers answer in parts
        content = "".join(part["text"] for part in content if part["type"] == "text")
    if content is None:
        content = ""
    if not isinstance(content, str):
        raise TypeError("the content is no text")
    return content.strip()
