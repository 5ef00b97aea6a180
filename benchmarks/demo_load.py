"""Load test of the page: many visitors at once all get their own answers, and the server's memory stays flat.

    python benchmarks/demo_load.py [runs/quickstart/opt] [--clients 200] [--seconds 120] [--quick]

The page runs in its own process. Each client has its own drawn scene and asks about it again and again, as a browser
does: every second one sends a question, in a lasting session with a heartbeat; the others request a caption word by
word in single requests, whose 16 tokens differ between almost any two scenes, so that swapped answers would show. A
full queue is a valid reply: it is counted, and the client retries after a pause that doubles. At the end, this process
runs the model alone on each scene, and every answer must be equal to that. The exit code is 1 if one differs, if a
client got none, at any HTTP 500, or if memory grows by more than `GROWTH` after the first quarter.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from qformer.checkpoints.loading import load_vision_language
from qformer.demo import backend
from qformer.scenes.scenes import Scenes

ROOT = Path(__file__).resolve().parent.parent
API = "/gradio_api"
GROWTH = 0.05  # largest growth of the server's memory
CAPTION = {"method": "greedy", "max_new_tokens": 16}
PAUSE = (0.25, 8.0)  # seconds before the first retry, and at most


@dataclass
class Client:
    """A visitor with its own picture and question."""

    number: int
    picture: bytes
    question: str  # empty for a caption
    answers: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def decoding(self) -> dict[str, Any] | None:
        return None if self.question else CAPTION


@dataclass
class Tally:
    """Results of all clients."""

    statuses: Counter[int] = field(default_factory=Counter)
    full: int = 0
    failed: list[str] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)  # seconds, MB
    health: list[float] = field(default_factory=list)  # seconds until /health replied


def scenes(count: int) -> list[Client]:
    """Make clients whose scenes all differ."""
    source = Scenes("test", size=240, seed=23, count=count, questions=True)
    clients = []
    for number in range(count):
        sample, written = source[number], io.BytesIO()
        Image.fromarray(np.asarray(sample.image)).save(written, "PNG")
        clients.append(Client(number, written.getvalue(), "" if number % 2 else sample.question or ""))
    assert len({client.picture for client in clients}) == count
    return clients


async def visit(client: Client, http: httpx.AsyncClient, tally: Tally, end: float) -> None:
    """Upload once, then ask until the time is over, and wait for the last answer."""
    lasting = client.number % 2 == 0
    session = f"visitor{client.number:05d}" if lasting else None
    alive = asyncio.create_task(_heartbeat(http, session)) if session else None
    try:
        response = await http.post(
            f"{API}/upload", files={"files": (f"{client.number}.png", client.picture, "image/png")}
        )
        tally.statuses[response.status_code] += 1
        reference = {"path": response.json()[0], "meta": {"_type": "gradio.FileData"}}
        while time.monotonic() < end or not client.answers:
            start = time.monotonic()
            said = await _ask(http, [reference, client.question, "", "vqa", None, client.decoding], session, tally)
            if said is None:
                return
            client.answers.append(said)
            client.seconds.append(time.monotonic() - start)
    except (httpx.HTTPError, ValueError, KeyError) as error:
        tally.failed.append(f"client {client.number}: {type(error).__name__}: {error}")
    finally:
        if alive:
            alive.cancel()


async def _ask(http: httpx.AsyncClient, data: list[Any], session: str | None, tally: Tally) -> str | None:
    body = {"data": data} | ({"session_hash": session} if session else {})
    pause = PAUSE[0]
    while True:
        response = await http.post(f"{API}/call/ask", json=body)
        tally.statuses[response.status_code] += 1
        if response.status_code != 503:
            break
        tally.full += 1
        await asyncio.sleep(pause * random.uniform(0.5, 1.5))
        pause = min(2 * pause, PAUSE[1])
    if response.status_code != 200:
        tally.failed.append(f"{response.status_code}: {response.text[:200]}")
        return None
    kind = ""
    async with http.stream("GET", f"{API}/call/ask/{response.json()['event_id']}") as stream:
        tally.statuses[stream.status_code] += 1
        async for line in stream.aiter_lines():
            head, _, value = line.partition(": ")
            kind = value if head == "event" else kind
            if head == "data" and kind == "complete":
                return json.loads(value)[0]
            if head == "data" and kind == "error":
                tally.failed.append(value)
                return None
    tally.failed.append("a stream ended without an answer")
    return None


async def _heartbeat(http: httpx.AsyncClient, session: str) -> None:
    async with http.stream("GET", f"{API}/heartbeat/{session}") as stream:
        async for _ in stream.aiter_lines():
            pass


async def measure(process: int, http: httpx.AsyncClient, tally: Tally, start: float) -> None:
    """Measure the server's resident memory every few seconds, and the response time of `/health`."""
    while True:
        tally.memory.append((time.monotonic() - start, resident(process)))
        asked = time.monotonic()
        tally.statuses[(await http.get("/health")).status_code] += 1
        tally.health.append(time.monotonic() - asked)
        await asyncio.sleep(2)


def resident(process: int) -> float:
    """Resident memory of a process, in megabytes."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmRSS"))


async def load(address: str, process: int, clients: list[Client], seconds: float) -> Tally:
    tally = Tally()
    start = time.monotonic()

    def own() -> httpx.AsyncClient:
        """Make a client with its own connections, like a browser; it closes them before the server does."""
        limits = httpx.Limits(keepalive_expiry=2)
        return httpx.AsyncClient(base_url=address, timeout=300, limits=limits, trust_env=False, verify=False)

    async def one(client: Client) -> None:
        async with own() as http:
            await visit(client, http, tally, start + seconds)

    async with own() as http:
        watch = asyncio.create_task(measure(process, http, tally, start))
        await asyncio.gather(*map(one, clients))
        tally.memory.append((time.monotonic() - start, resident(process)))
        watch.cancel()
    return tally


def started(checkpoint: str, log: Any, *options: str) -> tuple[subprocess.Popen[bytes], str]:
    """Start a page in its own process, and wait until it responds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "qformer", "demo", checkpoint, "--port", str(port), "--device", "cpu", *options]
    process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    for _ in range(600):
        if process.poll() is not None:
            break
        try:
            if httpx.get(f"{address}/health", timeout=5, trust_env=False).status_code == 200:
                return process, address
        except httpx.TransportError:
            time.sleep(0.2)
    process.kill()
    raise SystemExit(f"the page did not start:\n{Path(log.name).read_text()[-2000:]}")


def report(clients: list[Client], tally: Tally, took: float, wrong: list[str], code: int) -> bool:
    """Print the results; returns whether all of them are as expected."""
    waits = np.array([wait for client in clients for wait in client.seconds])
    none = [client.number for client in clients if not client.answers]
    quarter = [(at, size) for at, size in tally.memory if at >= tally.memory[-1][0] / 4]
    growth = quarter[-1][1] / quarter[0][1] - 1
    errors = sum(count for status, count in tally.statuses.items() if status >= 500) - tally.full
    table = Table(title=f"{len(clients)} clients, {took:.0f} s")
    table.add_column("what")
    table.add_column("value", justify="right")
    rows = {
        "answers": f"{len(waits)} ({len(waits) / took:.1f} per second)",
        "fewest, most answers of a client": f"{min(len(c.answers) for c in clients)}, "
        f"{max(len(c.answers) for c in clients)}",
        "clients without an answer": str(len(none)),
        "answers that differ from the model's own": str(len(wrong)),
        "different answers": str(len({answer for client in clients for answer in client.answers})),
        "queue full, retried": str(tally.full),
        "other replies with status 500 or more": str(errors),
        "failures": str(len(tally.failed)),
        "seconds to an answer, retries included: p50, p95, most": ", ".join(
            f"{value:.1f}" for value in (*np.percentile(waits, [50, 95]), waits.max())
        )
        if len(waits)
        else "-",
        "seconds until /health replied: p50, most": f"{np.median(tally.health):.3f}, {max(tally.health):.3f}",
        "memory of the server, MB: start, after a quarter, most, end": f"{tally.memory[0][1]:.0f}, "
        f"{quarter[0][1]:.0f}, {max(size for _, size in tally.memory):.0f}, {quarter[-1][1]:.0f} "
        f"({growth:+.1%} since a quarter)",
        "exit code of the server": str(code),
    }
    for row in rows.items():
        table.add_row(*row)
    console = Console()
    console.print(table)
    console.print("memory, MB: " + " ".join(f"{at:.0f}s:{size:.0f}" for at, size in tally.memory[::5]))
    for line in [*tally.failed[:5], *wrong[:5]]:
        console.print(line)
    return not (none or wrong or errors or tally.failed or code) and growth <= GROWTH


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default="runs/quickstart/opt")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--quick", action="store_true", help="20 clients, 10 seconds")
    given = parser.parse_args()
    count, seconds = (20, 10.0) if given.quick else (given.clients, given.seconds)
    clients = scenes(count)
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        process, address = started(given.checkpoint, log)
        start = time.monotonic()
        try:
            tally = asyncio.run(load(address, process.pid, clients, seconds))
            took = time.monotonic() - start
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait(60)
    model = load_vision_language(given.checkpoint, "cpu")
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        for client in clients:
            file = Path(folder) / "scene.png"
            file.write_bytes(client.picture)
            chosen = backend.Decoding.of(client.decoding)
            alone = backend.answer_to(model, str(file), client.question, decoding=chosen)
            wrong += [f"client {client.number}: {said!r}, alone {alone!r}" for said in client.answers if said != alone]
    sys.exit(0 if report(clients, tally, took, wrong, code) else 1)


if __name__ == "__main__":
    main()
