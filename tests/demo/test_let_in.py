"""A page that is served to others: its names, a proxy with a sub-path, its password, and uploads that go wrong."""

from __future__ import annotations

import errno
import io
import socket
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import gradio as gr
import httpx
import pytest
from gradio_client import Client, handle_file
from PIL import Image

from qformer.cli import page as page_command
from qformer.demo import exchange, limits, password, server
from qformer.demo.hosts import Hosts
from qformer.types import UsageError
from tests.demo.visitor import API, META, Visitor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NAMES = ("hidden_name", "gradio_api_info", "a title")


def png() -> bytes:
    written = io.BytesIO()
    Image.new("RGB", (20, 20), "red").save(written, "PNG")
    return written.getvalue()


@contextmanager
def serve(**options: Any) -> Iterator[tuple[str, Path]]:
    """A page of one function, which gives a picture back: its address, and where its uploads are."""
    with server.workplace() as folder:
        with gr.Blocks(title="a title", analytics_enabled=False) as page:
            given, back = gr.Image(type="filepath", image_mode=None), gr.Image(type="filepath")
            gr.Button().click(lambda file: file, given, back, api_name="hidden_name")
        gate = server.Gate()
        gate.name = "a model"
        _, url, _ = server.launch(page, folder=folder, gate=gate, block=False, **options)
        yield url.rstrip("/"), folder / server.UPLOADS
        server.close(page, gate)


@pytest.fixture(scope="module")
def proxied() -> Iterator[tuple[str, Path]]:
    """As a proxy at https://demo.example.org/demo/ would have it."""
    with serve(hosts=Hosts(["demo.example.org"], "/demo")) as served:
        yield served


@pytest.fixture(scope="module")
def locked() -> Iterator[tuple[str, Path]]:
    with serve(auth=("ann", "s\xe9cret:1")) as served:
        yield served


@pytest.fixture
def unslowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries of the tests before do not count."""
    monkeypatch.setattr(password, "EACH", (10_000, 0.001))
    monkeypatch.setattr(password, "ALL", (10_000, 0.001))


def files(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]


def until(holds: Callable[[], Any], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def test_other_names_and_other_sites_get_nothing(proxied: tuple[str, Path]) -> None:
    url, uploads = proxied
    visitor = Visitor(url)
    for headers in (
        {"Host": "evil.example"},
        {"Host": "evil.example", "X-Forwarded-Host": "demo.example.org"},
        {"X-Forwarded-Host": "evil.example"},
        {"Origin": "http://evil.example"},
        {"Origin": "http://203.0.113.9"},
        {"Origin": "null"},
        {"Host": "demo.example.org", "Origin": "https://evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
    ):
        visitor.http.headers = httpx.Headers(headers)
        assert visitor.upload(png()).status_code == 403
        assert visitor.post([None], "hidden_name").status_code == 403
        assert visitor.http.post(f"{API}/cancel", json={}).status_code == 403
        for path in ("/health", "/config", f"{API}/info", "/logout"):
            answer = visitor.http.get(path)
            assert (answer.status_code, set(answer.json())) == (403, {"detail"})
        by_link = "Sec-Fetch-Site" in headers
        assert visitor.http.get("/").status_code == (200 if by_link else 403)
        preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
        asked = visitor.http.options(f"{API}/call/hidden_name", headers=preflight)
        assert "hidden_name" not in asked.text
    assert files(uploads) == []


def test_a_request_that_names_no_host_or_wants_a_websocket(proxied: tuple[str, Path]) -> None:
    port = int(httpx.URL(proxied[0]).port or 0)
    for request, status in (
        (b"GET /health HTTP/1.0\r\n\r\n", b" 403 "),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n", b" 400 "),
        (b"GET /health HTTP/1.1\r\nHost: user@localhost\r\nConnection: close\r\n\r\n", b" 403 "),
        (
            b"GET /ws HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n",
            b" 40",
        ),
    ):
        with socket.create_connection(("127.0.0.1", port), timeout=20) as opened:
            opened.sendall(request)
            assert status in opened.recv(1_000).splitlines()[0]


@pytest.mark.parametrize(
    ("prefix", "headers", "root"),
    [
        ("", {}, "{url}/demo"),
        ("/demo", {}, "{url}/demo"),
        ("", {"X-Forwarded-Host": "demo.example.org", "X-Forwarded-Proto": "https"}, "https://demo.example.org/demo"),
        ("/demo", {"Host": "demo.example.org", "X-Forwarded-Proto": "https"}, "https://demo.example.org/demo"),
        ("/demo", {"Origin": "https://demo.example.org:8443"}, "https://demo.example.org:8443/demo"),
        ("", {"X-Gradio-Server": "http://evil.example"}, "{url}/demo"),
    ],
)
def test_a_proxy_with_a_sub_path(proxied: tuple[str, Path], prefix: str, headers: dict[str, str], root: str) -> None:
    """Whether it strips the path or not, and whatever it says of itself: files are where the visitor sees the page."""
    url = proxied[0]
    visitor = Visitor(url + prefix)
    visitor.http.headers = httpx.Headers(headers)
    root = root.format(url=url)
    assert visitor.http.get("/config").json()["root"] == root
    assert f'"root":"{root}"' in visitor.http.get("/").text
    assert visitor.health()["status"] == "ok"
    picture = {"path": visitor.upload(png()).json()[0], "meta": META}
    kind, value = visitor.outcome([picture], "hidden_name")
    assert kind == "complete"
    assert value["url"] == f"{root}{API}/file={value['path']}"
    assert visitor.http.get(f"{API}/file={value['path']}").status_code == 200
    if prefix:
        moved = httpx.get(url + prefix, headers=headers, trust_env=False)
        assert (moved.status_code, moved.headers["location"]) == (307, "/demo/")


def test_nothing_is_answered_without_the_password(locked: tuple[str, Path]) -> None:
    visitor = Visitor(locked[0])
    assert visitor.health() == {"status": "ok"}
    for path in ("/", "/?deep_link=a", "/health"):
        answer = visitor.http.get(path)
        assert answer.status_code == 200
        assert not [name for name in NAMES if name in answer.text]
    for method, path in (
        ("GET", "/config"),
        ("GET", f"{API}/info"),
        ("GET", f"{API}/openapi.json"),
        ("GET", f"{API}/queue/status"),
        ("GET", f"{API}/startup-events"),
        ("GET", f"{API}/app_id"),
        ("GET", f"{API}/heartbeat/a"),
        ("GET", f"{API}/file=/etc/passwd"),
        ("GET", "/theme.css"),
        ("GET", "/nothing"),
        ("GET", "/logout"),
        ("POST", "/"),
        ("POST", f"{API}/upload"),
        ("POST", f"{API}/cancel"),
        ("POST", f"{API}/reset"),
        ("POST", f"{API}/queue/join"),
        ("POST", f"{API}/run/predict"),
        ("POST", f"{API}/call/hidden_name"),
        ("POST", f"{API}/call/nothing"),
        ("PUT", "/health"),
    ):
        for cookies in ({}, {"Cookie": f"access-token-unsecure=x; {password.DEVICE}=a.b"}):
            answer = visitor.http.request(method, path, json={"data": []}, headers=cookies)
            assert answer.status_code == 401, path
            assert "log in first" in answer.text


def test_the_password_opens_all_and_log_out_closes_it(locked: tuple[str, Path], unslowed: None, tmp_path: Path) -> None:
    visitor = Visitor(locked[0])
    for user, word in (("ann", "secret"), ("bob", "s\xe9cret:1"), ("ann", "")):
        assert visitor.http.post("/login", data={"username": user, "password": word}).status_code in (400, 422)
    assert visitor.http.post("/login", content=b"x" * 20_000).status_code == 413
    assert visitor.health() == {"status": "ok"}
    assert visitor.http.post("/login", data={"username": "ann", "password": "s\xe9cret:1"}).status_code == 200
    assert visitor.health()["model"] == "a model"
    assert "hidden_name" in visitor.http.get("/").text
    (tmp_path / "a.png").write_bytes(png())
    assert visitor.outcome([visitor.picture(tmp_path / "a.png")], "hidden_name")[0] == "complete"
    client = Client(locked[0], auth=("ann", "s\xe9cret:1"), verbose=False)
    assert Path(client.predict(handle_file(tmp_path / "a.png"), api_name="/hidden_name")).is_file()
    assert visitor.http.get("/logout").status_code == 302
    assert visitor.health() == {"status": "ok"}


def test_wrong_passwords_are_slowed_for_who_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(password, "EACH", (3, 60.0))
    monkeypatch.setattr(password, "ALL", (8, 60.0))
    with serve(auth=("ann", "secret")) as (url, _):
        wrong, right = ({"username": "ann", "password": word} for word in ("wrong", "secret"))
        http = Visitor(url).http

        def log_in(data: dict[str, str], address: str, cookie: str = "") -> httpx.Response:
            http.cookies.clear()
            return http.post("/login", data=data, headers={"X-Forwarded-For": address, "Cookie": cookie})

        known = f"{password.DEVICE}={log_in(right, '192.0.2.1').cookies[password.DEVICE]}"
        assert [log_in(wrong, "192.0.2.1").status_code for _ in range(5)] == [400, 400, 400, 429, 429]
        refused = log_in(right, "192.0.2.1")
        assert refused.status_code == 429
        assert "too many wrong passwords; try again in" in refused.json()["detail"]
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert log_in(right, "192.0.2.2").status_code == 200  # others are not
        statuses = [log_in(wrong, f"198.51.100.{number}").status_code for number in range(8)]
        assert statuses == [400] * 5 + [429] * 3  # guessing from everywhere is
        assert log_in(right, "192.0.2.3").status_code == 429
        assert log_in(right, "192.0.2.3", known).status_code == 200  # a browser that has been in is not


def form(*parts: bytes, end: bytes = b"--x--\r\n") -> bytes:
    return b"".join(b"--x\r\nContent-Disposition: form-data; " + part + b"\r\n" for part in parts) + end


WHOLE = b'name="files"; filename="a.png"\r\n\r\n' + png()
FORMS = {
    "a field without a file name": (form(b'name="files"\r\n\r\nabc'), "fields named 'files', each with a file name"),
    "after one that is sound": (form(WHOLE, b'name="files"\r\n\r\nabc'), "fields named 'files', each with a file name"),
    "a field of another name": (form(b'name="other"; filename="a.png"\r\n\r\nabc'), "fields named 'files'"),
    "a field without a name": (form(b'filename="a.png"\r\n\r\nabc'), "fields named 'files'"),
    "no end": (form(WHOLE, end=b""), "is incomplete"),
    "no end of a header": (b'--x\r\nContent-Disposition: form-data; name="files"; file', "is incomplete"),
    "nothing": (b"", "is incomplete"),
    "no form": (b"abc", "not a form of files"),
    "a long header": (form(b'name="files"; filename="' + b"a" * 9_000 + b'"\r\n\r\nabc'), "header"),
    "a name that is a folder": (form(b'name="files"; filename=".."\r\n\r\nabc'), "'..' is not the name of a file"),
    "a name that is none": (form(b'name="files"; filename="???"\r\n\r\nabc'), "'???' is not the name of a file"),
    "a picture and none": (form(b'name="files"; filename="b.png"\r\n\r\nabc'), "cannot be read as a picture"),
}


@pytest.mark.parametrize("case", FORMS)
def test_uploads_that_are_no_forms_of_files(
    proxied: tuple[str, Path], case: str, caplog: pytest.LogCaptureFixture
) -> None:
    content, said = FORMS[case]
    url, uploads = proxied
    before = files(uploads)
    for query in ("", "?upload_id=abc"):  # with one Gradio counts what comes in
        answer = httpx.post(
            f"{url}{API}/upload{query}",
            content=content,
            headers={"Content-Type": "multipart/form-data; boundary=x"},
            trust_env=False,
        )
        assert (answer.status_code, said in answer.text) == (400, True), answer.text
        assert files(uploads) == before
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


@pytest.mark.parametrize(
    "kind",
    [
        f"multipart/form-data; boundary={'x' * 300}",
        "multipart/form-data",
        "multipart/mixed; boundary=x",
        "text/plain",
        "",
    ],
)
def test_uploads_that_are_no_forms(proxied: tuple[str, Path], kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Not even a boundary that is too long for a form's parser is a fault of ours, nor one said in its words."""
    answer = httpx.post(
        f"{proxied[0]}{API}/upload", content=form(WHOLE), headers={"Content-Type": kind}, trust_env=False
    )
    assert (answer.status_code, "not a form of files (multipart/form-data" in answer.text) == (400, True), answer.text
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_a_request_that_does_not_say_that_it_is_json(proxied: tuple[str, Path]) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = httpx.post(
            f"{proxied[0]}{API}/queue/join", content=b'{"data": []}', headers={"Content-Type": kind}, trust_env=False
        )
        assert (answer.status_code, "must be JSON" in answer.text) == (415, True)


@pytest.mark.parametrize("sent", [60, 200, 500_000])
def test_an_upload_that_breaks_off_leaves_nothing(
    proxied: tuple[str, Path], sent: int, caplog: pytest.LogCaptureFixture
) -> None:
    url, uploads = proxied
    before = files(uploads)
    head = f"POST {API}/upload HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    body = form(b'name="files"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n' + bytes(1_000_000))
    with socket.create_connection(("127.0.0.1", int(httpx.URL(url).port or 0))) as opened:
        opened.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[:sent])
        if sent > 1_000:
            until(lambda: files(uploads) != before)  # it is being written
        else:
            time.sleep(0.2)
    until(lambda: files(uploads) == before, 10)
    assert Visitor(url).health()["status"] == "ok"
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_what_a_killed_page_left_goes_at_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel takes the lock from a process that is killed; until then its folder stays, and so do all others."""
    (tmp_path / "other" / "qformer-demo-full").mkdir(parents=True)  # Python would not take a folder of a full disk
    (tmp_path / "other" / "qformer-demo-full" / server.LOCK).touch()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "other"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    left, foreign, linked = (tmp_path / f"qformer-demo-{name}" for name in ("left", "foreign", "linked"))
    (left / "uploads" / "a").mkdir(parents=True)
    (left / "uploads" / "a" / "a.png").touch()
    (left / server.LOCK).touch()
    foreign.mkdir()  # no lock of ours
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / server.LOCK).touch()
    linked.symlink_to(tmp_path / "elsewhere")
    with server.workplace() as first:
        assert not left.exists()
        (tmp_path / "other").rmdir()
        with server.workplace() as second:
            assert (first / server.UPLOADS).is_dir()
            assert (second / server.UPLOADS).is_dir()
    assert sorted(tmp_path.iterdir()) == [tmp_path / "elsewhere", foreign, linked]
    assert (tmp_path / "elsewhere" / server.LOCK).is_file()


def test_a_page_on_other_addresses(tmp_path: Path) -> None:
    with serve(hosts=Hosts(bind="0.0.0.0")) as (url, _):
        assert url.startswith("http://localhost:")
        assert Visitor(url.replace("localhost", "127.0.0.1")).health()["status"] == "ok"
    if socket.has_ipv6:
        with serve(hosts=Hosts(bind="::1")) as (url, _):
            assert url.startswith("http://[::1]:")
            assert Visitor(url).health()["status"] == "ok"
    with pytest.raises(UsageError, match=r"--host '192\.0\.2\.1' is not an address of this machine"):
        server.check_bind(Hosts(bind="192.0.2.1"))
    server.check_bind(Hosts(bind="::"))


def test_a_port_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before a model is loaded, and not in the words of Gradio."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = f"port {port} of 127.0.0.1 is taken; give another --port"
        with pytest.raises(UsageError, match=said):
            server.check_bind(Hosts(), port)
        with pytest.raises(UsageError, match=said), serve(port=port):
            pass
        monkeypatch.setattr("gradio.http_server.INITIAL_PORT_VALUE", port)
        monkeypatch.setattr("gradio.http_server.TRY_NUM_PORTS", 1)
        with pytest.raises(UsageError, match="no port from 7860 to 7959 is free"), serve():
            pass
    server.check_bind(Hosts(), port)


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """At the start a sentence; later one upload fails, without a traceback, and the page goes on."""
    full = OSError(errno.ENOSPC, "No space left on device")
    with (
        pytest.raises(UsageError, match=r"no room for the page's files in .* \(No space left .*set TMPDIR"),
        server.workplace(),
    ):
        raise full
    with serve() as (url, _):
        monkeypatch.setattr(limits, "check_file", lambda file: (_ for _ in ()).throw(full))
        answer = Visitor(url).upload(png())
        assert (answer.status_code, answer.text) == (507, limits.NO_ROOM)
        monkeypatch.undo()
        monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=100))
        assert Visitor(url).upload(png()).text == limits.NO_ROOM
        monkeypatch.undo()
        assert Visitor(url).upload(png()).status_code == 200
    assert [record.exc_info for record in caplog.records if record.levelname == "ERROR"] == [False]


def test_a_client_that_stalls_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "STALL", 0.2)
    with serve() as (url, uploads):
        for path, kind in (("upload", "multipart/form-data; boundary=x"), ("queue/join", "application/json")):
            with socket.create_connection(("127.0.0.1", int(httpx.URL(url).port or 0)), timeout=20) as opened:
                head = f"POST {API}/{path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: 999"
                opened.sendall(f"{head}\r\n\r\n--x\r\n".encode())
                received = b""
                while part := opened.recv(9_000) if b"again" not in received else b"":
                    received += part
                assert b"nothing came for 0 seconds; send the request again" in received
        assert files(uploads) == []


def test_gradio_shows_no_settings_of_its_own(proxied: tuple[str, Path]) -> None:
    http = Visitor(proxied[0]).http
    assert http.get("/config").json()["footer_links"] == ["api"]
    assert http.get("/monitoring/summary").json() == {"functions": {}}  # asked for by what it shows of its API,
    assert http.get(f"{API}/mcp/schema").status_code == 304  # and in the console of the browser a 404 were an error


def test_the_password_may_come_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(page_command.PASSWORD, raising=False)
    assert page_command._parse_auth("ann:se:cret") == ("ann", "se:cret")
    assert "can be read by everybody on this machine; set QFORMER_PASSWORD instead" in capsys.readouterr().out
    for auth in ("ann", ":secret", "ann:", ""):
        with pytest.raises(UsageError, match=r"give --auth user:password, or --auth user and QFORMER_PASSWORD"):
            page_command._parse_auth(auth)
    monkeypatch.setenv(page_command.PASSWORD, "from outside")
    assert page_command._parse_auth("ann") == ("ann", "from outside")
    assert page_command._parse_auth("ann:secret") == ("ann", "secret")
