"""A request and its response between a visitor and Gradio: reading, checking, holding back, refusing."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.formparsers import MultiPartException
from starlette.responses import JSONResponse, PlainTextResponse

from qformer.demo import limits
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import MutableMapping

    Message = MutableMapping[str, Any]

MAX_JSON = 1_000_000  # bytes: a long context and a conversation
MAX_DRAINED = 200_000_000  # bytes
MAX_HEADER = 8_192  # bytes of one header of a part
MAX_BOUNDARY = 200  # bytes; the standard has 70
TAIL = 1_000  # bytes at the end of a body, where clients name their session
FIELD = "an upload must hold its pictures in fields named 'files', each with a file name"
BROKEN = "the upload broke off"
STALL = 60.0  # seconds in which some of a body must come
STALLED = "nothing came for {:.0f} seconds; send the request again"


class Refused(Exception):
    """Refusal of a request.

    Args:
        headers: additional headers of the response.
    """

    def __init__(self, status: int, sentence: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(sentence)
        self.status = status
        self.headers = headers


class Form:
    """Parts of an upload, checked as they arrive.

    Gradio also accepts fields of other names and files in other kinds of forms, and leaves what it wrote of them on
    disk. It removes everything if a `MultiPartException` interrupts its reading, so that is what is raised.
    """

    def __init__(self, boundary: bytes) -> None:
        self._begin()
        self._is_whole = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._on_name,
                "on_header_value": self._on_value,
                "on_header_end": self._on_header,
                "on_headers_finished": self._check,
                "on_part_data": self._count,
                "on_end": self._end,
            },
        )

    def feed(self, body: bytes, more: bool) -> None:
        """Check the next bytes; raises `MultiPartException` if they are no form of files, or it ends early."""
        try:
            self._parser.write(body)
        except MultipartParseError as error:
            raise MultiPartException(f"the upload is not a form of files ({str(error)[:200]})") from error
        if not (more or self._is_whole):
            raise MultiPartException("the upload's form is incomplete; send all of it")

    def _begin(self) -> None:
        self._name, self._value, self._disposition, self._size = b"", b"", b"", 0

    def _count(self, _data: bytes, start: int, end: int) -> None:
        self._size += end - start
        if self._size > limits.MAX_BYTES:
            raise MultiPartException(
                f"a file is too large; the limit is {limits.MAX_BYTES / 1e6:.0f} MB, so make it smaller"
            )

    def _on_name(self, data: bytes, start: int, end: int) -> None:
        self._name = self._bounded(self._name + data[start:end])

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._value = self._bounded(self._value + data[start:end])

    def _bounded(self, text: bytes) -> bytes:
        if len(text) > MAX_HEADER:
            raise MultiPartException(f"a part of the upload has a header of more than {MAX_HEADER:,} bytes")
        return text

    def _on_header(self) -> None:
        if self._name.lower() == b"content-disposition":
            self._disposition = self._value
        self._name, self._value = b"", b""

    def _check(self) -> None:
        _, options = parse_options_header(self._disposition)
        if options.get(b"name") != b"files" or b"filename" not in options:
            raise MultiPartException(FIELD)
        name = options[b"filename"].decode("utf-8", "replace")
        if name and not re.search(r"[\w-]", Path(name).name):
            raise MultiPartException(f"'{name[:100]}' is not the name of a file")

    def _end(self) -> None:
        self._is_whole = True


class Exchange:
    """Both directions of one request: its body can be read again, and its response held back.

    Args:
        path: path within the page.
    """

    def __init__(self, receive: Any, send: Any, path: str, api: str) -> None:
        self._receive, self._send = receive, send
        self.is_file = path.startswith(f"{api}/file=")
        self.is_upload = path == f"{api}/upload"
        self.at_once = path == f"{api}/run/predict"
        self.status = 0
        self.left = False  # the client disconnected before everything was sent
        self.held = b""
        self.when_ok: list[tuple[bytes, bytes]] = []  # additional headers of a response 200
        self.tail = b""
        self._form: Form | None = None
        self._again: Message | None = None
        self._start: Message | None = None
        self._holds = self._ended = self._read = False

    @property
    def has_begun(self) -> bool:
        """Check whether part of a response has been sent."""
        return bool(self.status) and not self._holds

    def replay(self, body: bytes) -> None:
        self._again = {"type": "http.request", "body": body, "more_body": False}

    def hold(self, content_type: str) -> None:
        """Hold the response back, and check the incoming form; raises `Refused` if it is none."""
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary", b"")
        if kind.lower() != b"multipart/form-data" or not 0 < len(boundary) <= MAX_BOUNDARY:
            raise Refused(400, f"{FIELD}; this is not a form of files (multipart/form-data with a boundary)")
        self._holds, self._form = True, Form(boundary)

    async def receive(self) -> Message:
        if self._again is not None:
            message, self._again = self._again, None
            return message
        message = await self._next()
        self._read |= not message.get("more_body", False)
        self.tail = (self.tail + message.get("body", b""))[-TAIL:]
        if message["type"] == "http.disconnect" and not self._ended:
            self.left = True
            if self._form is not None and not self.status:
                raise MultiPartException(BROKEN)
        elif message["type"] == "http.request" and self._form is not None:
            self._form.feed(message.get("body", b""), message.get("more_body", False))
        return message

    async def _next(self) -> Message:
        """Next message of a client, which must not stall before its body is complete."""
        if self._read:
            return await self._receive()
        try:
            return await asyncio.wait_for(self._receive(), STALL)
        except TimeoutError:
            self._read = True
            told = STALLED.format(STALL)
            raise (Refused(408, told) if self._form is None else MultiPartException(told)) from None

    async def body(self, limit: int) -> bytes:
        """Read the whole body; raises `Refused` if it has more than `limit` bytes, or breaks off."""
        body = bytearray()
        more = True
        while more:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise Refused(400, "the request ended early")
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > limit:
                size = f"{limit / 1e6:.0f} MB" if limit >= 1e6 else f"{limit / 1e3:.0f} kB"
                raise Refused(413, f"the request has more than {size}; upload pictures, and shorten texts")
        return bytes(body)

    async def json(self) -> dict[str, Any]:
        """Read the body as a JSON object with finite numbers, whole characters, and limited size and depth.

        Raises:
            Refused: the body is something else.
        """
        try:
            return limits.check_request(await self.body(MAX_JSON))
        except UsageError as error:
            raise Refused(400, str(error)) from error

    async def drain(self) -> None:
        """Read the rest of the body, up to a limit: a client that is cut off while sending reads no response."""
        size, more = 0, not self._read
        while more and size < MAX_DRAINED:
            try:
                message = await asyncio.wait_for(self._receive(), STALL)
            except TimeoutError:
                return
            size += len(message.get("body", b""))
            more = message.get("more_body", False)
            self.tail = (self.tail + message.get("body", b""))[-TAIL:]
        self._read = not more

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if self.at_once and message["status"] == 500:  # refused by the function; the body says why
                message["status"] = 400
            self.status = message["status"]
            more = self.when_ok if self.status == 200 else []
            if self.is_file:  # an uploaded file is shown as a picture, never as a page of ours
                more = [
                    (b"x-content-type-options", b"nosniff"),
                    (b"content-security-policy", b"default-src 'none'; sandbox"),
                ]
            message["headers"] = [*message["headers"], *more]
        self._ended = message["type"] == "http.response.body" and not message.get("more_body", False)
        if not self._holds:
            await self._send(message)
        elif message["type"] == "http.response.start":
            self._start = message
        else:
            self.held += message.get("body", b"")

    async def send_now(self, message: Message) -> None:
        """Send what replaces a response that was held back."""
        await self._send(message)

    async def release(self) -> None:
        if self._start is not None:
            await self._send(self._start)
            await self._send({"type": "http.response.body", "body": self.held})

    async def refuse(self, scope: Message, refused: Refused) -> None:
        """Respond with the message, unless a response has begun."""
        if self.has_begun:
            return
        kind = PlainTextResponse if self.is_upload else None  # Gradio's page shows the plain body
        message, status, headers = str(refused), refused.status, refused.headers
        response = kind(message, status, headers) if kind else JSONResponse({"detail": message}, status, headers)
        await response(scope, self._receive, self._send)
