"""What a page on the network meets: each is refused with a sentence, and the page goes on."""

from __future__ import annotations

import base64
import io
import struct
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
import pytest
from PIL import Image

from qformer.demo import app, backend, server
from tests.demo.visitor import API, META, Visitor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qformer.model.vision_language import VisionLanguageModel

ASK = "what color is the star?"


@pytest.fixture(scope="module", autouse=True)
def still_right(served: str, picture: Path, model: VisionLanguageModel) -> Iterator[None]:
    """After all of them the page answers as the model does when it is asked alone."""
    yield
    visitor = Visitor(served)
    right = backend.answer_to(model, str(picture), ASK)
    assert visitor.outcome([visitor.picture(picture), ASK, ""]) == ("complete", right)


@pytest.fixture(autouse=True)
def still_there(visitor: Visitor) -> Iterator[None]:
    """After each of them nothing is left in the model or in front of it."""
    yield
    assert visitor.health() == {"status": "ok", "running": 0, "waiting": 0, "model": "test"}


@pytest.fixture
def shown(visitor: Visitor, picture: Path) -> dict[str, Any]:
    return visitor.picture(picture)


@pytest.fixture
def elsewhere() -> Iterator[tuple[str, list[str]]]:
    """A server that counts who fetches from it."""
    fetched: list[str] = []

    class Count(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            fetched.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Count)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}", fetched
    made.shutdown()
    made.server_close()


def png(width: int, height: int, rows: bytes = b"") -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def of_kind(kind: str, **options: Any) -> bytes:
    written = io.BytesIO()
    Image.new("RGB", (20, 20), "red").save(written, kind, **options)
    return written.getvalue()


def sound() -> bytes:
    return of_kind("PNG")


def claiming(width: int, height: int) -> bytes:
    """A JPEG whose head lies about its size."""
    data = of_kind("JPEG")
    place = data.index(b"\xff\xc0") + 5
    return data[:place] + struct.pack(">HH", height, width) + data[place + 4 :]


UPLOADS = {
    "a bomb that decodes to 100 million pixels": ("a.png", png(10_000, 10_000, bytes(10_001 * 10_000)), "50 million"),
    "a bomb that only claims its size": ("a.png", png(2**31 - 1, 2**31 - 1), "50 million"),
    "a line of a million pixels": ("a.png", png(1_000_000, 1), "crop it"),
    "fifty megabytes": ("a.png", bytes(50_000_000), "the limit is 20"),
    "HTML with the name of a picture": ("a.png", b"<html><script>alert(1)</script></html>", "cannot be read"),
    "SVG with a script": ("a.svg", b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>', "cannot be read"),
    "SVG with the name of a picture": ("a.png", b'<?xml version="1.0"?><svg onload="alert(1)"/>', "cannot be read"),
    "a shell script": ("a.jpg", b"#!/bin/sh\nrm -rf /\n", "cannot be read"),
    "PostScript, which PIL would hand to a program": ("a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n", "cannot be read"),
    "BMP, of which Pillow before 13 has a bomb": ("a.png", of_kind("BMP"), "give JPEG, PNG, WebP or GIF"),
    "TIFF": ("a.tif", of_kind("TIFF"), "give JPEG, PNG, WebP or GIF"),
    "JPEG inside TIFF": ("a.jpg", of_kind("TIFF", compression="jpeg"), "give JPEG, PNG, WebP or GIF"),
    "AVIF": ("a.avif", of_kind("AVIF"), "give JPEG, PNG, WebP or GIF"),
    "JPEG 2000": ("a.jp2", of_kind("JPEG2000"), "give JPEG, PNG, WebP or GIF"),
    "a JPEG that claims 4,000 million pixels": ("a.jpg", claiming(64_000, 64_000), "50 million"),
    "nothing": ("a.png", b"", "cannot be read"),
    "a pickle": ("a.png", b"cos\nsystem\n(S'true'\ntR.", "cannot be read"),
    "a name that climbs, and no picture": ("../../../../tmp/evil.png", b"evil", "cannot be read"),
}


@pytest.mark.parametrize("case", UPLOADS)
def test_uploads(visitor: Visitor, case: str) -> None:
    name, content, said = UPLOADS[case]
    response = visitor.upload(content, name)
    assert response.status_code in (400, 413)
    assert said in response.text
    assert len(response.text) < 300


def test_what_is_refused_is_not_kept(visitor: Visitor) -> None:
    with server.workplace() as folder, gr.Blocks() as page:
        _, url, _ = server.launch(page, folder=folder, gate=server.Gate(), block=False)
        other = Visitor(url)
        for name, content, _ in UPLOADS.values():
            other.upload(content[:1_000_000], name)
        assert list((folder / server.UPLOADS).rglob("*")) == []
        page.close()


def test_no_jpeg_of_a_visitor_reaches_pillow(visitor: Visitor, by_pillow: list[str]) -> None:
    for content in (of_kind("JPEG"), of_kind("JPEG", progressive=True)):
        path = visitor.upload(content, "photo.jpg").json()[0]
        for name, rest in (("ask", [ASK, ""]), ("caption", [2, "", 0.9, 1]), ("suggest", [""])):
            assert visitor.outcome([{"path": path, "meta": META}, *rest], name)[0] == "complete"
    assert by_pillow == []


def test_gradio_reads_no_picture_before_we_do(model: VisionLanguageModel) -> None:
    """Its image component would decode what was sent; our functions take the file unread."""
    page = app.build(backend.Models("test", model), server.Gate(), [])
    given = [
        each
        for each in page.fns.values()
        if any(isinstance(part, gr.Image | gr.Gallery | gr.File) for part in each.inputs)
    ]
    assert len(given) > 8
    assert not [each.name for each in given if each.preprocess]


def test_a_picture_named_like_a_page_is_a_picture(visitor: Visitor) -> None:
    """The content counts; and whatever is in it besides, a browser takes it for no page of ours."""
    content = sound() + b"<script>alert(1)</script>"
    path = visitor.upload(content, "../evil.html").json()[0]
    assert path.endswith("/evil.html")
    assert "/uploads/" in path
    assert visitor.outcome([{"path": path, "meta": META}, ASK, ""])[0] == "complete"
    served = visitor.http.get(f"{API}/file={path}")
    assert served.headers["content-disposition"].startswith("attachment")
    assert served.headers["content-type"] == "application/octet-stream"
    assert served.headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in served.headers["content-security-policy"]


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "//etc/passwd",
        "../../../../../../etc/passwd",
        "..%2f..%2f..%2f..%2fetc%2fpasswd",
        "{uploads}/../../../etc/passwd",
        "{uploads}/..%2f..%2f..%2fetc/passwd",
        "{uploads}",
        "{uploads}/nothing.png",
        "{uploads}/a%00.png",
        "{root}/pyproject.toml",
        "{root}/.git/config",
        "/proc/self/environ",
        "file:///etc/passwd",
    ],
)
def test_files_that_are_not_the_pages_own(visitor: Visitor, shown: dict[str, Any], path: str) -> None:
    uploads = Path(shown["path"]).parent.parent
    root = Path(__file__).parent.parent.parent
    asked = path.format(uploads=uploads, root=root)
    response = visitor.http.get(f"{API}/file={asked}")
    climbed = asked.startswith("../")  # out of the route, which the client does by itself
    assert response.status_code == (404 if climbed else 403)
    assert climbed or "upload the picture itself" in response.json()["detail"]
    status, said = visitor.outcome([{"path": asked, "meta": META}, ASK, ""])
    assert status in ("400", "403")
    assert "upload the picture itself" in said or "control character" in said


def test_addresses_are_never_fetched(visitor: Visitor, shown: dict[str, Any], elsewhere: tuple[str, list[str]]) -> None:
    address, fetched = elsewhere
    url = f"{address}/a.png"
    inline = "data:image/png;base64," + base64.b64encode(sound()).decode()
    for reference in (
        {"path": url, "meta": META},
        {"path": url, "url": url, "meta": META},
        {"path": url},
        {"path": None, "url": url, "meta": META},
        {"url": url, "meta": META},
        {**shown, "url": url},
        {**shown, "url": f"{url}?{API}/file="},
        {**shown, "url": inline},
        {"path": url.upper(), "meta": META},
        {"path": f"//{address[7:]}/a.png", "meta": META},
        {"path": "ftp://127.0.0.1/a.png", "meta": META},
    ):
        status, said = visitor.outcome([reference, ASK, ""])
        assert status in ("400", "403"), reference
        assert "upload" in said
    for route in (f"{API}/file={url}", f"{API}/proxy={url}", f"{API}/file/{url}", f"/proxy={url}"):
        assert visitor.http.get(route).status_code in (403, 404)
    assert fetched == []


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (["{shown}", "x" * 2_001, ""], "the question has 2,001 characters; the limit is 2,000"),
        (["{shown}", ASK, "x " * 10_001], "the context has 20,002 characters; the limit is 20,000"),
        (["{shown}", "what\0?", ""], r"control character (U+0000, at position 5)"),
        (["{shown}", "what\x1b[2J?", ""], "control character (U+001B"),
        (["{shown}", "\ud83d?", ""], "control character (U+D83D"),
        (["{shown}", ["what?"], ""], "'Question' must be text, but got a list"),
        (["{shown}", {"text": "what?"}, ""], "'Question' must be text, but got an object"),
        (["{shown}", 7, ""], "'Question' must be text, but got a number"),
        (["{shown}", True, ""], "'Question' must be text, but got true or false"),
        ([7, ASK, ""], "'Picture' must be a picture that was uploaded, but got a number"),
        (["/etc/passwd", ASK, ""], "'Picture' must be a picture that was uploaded, but got text"),
        ([[], ASK, ""], "'Picture' must be a picture that was uploaded, but got a list"),
        ([{}, ASK, ""], "a picture must be an object with the 'path'"),
        ([{"url": None}, ASK, ""], "a picture must be an object with the 'path'"),
        ([{"path": 7, "meta": META}, ASK, ""], "a picture must be an object with the 'path'"),
        ([{"path": "{path}"}, ASK, ""], 'a picture needs "meta"'),
        ([{"path": "{path}", "meta": 7}, ASK, ""], 'a picture needs "meta"'),
        ([{"path": "{path}", "meta": META, "orig_name": [7]}, ASK, ""], "the 'orig_name' of a picture must be text"),
        ([None, ASK, ""], "there is no picture yet"),
        (["{shown}", ASK, "", "sing", None, None], "the task is 'sing'; give one of vqa"),
        (["{shown}", ASK, "", ["vqa"], None, None], "'Task' must be text, but got a list"),
        (["{shown}", ASK, "", "vqa", "what? a star", None], "the history is not a list of [question, answer] pairs"),
        (["{shown}", ASK, "", "vqa", [["what?", 7]], None], "the answer of the history must be text"),
        (["{shown}", ASK, "", "vqa", [{"path": "/etc/passwd", "meta": META}], None], "does not belong to the page"),
        (["{shown}", ASK, "", "vqa", None, {"beams": 10**30}], "beams must be a whole number from 1 to 10"),
        (["{shown}", ASK, "", "vqa", None, {"temperature": "nan"}], "temperature must be a number"),
        (["{shown}", ASK, "", "vqa", None, {"method": ["beams"]}], "decoding.method is"),
        (["{shown}", ASK, "", "vqa", None, {"min_new_tokens": 99, "max_new_tokens": 3}], "min_new_tokens"),
        (["{shown}", ASK, "", "vqa", None, [1]], "decoding is a list"),
        ([], "'data' must be a list of 7 values (Picture, Question, Context, Task, history, decoding, more)"),
        (["{shown}", ASK, "", "", ""], "'data' must be a list of 7 values"),
        ({"picture": None}, "'data' must be a list of 7 values"),
        (None, "'data' must be a list of 7 values"),
        ("abc", "'data' must be a list of 7 values"),
    ],
    ids=lambda value: "" if isinstance(value, str) else repr(value)[:40],
)
def test_values_of_the_wrong_kind(visitor: Visitor, shown: dict[str, Any], data: Any, said: str) -> None:
    def fill(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: fill(value) for key, value in part.items()}
        if isinstance(part, list):
            return [fill(value) for value in part]
        return {"{shown}": shown, "{path}": shown["path"]}.get(part, part) if isinstance(part, str) else part

    status, sentence = visitor.outcome(fill(data))
    assert status in ("400", "403", "error")
    assert said in sentence


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b'{"data": [null, NaN, ""]}', 400, "NaN is not a number that can be used"),
        (b'{"data": [null, Infinity, ""]}', 400, "Infinity is not a number that can be used"),
        (b'{"data": [null, 1e999, ""]}', 400, "1e999 is not a number that can be used"),
        (b'{"data": [null, ' + b"9" * 10_000 + b', ""]}', 400, "not valid JSON"),
        (b'{"data": ' + b"[" * 400_000 + b"]" * 400_000 + b"}", 400, "nested too deeply"),
        (b'{"data": ' + b'{"a":' * 1_000 + b"1" + b"}" * 1_000 + b"}", 400, "nested too deeply"),
        (b'{"data": ["' + b"x" * 2_000_000 + b'"]}', 413, "more than 1 MB"),
        (b'{"data": [', 400, "not valid JSON"),
        (b"\xff\xfe\x00", 400, "not valid JSON"),
        (b"", 400, "not valid JSON"),
        (b"[]", 400, "must be a JSON object"),
        (b"7", 400, "must be a JSON object"),
    ],
    ids=range(12),
)
def test_bodies(visitor: Visitor, body: bytes, status: int, said: str) -> None:
    for route in ("call/ask", "queue/join", "cancel"):
        response = visitor.http.post(f"{API}/{route}", content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == status
        assert said in response.json()["detail"]


def test_what_is_said_of_a_picture_besides_does_not_count(
    visitor: Visitor, shown: dict[str, Any], model: VisionLanguageModel, picture: Path
) -> None:
    lies = {"size": "big", "is_stream": True, "mime_type": ["text/html"], "url": f"http://x{API}/file={shown['path']}"}
    assert visitor.outcome([shown | lies, ASK, ""])[1] == backend.answer_to(model, str(picture), ASK)


def test_functions_and_sessions_that_do_not_exist(visitor: Visitor, shown: dict[str, Any]) -> None:
    data = [shown, ASK, ""]
    for number in (999, -1, None, "0", 1.5, [0], 10**30):
        response = visitor.http.post(f"{API}/queue/join", json={"data": data, "fn_index": number, "session_hash": "a"})
        assert response.status_code == 404
        assert "does not exist; there are ask" in response.json()["detail"]
    assert "does not exist" in visitor.post(data, "nothing").json()["detail"]
    assert "does not exist" in visitor.post(data, "__init__").json()["detail"]
    for session in (None, 7, ["a"]):
        response = visitor.http.post(f"{API}/queue/join", json={"data": data, "fn_index": 0, "session_hash": session})
        assert response.status_code == 400
        assert "must name its session" in response.json()["detail"]
    assert visitor.post(data, session_hash=7).status_code in (400, 422)
    for route in ("queue/data?session_hash=someone", "queue/data", "call/ask/0123456789abcdef"):
        response = visitor.http.get(f"{API}/{route}")
        assert response.status_code == 404
        assert "no request of this session is waiting" in response.json()["detail"]
    cancel = {"session_hash": "someone", "fn_index": 0, "event_id": "0123456789abcdef"}
    assert visitor.http.post(f"{API}/cancel", json=cancel).status_code == 200
    assert visitor.http.post(f"{API}/cancel", json={"session_hash": 7}).status_code == 422


def test_nobody_hears_or_ends_what_another_asked(visitor: Visitor, shown: dict[str, Any], served: str) -> None:
    event = visitor.post([shown, ASK, ""]).json()["event_id"]
    stranger = Visitor(served)
    stranger.http.post(f"{API}/cancel", json={"session_hash": "stranger", "fn_index": 0, "event_id": "0" * 32})
    assert stranger.http.get(f"{API}/queue/data", params={"session_hash": "stranger"}).status_code == 404
    assert list(visitor.events(event))[-1][0] == "complete"


@pytest.mark.parametrize(
    ("method", "route"),
    [
        ("GET", "/gradio_api/monitoring"),
        ("GET", "/monitoring"),
        ("GET", "/gradio_api/deep_link?session_hash=a"),
        ("GET", "/gradio_api/vibe-code/"),
        ("POST", "/gradio_api/vibe-edit/"),
        ("POST", "/gradio_api/process_recording"),
        ("POST", "/gradio_api/component_server"),
        ("GET", "/gradio_api/run-history/buckets"),
        ("POST", "/gradio_api/run/ask"),
        ("POST", "/gradio_api/api/ask"),
        ("POST", "/gradio_api/call/v2/ask"),
        ("POST", "/gradio_api/stream/a"),
        ("GET", "/gradio_api/dev/reload"),
        ("GET", "/gradio_api/custom_component/a/b/c/d"),
        ("GET", "/docs"),
        ("GET", "/static/../../../../etc/passwd"),
        ("GET", "/assets/..%2f..%2f..%2f..%2fetc/passwd"),
        ("DELETE", "/gradio_api/upload"),
        ("PUT", "/gradio_api/queue/join"),
        ("TRACE", "/"),
    ],
)
def test_what_this_page_does_not_offer(visitor: Visitor, method: str, route: str) -> None:
    response = visitor.http.request(method, route, json={"data": []} if method == "POST" else None)
    assert response.status_code in (403, 404)
    assert "Traceback" not in response.text
    assert "root:" not in response.text


def test_uploads_that_are_none(visitor: Visitor) -> None:
    bodies = (
        ({"Content-Type": "text/plain"}, b"abc"),
        ({"Content-Type": "multipart/form-data"}, b"abc"),
        ({"Content-Type": "multipart/form-data; boundary=x"}, b"abc"),
        (
            {"Content-Type": "multipart/form-data; boundary=x"},
            b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--",
        ),
        ({"Content-Type": "multipart/form-data; boundary=x"}, b"--x\r\nA: " + b"b" * 100_000),
    )
    for headers, body in bodies:
        response = visitor.http.post(f"{API}/upload", content=body, headers=headers)
        assert response.status_code in (400, 413), response.text
    streamed = visitor.http.post(
        f"{API}/upload", content=iter([b"abc"]), headers={"Content-Type": "multipart/form-data; boundary=x"}
    )
    assert streamed.status_code == 411
    deep = visitor.http.get("/", params={"deep_link": "../../etc"})
    assert deep.status_code == 400
    assert "does not support links" in deep.json()["detail"]


SLIDES = [
    (11, "'Beams' must be a number from 1 to 10, but got 11"),
    (0, "'Beams' must be a number from 1 to 10, but got 0"),
    (10**30, "'Beams' must be a number from 1 to 10"),
    ("5", "'Beams' must be a number, but got text"),
    (True, "'Beams' must be a number, but got true or false"),
    ([5], "'Beams' must be a number, but got a list"),
]


def test_sliders_and_choices() -> None:
    def refuse(beams: float) -> str:
        raise gr.Error(f"{beams:g} is not today's number")

    with server.workplace() as folder:
        with gr.Blocks() as page:
            beams = gr.Slider(1, 10, value=5, label="Beams")
            preset = gr.Dropdown(["plain", "long"], label="Preset")
            out = gr.Textbox()
            gr.Button().click(lambda beams, preset: f"{beams:g} {preset}", [beams, preset], out, api_name="ask")
            gr.Button().click(refuse, beams, out, queue=False)
        _, url, _ = server.launch(page, folder=folder, gate=server.Gate(), block=False)
        other = Visitor(url)
        for value, said in SLIDES:
            status, sentence = other.outcome([value, "long"])
            assert status == "400"
            assert said in sentence
        assert other.outcome([5, "short"]) == ("400", "'Preset' must be one of plain, long")
        assert "NaN is not a number" in other.post([float("nan"), "long"]).json()["detail"]
        assert other.outcome([5, "long"]) == ("complete", "5 long")
        body = {"session_hash": "a", "fn_index": 1}
        at_once = other.http.post(f"{API}/run/predict", json=body | {"data": [5]})
        assert (at_once.status_code, at_once.json()["error"]) == (400, "5 is not today's number")
        assert other.http.post(f"{API}/run/predict", json=body | {"data": [11]}).status_code == 400
        assert (
            other.http.post(f"{API}/run/predict", json=body | {"data": [5, "long"], "fn_index": 0}).status_code == 404
        )
        page.close()


def test_only_those_who_are_let_in(model: VisionLanguageModel, picture: Path, visitor: Visitor) -> None:
    gate = server.Gate()
    with server.workplace() as folder:
        page = app.build(backend.Models("test", model), gate, [])
        _, url, _ = server.launch(page, folder=folder, gate=gate, auth=("ann", "secret"), block=False)
        other = Visitor(url)
        assert other.upload(picture).status_code == 401
        assert other.post([None, ASK, ""]).status_code == 401
        assert other.http.post("/login", data={"username": "ann", "password": "wrong"}).status_code == 400
        assert other.http.post("/login", data={"username": "ann", "password": "secret"}).status_code == 200
        assert other.outcome([other.picture(picture), ASK, ""])[0] == "complete"
        assert other.health()["status"] == "ok"
        page.close()
