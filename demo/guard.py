"""The guard in front of Gradio: a filter of requests.

Gradio serves more than this page needs: it downloads pictures from addresses, proxies, records and shares. `Guard` lets
through only what the page uses, from its own pages (`qformer.demo.hosts`) and from visitors who know the password
(`qformer.demo.password`), and reads each request before Gradio does: a refused request costs no download, no decoding
and no place in the queue, and gets a reason in one sentence.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote

from anyio.to_thread import run_sync
from starlette.requests import HTTPConnection
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

from qformer.demo import limits
from qformer.demo.exchange import Exchange, Refused
from qformer.demo.hosts import network
from qformer.demo.limits import NO_ROOM
from qformer.demo.password import DEVICE, FORM, FORM_HEADERS, Tries
from qformer.demo.visits import ONCE
from qformer.types import UsageError

if TYPE_CHECKING:
    from collections.abc import MutableMapping

    from qformer.demo.hosts import Hosts
    from qformer.demo.visits import Visits

    Message = MutableMapping[str, Any]

API = "/gradio_api"
READ = re.compile(  # paths that the page and the clients of its API fetch
    r"/|/health|/config|/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt|/logout|/(assets|static|svelte)/.+"
    rf"|{API}/(info|openapi\.json|app_id|token|user|login_check|theme\.css|startup-events|upload_progress)/?"
    rf"|{API}/queue/(data|status)|{API}/call/[^/]+/[^/]+|{API}/heartbeat/[^/]+|{API}/file=.+",
    re.DOTALL,
)
WRITE = re.compile(rf"/login/?|{API}/(upload|cancel|reset/?|queue/join|run/predict|call/[^/]+)")
EMPTY: dict[str, Response] = {  # what Gradio's page of its API asks for; browsers report a 404 in their console
    "/monitoring/summary": JSONResponse({"functions": {}}),
    f"{API}/mcp/schema": Response(status_code=304),  # not 200, or it would show a way to call us by MCP
}
MAX_UPLOAD = 100_000_000  # bytes of an upload with all its files
MAX_LOGIN = 10_000  # bytes
LONGEST = 20  # digits of a length that is read
MAX_SESSION = 100  # characters of the name of a session
SESSION = re.compile(rb'"session_hash": ?"([A-Za-z0-9-]{1,100})"')
START = f"{API}/startup-events"  # requested once by Gradio itself
KEPT: tuple[str, ...] = ("data", "session_hash", "fn_index", "trigger_id", "event_data")  # kept keys of a request
ADDED = "added-later"  # class of inputs that requests may leave out at the end, since clients came before them
FAILED = "something went wrong here; it was logged, and the page keeps running"
NO_PATH = "a picture must be an object with the 'path' that its upload returned"
CLOSED = "the page is shutting down and accepts no new requests; try again later"
FULL = "{} requests are waiting, which is the limit; try again in a moment"
NO_SESSION = f"a request must name its session (session_hash) in at most {MAX_SESSION} characters"
REFUSAL = "page_refuse"  # function of the page that raises the sentence it is given
LOGGER = logging.getLogger(__name__)
TYPES: dict[str, tuple[type, ...]] = {"string": (str,), "boolean": (bool,), "array": (list, tuple), "object": (dict,)}
TYPES |= dict.fromkeys(("number", "integer"), (int, float))  # a browser may send 3.0
WORDS = {"string": "text", "number": "a number", "integer": "a number", "boolean": "true or false", "array": "a list"}


class Guard:
    """ASGI application around Gradio's.

    Args:
        hosts: names and path of the page, see `qformer.demo.hosts`.
        has_password: Gradio asks for a password; without it, only Gradio's login can be reached.
    """

    def __init__(
        self, app: Any, *, page: Any, gate: Any, visits: Visits, hosts: Hosts, has_password: bool, queue: int
    ) -> None:
        self.app = app
        self.page = page
        self.gate = gate
        self.visits = visits
        self.uploads = visits.uploads
        self.hosts = hosts
        self.tries = Tries() if has_password else None
        self.queue = queue

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})  # the page uses none
        path = self.hosts.path(scope["path"])
        exchange = Exchange(receive, send, path, API)
        kept_open = path.startswith(f"{API}/heartbeat/") or path == "/health"
        self.visits.answering += not kept_open
        try:
            if (refusal := self.hosts.refusal(scope["method"], path, scope["headers"])) is not None:
                raise Refused(403, refusal)
            scope = self.hosts.rewritten(scope, path)
            if self.tries is None or await self._lets_in(scope, path, exchange, self.tries):
                await self._pass(scope, path, exchange)
        except Refused as refused:
            LOGGER.info("%s %s %a: %d %a", _address(scope), scope["method"], path[:200], refused.status, str(refused))
            await exchange.drain()
            await exchange.refuse(scope, refused)
        except Exception as error:
            full = limits.is_full(error)
            LOGGER.error("%s %a", scope["method"], path[:200], exc_info=not full)
            await exchange.drain()
            await exchange.refuse(scope, Refused(507, NO_ROOM) if full else Refused(500, FAILED))
        finally:
            self.visits.answering -= not kept_open

    async def _lets_in(self, scope: Message, path: str, exchange: Exchange, tries: Tries) -> bool:
        """Check that a request comes from a visitor who has logged in; otherwise respond to it, or refuse it."""
        method = scope["method"]
        response: Response | None = None
        if (method == "GET" and path == START and not self.visits.has_started) or await self._knows(scope):
            return True
        if method == "POST" and path.rstrip("/") == "/login":
            await self._log_in(scope, exchange, tries)
        elif method in ("GET", "HEAD") and path == "/":
            response = HTMLResponse(FORM, headers=FORM_HEADERS)
        elif method in ("GET", "HEAD") and path == "/health":
            response = JSONResponse({"status": "stopping" if self.gate.stopping else "ok"})
        else:
            raise Refused(401, "this page has a password; log in first")
        if response is not None:
            await response(scope, exchange.receive, exchange.send)
        return False

    async def _knows(self, scope: Message) -> bool:
        """Ask Gradio whether the visitor has logged in."""
        status = 0

        async def nothing() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def note(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)

        asked = {**scope, "method": "GET", "path": f"{self.hosts.prefix}{API}/login_check", "query_string": b""}
        await self.app(asked, nothing, note)
        return status == 200

    async def _log_in(self, scope: Message, exchange: Exchange, tries: Tries) -> None:
        """Check a password; each try counts as wrong until it succeeds, so that parallel tries gain nothing."""
        exchange.replay(await exchange.body(MAX_LOGIN))
        client = tries.client(_address(scope), HTTPConnection(scope).cookies.get(DEVICE))
        if wait := math.ceil(tries.take(client)):
            raise Refused(429, f"too many wrong passwords; try again in {wait} seconds", {"Retry-After": str(wait)})
        cookie = f"{DEVICE}={tries.cookie()}; Max-Age=31536000; Path=/; HttpOnly; SameSite=Lax"
        exchange.when_ok = [(b"set-cookie", cookie.encode())]
        await self.app(scope, exchange.receive, exchange.send)
        if exchange.status == 200:
            tries.give_back(client)

    async def _pass(self, scope: Message, path: str, exchange: Exchange) -> None:
        method = scope["method"]
        if not path:
            return await RedirectResponse(f"{self.hosts.prefix}/")(scope, exchange.receive, exchange.send)
        if method == "GET" and path in EMPTY:
            return await EMPTY[path](scope, exchange.receive, exchange.send)
        offered = READ if method in ("GET", "HEAD") else WRITE if method == "POST" else None
        if offered is None or not offered.fullmatch(path):
            raise Refused(404, f"there is nothing at {method[:10]} {path[:100]!r}")
        query = parse_qs(scope["query_string"].decode("latin-1"))
        if "deep_link" in query:
            raise Refused(400, "this page does not support links to its state; open it without one")
        if exchange.is_file:
            self._check_file(path.removeprefix(f"{API}/file="))
        session = _session(path, query)
        if len(session or "") > MAX_SESSION:
            raise Refused(400, NO_SESSION)
        if method == "POST" and path == f"{API}/upload":
            try:
                return await self._upload(scope, exchange)
            except Refused as refused:
                return await self._refuse_upload(scope, exchange, refused)
        if method == "POST" and not path.startswith("/login"):
            kind = dict(scope["headers"]).get(b"content-type", b"")
            if kind.partition(b";")[0].strip().lower() != b"application/json":
                raise Refused(415, "a request must be JSON; send it as such (Content-Type: application/json)")
            if path.rstrip("/").endswith(("/cancel", "/reset")):
                body = await exchange.json()
                if path.endswith("/cancel"):
                    self.gate.cancel(str(body.get("session_hash")))
            else:
                body = await self._call(path.removeprefix(f"{API}/call/"), exchange)
            exchange.replay(json.dumps(body).encode())
        if session is None:
            try:
                return await self.app(scope, exchange.receive, exchange.send)
            except KeyError:  # of Gradio, where an answer ends while it is being cancelled
                if not path.endswith("/cancel"):
                    raise
                return await JSONResponse({"success": True})(scope, exchange.receive, exchange.send)
        return await self._stream(scope, exchange, session, path)

    async def _stream(self, scope: Message, exchange: Exchange, session: str, path: str) -> None:
        """Pass on a stream, which is open while the visitor is there; when it closes, the call is cancelled."""
        queue, request = self.visits.queue, session
        if path.startswith(f"{API}/call/"):  # names the request, whose session may be another
            owners = (owner for owner, events in queue.pending_event_ids_session.items() if request in events)
            session = next(owners, request)
        if not path.startswith(f"{API}/heartbeat/") and session not in queue.pending_messages_per_session:
            raise Refused(404, "no request of this session is waiting for a response; send one first")
        self.visits.open[session] += 1
        stays = path.startswith(f"{API}/heartbeat/")
        try:
            await self.app(scope, exchange.receive, exchange.send)
        finally:
            self.visits.end(session, stays)
            if exchange.left and not stays:
                self.gate.cancel(session)

    async def _upload(self, scope: Message, exchange: Exchange) -> None:
        """Accept uploads; files that are not pictures are removed at once."""
        headers = {key: value.decode("latin-1") for key, value in scope["headers"]}
        length = headers.get(b"content-length", "")
        if self.gate.stopping:
            raise Refused(503, CLOSED)
        if not (length.isascii() and length.isdecimal() and len(length) < LONGEST):
            raise Refused(411, "an upload must have a length (Content-Length)")
        if int(length) > MAX_UPLOAD:
            raise Refused(413, f"the upload has {int(length) / 1e6:.1f} MB; the limit is {MAX_UPLOAD / 1e6:.0f} MB")
        visitor = network(_address(scope))
        exchange.hold(headers.get(b"content-type", ""))
        with self.visits.receiving(visitor, int(length)):
            await self.app(scope, exchange.receive, exchange.send)
            await exchange.drain()
        if exchange.status == 200:
            refused: list[UsageError] = []
            files = [Path(name) for name in json.loads(exchange.held)]
            for file in files:
                try:
                    await run_sync(limits.check_file, file)
                except UsageError as error:
                    await run_sync(self.visits.remove, file)
                    refused.append(error)
            await run_sync(self.visits.keep, [file for file in files if file.exists()], visitor)
            if refused:
                raise Refused(400, str(refused[0])) from refused[0]
        await exchange.release()

    async def _refuse_upload(self, scope: Message, exchange: Exchange, refused: Refused) -> None:
        """Refuse an upload; `gradio_client`, which shows no reason here, gets a path for which its call is refused."""
        if not dict(scope["headers"]).get(b"user-agent", b"").startswith(b"gradio_client/") or exchange.has_begun:
            raise refused
        path = f"{self.uploads}/{secrets.token_hex(16)}/refused"
        self.visits.refuse(path, str(refused))
        await exchange.drain()
        await JSONResponse([path])(scope, exchange.receive, exchange.send_now)

    def _check_file(self, name: str) -> str:
        """Check that a file belongs to the page; returns its path."""
        if sentence := self.visits.refused.get(name):
            raise Refused(400, sentence)
        if "://" in name or name.startswith("data:"):
            raise Refused(403, "addresses are not fetched here; upload the picture itself")
        try:
            real = os.path.realpath(name)
        except (OSError, ValueError):
            real = ""
        if not real.startswith(f"{self.uploads}/") or not os.path.isfile(real):
            raise Refused(403, "this file does not belong to the page; upload the picture itself")
        return real

    async def _call(self, name: str, exchange: Exchange) -> dict[str, Any]:
        """Read and check a call; a refused one of the queue is replaced by one that fails with the reason.

        The page and `gradio_client` show the reason of a call that fails, but not that of a response 400.
        """
        body: dict[str, Any] = {}
        try:
            body = await exchange.json()
            return await self._request(name, body)
        except Refused as refused:
            await exchange.drain()
            told = [number for number, function in self.page.fns.items() if function.api_name == REFUSAL]
            named = SESSION.findall(exchange.tail)  # of a body that was not read
            session = body.get("session_hash", named[-1].decode() if named else None)
            is_told = told and isinstance(session, str) and name == f"{API}/queue/join"
            if not is_told or refused.status not in (400, 403, 413) or str(refused) == NO_SESSION:
                raise
            self.visits.begin(str(session))
            LOGGER.info("%s: %d %a", name, refused.status, str(refused))
            return {"data": [str(refused)], "fn_index": told[0], "session_hash": session}

    async def _request(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        """Check a call of one of the page's functions; returns it with only the keys that Gradio needs."""
        if self.gate.stopping:
            raise Refused(503, CLOSED)
        at_once = name == f"{API}/run/predict"  # quick calls of the page, which do not wait in the queue
        if not at_once and len(self.visits.queue) >= self.queue:
            raise Refused(503, FULL.format(self.queue))
        if not isinstance(body.get("session_hash") or "", str) or len(body.get("session_hash") or "") > MAX_SESSION:
            raise Refused(400, NO_SESSION)
        named = {f.api_name: f for f in self.page.fns.values() if f.api_visibility == "public"}
        number = body.get("fn_index")
        if name.startswith("/"):  # the queue, where functions are numbered
            function = self.page.fns.get(number) if isinstance(number, int) else None
            if not isinstance(body.get("session_hash"), str):
                raise Refused(400, NO_SESSION)
        else:
            function = named.get(name)
        if function is None or function.fn is None or (at_once and function.queue):
            asked = f"the function {name[:100]!r}" if not name.startswith("/") else f"a function {str(number)[:20]!r}"
            raise Refused(404, f"{asked} does not exist; there are {', '.join(map(str, named))}")
        if not function.cancels:
            if isinstance(data := body.get("data"), list):
                data += [None for block in function.inputs[len(data) :] if ADDED in block.elem_classes]
            await self._check_inputs(function, data, is_named=not name.startswith("/"))
        kept: dict[str, Any] = {key: body[key] for key in KEPT if key in body}
        if not isinstance(kept.get("event_data"), dict):  # a checkbox tells its value, which nothing here reads
            kept["event_data"] = {}
        if kept.get("session_hash") is None:
            kept["session_hash"] = ONCE + secrets.token_hex(16)
        self.visits.begin(kept["session_hash"])
        return kept

    async def _check_inputs(self, function: Any, data: Any, is_named: bool) -> None:
        """Check that values have the types of the function's components, and that pictures are existing files."""
        inputs = function.inputs
        if is_named and isinstance(data, list) and len(data) != len(inputs):
            inputs = [block for block in inputs if not block.skip_api]
        if not isinstance(data, list) or len(data) != len(inputs):
            labels = ", ".join(_label(block) for block in inputs)
            raise Refused(400, f"'data' must be a list of {len(inputs)} values ({labels})")
        for block, value in zip(inputs, data, strict=True):
            if value is not None and not getattr(block, "stateful", False):
                _check_kind(block, value)
        for part in limits.parts(data):
            if isinstance(part, dict) and ("path" in part or "url" in part):
                await self._check_reference(part)

    async def _check_reference(self, part: dict[str, Any]) -> None:
        name, url, meta = part.get("path"), part.get("url"), part.get("meta")
        if not isinstance(name, str) or not (url is None or isinstance(url, str)):
            raise Refused(400, NO_PATH)
        self._check_file(name)
        if url and unquote(url).partition(f"{API}/file=")[2] != name:
            raise Refused(403, "addresses are not fetched here; upload the picture itself")
        if not isinstance(meta, dict) or meta.get("_type") != "gradio.FileData":
            raise Refused(400, 'a picture needs "meta": {"_type": "gradio.FileData"} beside its path')
        if not isinstance(part.get("orig_name") or "", str):
            raise Refused(400, "the 'orig_name' of a picture must be text")
        for key in ("url", "size", "mime_type", "is_stream"):  # the file itself is more reliable
            part.pop(key, None)
        try:
            await run_sync(limits.check_file, name)
        except UsageError as error:
            raise Refused(400, str(error)) from error


def _address(scope: Message) -> str:
    return str(scope["client"][0]) if scope.get("client") else ""


def _label(block: Any) -> str:
    return str(getattr(block, "label", None) or block.get_block_name())


def _check_kind(block: Any, value: Any) -> None:
    schema = block.api_info()
    label, kind, picture = _label(block), str(schema.get("type")), "path" in schema.get("properties", {})
    if choices := schema.get("enum"):
        if value not in choices:
            raise Refused(400, f"'{label}' must be one of {', '.join(map(str, choices))}")
    elif kind in TYPES and (not isinstance(value, TYPES[kind]) or (isinstance(value, bool) and kind != "boolean")):
        wanted = WORDS.get(kind, "a picture that was uploaded" if picture else "an object")
        raise Refused(400, f"'{label}' must be {wanted}, but got {limits.kind(value)}")
    if picture and "path" not in value:
        raise Refused(400, NO_PATH)
    if kind == "array" and block.data_model is not None:
        try:
            block.data_model.model_validate(value)
        except ValueError as error:
            raise Refused(400, f"'{label}' must be a list of files that were uploaded to this page") from error
    if kind in ("number", "integer"):
        low, high = getattr(block, "minimum", None), getattr(block, "maximum", None)
        if not (-math.inf if low is None else low) <= value <= (math.inf if high is None else high):
            raise Refused(400, f"'{label}' must be a number from {low} to {high}, but got {str(value)[:20]}")


def _session(path: str, query: dict[str, list[str]]) -> str | None:
    """Session whose stream a request opens."""
    if path == f"{API}/queue/data":
        return query.get("session_hash", [""])[0]
    if path.startswith((f"{API}/heartbeat/", f"{API}/call/")) and path.count("/") == (3 if "heartbeat" in path else 4):
        return path.rpartition("/")[2]
    return None
