"""Hostile inputs against a running page: it must refuse each in one sentence, keep no file of them, and stay small.

    python benchmarks/attack_page.py [runs/quickstart/opt] [--index gallery] [--sessions 1000]

The page runs in its own process. About 1,500 inputs follow one another: values of the wrong kind, size, depth and
alphabet for every parameter of every function, by name and by number; paths and addresses; uploads that are no
pictures, bombs, forms that are none or break off; names and origins of other sites; routes of Gradio that the page does
not offer; and bytes that are no HTTP. Then come sessions that ask and never fetch what they asked for.

Printed are the statuses, what stayed on disk, the tracebacks in the log, and the memory. The exit code is 1 at any
status 500 or traceback, if a file of a refused upload stayed, or if the page no longer gives its first answer.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import socket
import struct
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from demo_load import API, resident, started
from PIL import Image

META = {"_type": "gradio.FileData"}
DEEP: Any = []
for _ in range(60):
    DEEP = [DEEP]
VALUES: list[Any] = [
    None, True, False, 0, -1, 7, 1.5, 10**30, -(10**400), "", " ", "x", "7", "x" * 3_000, "\u4f60" * 30_000,
    "a\0b", "a\x1b[2Jb", "\ud800", "<script>alert(1)</script>", "{{7*7}}", "${7*7}", "'; drop table images; --",
    "$$\\href{javascript:alert(1)}{a}$$", [], [None], ["a"] * 100, [[["a"]]], DEEP, {}, {"a": 1}, {"path": 1},
    {"path": "/etc/passwd"}, {"path": "/etc/passwd", "meta": META}, {"path": "../../etc/passwd", "meta": META},
    {"path": "/proc/self/environ", "meta": META}, {"path": "a\0b", "meta": META}, {"path": "x" * 5_000, "meta": META},
    {"path": "http://127.0.0.1:9/a.png", "meta": META}, {"path": "file:///etc/passwd", "meta": META},
    {"url": "http://169.254.169.254/", "meta": META}, {"path": "data:image/png;base64,AAAA", "meta": META},
    {"__type__": "update", "value": "x"}, {"method": "beams", "beams": 10**9}, {"method": "evil"}, {"top_p": "nan"},
]  # fmt: skip
PATHS = (
    "/etc/passwd", "//etc/passwd", "..%2f..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/etc/passwd", "/proc/self/environ",
    "/proc/self/cmdline", "file:///etc/passwd", "http://127.0.0.1:9/", "a%00.png", "{uploads}", "{uploads}/..",
    "{uploads}/../lock", "{uploads}/%2e%2e/lock", "{root}/pyproject.toml", "{root}/.git/config", "C:\\a",
)  # fmt: skip
ROUTES = (
    "/monitoring", "/monitoring/summary", "/docs", "/redoc", "/openapi.json", "/dev/reload", "/vibe-code/",
    "/vibe-edit/", "/component_server", "/process_recording", "/deep_link?session_hash=a", "/run/ask", "/api/ask",
    "/call/v2/ask", "/stream/a", "/run-history/buckets", "/custom_component/a/b/c/d", "/proxy=http://127.0.0.1:9/",
    "/file/etc/passwd", "/upload_progress?upload_id=" + "a" * 9_000, "/heartbeat/" + "s" * 9_000, "/queue/data",
    "/queue/data?session_hash=nobody", "/call/ask/nobody", "/call/" + "a" * 9_000, "/cancel", "/reset", "/login_check",
)  # fmt: skip
BODIES = (b"", b"{", b"[1]", b"null", b'"a"', b"\xff\xfe", b'{"data": NaN}', b'{"data": [1e999]}', b"[" * 100_000,
          b'{"data": []}', b'{"data": {}, "session_hash": 5}', b'{"data": [], "session_hash": "' + b"s" * 5_000 + b'"}',
          b'{"data": "' + b"x" * 2_000_000 + b'"}')  # fmt: skip
FOREIGN: tuple[dict[str, str], ...] = (
    {"Host": "evil.example"}, {"Host": "localhost.evil.example"}, {"Host": "a@localhost"}, {"Host": "2130706433"},
    {"X-Forwarded-Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"},
    {"Origin": "http://203.0.113.9"}, {"Origin": "chrome-extension://a"}, {"Sec-Fetch-Site": "cross-site"},
)  # fmt: skip
RAW = (
    b"\0" * 100, b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET / HTTP/1.0\r\n\r\n", b"\x16\x03\x01\x02\x00",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n", b"GET " + b"/a" * 60_000 + b" HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"A: b\r\n" * 20_000, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"POST /gradio_api/call/ask HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
    b"GET /ws HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
)  # fmt: skip


@dataclass
class Report:
    """What came of all inputs."""

    statuses: Counter[int] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    memory: list[tuple[int, float]] = field(default_factory=list)  # inputs, MB

    def note(self, kind: str, response: httpx.Response | None, what: object) -> None:
        self.kinds[kind] += 1
        if response is None:
            return
        self.statuses[response.status_code] += 1
        if response.status_code == 500 or "Traceback" in response.text or "root:x:" in response.text:
            self.wrong.append(f"{kind} {what!r:.200}: {response.status_code} {response.text[:200]}")


def png(width: int, height: int, rows: bytes = b"") -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def encoded(kind: str, **options: Any) -> bytes:
    made = io.BytesIO()
    Image.new("RGB", (20, 20), "red").save(made, kind, **options)
    return made.getvalue()


def no_pictures() -> Iterator[bytes]:
    """Files that the page must not keep."""
    yield png(10_000, 10_000, bytes(10_001 * 10_000))  # 100 million pixels in 100 KB
    yield from (
        png(width, height) for width, height in ((2**31 - 1, 2**31 - 1), (1_000_000, 1), (0, 0), (60_000, 60_000))
    )
    for kind in ("BMP", "TIFF", "AVIF", "JPEG2000", "ICO", "PPM", "PCX", "TGA"):
        yield encoded(kind)
    yield from (b"", b"\x89PNG", b"GIF89a", b"RIFF\xff\xff\xff\xffWEBP", b"\xff\xd8\xff", b"PK\x03\x04" + bytes(500))
    yield from (b"<html><script>alert(1)</script>", b"<svg onload='alert(1)'/>", b"%!PS-Adobe-3.0", b"#!/bin/sh\nid")
    yield from (b"cos\nsystem\n(S'id'\ntR.", b"\0\0\0\x18ftypmp42" + bytes(2_000), b"\x1aE\xdf\xa3" + bytes(2_000))
    for end in range(20, 400, 20):  # JPEGs and PNGs that end early
        yield encoded("JPEG")[:end]
        yield encoded("PNG")[: end // 6]
    yield bytes(21_000_000)


def forms() -> Iterator[bytes]:
    """Bodies that are no forms of files."""
    part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + encoded("PNG")
    yield from (
        b"",
        b"abc",
        b"--x--",
        part,
        part + b"\r\n--x",
        part + b"\r\n--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--",
    )
    for names in (b'name="files"', b'name="other"; filename="a"', b'filename="a"', b'name="files"; filename=".."',
                  b'name="files"; filename="' + b"a" * 9_000 + b'"', b'name="files"; filename="\xff\xfe"'):  # fmt: skip
        yield b"--x\r\nContent-Disposition: form-data; " + names + b"\r\n\r\nabc\r\n--x--\r\n"


class Attack:
    """All inputs against one page."""

    def __init__(self, address: str, process: int, temporary: Path) -> None:
        self.http = httpx.Client(base_url=address, timeout=180, trust_env=False)
        self.port, self.process, self.report = int(httpx.URL(address).port or 0), process, Report()
        self.uploads = next(temporary.glob("qformer-demo-*")) / "uploads"
        self.picture = {"path": self.upload(encoded("PNG")).json()[0], "meta": META}
        self.stayed = 0
        self.first = self.call("ask", [self.picture, "what color is it?", "", "vqa", None, None])

    def files(self) -> set[Path]:
        return {file for file in self.uploads.rglob("*") if file.is_file()}

    def upload(self, content: bytes, name: str = "a.png") -> httpx.Response:
        return self.http.post(f"{API}/upload", files={"files": (name, content)})

    def call(self, name: str, data: Any) -> httpx.Response:
        """Ask by name, and fetch the response."""
        try:
            body = json.dumps({"data": data}).encode()
        except ValueError:  # Python writes no number of more than 4,300 digits
            body = b'{"data": [' + b"9" * 5_000 + b"]}"
        asked = self.http.post(f"{API}/call/{name}", content=body, headers={"Content-Type": "application/json"})
        return self.http.get(f"{API}/call/{name}/{asked.json()['event_id']}") if asked.status_code == 200 else asked

    def note(self, kind: str, response: httpx.Response | None, what: object = "") -> None:
        self.report.note(kind, response, what)
        if self.report.kinds.total() % 50 == 1:
            self.report.memory.append((self.report.kinds.total(), resident(self.process)))

    def values(self) -> None:
        """Every value for every parameter of every function by name; the others are plain."""
        info = self.http.get(f"{API}/info").json()["named_endpoints"]
        for name, about in info.items():
            plain = [
                self.picture if one["component"] == "Image" else one.get("parameter_default")
                for one in about["parameters"]
            ]
            for place in range(len(plain)):
                for value in VALUES:
                    self.note(
                        "value", self.call(name[1:], [*plain[:place], value, *plain[place + 1 :]]), (name, place, value)
                    )
            for data in ("x", {}, [], plain[:-1], plain * 3, None):
                self.note("list of values", self.call(name[1:], data), (name, data))

    def numbers(self) -> None:
        """Bodies and functions by number, in the queue and at once."""
        count = len(self.http.get("/config").json()["dependencies"])
        for route in ("queue/join", "run/predict", "cancel", "reset"):
            for body in BODIES:
                self.note("body", self.http.post(f"{API}/{route}", content=body), (route, body[:40]))
        for number in (*range(count), -1, count, 10**20, "0", None, [0], True):
            for route in ("queue/join", "run/predict"):
                for data in ([], [None] * 3, ["x"] * 8):
                    body = {
                        "data": data,
                        "fn_index": number,
                        "session_hash": f"n{number}"[:40],
                        "event_data": {"hit": "' or 1"},
                    }
                    self.note("function", self.http.post(f"{API}/{route}", json=body), (route, number, data))

    def routes(self) -> None:
        root = Path(__file__).resolve().parent.parent
        for path in PATHS:
            name = path.format(uploads=self.uploads, root=root)
            for route in (f"{API}/file={name}", f"{API}/file/{name}", f"/static/{name}", f"/assets/{name}"):
                self.note("path", self.http.get(route), route)
        for route in ROUTES:
            for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS"):
                for start in (API, "") if method == "GET" and "heartbeat" not in route else (API,):
                    if method == "GET" and "upload_progress" in route:
                        continue  # a stream without an end
                    self.note("route", self.http.request(method, f"{start}{route}"), (method, route))
        for headers in FOREIGN:
            for method, route in (
                ("GET", "/config"),
                ("GET", "/health"),
                ("POST", f"{API}/call/ask"),
                ("POST", f"{API}/upload"),
            ):
                response = self.http.request(method, route, headers=headers)
                self.note("foreign site", response, (headers, route))
                if response.status_code != 403:
                    self.report.wrong.append(f"{headers} got {response.status_code} at {route}")

    def sends(self) -> None:
        """Uploads that are no pictures, no forms, or break off, and bytes that are no HTTP."""
        before, accepted = self.files(), set[Path]()
        for content in no_pictures():
            for name in ("a.png", "../../../tmp/a.html"):
                response = self.upload(content, name)
                self.note("no picture", response, content[:20])
                if response.status_code == 200:  # its head is that of a picture; that it is cut shows when it is read
                    accepted.update(map(Path, response.json()))
        for content in forms():
            for kind in ("multipart/form-data; boundary=x", "multipart/form-data", "text/plain"):
                self.note(
                    "no form",
                    self.http.post(f"{API}/upload", content=content, headers={"Content-Type": kind}),
                    content[:60],
                )
        head = f"POST {API}/upload HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"
        part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + bytes(300_000)
        for size in range(0, 300_000, 10_000):
            self.raw(f"{head}Content-Length: 5000000\r\n\r\n".encode() + part[:size], "cut off")
        for content in RAW:
            self.raw(content, "no HTTP")
        time.sleep(2)  # what breaks off is noticed
        self.stayed += len(self.files() - before - accepted)

    def raw(self, content: bytes, kind: str) -> None:
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as opened:
            try:
                opened.sendall(content)
                if kind == "no HTTP":
                    opened.settimeout(2)
                    opened.recv(1_000)
            except OSError:
                pass
        self.note(kind, None)

    def silent(self, sessions: int) -> tuple[float, float]:
        """Memory in KB of a session whose refusal, and of one whose answer, is never fetched."""
        numbers = {one["api_name"]: one["id"] for one in self.http.get("/config").json()["dependencies"]}
        taken = []
        for name, data, count in (
            ("ask", [], sessions),
            ("ask", [self.picture, "what?", "", "vqa", None, None, None], sessions // 5),
        ):
            before, done = resident(self.process), 0
            while done < count:
                body = {"data": data, "fn_index": numbers[name], "session_hash": f"{name}{len(data)}-{done}"}
                response = self.http.post(f"{API}/queue/join", json=body)
                done += response.status_code != 503
                if response.status_code == 503:
                    time.sleep(0.3)
                else:
                    self.note("never fetched", response, name)
            while self.http.get("/health").json()["waiting"]:
                time.sleep(0.3)
            taken.append((resident(self.process) - before) * 1e3 / count)
        return taken[0], taken[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default="runs/quickstart/opt")
    parser.add_argument("--index", help="gallery to search")
    parser.add_argument("--rounds", type=int, default=1, help="how often; the memory is that of the last half")
    parser.add_argument("--sessions", type=int, default=1000, help="sessions that never fetch a response")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, (Path(temporary) / "log").open("w+") as log:
        os.environ["TMPDIR"] = temporary
        process, address = started(given.checkpoint, log, *(["--index", given.index] if given.index else []))
        start = time.monotonic()
        try:
            attack = Attack(address, process.pid, Path(temporary))
            for part in given.rounds * (attack.values, attack.numbers, attack.routes, attack.sends):
                part()
                took, size = time.monotonic() - start, resident(process.pid)
                print(f"{part.__name__}: {attack.report.kinds.total()} inputs, {took:.0f} s, {size:.0f} MB", flush=True)
            idle, unread = attack.silent(given.sessions)
            again = attack.call("ask", [attack.picture, "what color is it?", "", "vqa", None, None])
        finally:
            process.terminate()
            code = process.wait(120)
        log.seek(0)
        text = log.read()
        tracebacks = text.count("Traceback (most recent call last)")
        raised = Counter(
            line[:200] for line in text.splitlines() if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)
        )
        left = sum(file.is_file() for file in Path(temporary).rglob("qformer-demo-*/**/*"))
    report = attack.report
    print(dict(report.kinds), "in all", report.kinds.total())
    print("statuses", dict(sorted(report.statuses.items())), "tracebacks", tracebacks, dict(raised))
    print("files of refused uploads", attack.stayed, "files after the end", left, "exit code", code)
    ends = report.memory[len(report.memory) // 2], report.memory[-1]
    slope = (ends[1][1] - ends[0][1]) / (ends[1][0] - ends[0][0]) * 1e3
    print(f"memory, MB: {report.memory[0][1]:.0f} at first, {ends[1][1]:.0f} at last, {slope:+.1f} per 1,000 inputs")
    print(f"memory of a session that never fetches: {idle:+.0f} KB with a refusal, {unread:+.0f} KB with an answer")
    same = again.text == attack.first.text
    print("first answer again:", same, *report.wrong[:20], sep="\n")
    sys.exit(0 if same and not (report.wrong or tracebacks or attack.stayed or left or code) else 1)


if __name__ == "__main__":
    main()
