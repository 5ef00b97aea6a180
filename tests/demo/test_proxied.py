"""The page in a real browser behind a proxy with a sub-path, and behind a password."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import uvicorn
from playwright.sync_api import expect, sync_playwright
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from qformer.demo import app, backend, server
from qformer.demo.hosts import Hosts
from qformer.scenes.examples import draw_examples
from tests.demo.test_page import CHROMIUM, FLAGS, WAIT, browser_only, choose, replies, tab, write

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qformer.demo.backend import Models

NAME = "demo.example.org"  # which the browser alone takes for this machine
EMPTY = "[...document.images].filter(one => one.checkVisibility() && !one.naturalWidth).map(one => one.src)"
HOP = ("host", "connection", "transfer-encoding", "content-length", "keep-alive")


@contextmanager
def proxy() -> Iterator[tuple[int, dict[str, Any]]]:
    """A proxy that strips `/demo`: its port, and what to set before it is used: `to`, and more `headers`."""
    kept: dict[str, Any] = {}
    client = httpx.AsyncClient(timeout=None, trust_env=False)

    async def pass_on(request: Request) -> Response:
        below = request.url.path.removeprefix("/demo")
        if below == request.url.path:
            return Response(status_code=204)  # the browser asks for an icon here
        headers = {key: value for key, value in request.headers.items() if key not in HOP} | kept["headers"]
        url = httpx.URL(f"{kept['to']}{below or '/'}", query=request.url.query.encode())
        body = await request.body()
        answer = await client.send(
            client.build_request(request.method, url, headers=headers, content=body), stream=True
        )
        response = StreamingResponse(answer.aiter_raw(), answer.status_code)
        response.raw_headers = [pair for pair in answer.headers.raw if pair[0].lower().decode() not in HOP]
        return response

    routes = [Route("/{path:path}", pass_on, methods=["GET", "POST"])]
    config = uvicorn.Config(Starlette(routes=routes), host="127.0.0.1", port=0, log_level="error", proxy_headers=False)
    made = uvicorn.Server(config)
    thread = threading.Thread(target=made.run, daemon=True)
    thread.start()
    while not made.started:
        time.sleep(0.01)
    yield made.servers[0].sockets[0].getsockname()[1], kept
    made.force_exit = made.should_exit = True
    thread.join(20)


@pytest.mark.slow
@browser_only
@pytest.mark.parametrize("forwards", [True, False], ids=["forwarded", "silent"])
def test_a_visitor_behind_a_proxy(models: Models, picture: Path, no_network: None, forwards: bool) -> None:
    """Who logs in has pictures, answers and sheets, all from the proxy; a silent proxy needs the whole address."""
    gate, faults = server.Gate(), []
    with proxy() as (port, kept), server.workplace() as folder, sync_playwright() as play:
        address = f"http://{NAME}:{port}/demo"
        hosts = Hosts([NAME], "/demo") if forwards else Hosts([], address)
        page = app.build(models, gate, draw_examples(folder))
        _, url, _ = server.launch(
            page, folder=folder, gate=gate, block=False, hosts=hosts, auth=("ann", "secret"), **app.LOOKS
        )
        kept["to"] = url.rstrip("/")
        kept["headers"] = {"X-Forwarded-Host": f"{NAME}:{port}", "X-Forwarded-Proto": "http"} if forwards else {}
        browser = play.chromium.launch(
            executable_path=CHROMIUM, args=[*FLAGS, f"--host-resolver-rules=MAP {NAME} 127.0.0.1"]
        )
        opened = browser.new_page()
        opened.set_default_timeout(WAIT)
        opened.on(
            "request", lambda one: None if one.url.startswith((address, "data:", "blob:")) else faults.append(one.url)
        )
        opened.goto(f"{address}/")
        opened.get_by_label("Name").fill("ann")
        opened.get_by_label("Password").fill("wrong")
        opened.get_by_role("button", name="Log in").click()
        expect(opened.locator("output")).to_have_text("The name or the password is wrong.")
        opened.on("response", lambda one: faults.append(f"{one.status} {one.url}") if one.status >= 400 else None)
        opened.get_by_label("Password").fill("secret")
        opened.get_by_role("button", name="Log in").click()
        choose(opened, picture)
        write(opened, "question", "what color is the star?")
        opened.locator("#ask").click()
        assert replies(opened, 1) == [backend.answer_to(models.asking, str(picture), "what color is the star?").strip()]
        tab(opened, "Look")
        opened.locator("#look-queries").click()
        expect(opened.get_by_alt_text("Where each query looks")).to_be_visible()
        tab(opened, "Ask")
        expect(opened.locator("#examples tbody img").first).to_be_visible()
        assert opened.evaluate(EMPTY) == []
        browser.close()
        server.close(page, gate)
    assert [fault for fault in faults if "favicon" not in fault] == []
